"""The kernels as other processors and compilers get them: shorter registers, and GCC's own form of a shuffle."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import pytest
import torch
from expert_cases import CASES, results
from test_cpu_numerics import verify
from test_cpu_training import drawn
from test_cpu_training import results as trained

from sparseffn.ops.cpu import build, kernels

pytestmark = [
    pytest.mark.skipif(build.unavailable() is not None, reason="no compiled kernels here"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="names instruction sets of x86-64"),
    pytest.mark.usefixtures("poison"),
]

QUICK = [flag for flag in build.FLAGS if flag not in ("-O3", "-march=native")] + ["-O0", "-DSPARSEFFN_POISON"]
TARGETS = {
    "avx2": ["-march=x86-64-v3"],
    "sse2": ["-march=x86-64"],
    # Clang has no other form than the one that is left out here.
    "gcc-before-12": ["-march=native", "-DSPARSEFFN_OLD_SHUFFLE"],
}


@pytest.mark.parametrize("target", [name if name == "avx2" else pytest.param(name, marks=pytest.mark.slow) for name in TARGETS])
def test_numbers_are_right_there_too(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts in both types with their gradients, and a training step of few tokens."""
    if target == "avx2" and "avx2" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip("this processor has no AVX2")
    if target == "gcc-before-12" and "clang" in " ".join(build.find_compiler()):
        pytest.skip("the compiler is Clang")
    path = build.compile_library(tmp_path, flags=[*QUICK, *TARGETS[target]])
    library = ctypes.CDLL(str(path))
    monkeypatch.setattr(kernels, "library", lambda: library)
    kernels._functions.cache_clear()
    try:
        for name in ("odd", "wide", "decoding", "one-token"):
            verify(CASES[name], torch.bfloat16, activation="relu")
            # Sums of fewer lanes are longer than those of this processor's PyTorch: twice its error is no bound for them.
            for dtype, near in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
                inputs, direction = CASES[name].inputs(dtype)
                indices = CASES[name].indices()
                got, truth = (results(backend, inputs, indices, direction) for backend in ("cpu", "reference"))
                for one, two in zip(got, truth, strict=True):
                    torch.testing.assert_close(one.double(), two.double(), atol=near, rtol=near)
        inputs, directions = drawn(40, 5, 2, 33, 18)
        got, other = (trained(inputs, directions, "renormalised", 2, fused=fused) for fused in (True, False))
        for one, two in zip(got, other, strict=True):
            torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)
    finally:
        kernels._functions.cache_clear()
