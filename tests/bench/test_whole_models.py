"""Whole models of transformers as `bench hf` builds, checks and times them."""

from __future__ import annotations

import pytest
import torch
from msgspec import structs

pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")

from sparseffn.bench import whole_models, whole_speed
from sparseffn.bench.whole_models import (
    SHAPES,
    WITHOUT_EXPERTS,
    build_whole,
    check_implementations,
    experts_work,
    gathered_bytes,
    without_experts,
)
from sparseffn.bench.whole_speed import OURS, bench_whole_models
from sparseffn.errors import UserError
from sparseffn.hf import experts
from sparseffn.results.bench_result import WholeSettings

CPU = torch.device("cpu")
QUICK = WholeSettings(models=("tiny",), prompt=6, decoded=3, dtypes=("float32",), rounds=2)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shapes_have_the_parameters_of_the_published_models(name: str) -> None:
    """OLMoE 6.9e9, Qwen3-30B-A3B 30.5e9, Granite 1.33e9, as their cards say."""
    from transformers import AutoModelForCausalLM

    published = {"olmoe": 6.92e9, "qwen3-moe": 30.53e9, "granite-1b": 1.335e9}
    shape = SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.build_config(shape.n_layers))
    if name in published:
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(published[name], rel=0.005)


def test_as_many_layers_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of half of the memory; a model of which not one layer fits is refused."""
    whole = build_whole("tiny", torch.float32, CPU, None)
    assert whole.n_layers == whole.n_published == 2 and whole.num_params == sum(p.numel() for p in whole.model.parameters())
    assert build_whole("tiny", torch.float32, CPU, 1).n_layers == 1
    monkeypatch.setattr(whole_models, "memory_bytes", lambda device: 2 * 4 * (whole.num_params - 1))
    assert build_whole("tiny", torch.float32, CPU, None).n_layers == 1
    assert build_whole("tiny", torch.bfloat16, CPU, None).n_layers == 2
    monkeypatch.setattr(whole_models, "memory_bytes", lambda device: 2**10)
    with pytest.raises(UserError, match="must fit into half of the memory; got tiny"):
        build_whole("tiny", torch.float32, CPU, None)


@pytest.mark.usefixtures("quick_roof")
def test_what_differs_from_float64_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours with an error, a peer with a reason."""
    whole = build_whole("tiny", torch.float32, CPU, None)
    found, absent = check_implementations(whole, ("eager", OURS), OURS)
    assert found.keys() == {"eager", OURS} and max(found.values()) < 1e-5 and not absent
    right = experts.ops.experts
    monkeypatch.setattr(experts.ops, "experts", lambda *args, **named: 1.01 * right(*args, **named))
    assert "differs from float64" in check_implementations(whole, ("eager", OURS), "none")[1][OURS]
    with pytest.raises(UserError, match="sparseffn must agree with float64 to be timed"):
        bench_whole_models(QUICK)


@pytest.mark.usefixtures("quick_roof")
def test_layers_take_less_than_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every implementation in both passes; batched_mm is left out where it would copy too much."""
    monkeypatch.setattr(whole_speed, "MOST_GATHERED_BYTES", 1.5 * gathered_bytes(build_whole("tiny", torch.float32, CPU, 1), 1))
    result = bench_whole_models(QUICK)
    assert [row.label for row in result.rows] == ["eager", "batched_mm", "grouped_mm", OURS]
    for row in result.rows:
        passes = [row.decoding] if row.label == "batched_mm" else [row.decoding, row.prompt]
        assert all(time is not None and 0 < time.layers.median_s < time.median_s for time in passes)
        assert (row.decoding.over_fastest_hf is None) == (row.label != OURS)
    ours = result.rows[-1].decoding
    assert ours.tokens_per_s == pytest.approx(1 / ours.median_s) and ours.n == 2
    limit = ours.limit
    assert limit is not None and 0 < limit.layers_rest_s < limit.rest_s and limit.most_times_faster is not None
    assert result.rows[0].decoding.limit is None
    (left,) = result.left_out
    assert left.label == "batched_mm" and left.tokens == 6 and "GiB of expert matrices" in left.reason


def test_work_of_experts() -> None:
    """By hand: 2 layers of 8 experts of 3 x 32 x 16 numbers, 2 a token; of many tokens all are read."""
    whole = build_whole("tiny", torch.bfloat16, CPU, None)
    size = 3 * 32 * 16
    assert experts_work(whole, 1) == pytest.approx((2 * 2 * 2 * size, 2 * 2 * size * 2))
    assert experts_work(whole, 512) == pytest.approx((2 * 2 * 2 * 512 * size, 2 * 8 * size * 2))


def test_limit_of_a_pass() -> None:
    """Of each round: what is left without experts, and the larger of their limits; the fastest is that of the medians."""
    whole = {"eager": [9.0, 9.0, 9.0], "grouped_mm": [8.0, 6.0, 40.0], OURS: [3.0, 3.0, 3.0], WITHOUT_EXPERTS: [3.0, 1.0, 4.0]}
    layers = {"eager": [5.0, 5.0, 5.0], "grouped_mm": [6.0, 6.0, 6.0], OURS: [2.0, 2.0, 2.0], WITHOUT_EXPERTS: [0.5, 1.5, 0.5]}
    limit = whole_speed._limit({"whole": whole, "layers": layers}, arithmetic_s=0.5, bytes_s=1.0)
    assert (limit.rest_s, limit.layers_rest_s) == (3.0, 0.5)
    # 8 / 4, 6 / 2 and 40 / 5; 5 / 1.5, 5 / 2.5 and 5 / 1.5.
    assert (limit.most_times_faster, limit.layers_most_times_faster) == pytest.approx((3.0, 5 / 1.5))
    limit = whole_speed._limit({"whole": whole, "layers": layers}, arithmetic_s=2.0, bytes_s=1.0)
    assert (limit.most_times_faster, limit.layers_most_times_faster) == pytest.approx((2.0, 5 / 2.5))


def test_experts_are_left_out_for_a_while() -> None:
    """The rest of the model computes; afterwards transformers does not know the name."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    whole = build_whole("tiny", torch.float32, CPU, 1)
    with without_experts(), torch.inference_mode():
        whole.model.set_experts_implementation(WITHOUT_EXPERTS)
        x = torch.randn(1, 3, 32)
        y = whole.layers[0].mlp(x)
    assert not bool((y[0] if isinstance(y, tuple) else y).any())
    assert WITHOUT_EXPERTS not in ALL_EXPERTS_FUNCTIONS


@pytest.mark.usefixtures("quick_roof")
def test_bfloat16_is_checked_and_timed() -> None:
    """Every implementation, with deviations from float64 that are of its size and not of float32's."""
    result = bench_whole_models(structs.replace(QUICK, dtypes=("bfloat16",), layers=1))
    assert [row.label for row in result.rows] == ["eager", "batched_mm", "grouped_mm", OURS] and not result.left_out
    for row in result.rows:
        assert (row.dtype, row.n_layers) == ("bfloat16", 1) and 1e-4 < row.deviation < 0.02
        assert row.decoding.median_s > 0 and row.prompt is not None and row.prompt.median_s > 0


def test_without_kernels_there_is_nothing_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' own function under our name would be a false figure."""
    monkeypatch.setattr(whole_speed, "formula_of", lambda experts: "no kernels run here: no C++ compiler")
    with pytest.raises(UserError, match="must have kernels for tiny; got none: no kernels run here: no C"):
        bench_whole_models(QUICK)
