"""A Universal Transformer: one block at every layer."""

from __future__ import annotations

import torch

from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.models import TransformerXL, TransformerXLConfig


def config(*, shared: bool, n_experts: int = 6) -> TransformerXLConfig:
    """Three layers."""
    ffn = SigmaMoEConfig(d_model=16, n_experts=n_experts, expert_size=4, k=2, n_layers=3)
    return TransformerXLConfig(vocab_size=20, d_model=16, n_layers=3, n_heads=2, d_head=8, ffn=ffn, shared_layers=shared)


def test_count_is_of_one_block() -> None:
    """Closed form against the model, whose parameters are counted once."""
    for shared in (True, False):
        model = TransformerXL(config(shared=shared))
        assert sum(p.numel() for p in model.parameters()) == config(shared=shared).num_params()


def test_applications_may_select_other_parameters_but_none_twice() -> None:
    """Of 6 experts three times two are all; of 12 half; the selector, which each of them reads, counts each time."""
    for n_experts, active in ((6, 6 * 2 * 16 * 4 + 6 * 16), (12, 3 * (2 * 2 * 16 * 4 + 12 * 16))):
        sizes = config(shared=True, n_experts=n_experts)
        assert sizes.active_params() == sizes.other_params() + active


def test_shared_model_is_the_plain_one_with_equal_layers() -> None:
    """Logits, memory and statistics of all three applications."""
    shared, plain = TransformerXL(config(shared=True)).eval(), TransformerXL(config(shared=False)).eval()
    shared.init_parameters(0)
    plain.load_state_dict(shared.state_dict())
    tokens = torch.arange(10)[None]
    ours, theirs = (model(tokens, memory_length=4, return_stats=True) for model in (shared, plain))
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.memory, theirs.memory)
    assert ours.stats is not None and theirs.stats is not None
    for our, their in zip(ours.stats, theirs.stats, strict=True):
        assert torch.equal(our.counts, their.counts)
        torch.testing.assert_close(our.weights, their.weights)
    assert len(ours.memory) == len(ours.stats) == 3 and not torch.equal(ours.stats[0].weights, ours.stats[2].weights)


def test_gradient_sums_over_applications() -> None:
    """One parameter receives what the plain model's three receive together."""
    shared, plain = TransformerXL(config(shared=True)), TransformerXL(config(shared=False))
    shared.init_parameters(0)
    plain.load_state_dict(shared.state_dict())
    for model in (shared, plain):
        model(torch.arange(10)[None]).logits.square().mean().backward()
    grads = [block.ffn.experts.keys.grad for block in plain.layers]
    torch.testing.assert_close(shared.layers[0].ffn.experts.keys.grad, sum(grads))


def test_json_says_it_only_where_it_is_so() -> None:
    """Files of models from before there was a choice read as before."""
    assert "shared_layers" not in config(shared=False).to_json()
    for shared in (True, False):
        assert TransformerXLConfig.from_json(config(shared=shared).to_json()) == config(shared=shared)
