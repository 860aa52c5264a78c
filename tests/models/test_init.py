"""Initial parameters: their spread, and that methods start from the same model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.small import SIZES, small_config, text
from sparseffn.ffn import method_class
from sparseffn.ffn.dense import Dense
from sparseffn.models import TransformerXL, TransformerXLConfig, keyed_generator

PROJECTIONS = ["query", "key", "value", "position", "output"]


def drawn(method: str = "dense", seed: int = 0, **changes: int | float) -> TransformerXL:
    """A small model with the parameters of a seed."""
    model = TransformerXL(small_config(method, **changes))
    model.init_parameters(seed)
    return model


def outside_ffn(model: TransformerXL) -> dict[str, Tensor]:
    """Parameters by name, without those of feedforward blocks."""
    return {name: p for name, p in model.named_parameters() if ".ffn." not in name}


def spread(weight: Tensor) -> float:
    """Root mean square, the standard deviation about zero."""
    return float(weight.detach().double().square().mean().sqrt())


class TestSpread:
    @pytest.mark.parametrize("n_layers", [1, 5], ids=lambda n: f"layers{n}")
    @pytest.mark.parametrize("name", PROJECTIONS)
    def test_attention_projections(self, name: str, n_layers: int) -> None:
        """Exactly sqrt(2 / (fan_in n_layers)), in every layer."""
        for layer in drawn(n_layers=n_layers).layers:
            weight = getattr(layer.attention, name).weight
            assert spread(weight) == pytest.approx(math.sqrt(2 / (weight.shape[1] * n_layers)), rel=1e-6)

    def test_dense_block(self) -> None:
        """The same rule; fan-in is d_model for keys, d_ff for values. Biases are zero."""
        for _, layer in drawn().ffn_layers():
            assert isinstance(layer, Dense)
            assert spread(layer.keys) == pytest.approx(math.sqrt(2 / (8 * 2)), rel=1e-6)
            assert spread(layer.values) == pytest.approx(math.sqrt(2 / (12 * 2)), rel=1e-6)
            assert not layer.key_bias.any()
            assert not layer.bias.any()

    def test_normal_is_truncated_at_two_deviations(self) -> None:
        """Rescaling moves the bound from 2 to 2 / 0.8796, the truncated normal's own deviation."""
        weight = drawn(d_model=128, d_head=64).layers[0].attention.query.weight.detach()
        assert 2.2 < float(weight.abs().max()) / spread(weight) < 2.3

    def test_embedding_and_output(self) -> None:
        """Xavier uniform, and PyTorch's default of a linear layer."""
        model = drawn(vocab_size=400, d_model=64)
        for parameter, bound in (
            (model.embedding.weight, math.sqrt(6 / (400 + 64))),
            (model.output.weight, 1 / math.sqrt(64)),
            (model.output.bias, 1 / math.sqrt(64)),
        ):
            assert 0.97 * bound < float(parameter.detach().abs().max()) <= bound
            assert spread(parameter) == pytest.approx(bound / math.sqrt(3), rel=0.1)

    def test_the_rest_is_constant(self) -> None:
        """Norms 1 and 0, attention's biases 0, its scale 1 / sqrt(d_head)."""
        for name, parameter in outside_ffn(drawn()).items():
            if "norm" in name:
                assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
            elif "content_bias" in name or "position_bias" in name:
                assert not parameter.any(), name
            elif name.endswith("scale"):
                assert float(parameter.detach()) == pytest.approx(3**-0.5), name

    def test_embedding_and_output_are_not_tied(self) -> None:
        """Two matrices."""
        model = drawn()
        assert model.embedding.weight.data_ptr() != model.output.weight.data_ptr()


