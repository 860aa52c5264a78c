"""Whole models of transformers as `bench hf` builds, checks and times them."""

from __future__ import annotations

import pytest
import torch
from msgspec import structs

pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")

from sparseffn.bench import whole_models, whole_speed
from sparseffn.bench.whole_models import SHAPES, build_whole, check_implementations, gathered_bytes
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
    (left,) = result.left_out
    assert left.label == "batched_mm" and left.tokens == 6 and "GiB of expert matrices" in left.reason


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
