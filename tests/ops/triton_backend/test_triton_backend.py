"""The backend `triton` seen from outside: imported late, refused where it cannot run, tiles chosen without tuning."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparseffn
from sparseffn import ops
from sparseffn.errors import UserError
from sparseffn.ops.triton import REGISTERED, triton_backend, tuning
from sparseffn.ops.triton.tuning import Situation, Tile

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def situation(n_rows: int, family: str = "product", kind: str = "half") -> Situation:
    """Matrices of 64 x 32 for eight experts."""
    bucket = tuning.row_bucket(n_rows, 8)
    return Situation("kernel", family, kind, bucket, sizes=(64, 32), aligned=True, device=CPU)


def test_import_leaves_triton_alone() -> None:
    """Neither the package nor the backend's own modules import it, nor does asking whether it runs on the CPU."""
    words = "import sys, torch, sparseffn, sparseffn.ops.triton as backend"
    words += "; backend.triton_backend().unavailable(torch.device('cpu'), torch.float32)"
    script = f"{words}; sys.exit('triton' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(sparseffn.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 0


def test_cpu_is_refused_by_name_and_passed_over_by_auto() -> None:
    """Outside the interpreter it needs a GPU."""
    assert ops.explain_backend(CPU)[0] != "triton"
    with pytest.raises(UserError, match="backend 'triton' cannot run on cpu: it needs a CUDA or ROCm device; fix: use"):
        ops.weighted_rows(torch.ones(2, 2), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), backend="triton")


def test_missing_package_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU without Triton the message says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reason = triton_backend().unavailable(CUDA, torch.float32)
    assert reason is not None and "pip install triton" in reason


def test_float64_falls_through_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where Triton is installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert triton_backend().unavailable(CUDA, torch.float32) is None
    assert ops.explain_backend(CUDA)[0] == "triton"
    assert ops.explain_backend(CUDA, dtype=torch.float64)[0] == "torch"


def test_gpu_takes_triton_first() -> None:
    """It stands before `torch`, which serves what it cannot compute."""
    names = [backend.name for backend in ops.list_backends()]
    assert names.index("triton") < names.index("torch")


def test_registered_operations_take_the_arguments_of_their_schemas() -> None:
    """Every one exists, with the schema's arguments where it names them, and takes as many."""
    pytest.importorskip("triton", reason="triton has wheels for Linux on x86_64")
    from inspect import Parameter, signature

    from sparseffn.ops.triton import operations

    for name in REGISTERED:
        ours = signature(getattr(operations, name)).parameters
        wanted = [argument.name for argument in getattr(torch.ops.sparseffn, name).default._schema.arguments]
        named = [n for n, parameter in ours.items() if parameter.kind is not Parameter.VAR_POSITIONAL]
        assert named == wanted[: len(named)] and (named == wanted or len(named) < len(ours)), name


def test_token_count_alone_does_not_change_the_situation() -> None:
    """Sizes are bucketed: 1,001 and 1,023 rows tune and compile as one, and every count has a tile."""
    assert situation(1001) == situation(1023) == situation(1024)
    for n_rows in (0, 1, 63, 10**7):
        assert tuning.pick_tile(situation(n_rows), lambda tile: None) in [
            tile for _, tile in tuning.default_tiles("product", "half", True)
        ]


def test_nothing_is_timed_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variable set, the fastest of the table is taken and measured once."""
    timed: list[float] = []
    monkeypatch.setattr(tuning, "milliseconds", lambda call: timed.append(len(timed)) or -len(timed))
    monkeypatch.setattr(tuning, "_MEASURED", {})
    tuning.pick_tile(situation(999), lambda tile: None)
    assert not timed
    monkeypatch.setenv("SPARSEFFN_TRITON_TUNE", "1")
    tiles = [tile for _, tile in tuning.default_tiles("product", "half", True)]
    assert tuning.pick_tile(situation(999), lambda tile: None) == tiles[-1]
    assert tuning.pick_tile(situation(1000), lambda tile: None) == tiles[-1]
    assert len(timed) == len(tiles)


def test_tf32_is_taken_only_on_request() -> None:
    """As everywhere in PyTorch, by `torch.set_float32_matmul_precision`."""
    before = torch.get_float32_matmul_precision()
    try:
        kinds = []
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            kinds.append([tuning.arithmetic(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)])
    finally:
        torch.set_float32_matmul_precision(before)
    assert kinds == [["ieee", "half", "half"], ["tf32", "half", "half"]]


def test_float32_is_multiplied_as_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before PyTorch's setting; a word that is none of the three is refused."""
    for asked in ("tf32x3", "tf32", "ieee"):
        monkeypatch.setenv("SPARSEFFN_TRITON_FLOAT32", asked)
        assert tuning.arithmetic(torch.float32) == asked and tuning.arithmetic(torch.bfloat16) == "half"
    monkeypatch.setenv("SPARSEFFN_TRITON_FLOAT32", "tf32x2")
    with pytest.raises(UserError, match="did you mean 'tf32"):
        tuning.arithmetic(torch.float32)


def test_every_arithmetic_and_bucket_has_a_tile() -> None:
    """Of both vendors; in rising order of rows, the last one for any number."""
    for vendor, kinds in (("cuda", ("half", "tf32", "tf32x3", "ieee")), ("hip", ("half", "ieee"))):
        for family in ("product", "gated", "hidden", "outer"):
            for kind in kinds:
                rows = [rows for rows, _ in tuning.default_tiles(family, kind, True, vendor)]
                assert rows == sorted(rows) and rows[-1] == tuning.MAX_BUCKET


def test_stages_fit_into_shared_memory() -> None:
    """One at least, and no more than asked for."""
    assert Tile(128, 128, 64, 8, 5).within(163 * 1024, 2).n_stages == 5
    assert Tile(128, 128, 64, 8, 5).within(99 * 1024, 2).n_stages == 3
    assert Tile(128, 128, 64, 8, 5).within(1024, 2).n_stages == 1


@pytest.mark.parametrize(
    ("x", "aligned"),
    [
        (torch.ones(4, 64), True),
        (torch.ones(4, 412).bfloat16(), True),
        (torch.ones(4, 41).bfloat16(), False),
        (torch.ones(2, 48, 64).mT, True),
        (torch.ones(4, 80)[:, 1:65], False),
        (torch.ones(2, 4, 80)[..., ::2], False),
    ],
    ids=["multiple", "paper", "width", "transposed", "start", "interleaved"],
)
def test_alignment(x: torch.Tensor, aligned: bool) -> None:
    """Lines, what lies between them and the address count."""
    assert tuning.is_aligned(x) == aligned


def test_small_sides_take_small_blocks() -> None:
    """Never under 16, which is what tl.dot takes."""
    assert Tile(64, 128, 32, 4, 3).fitted(n=33, k=5) == Tile(64, 64, 16, 4, 3)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton has wheels for Linux on x86_64")
def test_mixed_devices_are_refused() -> None:
    """By name of the devices, before a kernel sees an address."""
    from sparseffn.ops.triton.launch import check_tensors

    with pytest.raises(UserError, match="must be on one device; got cpu and meta; fix: move them"):
        check_tensors(x=torch.ones(1), weight=torch.ones(1, device="meta"))