class TestSeeds:
    @pytest.mark.parametrize("method", ["sigma-moe", "switch", "pkm", "topk"])
    def test_models_differ_in_their_blocks_alone(self, method: str) -> None:
        """Everything outside is bit-identical to the dense model's."""
        ffn = next(e for e in method_class(method).examples() if e.d_model == 8)
        other = TransformerXL(TransformerXLConfig(**SIZES, ffn=ffn))
        other.init_parameters(0)
        expected = outside_ffn(drawn())
        assert expected.keys() == outside_ffn(other).keys()
        assert all(torch.equal(p, expected[name]) for name, p in outside_ffn(other).items())

    @pytest.mark.parametrize("method", ["dense", "sigma-moe"])
    def test_a_seed_is_all_that_decides(self, method: str) -> None:
        """Same seed, same bits, whatever the global generator; another seed, another draw of each random parameter."""
        first = dict(drawn(method, seed=0).named_parameters())
        torch.manual_seed(123)
        same, other = (dict(drawn(method, seed=seed).named_parameters()) for seed in (0, 1))
        for name, parameter in first.items():
            assert torch.equal(parameter, same[name]), name
            if parameter.std(correction=0) > 0:
                assert not torch.equal(parameter, other[name]), name

    def test_layers_and_names_draw_their_own_numbers(self) -> None:
        """No two projections of the same shape are equal."""
        weights = [getattr(layer.attention, n).weight for layer in drawn().layers for n in PROJECTIONS[:4]]
        blocks = [layer.keys for _, layer in drawn().ffn_layers()]
        for group in (weights, blocks):
            assert not any(torch.equal(a, b) for i, a in enumerate(group) for b in group[:i])

    def test_generators_depend_on_seed_and_name(self) -> None:
        """And on nothing else."""
        pairs = [(0, "a"), (0, "b"), (1, "a"), (0, "a")]
        numbers = [torch.rand(4, generator=keyed_generator(seed, name)).tolist() for seed, name in pairs]
        assert numbers[0] == numbers[3]
        assert len({tuple(n) for n in numbers}) == 3


class TestModes:
    def test_dropout_acts_in_training_only(self) -> None:
        """Evaluation is deterministic and has the numbers of a model without dropout."""
        model, plain, tokens = drawn(dropout=0.5), drawn(), text(6)
        assert not torch.equal(model(tokens).logits, model(tokens).logits)
        model.eval()
        assert torch.equal(model(tokens).logits, plain(tokens).logits)

    @pytest.mark.parametrize("method", ["dense", "sigma-moe"])
    def test_autocast_computes_in_bfloat16(self, method: str) -> None:
        """bfloat16 logits near the float32 ones, float32 gradients of every parameter, memory carried on."""
        model, tokens = drawn(method), text(6)
        expected = model(tokens, model(tokens, memory_length=6).memory).logits
        with torch.autocast("cpu", torch.bfloat16):
            out = model(tokens, model(tokens, memory_length=6).memory, memory_length=6)
        assert out.logits.dtype == torch.bfloat16
        # A rounded score may select another expert for a token; most logits agree all the same.
        assert (out.logits - expected).abs().median() < 0.02 * expected.abs().max()
        out.logits.float().square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    def test_statistics_come_on_request_one_for_each_layer(self) -> None:
        """And do not change the logits."""
        model, tokens = drawn("sigma-moe").eval(), text(6)
        out = model(tokens, return_stats=True)
        assert model(tokens).stats is None
        assert out.stats is not None and len(out.stats) == 2
        assert torch.equal(out.logits, model(tokens).logits)


@pytest.mark.parametrize("method", ["dense", "sigma-moe"])
def test_single_parameters_are_drawn_as_among_all(method: str) -> None:
    """`only` draws what it names, to the same bits, and leaves the rest."""
    whole, part = drawn(method, seed=3), drawn(method, seed=4)
    before = {name: p.clone() for name, p in part.named_parameters()}
    first, _ = next(iter(part.layers[1].ffn.named_parameters()))
    wanted = {"embedding.weight", "layers.0.attention.key.weight", f"layers.1.ffn.{first}"}
    part.init_parameters(3, only=wanted)
    for name, p in part.named_parameters():
        assert torch.equal(p, whole.get_parameter(name) if name in wanted else before[name]), name
