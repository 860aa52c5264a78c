"""The C++ under the address and undefined-behaviour sanitizers, in a process that loads their runtime first."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import pytest
from variants import compile_variant, kernel_files, run_with

from sparseffn.ops.cpu import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.unavailable() is not None, reason="no compiled kernels here"),
]

# Scratch memory that is handed out unwritten holds NaN, which the comparison then finds.
FLAGS = ("-std=c++17", "-O1", "-g", "-march=native", "-fopenmp", "-fPIC", "-fno-omit-frame-pointer", "-DSPARSEFFN_POISON")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
FUZZ = str(Path(__file__).with_name("fuzz_kernels.py"))


@pytest.fixture(scope="module")
def runtimes(lacks: Callable[[str], NoReturn]) -> list[str]:
    """Paths of the sanitizers' runtimes."""
    found = []
    for name in ("libasan.so", "libubsan.so"):
        asked = [*build.find_compiler(), f"-print-file-name={name}"]
        found.append(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
        if not Path(found[-1]).is_absolute():
            lacks(f"the compiler brings no {name}")
    return found


def fuzzed(
    runtimes: list[str], folder: Path, files: Sequence[str], *arguments: str, change: tuple[str, str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Drawn computations, with some files of the kernels under the sanitizers' eyes."""
    library = compile_variant(folder, files, [*FLAGS, *SANITIZERS], change)
    return run_with(library, FUZZ, *arguments, preload=runtimes, ASAN_OPTIONS="detect_leaks=0")


# Compiling for the sanitizers takes four minutes where two slow cores have nothing else to do.
@pytest.mark.timeout(1500)
def test_sanitizers_are_silent(runtimes: list[str], tmp_path: Path) -> None:
    """25 drawn computations of each operation, in all four types; an error would end the process."""
    done = fuzzed(runtimes, tmp_path / "watched", kernel_files(), "--rounds", "25", "--seed", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nothing found" in done.stdout


def test_a_read_past_the_end_is_seen(runtimes: list[str], tmp_path: Path) -> None:
    """So that the silence is not that of kernels nobody watches: a bias is read one number too far."""
    change = ("hidden.h", "row[g] += upcast(bias[g]);", "row[g] += upcast(bias[g + n]);")
    # The first seed that draws biases in float64 for the last expert; with others the numbers are wrong instead.
    done = fuzzed(runtimes, tmp_path / "wrong", ["experts_double.cpp"], "--rounds", "1", "--seed", "7", change=change)
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
