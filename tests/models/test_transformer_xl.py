"""The language model: equations, causality, memory, initialisation, sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ffn import FFNConfig
from sparseffn.ffn.dense import DenseConfig
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.models import TransformerXL, TransformerXLConfig
from sparseffn.models.presets import get_preset
from sparseffn.models.reference import model_reference

DENSE = DenseConfig(d_model=12, d_ff=20, n_layers=2)
SIGMA = SigmaMoEConfig(d_model=12, n_experts=4, expert_size=5, k=2, n_layers=2)
FFNS = pytest.mark.parametrize("ffn", [DENSE, SIGMA], ids=["dense", "sigma-moe"])


def make(ffn: FFNConfig, *, dropout: float = 0.0, seed: int = 0) -> TransformerXL:
    """A small model in float64 whose attention biases are not zero."""
    config = TransformerXLConfig(vocab_size=13, d_model=12, n_layers=2, n_heads=3, d_head=5, dropout=dropout, ffn=ffn)
    model = TransformerXL(config)
    model.init_parameters(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("content_bias", "position_bias")):
                parameter.normal_(0.0, 0.5)
    return model.double().eval()


def text(length: int, batch: int = 2) -> Tensor:
    """Random tokens."""
    return torch.randint(13, (batch, length))


@FFNS
@pytest.mark.parametrize("with_memory", [False, True], ids=["no-memory", "memory"])
def test_model_equals_the_plain_loops(ffn: FFNConfig, with_memory: bool) -> None:
    """Logits and every gradient agree with the reference in float64."""
    model, tokens = make(ffn), text(6)
    memory = model(text(5), memory_length=4).memory if with_memory else None
    got = model(tokens, memory).logits
    wanted = model_reference(model, tokens, memory)
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)
    direction = torch.randn_like(got)
    ours = torch.autograd.grad((got * direction).sum(), list(model.parameters()))
    theirs = torch.autograd.grad((wanted * direction).sum(), list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@FFNS
def test_no_token_sees_its_future(ffn: FFNConfig) -> None:
    """Changing a token leaves earlier logits alone and changes later ones, memory or not."""
    model, tokens = make(ffn), text(9)
    memory = model(text(7), memory_length=7).memory
    before = model(tokens, memory).logits
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 13
    after = model(changed, memory).logits
    torch.testing.assert_close(before[:, :4], after[:, :4], atol=1e-12, rtol=0)
    assert bool((before[:, 4:] != after[:, 4:]).any(dim=-1).all())


def test_every_position_sees_the_memory() -> None:
    """Changing a remembered state changes all logits."""
    model, tokens = make(DENSE), text(5)
    memory = model(text(6), memory_length=6).memory
    changed = tuple(states + (torch.arange(6) == 0)[:, None] for states in memory)
    assert bool((model(tokens, memory).logits != model(tokens, changed).logits).any(dim=-1).all())


@FFNS
def test_windows_with_enough_memory_equal_the_whole_text(ffn: FFNConfig) -> None:
    """A text in windows of any size is the text at once."""
    model, tokens = make(ffn), text(17)
    whole, parts, memory = model(tokens).logits, [], None
    for window in tokens.split([4, 1, 7, 5], dim=1):
        output = model(window, memory, memory_length=32)
        memory = output.memory
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-11, rtol=0)


def test_empty_memory_is_attended_to_by_nobody() -> None:
    """No memory and memory of length zero are the same, and not the same as zeros."""
    model, tokens = make(DENSE), text(4)
    none = model(tokens).logits
    empty = model(tokens, tuple(torch.zeros(2, 0, 12, dtype=torch.float64) for _ in range(2))).logits
    zeros = model(tokens, tuple(torch.zeros(2, 3, 12, dtype=torch.float64) for _ in range(2))).logits
    assert torch.equal(none, empty)
    assert not torch.allclose(none, zeros)


def test_memory_is_detached_but_projections_learn_from_it() -> None:
    """No gradient into the window before; keys and values of the memory give gradient to their projections."""
    model = make(DENSE)
    memory = model(text(5), memory_length=3).memory
    assert all(states.shape == (2, 3, 12) and not states.requires_grad for states in memory)
    first = model.layers[0].attention.value.weight
    with_memory = torch.autograd.grad(model(text(1), memory).logits.sum(), first)[0]
    assert bool(with_memory.any())


@pytest.mark.parametrize(
    ("preset", "vocab_size", "dense", "sigma", "millions"),
    [
        ("wt-s", 8000, 1_694_137, 1_694_144, (47, 47)),
        ("wt-s-star", 8000, 13_596_412, 13_553_152, (238, 237)),
        ("wt-b", 8000, 8_422_414, 8_421_376, (262, 262)),
        ("e8", 205, 2_104_837, 2_105_344, (41, 41)),
    ],
)
def test_published_sizes_come_out(preset: str, vocab_size: int, dense: int, sigma: int, millions: tuple[int, int]) -> None:
    """Blocks as by hand and whole models as in the paper's tables 3 and 8."""
    chosen = get_preset(preset)
    blocks = (DenseConfig.from_shape(chosen.shape), SigmaMoEConfig.from_shape(chosen.shape))
    assert tuple(block.num_params() for block in blocks) == (dense, sigma)
    totals = tuple(round(chosen.model(block, vocab_size).num_params() / 1e6) for block in blocks)
    assert totals == millions


@FFNS
def test_closed_form_counts_the_model(ffn: FFNConfig) -> None:
    """Config, meta device and memory agree."""
    model = make(ffn)
    with torch.device("meta"):
        meta = TransformerXL(model.config)
    counts = {sum(p.numel() for p in m.parameters()) for m in (model, meta)}
    assert counts == {model.config.num_params()}


def test_models_of_one_seed_are_alike_outside_the_feedforward_blocks() -> None:
    """Bit for bit, whatever the block; another seed is different."""
    one, other, third = (dict(make(f, seed=s).named_parameters()) for f, s in ((DENSE, 0), (SIGMA, 0), (DENSE, 1)))
    shared = [name for name in one if ".ffn." not in name]
    drawn = [n for n in shared if n.endswith("weight") and "norm" not in n]
    assert all(torch.equal(one[n], other[n]) for n in shared if "bias" not in n)
    assert not any(torch.equal(one[n], third[n]) for n in drawn)


def test_linear_layers_have_exactly_the_stated_spread() -> None:
    """`sqrt(2 / (fan_in n_layers))`, the sample's own root mean square."""
    model = make(DENSE)
    weight = model.layers[1].attention.output.weight.detach()
    assert float(weight.square().mean().sqrt()) == pytest.approx((2 / (15 * 2)) ** 0.5, rel=1e-6)


def test_config_survives_json_and_refuses_nonsense() -> None:
    """Round trip; a block of another width, an unknown field."""
    config = make(SIGMA).config
    assert TransformerXLConfig.from_json(config.to_json()) == config
    with pytest.raises(UserError, match=r"`ffn.d_model` must be the model's"):
        TransformerXLConfig(vocab_size=5, d_model=8, n_layers=1, n_heads=1, d_head=4, ffn=DENSE)
    with pytest.raises(UserError, match="unknown model option 'd_modl'"):
        TransformerXLConfig.from_json({**config.to_json(), "d_modl": 1})


def test_autocast_runs_forward_and_backward_in_bfloat16() -> None:
    """Logits in bfloat16, finite gradients."""
    model = make(SIGMA).float().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(text(6), memory_length=6)
        output = model(text(6), output.memory)
    output.logits.float().sum().backward()
    assert output.logits.dtype == torch.bfloat16
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
