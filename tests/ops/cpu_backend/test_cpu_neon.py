"""The kernels on aarch64: cross-compiled with NEON, and their products tried by an emulator."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from variants import kernel_files, without

from sparseffn.ops.cpu import build

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PROGRAM = Path(__file__).with_name("products.cpp")
# Above the base, arithmetic of float16 and bfloat16 in registers, as Graviton 3 and Neoverse V1 have.
TARGETS = {"armv8-a": "NEON", "armv8.2-a+bf16+fp16": "NEON"}


def compile_for(target: str, folder: Path) -> Path:
    """The program for a processor, linked into one file; optimised, as an emulator is slow."""
    flags = [*without("-O3", "-march=native"), "-O1", f"-march={target}", f"-I{build.SOURCES}", "-DSPARSEFFN_POISON"]
    sources = [PROGRAM, *(build.SOURCES / name for name in kernel_files())]
    objects = [folder / f"{source.stem}.o" for source in sources]
    commands = [[COMPILER, *flags, "-c", s, "-o", o] for s, o in zip(sources, objects, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda words: subprocess.run(words, capture_output=True, text=True, check=False), commands):
            assert done.returncode == 0, done.stderr
    program = folder / "products"
    subprocess.run([COMPILER, *flags, "-static", *objects, "-o", program], check=True)
    return program


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER}: apt install g++-aarch64-linux-gnu")
@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"needs {EMULATOR}: apt install qemu-user")
@pytest.mark.parametrize("target", TARGETS)
def test_products_are_right_on_aarch64(target: str, tmp_path: Path) -> None:
    """Every storage type and layout, forward and backward, against loops in double."""
    program = compile_for(target, tmp_path)
    done = subprocess.run([EMULATOR, "-cpu", "max", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == TARGETS[target] and len(lines) == 4 * 3 * 5
