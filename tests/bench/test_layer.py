"""Timing of layers: cold rotation, rows, refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from sparseffn.bench.benchmark import LayerTurn, Rotation, layers_to_leave_cache
from sparseffn.bench.candidates import Candidate, Setting, Shape, backend_restored
from sparseffn.bench.layer import bench_layers, candidates_of, refusal
from sparseffn.errors import UserError
from sparseffn.results.bench_result import LayerSettings
from sparseffn.storage import write_json

from .conftest import DENSE, SIGMA, setting


def test_cold_calls_visit_different_layers_with_fresh_tokens() -> None:
    """Every layer once before any comes again, after the one before it; a warm timing stays with one layer and its tokens."""
    rotation = Rotation(Candidate(label="sigma-moe", config=SIGMA), setting(4), n_layers=5)
    seen: list[tuple[int, float]] = []
    for place, module in enumerate(rotation.modules):
        module.register_forward_pre_hook(lambda m, args, place=place: seen.append((place, float(args[0][0, 0]))))
    timed: list[tuple[int, float]] = []
    with backend_restored():
        for index in range(7):
            call = LayerTurn(rotation, training=False).prepare(index)
            before = [place for place, _ in seen]
            seen.clear()
            call()
            assert before == [(index - 1) % 5]
            timed += seen
            seen.clear()
    assert [place for place, _ in timed] == [0, 1, 2, 3, 4, 0, 1]
    assert len({token for _, token in timed}) == 7
    weights = {layer.experts.keys.data_ptr() for layer in rotation.layers}
    assert len(weights) == 5 and not torch.equal(rotation.layers[0].experts.keys, rotation.layers[1].experts.keys)
    seen.clear()
    with backend_restored():
        LayerTurn(rotation, training=False, warm=True).prepare(3)()
    assert len(seen) == 3 and len(set(seen)) == 1


def test_layers_fill_four_times_the_cache() -> None:
    """2176 parameters of 4 bytes: 8704 bytes a layer, 4 x 20000 bytes to fill."""
    assert layers_to_leave_cache(SIGMA, 4, 20_000) == 10
    assert layers_to_leave_cache(SIGMA, 4, 1) == 2


def test_gradients_are_freed_between_calls() -> None:
    """A training turn leaves nothing behind."""
    rotation = Rotation(Candidate(label="sigma-moe", config=SIGMA), setting(4), n_layers=1)
    turn = LayerTurn(rotation, training=True)
    with backend_restored():
        turn.prepare(0)()
        assert all(p.grad is not None for p in rotation.layers[0].parameters())
        turn.finish()
    assert all(p.grad is None for p in rotation.layers[0].parameters())


@pytest.mark.usefixtures("quick")
def test_result_has_every_figure(shape: Shape, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the table of figures is checked with, for cold and for other sizes."""
    monkeypatch.delenv("SPARSEFFN_BACKEND", raising=False)
    settings = LayerSettings(tokens=(2, 70), rounds=2, backends=("auto", "torch"))
    write_json(tmp_path / "layer.json", bench_layers([shape], settings))
    result = json.loads((tmp_path / "layer.json").read_text())
    assert {"format", "kind", "environment", "settings", "roof", "shapes", "rows", "left_out"} == set(result)
    assert {"torch", "threads", "blas", "last_level_cache_bytes", "date", "cpu"} <= set(result["environment"])
    labels = {row["label"] for row in result["rows"]}
    assert {"dense", "sigma-moe [auto]", "sigma-moe [torch]"} <= labels
    assert {row["backend"] for row in result["rows"] if row["label"] in ("dense", "sigma-moe [torch]")} == {"torch"}
    for row in result["rows"]:
        assert row["cache"] == ("cold" if row["tokens"] == 2 else "repeated")
        assert ("warm" in row) == (row["tokens"] == 2) and row["gate"]["tokens"] == row["tokens"]
        for key in ("forward", "training"):
            timing = row[key]
            assert timing["q1_s"] <= timing["median_s"] <= timing["q3_s"]
            assert timing["over_limit"] == pytest.approx(timing["median_s"] / timing["limit_s"])
            assert timing["over_dense_over_share"] == pytest.approx(timing["over_dense"] / row["share"])
    assert os.environ.get("SPARSEFFN_BACKEND") is None


