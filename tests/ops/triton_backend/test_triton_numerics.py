"""Triton kernels against the reference in float64, through Triton's interpreter on CPU tensors.

Whether a kernel is interpreted is settled when it is decorated, so the cases run in a process of their own and each test
reads one outcome. See `triton_cases.py` for the cases and `run_interpreted.py` for what is done with them.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import pytest
import run_on_device
import torch
from triton_cases import CHECKS, FULL, MUTANTS, QUICK, Case, Mutant

import sparseffn

Outcomes = dict[str, str]

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton has wheels for Linux on x86_64"),
    # The first test of a fixture waits for all of its cases: a minute, and on a busy machine several times as long.
    pytest.mark.timeout(1200),
]


# The interpreters before Triton 3.7 convert arrays to numbers as NumPy 2.4 no longer does.
MENDED_TRITON, STRICT_NUMPY = (3, 7), (2, 4)


def minor(package: str) -> tuple[int, ...]:
    """The first two numbers of a package's version."""
    return tuple(map(int, version(package).split(".")[:2]))


def run(what: str, folder: Path, *, n_parts: int = 1, stop_s: float = math.inf, limit_s: float = 1100.0) -> Outcomes:
    """Case to complaint, from processes that interpret, each a part of the cases; warnings are errors there too.

    After `stop_s` no case is begun.
    """
    if minor("triton") < MENDED_TRITON and minor("numpy") >= STRICT_NUMPY:
        pytest.skip(f"the interpreter of Triton {version('triton')} fails under NumPy {version('numpy')}; fix: numpy<2.4")
    script = Path(__file__).with_name("run_interpreted.py")
    package = str(Path(sparseffn.__file__).parents[1])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}

    def run_part(part: int) -> Outcomes:
        out = folder / f"{what}-{part}.json"
        command = [sys.executable, "-W", "error", str(script), what, str(out), "--seconds", str(stop_s)]
        command += ["--part", str(part), str(n_parts)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit_s)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(out.read_text())

    with ThreadPoolExecutor(n_parts) as pool:
        return {case: said for found in pool.map(run_part, range(n_parts)) for case, said in found.items()}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Outcomes of the sample."""
    return run("quick", tmp_path_factory.mktemp("interpreted"))


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Outcomes of the mutants and the checks."""
    return run("mistakes", tmp_path_factory.mktemp("interpreted"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, seconds_left: Callable[[], float]) -> Outcomes:
    """Outcomes of every operation, option, shape, dtype and kind of tile; a run with a limit spends half of what is left."""
    n_parts = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(12, os.cpu_count() or 1)
    return run("full", tmp_path_factory.mktemp("interpreted"), n_parts=n_parts, stop_s=seconds_left() / 2, limit_s=5000.0)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """The same cases as kernels on a GPU, in processes that survive a lost device and write as they go."""
    out = tmp_path_factory.mktemp("compiled") / "cases.json"
    whole = run_on_device.run(out, n_workers=min(12, os.cpu_count() or 1), limit_s=1500.0, only="")
    wrong = {entry["name"]: entry["message"] for entry in whole["wrong"]}
    missing = whole["n_cases"] - whole["n_run"]
    return defaultdict(str, wrong) if not missing else defaultdict(lambda: f"{missing} cases were not run in time", wrong)


@pytest.mark.parametrize("case", QUICK, ids=[case.name for case in QUICK])
def test_output_and_gradients_are_near_the_truth(quick: Outcomes, case: Case) -> None:
    """Every option in float32 and bfloat16, plain and gated experts and a router in every shape, a sample of the rest."""
    assert quick[case.name] == ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_mistake_in_a_kernel_is_caught(mistakes: Outcomes, mutant: Mutant) -> None:
    """A kernel with one expression changed fails the very check that the right one passes."""
    assert mistakes[mutant.name].startswith(mutant.variant.partition("-")[0])


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted_backend(mistakes: Outcomes, name: str) -> None:
    """See the function of that name in `interpreted_checks.py` or `launch_checks.py`."""
    assert mistakes[name] == ""


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("case", FULL, ids=[case.name for case in FULL])
def test_full_product_is_near_the_truth(full: Outcomes, case: Case, not_begun: Callable[[], NoReturn]) -> None:
    """Operations and their options x shapes x dtypes x tiles."""
    if case.name not in full:
        not_begun()
    assert full[case.name] == ""


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")
@pytest.mark.parametrize("case", FULL, ids=[case.name for case in FULL])
def test_gpu_is_near_the_truth(compiled: Outcomes, case: Case) -> None:
    """The full product once more where there is a GPU."""
    assert compiled[case.name] == ""
