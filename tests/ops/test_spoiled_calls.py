"""Operations called as nobody should call them neither crash nor give something wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_spoiled_calls_are_refused_or_answered_rightly() -> None:
    """In a process of its own, so that a crash is a failure with the name of the call."""
    command = [sys.executable, str(Path(__file__).with_name("spoiled_calls.py")), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-2000:]
