"""The cases of the Triton tests in many processes: a lost device costs one case, and nothing is run twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import run_on_device

ONLY = "experts-relu-one-float32"
# A worker that dies in its first case, then goes on as the real one does.
WORKER = """
import json, os, pathlib, sys
import run_on_device
path, only = pathlib.Path(sys.argv[1]), sys.argv[2]
found = json.loads(path.read_text()) if path.exists() else {}
for case in run_on_device.chosen(only):
    if case.name in found:
        continue
    path.write_text(json.dumps({**found, case.name: "the process died in this case"}))
    if not found:
        os._exit(3)
    found[case.name] = ""
    path.write_text(json.dumps(found))
"""


def test_lost_device_costs_one_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is started again after the case that killed it, which counts as wrong."""

    def launch(out: Path, worker: int, n_workers: int, only: str) -> subprocess.Popen:
        command = [sys.executable, "-c", WORKER, str(run_on_device.shard(out, worker)), only]
        return subprocess.Popen(command, cwd=Path(run_on_device.__file__).parent)

    monkeypatch.setattr(run_on_device, "launch", launch)
    out = tmp_path / "cases.json"
    whole = run_on_device.run(out, n_workers=1, limit_s=60.0, only=ONLY)
    first = run_on_device.chosen(ONLY)[0].name
    assert whole["wrong"] == [{"name": first, "message": "the process died in this case"}]
    assert (whole["n_run"], whole["n_cases"], whole["restarts"]) == (2, 2, 1) and json.loads(out.read_text()) == whole


def test_time_limit_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are stopped; the file says how many cases were run."""
    monkeypatch.setattr(
        run_on_device, "launch", lambda *args: subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    )
    whole = run_on_device.run(tmp_path / "cases.json", n_workers=2, limit_s=1.0, only=ONLY)
    assert (whole["n_run"], whole["n_cases"]) == (0, 2)
