"""The C++ kernels: compiled at first use with the system's compiler, kept in the user's cache.

    CACHE/kernels/KEY.so    KEY: sources, flags, compiler, processor, PyTorch

One process compiles while others wait for its lock; the library appears whole or not at all.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sparseffn.errors import UserError

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
# Neither errno nor floating-point traps are used; multiply-adds may fuse. NaN and infinities keep their meaning.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
_COMPILERS = ("c++", "g++", "clang++")


class CompilerError(RuntimeError):
    """The kernels cannot be compiled here; the message says why."""


def find_compiler() -> list[str]:
    """The command of `$CXX`, a program and its first arguments ("ccache g++"), or the first C++ compiler on the path.

    Raises:
        CompilerError: there is none.
    """
    try:
        asked = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise CompilerError(f"CXX={os.environ['CXX']} is no command: {error}; set CXX to one") from error
    for program, *arguments in [asked] if asked else [[name] for name in _COMPILERS]:
        if path := shutil.which(program):
            return [path, *arguments]
    wanted = asked[:1] or _COMPILERS
    raise CompilerError(f"no C++ compiler found (looked for {', '.join(wanted)}); install g++ or set CXX")


def build_key(compiler: Sequence[str], sources: Sequence[Path], flags: Sequence[str]) -> str:
    """What a library depends on, as a name."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256()
    for part in (version, " ".join([*compiler[1:], *flags]), torch.__version__, platform.machine(), _processor()):
        digest.update(part.encode() + b"\0")
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """Model and instruction sets: `-march=native` code must not move to another processor."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def compile_library(folder: Path, *, sources: Path = SOURCES, flags: Sequence[str] = FLAGS) -> Path:
    """The shared library in `folder`, compiled unless it is there.

    Args:
        folder: where libraries are kept.
        sources: folder of `*.cpp` and `*.h`.
        flags: of the compiler.

    Raises:
        CompilerError: there is no compiler, it refuses, or `folder` cannot be written.
    """
    compiler = find_compiler()
    key = build_key(compiler, sorted([*sources.glob("*.h"), *sources.glob("*.cpp")]), flags)
    target = folder / f"{key}.so"
    if target.exists():
        return target
    # Reads result files too, which an import of the layers should not wait for.
    from sparseffn.storage import lock, writing

    fix = "set SPARSEFFN_CACHE"
    try:
        with writing(folder, fix=fix), lock(folder / f"{key}.lock", fix=fix):
            if not target.exists():
                _compile(compiler, sorted(sources.glob("*.cpp")), flags, target)
    except UserError as error:
        raise CompilerError(str(error)) from error
    return target


def _compile(compiler: Sequence[str], files: Sequence[Path], flags: Sequence[str], target: Path) -> None:
    """Compile the files side by side, link them, and put the library in its place in one step."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as scratch:
        objects = [Path(scratch) / f"{file.stem}.o" for file in files]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            pairs = zip(files, objects, strict=True)
            list(pool.map(lambda pair: _call([*compiler, *flags, "-c", str(pair[0]), "-o", str(pair[1])]), pairs))
        whole = Path(scratch) / target.name
        _call([*compiler, *flags, "-shared", "-o", str(whole), *map(str, objects)])
        whole.replace(target)
    logger.warning(
        "compiled the CPU kernels with %s in %.0f s, once, into %s", shlex.join(compiler), time.monotonic() - start, target
    )


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
        raise CompilerError(f"{command[0]} failed: {reason}")


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels of this process.

    Raises:
        CompilerError: they cannot be compiled or loaded.
    """
    from sparseffn.storage import default_cache_dir

    try:
        return ctypes.CDLL(str(compile_library(default_cache_dir() / "kernels")))
    except OSError as error:
        raise CompilerError(f"the compiled kernels cannot be loaded: {error}") from error


@functools.cache
def unavailable() -> str | None:
    """Why there are no compiled kernels, logged once; None where there are. Compiles at the first call."""
    try:
        if not sys.platform.startswith("linux"):
            raise CompilerError(f"they are written for Linux, this is {sys.platform}")
        library()
    except CompilerError as error:
        logger.warning("no compiled CPU kernels, PyTorch's operations are used: %s", error)
        return str(error)
    return None
