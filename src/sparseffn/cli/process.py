"""What the command does about its own process: memory that it frees, characters that the output cannot show, its end.

glibc maps each large block afresh, so that every pass over a new tensor pays for page faults: evaluation of a mixture at preset
tiny is many times slower so. Importing the library leaves the allocator alone.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import io
import os
import re
import sys
import unicodedata

# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1
# A few microseconds. Alone on two cores training is as fast as with GNU's 300,000.
_SPINS = 1000

# What stands for characters of our help and tables where only ASCII can be written: frames, signs, quotation marks.
_ASCII = {
    **dict.fromkeys("\u2500\u2501\u256d\u256e\u256f\u2570\u2578\u257a\u2013\u2014\u2212", "-"),
    **dict.fromkeys("\u2018\u2019", "'"),
    **dict.fromkeys("\u201c\u201d", '"'),
    "\u2502": "|",
    "\u2022": "*",
    "\u00d7": "x",
    "\u00b1": "+-",
    "\u2192": "->",
    "\u2264": "<=",
    "\u2265": ">=",
    "\u2423": "_",
    "\u03c3": "sigma",
}


def keep_freed_memory() -> None:
    """Have glibc keep memory; nothing happens where the C library is another one."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


def share_cores() -> None:
    """Have threads that wait for one another go to sleep soon; of use before PyTorch is imported, and no more after it.

    GNU's OpenMP lets them spin for a long time, on the very core that the thread which they wait for needs, where other work is
    on the machine. Nothing happens where the user's environment says how they wait.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(_SPINS)


def freed_memory() -> str:
    """What becomes of freed memory in this process, for results."""
    return "kept by the process" if sys.platform.startswith("linux") else "the C library's default"


def write_any_text() -> None:
    """Replace what the encoding of the output lacks, as under LC_ALL=C, instead of failing; a closed stream takes any text."""
    if sys.stdout is None:
        sys.stdout = io.StringIO()
    if sys.stderr is None:
        sys.stderr = io.StringIO()
    codecs.register_error("sparseffn", _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="sparseffn")


def _replace(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError), "registered for output"
    return "".join(map(_nearest, error.object[error.start : error.end])), error.end


def _nearest(character: str) -> str:
    """ASCII that may stand for a character: `x` for a multiplication sign, a letter without its accent, else `?`."""
    plain = unicodedata.normalize("NFKD", _ASCII.get(character, character))
    return "".join(c for c in plain if c.isascii()) or "?"


def launched_processes() -> str:
    """How many processes a launcher such as `torchrun` says that it started, as it stands in the environment."""
    return os.environ.get("WORLD_SIZE") or "1"


def leave(code: int) -> int:
    """End this process at once where it is one of several that a launcher started; else return the exit code.

    A thread of gloo may still free tensors of the last collective, for which it needs the interpreter. While that goes away, it
    aborts the process instead ("terminate called without an active exception", exit code -6), and the launcher ends the others.
    `destroy_process_group` waits for such threads only where nothing else holds the group, as DTensor's cache of meshes does.
    """
    if launched_processes() != "1":
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def printable(text: str) -> str:
    """The text with control characters but line ends and tabs escaped: none of it can steer a terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)
