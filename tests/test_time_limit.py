"""A run of the tests with `--minutes`: what has not begun by then is skipped, and said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("minutes", "n_skipped"), [("0", 6), ("60", 0)], ids=["over", "left"])
def test_tests_that_have_not_begun_are_counted(minutes: str, n_skipped: int) -> None:
    """Six tests: none of them runs, or all do."""
    here = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--minutes",
        minutes,
        "-k",
        "other_machine",
        "test_network.py",
    ]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert (f"{n_skipped} tests were NOT RUN: not begun within the time" in done.stdout) == (n_skipped > 0), done.stdout
    assert f"6 {'skipped' if n_skipped else 'passed'}" in done.stdout, done.stdout
