"""A training step and its parts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sparseffn.bench.step import PARTS, Step, StepShape, bench_step, whole_with_rest
from sparseffn.devices import Precision
from sparseffn.errors import UserError
from sparseffn.ffn import FFNConfig
from sparseffn.models import TransformerXLConfig
from sparseffn.results.bench_result import StepSettings

from .conftest import DENSE, SIGMA

SHAPE = StepShape(batch=2, context=6, memory=4)


def model(ffn: FFNConfig) -> TransformerXLConfig:
    """Two layers of width 16."""
    return TransformerXLConfig(vocab_size=20, d_model=16, n_layers=2, n_heads=2, d_head=8, ffn=ffn)


class Ticks:
    """A clock that goes on by one with each look."""

    def __init__(self) -> None:
        self.ticks: Iterator[int] = iter(range(10_000))

    def __call__(self) -> float:
        return float(next(self.ticks))


@pytest.mark.parametrize("ffn", [DENSE, SIGMA], ids=["dense", "sigma-moe"])
def test_every_part_is_met_forward_and_backward(ffn: FFNConfig) -> None:
    """With a clock of looks: a tick for each forward and backward of a module, one for output layer and optimiser."""
    parts = Step(model(ffn), SHAPE).run_in_parts(Ticks())
    assert {part: parts[part] for part in ("feedforward", "attention", "optimiser")} == {
        "feedforward": 4.0, "attention": 4.0, "optimiser": 1.0
    }  # fmt: skip
    assert parts["output layer"] == 1.0 and parts["rest"] > 0 and tuple(parts) == (*PARTS, "rest")


def test_parts_add_up_to_the_whole() -> None:
    """The rest is what is left."""
    assert whole_with_rest({"feedforward": 2.0, "attention": 1.5}, 5.0)["rest"] == 1.5


def test_hooks_are_gone_after_a_step_in_parts() -> None:
    """A step that is timed as a whole runs without them."""
    step = Step(model(SIGMA), SHAPE)
    before = step.model.layers[0].ffn.router.selector.detach().clone()
    step.run_in_parts()
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in step.model.modules())
    assert not before.equal(step.model.layers[0].ffn.router.selector)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_result_holds_both_comparisons(precision: Precision) -> None:
    """Attentions and methods, in each precision."""
    shape = StepShape(batch=2, context=6, memory=4, precision=precision)
    settings = StepSettings(
        preset="x", method="dense", params=1, vocab_size=20, rounds=1, batch=2, context=6, memory=4, precision=precision
    )
    result = bench_step(model(DENSE), {"dense": model(DENSE), "sigma-moe": model(SIGMA)}, shape, settings)
    assert result.ratio > 0 and result.methods["dense"].over_base == 1.0 and set(result.times) == {"relative", "plain"}
    for found in result.methods.values():
        assert sum(found.parts.values()) == pytest.approx(found.parts_whole_s)


def test_bad_shape_is_refused() -> None:
    """With the remedy."""
    with pytest.raises(UserError, match="`batch` and `context` must be at least 1"):
        StepShape(batch=0)
