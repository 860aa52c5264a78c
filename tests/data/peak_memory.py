"""Prepare a text with all bounds of memory made small, and print the peak in MB: `peak_memory.py TEXT CACHE TOKENIZER`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sparseffn.data import bpe, load_corpus, splits

text, cache, tokenizer = sys.argv[1:]
# As if texts were so much longer: what grows with one of a few megabytes grows with one of any length.
splits.BLOCK_BYTES = 1 << 18
bpe.MAX_WORDS = 10_000
bpe.MAX_BYTES_OF_LINES = 1 << 18
load_corpus("text", data_dir=text, cache_dir=cache, tokenizer=tokenizer, vocab_size=400 if tokenizer == "bpe" else None)
status = Path("/proc/self/status").read_text()
peak = re.search(r"VmHWM:\s+(\d+) kB", status)
assert peak is not None, "Linux has it"
sys.stdout.write(f"{int(peak[1]) / 1000}\n")
