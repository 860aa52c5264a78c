"""The kernels compiled another way, in place of those in use, in a process of its own.

What is compiled are the files that know nothing of PyTorch, a few seconds each without optimisation. The process loads them
before anything else, so that the library finds their functions before its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sparseffn.ops.cpu import build

# Quick to compile; comparisons do not care for speed. Scratch memory that is handed out unwritten holds NaN.
QUICK = ("-O0", "-DSPARSEFFN_POISON")


def kernel_files() -> list[str]:
    """The files of kernels, without those that include PyTorch's headers."""
    return sorted(
        p.name for p in build.SOURCES.glob("*.cpp") if "<torch/" not in p.read_text() and "<ATen/" not in p.read_text()
    )


def without(*left_out: str) -> list[str]:
    """The compiler's flags but for some."""
    return [flag for flag in build.FLAGS if flag not in left_out]


def compile_variant(
    folder: Path,
    files: Sequence[str],
    flags: Sequence[str],
    change: tuple[str, str, str] | None = None,
    more: Sequence[Path] = (),
) -> Path:
    """A shared library of some files of the kernels.

    Args:
        folder: where to.
        files: of `kernel_files`.
        flags: of the compiler.
        change: a file, what is replaced in it, and by what.
        more: files that are no kernels.
    """
    sources = folder / "csrc"
    sources.mkdir(parents=True)
    for path in build.SOURCES.rglob("*"):
        if path.is_file() and (path.name in files or path.suffix == ".h"):
            to = sources / path.relative_to(build.SOURCES)
            to.parent.mkdir(exist_ok=True)
            to.write_bytes(path.read_bytes())
    for path in more:
        (sources / path.name).write_bytes(path.read_bytes())
    if change is not None:
        name, old, new = change
        changed = sources / name
        text = changed.read_text()
        assert old in text, f"{name} no longer has {old!r}"
        changed.write_text(text.replace(old, new))
    return build.compile_library(folder, sources=sources, flags=flags)


def run_with(
    library: Path, *arguments: str, preload: Sequence[str] = (), timeout: float | None = 550, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Python with some arguments, where a variant takes the place of the kernels in use, loaded after other libraries."""
    first = {"LD_PRELOAD": ":".join([*preload, str(library)]), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **first, **environment})
