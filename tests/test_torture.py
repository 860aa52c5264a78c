"""Really killed processes: `make torture` in small."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def torture(*words: str) -> list[tuple[str, int, int, int]]:
    """Class of faults, tried, survived and lost, of each line that is printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / "tools" / "torture"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = re.findall(r"^(\S+) +(\d+) tried, +(\d+) survived, (\d+) lost", done.stdout, flags=re.MULTILINE)
    assert found, done.stderr
    assert done.returncode == any(int(lost) for *_, lost in found), done.stderr
    return [(name, int(tried), int(survived), int(lost)) for name, tried, survived, lost in found]


def test_ten_kills_at_random_moments_change_no_bit() -> None:
    """SIGKILL while steps are taken and files written; every tensor, line and number is compared."""
    assert torture("--only", "kill", "--kills", "10") == [("kill", 10, 10, 0)]


@pytest.mark.slow
def test_every_class_of_faults_is_survived() -> None:
    """Three minutes of `make torture`."""
    found = torture("--minutes", "3", "--kills", "40", "--seed", "1")
    assert len(found) == 8
    assert all(tried == survived > 0 and lost == 0 for _, tried, survived, lost in found)