@pytest.mark.usefixtures("quick")
def test_tiny_layers_are_not_called_cold(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 256 such layers stays in the cache, so that nothing comes from memory."""
    monkeypatch.setattr("sparseffn.bench.benchmark.last_level_cache_bytes", lambda device: (2**30, "made up"))
    result = bench_layers([shape], LayerSettings(tokens=(2,), rounds=1, peers=False))
    assert {row.cache for row in result.rows} == {"repeated"}


@pytest.mark.usefixtures("quick")
def test_layers_beyond_memory_are_refused(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is built."""
    monkeypatch.setattr("sparseffn.bench.benchmark.memory_bytes", lambda device: 2**16)
    with pytest.raises(UserError, match="half of the memory"):
        bench_layers([shape], LayerSettings(tokens=(2,), rounds=1, peers=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": (0,)}, "at least 1"),
        ({"tokens": ()}, "at least one"),
        ({"tokens": (4,), "rounds": 0}, "at least 1"),
        ({"tokens": (4,), "backends": ("trch",)}, "did you mean 'torch'"),
        ({"tokens": (4,), "dtype": "float8"}, "`dtype` must be one of"),
    ],
    ids=["zero", "none", "rounds", "backend", "dtype"],
)
def test_bad_settings_are_refused(changes: dict, message: str, shape: Shape) -> None:
    """With value and remedy."""
    with pytest.raises(UserError, match=message):
        bench_layers([shape], LayerSettings(**changes))


def test_peer_module_is_called_not_the_layer() -> None:
    """A peer's module stands over the layer's parameters."""
    candidate = Candidate(label="peer", config=DENSE, wrap=lambda layer: nn.Sequential(layer))
    assert isinstance(Rotation(candidate, setting(1), 1).modules[0], nn.Sequential) and candidate.is_peer


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="PyTorch before 2.10 has no grouped_mm")
def test_grouped_mm_stands_beside_the_mixtures_of_a_gpu(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a candidate where it runs, else with the reason; no GPU is needed to say which."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for dtype, runs in ((torch.bfloat16, True), (torch.float32, False)):
        gpu = Setting(n_tokens=4, dtype=dtype, device=torch.device("cuda"))
        candidates, absent = candidates_of(shape, LayerSettings(tokens=(4,), peers=False), gpu)
        assert [c.backend for c in candidates if c.label == "sigma-moe [grouped_mm]"] == ["grouped_mm"] * runs
        assert list(absent) == ["sigma-moe [grouped_mm]"] * (not runs)
    assert "not in torch.float32" in absent["sigma-moe [grouped_mm]"]
    assert {c.backend for c in candidates_of(shape, LayerSettings(tokens=(4,), peers=False), setting(4))[0]} == {"auto"}


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="PyTorch before 2.10 has no grouped_mm")
@pytest.mark.usefixtures("quick")
def test_what_cannot_compute_a_width_is_left_out_with_the_reason() -> None:
    """PyTorch's product of groups takes no rows of 20 numbers in bfloat16; it ends no benchmark."""
    pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")
    narrow = Shape(name="narrow", dense=DENSE.replace(d_model=20), methods={"sigma-moe": SIGMA.replace(d_model=20)})
    result = bench_layers([narrow], LayerSettings(tokens=(70,), rounds=1, dtype="bfloat16"))
    absent = {left.label: left.reason for left in result.left_out}
    assert "16 bytes" in absent["hf grouped_mm"] and "hf grouped_mm" not in {row.label for row in result.rows}
    optional = Candidate(label="x", config=narrow.methods["sigma-moe"], backend="grouped_mm", optional=True)
    assert "multiples of 8" in (refusal(optional, setting(70, torch.bfloat16)) or "")
    assert refusal(optional, setting(70)) is None
