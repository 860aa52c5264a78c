"""What the compiler makes of the tiles' loops: every register is loaded once, however often it is multiplied."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from variants import without

from sparseffn.ops.cpu import build

TILES = Path(__file__).with_name("tiles.cpp")
_MULTIPLIES = re.compile(r"v(fmadd|dpbf16)\w*")
# AT&T's order: what is read comes first, what is written last.
_READS = re.compile(r"v\w+\s+[^%(]*\([^)]*\)[^,]*,")


class Loop(NamedTuple):
    """An innermost loop of a function, by numbers of its instructions."""

    function: str
    multiplies: int
    reads: int


def loops_of(assembly: str) -> list[Loop]:
    """Loops without branches inside, that multiply."""
    found, function, body, label = [], "", [], ""
    for line in assembly.splitlines():
        text = line.split("#")[0].strip()
        if text.endswith(":"):
            function = text[:-1] if text.startswith("_Z") else function
            body, label = [], text[:-1]
        elif text.startswith("j"):
            if label and text.split()[-1] == label:
                multiplies = sum(bool(_MULTIPLIES.match(t)) for t in body)
                if multiplies:
                    found.append(Loop(function, multiplies, sum(bool(_READS.match(t)) for t in body)))
            body, label = [], ""
        elif text and not text.startswith("."):
            body.append(text)
    return found


def compiled_for(target: str) -> str:
    """The tiles in assembly."""
    command = [
        *build.find_compiler(),
        *without("-march=native"),
        f"-march={target}",
        f"-I{build.SOURCES}",
        "-S",
        str(TILES),
        "-o",
        "-",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def most_reads(loop: Loop) -> int:
    """As many as both sides of a tile have, for each turn that the compiler unrolled."""
    rows, columns = (int(re.findall(pattern, loop.function)[-1]) for pattern in (r"Li(\d)E", r"A(\d)_"))
    return loop.multiplies // (rows * columns) * (rows + columns)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the compiler is for another processor than x86-64")
@pytest.mark.parametrize(("target", "n_tiles"), {"haswell": 5, "skylake-avx512": 8, "cooperlake": 11}.items())
def test_each_register_is_loaded_once(target: str, n_tiles: int) -> None:
    """With AVX2, AVX-512, and its instructions for bfloat16. GCC 12 loads a register for every product otherwise: four rows and
    four lines took 29 loads instead of 8 (docs/kernels.md)."""
    loops = loops_of(compiled_for(target))
    assert len({loop.function for loop in loops}) == n_tiles
    assert [loop for loop in loops if loop.reads > most_reads(loop)] == []
