"""The C++ under the address and undefined-behaviour sanitizers, in a process that loads their runtime first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparseffn.ops.cpu import build

# Scratch memory that is handed out unwritten holds NaN, which the comparison then finds.
FLAGS = ("-std=c++17", "-O1", "-g", "-march=native", "-fopenmp", "-fPIC", "-fno-omit-frame-pointer", "-DSPARSEFFN_POISON")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
FUZZ = Path(__file__).with_name("fuzz_kernels.py")

SCRIPT = """
import ctypes, runpy, sys
from sparseffn.ops.cpu import kernels
library = ctypes.CDLL(sys.argv[1])
kernels.library = lambda: library
sys.argv = ["fuzz_kernels.py", "--rounds", "25", "--seed", "1"]
runpy.run_path({fuzz!r}, run_name="__main__")
"""


def runtime(name: str) -> str:
    """Path of a sanitizer's runtime; a test without it skips at home and fails in CI."""
    asked = [*build.find_compiler(), f"-print-file-name={name}"]
    path = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        reason = f"the compiler brings no {name}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return path


@pytest.mark.slow
@pytest.mark.skipif(build.unavailable() is not None, reason="no compiled kernels here")
def test_sanitizers_are_silent(tmp_path: Path) -> None:
    """25 drawn computations of each kernel, in float64, float32 or bfloat16; an error would end the process."""
    preload = f"{runtime('libasan.so')}:{runtime('libubsan.so')}"
    library = build.compile_library(tmp_path, flags=[*FLAGS, *SANITIZERS])
    environment = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", SCRIPT.format(fuzz=str(FUZZ)), str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nothing found" in done.stdout
