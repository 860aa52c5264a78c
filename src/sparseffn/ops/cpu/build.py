"""The C++ kernels: compiled at first use with the system's compiler, kept in the user's cache.

    CACHE/kernels/KEY.so        KEY: sources, flags, compiler, processor, PyTorch
    CACHE/kernels/KEY.digest    of the whole library: one that lost its end ends the process that loads it

One process compiles while others wait for its lock; the library appears whole or not at all. `torch.ops.load_library` loads it,
which registers its operations with PyTorch's dispatcher; so it is compiled with PyTorch's headers and for its version alone.
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
# Apple's compiler has OpenMP, but neither its header, which `csrc/apple` replaces, nor its library, which is PyTorch's; and it
# refuses "native" for its own processors, which are all alike to it.
_MACOS = sys.platform == "darwin"
_MACHINE = ("-Xclang", "-fopenmp", f"-I{SOURCES / 'apple'}") if _MACOS else ("-march=native", "-fopenmp")
# Neither errno nor floating-point traps are used; multiply-adds may fuse. NaN and infinities keep their meaning.
FLAGS = (
    "-std=c++17",
    "-O3",
    *_MACHINE,
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
_COMPILERS = ("c++", "g++", "clang++")
# What includes PyTorch's headers, which cost ten seconds a file: the other files do without.
_WITH_TORCH = ("block_operations.cpp", "dispatch.cpp", "operations.cpp")


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
    abi = f"cxx11={torch.compiled_with_cxx11_abi()}"
    for part in (version, " ".join([*compiler[1:], *flags]), torch.__version__, abi, platform.machine(), _processor()):
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
    key = build_key(compiler, sorted([*sources.rglob("*.h"), *sources.glob("*.cpp")]), flags)
    target = folder / f"{key}.so"
    # Reads result files too, which an import of the layers should not wait for.
    from sparseffn.storage import lock, writing

    fix = "set SPARSEFFN_CACHE"
    try:
        with writing(folder, fix=fix):
            if _is_whole(target):
                return target
            with lock(folder / f"{key}.lock", fix=fix):
                if not _is_whole(target):
                    _compile(compiler, sorted(sources.glob("*.cpp")), flags, target)
    except UserError as error:
        raise CompilerError(str(error)) from error
    return target


def _is_whole(library: Path) -> bool:
    """Whether a library is what was compiled; without its last pages it raises SIGBUS where it is loaded."""
    from sparseffn.storage import file_digest

    digest = library.with_suffix(".digest")
    return library.exists() and digest.exists() and digest.read_text() == file_digest(library)


def _flags_of(file: Path, flags: Sequence[str]) -> list[str]:
    """The flags of one file: PyTorch's choice among two kinds of strings, and what its headers need where they are included."""
    found = [*flags, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    if file.name in _WITH_TORCH:
        include = _torch_folder() / "include"
        found += ["-std=c++20", f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}"]
    return found


def _link_flags(files: Sequence[Path]) -> list[str]:
    """What files that name PyTorch's functions are linked with; all of it is loaded already."""
    library = _torch_folder() / "lib"
    named = ["-ltorch", "-ltorch_cpu", "-lc10"] if any(file.name in _WITH_TORCH for file in files) else []
    return [f"-L{library}", *named, *(["-lomp", f"-Wl,-rpath,{library}"] if _MACOS else [])]


def _torch_folder() -> Path:
    return Path(torch.__path__[0])


def _compile(compiler: Sequence[str], files: Sequence[Path], flags: Sequence[str], target: Path) -> None:
    """Compile the files side by side, link them, and put the library in its place in one step."""
    from sparseffn.storage import file_digest, sync

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as scratch:
        objects = [Path(scratch) / f"{file.stem}.o" for file in files]
        commands = [
            [*compiler, *_flags_of(file, flags), "-c", str(file), "-o", str(made)]
            for file, made in zip(files, objects, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(_call, commands))
        whole = Path(scratch) / target.name
        _call([*compiler, *flags, "-shared", "-o", str(whole), *map(str, objects), *_link_flags(files)])
        sync(whole)
        whole.replace(target)
        target.with_suffix(".digest").write_text(file_digest(target))
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
    """The kernels of this process, registered with PyTorch's dispatcher.

    Raises:
        CompilerError: they cannot be compiled or loaded.
    """
    from sparseffn.storage import default_cache_dir

    try:
        path = str(compile_library(default_cache_dir() / "kernels"))
        torch.ops.load_library(path)
        return ctypes.CDLL(path)
    except UserError as error:
        raise CompilerError(str(error)) from error
    except OSError as error:
        # PyTorch names the file alone, the loader the reason.
        raise CompilerError(f"the compiled kernels cannot be loaded: {error.__cause__ or error}") from error


@functools.cache
def unavailable() -> str | None:
    """Why there are no compiled kernels, logged once; None where there are. Compiles at the first call."""
    try:
        if not (_MACOS or sys.platform.startswith("linux")):
            raise CompilerError(f"they are written for Linux and macOS, this is {sys.platform}")
        library()
    except CompilerError as error:
        logger.warning("no compiled CPU kernels, PyTorch's operations are used: %s", error)
        return str(error)
    return None


def differentiate(operation: str, cast: Sequence[str]) -> None:
    """Give an operation of the loaded library its autograd, and the arguments that autocast casts; see `dispatch.cpp`."""
    function = library().sparseffn_differentiate
    function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_char_p], ctypes.c_char_p
    error = function(operation.encode(), ",".join(cast).encode())
    if error is not None:
        raise RuntimeError(f"the compiled kernels do not fit the operation {operation}: {error.decode()}")


def instruction_sets() -> str | None:
    """What the kernels were compiled for, as "AVX512, AVX2"; None where there are none. Compiles at the first call."""
    if unavailable() is not None:
        return None
    function = library().sparseffn_instruction_sets
    function.restype = ctypes.c_char_p
    return function().decode()
