"""The kernels as other processors and compilers get them: shorter registers, and GCC's own form of a shuffle."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
from variants import QUICK, compile_variant, kernel_files, run_with, without

from sparseffn.ops.cpu import build

pytestmark = [
    pytest.mark.skipif(build.unavailable() is not None, reason="no compiled kernels here"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="names instruction sets of x86-64"),
]

FLAGS = [*without("-O3", "-march=native"), *QUICK]
TARGETS = {
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    # Without instructions for float16.
    "avx": ["-march=sandybridge"],
    "sse2": ["-march=x86-64"],
    "without-tiles": ["-march=native", "-DSPARSEFFN_NO_TILES"],
    # Clang has no other form than the one that is left out here.
    "gcc-before-12": ["-march=native", "-DSPARSEFFN_OLD_SHUFFLE"],
}
NEEDS = {"avx": "avx", "avx2": "avx2", "avx512": "avx512vl", "without-tiles": "amx_bf16"}
CHECKER = str(Path(__file__).with_name("check_kernels.py"))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_numbers_are_right_there_too(target: str, tmp_path: Path) -> None:
    """Experts in every type with their gradients, routes, rows."""
    if target in NEEDS and NEEDS[target] not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip(f"this processor has no {target}")
    if target == "gcc-before-12" and "clang" in " ".join(build.find_compiler()):
        pytest.skip("the compiler is Clang")
    library = compile_variant(tmp_path / "target", kernel_files(), [*FLAGS, *TARGETS[target]])
    done = run_with(library, CHECKER, "other-processors", "routes", "rows", "ties", "inner", "large")
    assert done.returncode == 0, done.stderr
