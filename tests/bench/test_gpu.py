"""`make gpu`, rehearsed on the CPU: parts are processes, survive one another, and are not run twice."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparseffn.bench import gpu
from sparseffn.bench.gpu import PARTS, Part, run_gpu
from sparseffn.bench.machine import measured_on
from sparseffn.cli import main
from sparseffn.errors import UserError
from sparseffn.report.gpu_report import gpu_markdown, gpu_page
from sparseffn.results.bench_result import LayerResult
from sparseffn.results.gpu_result import GPU_PARTS, GpuPart, read_gpu_parts

# Each command once; the others are the same in another dtype or preset.
REHEARSED = ("triton-cases", "layer-fp32", "step-bf16", "launches", "figures", "compare-small", "tiles")
# What a machine with a GPU and no network may lack.
ABSENT = ("pooch", "sentencepiece", "datasets", "tensorboard")


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that cannot import what may be absent."""
    for name in ABSENT:
        (tmp_path / "bare").mkdir(exist_ok=True)
        (tmp_path / "bare" / f"{name}.py").write_text("raise ImportError('not on the machine with the GPU')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "bare"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
@pytest.mark.usefixtures("bare")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton has wheels for Linux on x86_64")
def test_rehearsal_runs_every_kind_of_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With files under the size that is allowed, a page, and nothing run twice."""
    out, work = tmp_path / "out", tmp_path / "work"
    words = ["bench", "gpu", "--rehearse", "--device", "cpu", "--out", str(out), "--work", str(work), "--parts", *REHEARSED]
    code, found = main(words), read_gpu_parts(out)
    assert {part.part: (part.state, part.error) for part in found} == dict.fromkeys(REHEARSED, ("done", "")) and code == 0
    assert sum(path.stat().st_size for path in out.iterdir()) < 60_000
    layer = next(part.result for part in found if part.part == "layer-fp32")
    assert isinstance(layer, LayerResult) and {row.label for row in layer.rows} == {"dense", "sigma-moe"}
    assert all(part.environment.torch == torch.__version__ and str(tmp_path) not in part.title for part in found)
    page = (out / "gpu.html").read_text()
    assert "A rehearsal" in page and all(PARTS[name].title in page for name in REHEARSED)
    assert "unmeasured" in gpu_markdown(out) and "Measured on a GPU" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "run_part", None)
    assert main(words) == 0 and read_gpu_parts(out) == found


def test_source_tree_names_the_package_that_it_lacks() -> None:
    """In one line with the remedy, exit code 2."""
    script = "import sys, runpy; sys.modules['tyro'] = None; runpy.run_module('sparseffn', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("sparseffn: package 'tyro' must be installed; fix: pip install .")


@pytest.fixture
def run_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], GpuPart]:
    """Runs a part whose command is a script that gets the part's folder; its result is that of the cases."""

    def run(script: str, limit_s: float = 60.0) -> GpuPart:
        path = tmp_path / "part.py"
        path.write_text(script)
        part = Part("tiles", "x", PARTS["triton-cases"].collect, f"{path} {{work}}", limit_s=limit_s)
        monkeypatch.setattr(gpu, "_probe", lambda device: measured_on(torch.device(device)))
        monkeypatch.setitem(PARTS, "tiles", part)
        return run_gpu(tmp_path / "out", parts=["tiles"], device="cpu", work=tmp_path / "work", rehearse=True)[0]

    return run


WRITES = """
import json, pathlib, sys
cases = {"n_cases": 4, "n_run": 1, "wrong": [{"name": "a", "message": "off"}], "restarts": 2}
(pathlib.Path(sys.argv[1]) / "cases.json").write_text(json.dumps(cases))
"""


def test_failed_part_keeps_its_error_and_is_run_again(run_script: Callable[[str], GpuPart]) -> None:
    """What it wrote before is kept; the next run of the same part takes its place."""
    failed = run_script(f"{WRITES}sys.exit('the device is lost')")
    assert failed.state == "failed" and failed.error == "the device is lost"
    assert failed.result is not None and "the device is lost" in gpu_page([failed])
    assert run_script(WRITES).state == "done"


def test_part_beyond_its_limit_is_stopped_with_its_children(tmp_path: Path, run_script: Callable[..., GpuPart]) -> None:
    """What came until then is kept."""
    marker = tmp_path / "child"
    child = f"import time, pathlib; time.sleep(6); pathlib.Path({str(marker)!r}).touch()"
    script = f"{WRITES}import subprocess, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    stopped = run_script(script, limit_s=3.0)
    assert stopped.state == "time limit" and stopped.result is not None and stopped.seconds < 30
    assert not marker.exists()


def test_bad_calls_are_refused(tmp_path: Path) -> None:
    """Unknown parts, a measurement without a GPU; nothing is written."""
    with pytest.raises(UserError, match="did you mean 'layer-bf16'"):
        run_gpu(tmp_path / "out", parts=["layer-bf6"])
    with pytest.raises(UserError, match="must be a GPU to measure it; got 'cpu'"):
        run_gpu(tmp_path / "out", device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU is visible"):
            run_gpu(tmp_path / "out", parts=["tiles"])
    assert not (tmp_path / "out").exists()


def test_absent_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that brings them along."""
    monkeypatch.setattr(gpu, "NEEDED", ("json", "no_such_package"))
    with pytest.raises(UserError, match=r"got no no_such_package; fix: `make gpu-wheels`.*make gpu WHEELS=FOLDER"):
        run_gpu(tmp_path / "out", device="cpu", rehearse=True)


def test_parts_are_in_the_order_of_their_files() -> None:
    """And each ends within eight minutes."""
    assert tuple(PARTS) == GPU_PARTS and all(part.limit_s < 480 for part in PARTS.values())


def test_rows_of_the_readme_come_from_the_files(tmp_path: Path) -> None:
    """A table of what is there; what is not is named as unmeasured."""
    committed = json.loads((Path(__file__).parents[2] / "results" / "bench-layer-paper-2-cores.json").read_text())
    rows = [row for row in committed["rows"] if row["tokens"] == 1024]
    layer = {**committed, "rows": rows, "environment": {**committed["environment"], "device": "GPU X", "driver": "580.1"}}
    part = {"kind": "gpu", "format": 1, "environment": layer["environment"], "part": "layer-fp32", "title": "Layers"}
    part |= {"command": ["python"], "seconds": 9.0, "limit_s": 470.0, "state": "done", "result": layer}
    (tmp_path / "layer-fp32.json").write_text(json.dumps(part))
    text = gpu_markdown(tmp_path)
    assert "Measured on GPU X, driver 580.1, torch 2.13.0" in text
    assert "| float32 | wt-s | 1,024 |" in text and text.count("| float32 |") == 3
    assert "Unmeasured: triton-cases, layer-bf16, step-bf16" in text and "layer-fp32," not in text
    assert "unmeasured**" in gpu_markdown(tmp_path / "nothing")
