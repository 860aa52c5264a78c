"""Memory of preparing a corpus does not grow with its text, whichever the tokenizer."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from sparseffn.data import list_tokenizers

SCRIPT = Path(__file__).with_name("peak_memory.py")
WORDS = [f"w{number}" for number in range(5000)]


def write_text(path: Path, n_bytes: int, *, of_new_words: bool) -> None:
    """Lines of words, a half of them never seen before where that is wanted."""
    draw, size = random.Random(0), 0
    with path.open("w") as stream:
        while size < n_bytes:
            words = draw.choices(WORDS, k=12)
            if of_new_words:
                words[::2] = [f"{draw.getrandbits(60):x}é" for _ in words[::2]]
            size += stream.write(" ".join(words) + "\n")


def peak_mb(text: Path, cache: Path, tokenizer: str) -> float:
    command = [sys.executable, str(SCRIPT), str(text), str(cache), tokenizer]
    # Blocks that are freed go back to the system at once, so that the peak is of what is held.
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    return float(subprocess.run(command, env=settings, check=True, stdout=subprocess.PIPE, text=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize("tokenizer", list_tokenizers())
def test_peak_does_not_grow_with_the_text(tokenizer: str, tmp_path: Path) -> None:
    """Of 16 MB it is that of 2 MB, within 8 MB. A vocabulary of words is as large as it is: its text has few."""
    pytest.importorskip("sentencepiece") if tokenizer == "bpe" else None
    peaks = []
    for n_bytes in (2_000_000, 16_000_000):
        write_text(tmp_path / f"{n_bytes}.txt", n_bytes, of_new_words=tokenizer != "words")
        peaks.append(peak_mb(tmp_path / f"{n_bytes}.txt", tmp_path / "cache", tokenizer))
    assert peaks[1] < peaks[0] + 8, peaks
