"""A conversion by split and distillation, and the peak of its memory in MB: `conversion_peak.py MODEL TEXT TOKENS OUT`.

What counts is memory that is the process's own. Pages of mapped files, which the system takes back when it needs them, do not.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from threading import Event, Thread

from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from sparseffn.hf import split
from sparseffn.hf.conversion import ConvertSettings, convert

STATUS = Path("/proc/self/status")


def held_mb() -> float:
    found = re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())
    assert found is not None, "Linux has it"
    return int(found[1]) / 1000


class Peak(Thread):
    """Looks every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over, self.before, self.most = Event(), held_mb(), 0.0

    def run(self) -> None:
        while not self.over.wait(0.002):
            self.most = max(self.most, held_mb() - self.before)


def main(model: str, text: str, tokens: str, out: str) -> None:
    # As if texts were so much longer, and nothing here is about quality.
    split._ROUTER_TOKENS = 4096
    disable_progress_bar()
    set_verbosity_error()
    settings = ConvertSettings(
        model=model, method="sigma-moe", options={"n_experts": 16, "k": 4}, fill=split.Split(rounds=2, router_steps=20),
        calibrate=Path(text), tokens=int(tokens), eval_tokens=2048, context=64, distill=5, end_to_end=0, batch_tokens=64,
        out=Path(out),
    )  # fmt: skip
    peak = Peak()
    peak.start()
    convert(settings)
    peak.over.set()
    peak.join()
    sys.stdout.write(f"{peak.most}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
