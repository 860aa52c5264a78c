"""Gated experts against transformers' implementations: equal in float64's eyes, cold where it is said, over the right limit."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch
from torch import Tensor

from sparseffn import ops
from sparseffn.bench import expert_speed, gated_experts
from sparseffn.bench.expert_speed import bench_experts
from sparseffn.bench.gated_experts import OURS, check_experts, prepare
from sparseffn.errors import UserError
from sparseffn.report.bench_report import bench_tables
from sparseffn.results.bench_result import ExpertShape, ExpertsResult, ExpertsSettings, Roof

SHAPE = ExpertShape(d_model=16, expert_size=24, n_experts=5, k=2)
CPU = torch.device("cpu")
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers: pip install 'sparseffn[hf]'"
)


def measured(*tokens: int, dtypes: tuple[str, ...] = ("float32",)) -> ExpertsResult:
    return bench_experts(ExpertsSettings(shapes=(SHAPE,), tokens=tokens, dtypes=dtypes, rounds=2))


@needs_transformers
@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("n_tokens", [3, 70], ids=["forward", "training"])
def test_all_candidates_agree_with_float64(n_tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and the three of transformers; where they are trained, in the gradients of the shared weights too."""
    monkeypatch.setattr(gated_experts, "_FAR_SLOWER", float("inf"))
    checks, size = check_experts(prepare(SHAPE, n_tokens, dtype, CPU, []))
    assert size.absent == {} and set(size.modules) == {OURS, "hf eager", "hf batched_mm", "hf grouped_mm"} == set(checks)
    gradients = {"gradient of x", "gradient of gate_up_proj", "gradient of down_proj"} if n_tokens == 70 else set()
    assert all(set(check.largest_deviation) == {"output", *gradients} for check in checks.values())


FAULTS = {
    "last-token": lambda y: y * torch.tensor([1.0] * (len(y) - 1) + [1.1])[:, None],
    "nan": lambda y: y + torch.nan,
}


@pytest.mark.usefixtures("quick_roof")
@pytest.mark.parametrize("fault", FAULTS)
def test_no_speed_for_a_wrong_kernel(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token a tenth off, or a NaN."""
    right = ops.experts
    monkeypatch.setattr(ops, "experts", lambda *args, **options: FAULTS[fault](right(*args, **options)))
    with pytest.raises(UserError, match=r"sparseffn must agree with float64 to be timed; got .* in the output"):
        measured(3)


@pytest.mark.usefixtures("quick_roof")
def test_a_wrong_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here that of the gate keys, half of a weight's."""

    def wrong(x: Tensor, *args: Tensor, gate_keys: Tensor, **options: str) -> Tensor:
        return right(x, *args, gate_keys=gate_keys.detach() + 0.9 * (gate_keys - gate_keys.detach()), **options)

    right = ops.experts
    monkeypatch.setattr(ops, "experts", wrong)
    with pytest.raises(UserError, match="in the gradient of gate_up_proj"):
        measured(70)


@needs_transformers
@pytest.mark.usefixtures("quick_roof")
def test_wrong_and_slow_peers_are_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """And ours is still timed."""
    from transformers.models.olmoe import modeling_olmoe

    forward = modeling_olmoe.OlmoeExperts.forward

    def wrong(self: torch.nn.Module, *args: Tensor) -> Tensor:
        y = forward(self, *args)
        return 2 * y if self.config._experts_implementation == "eager" else y

    monkeypatch.setattr(modeling_olmoe.OlmoeExperts, "forward", wrong)
    monkeypatch.setattr(gated_experts, "_FAR_SLOWER", 1.0)
    result = measured(3)
    reasons = {absent.label: absent.reason for absent in result.left_out}
    assert "differs from float64 by 1 in the output" in reasons["hf eager"]
    assert len(reasons) == 2 and any("times as long as the fastest's" in reason for reason in reasons.values())
    (ours,) = (row for row in result.rows if not row.peer)
    assert ours.forward.over_fastest_hf is not None and ours.forward.over_fastest_hf.times_faster > 0


@pytest.mark.usefixtures("quick_roof")
def test_without_transformers_ours_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables say why."""
    monkeypatch.setattr(gated_experts.importlib.util, "find_spec", lambda name: None)
    result = measured(3)
    assert [row.label for row in result.rows] == [OURS] and result.rows[0].forward.over_fastest_hf is None
    (table,) = bench_tables(result)
    assert sum("sparseffn[hf]" in note for note in table.notes) == 3


def test_few_tokens_find_nothing_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call, of those before the timed ones too, goes to the next layer, with tokens and experts of its own."""
    monkeypatch.setattr(gated_experts, "last_level_cache_bytes", lambda device: (SHAPE.num_params * 4 * 3, "made up"))
    stored: list[gated_experts.Stored] = []
    size = prepare(SHAPE, 3, torch.float32, CPU, stored)
    assert size.n_layers == 12 and len({layer.down_proj.data_ptr() for layer in stored}) == 12
    counter = itertools.count()
    turns = [expert_speed._CallTurn(size, label, counter, training=False) for label in size.modules]
    seen: list[Tensor] = []
    for module in itertools.chain(*size.modules.values()):
        module.register_forward_pre_hook(lambda module, call: seen.append(module.down_proj))
    for index in range(6):
        for turn in turns:
            turn.prepare(index)()
    places = [next(i for i, layer in enumerate(stored) if layer.down_proj is weight) for weight in seen]
    assert places == [count % 12 for count in range(2 * 6 * len(turns))]
    assert not torch.equal(size.draw(1).x, size.draw(2).x)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_roof")
def test_limits_follow_from_the_sizes() -> None:
    """2 x 3 D I FLOPs a token and expert, thrice that with the backward; and the bytes of what is chosen."""
    result = measured(3, 512, dtypes=("float32", "bfloat16"))
    for row in result.rows:
        flops = 2 * 3 * 16 * 24 * 2 * row.tokens
        assert row.forward.limit_arithmetic_s == pytest.approx(flops / 1e11)
        assert (row.training is None) == (row.tokens == 3)
        itemsize = 2 if row.dtype == "bfloat16" else 4
        assert row.touched_bytes <= SHAPE.num_params * itemsize
        if row.training is not None:
            assert row.touched_bytes == SHAPE.num_params * itemsize
            assert row.training.limit_arithmetic_s == pytest.approx(3 * flops / 1e11)
            assert row.training.gradient_s == pytest.approx(SHAPE.num_params * itemsize / 1e10)
    assert set(result.roofs) == {"float32", "bfloat16"} and isinstance(result.roofs["float32"], Roof)


def test_layers_that_do_not_fit_are_refused() -> None:
    """Before anything is drawn."""
    huge = ExpertShape(d_model=2**14, expert_size=2**14, n_experts=2**10, k=1)
    with pytest.raises(UserError, match="must fit into half of the memory"):
        prepare(huge, 1, torch.float32, CPU, [])
