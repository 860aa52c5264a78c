"""Runs every case of `triton_cases.FULL` on a GPU, in many processes that survive a lost device, and writes what went wrong.

    python run_on_device.py OUT.json [--workers 12] [--limit 400] [--only WORD]
    TRITON_INTERPRET=1 python run_on_device.py OUT.json --only experts-relu-one      (a rehearsal on the CPU)

Each worker writes OUT.json.N after every case, so that nothing is run again when the same command goes on; OUT.json is what
`sparseffn.bench.gpu` reads. A case that kills its process counts as wrong and its worker is started again after it. Compilation
takes most of the time. Look closer at a failing case by its name, with CUDA_LAUNCH_BLOCKING=1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import triton_cases

# A worker that keeps losing the device is given up.
_MOST_RESTARTS = 5
_LOST = 3


def chosen(only: str) -> list[triton_cases.Case]:
    """Cases whose name holds a word."""
    return [case for case in triton_cases.FULL if only in case.name]


def shard(out: Path, worker: int) -> Path:
    """The file of a worker."""
    return out.with_name(f"{out.name}.{worker}")


def work(out: Path, worker: int, n_workers: int, only: str) -> None:
    """Run one worker's cases that have no result yet."""
    import run_interpreted
    import torch
    from triton import knobs

    interpreted = knobs.runtime.interpret
    if interpreted:
        run_interpreted.patched_interpreter.mend()
    else:
        torch.set_default_device("cuda")
        # cuBLAS starts in autograd's thread, before new tensors are filled with NaN.
        a = torch.ones(16, 16, requires_grad=True)
        (a @ a).sum().backward()
    run_interpreted.poison_new_tensors()
    path = shard(out, worker)
    found: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    for case in chosen(only)[worker::n_workers]:
        if case.name in found:
            continue
        found[case.name] = "the process died in this case"
        path.write_text(json.dumps(found))
        found[case.name], lost = outcome(run_interpreted.check, case, interpreted)
        path.write_text(json.dumps(found))
        if lost:
            os._exit(_LOST)


def outcome(check, case: triton_cases.Case, interpreted: bool) -> tuple[str, bool]:
    """What is wrong with a case, and whether it took the device with it."""
    import torch

    try:
        message = check(case)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"[:400]
    try:
        if not interpreted:
            torch.cuda.synchronize()
    except Exception as error:
        return f"{message} | device lost: {error}"[:400], True
    return message, False


def launch(out: Path, worker: int, n_workers: int, only: str) -> subprocess.Popen:
    """A worker in a process of its own."""
    words = [sys.executable, __file__, str(out), "--workers", str(n_workers), "--only", only, "--worker", str(worker)]
    return subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"})


def collect(out: Path, n_workers: int, only: str, restarts: int) -> dict[str, Any]:
    """Write what all workers found."""
    shards = [path for path in (shard(out, worker) for worker in range(n_workers)) if path.exists()]
    # A worker may be writing.
    found: dict[str, str] = {}
    for path in shards:
        try:
            found |= json.loads(path.read_text())
        except json.JSONDecodeError:
            continue
    whole = {
        "n_cases": len(chosen(only)),
        "n_run": len(found),
        "wrong": [{"name": name, "message": message} for name, message in found.items() if message],
        "restarts": restarts,
        "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
    }
    out.write_text(json.dumps(whole, indent=1))
    return whole


def run(out: Path, n_workers: int, limit_s: float, only: str) -> dict[str, Any]:
    """All cases, until the time limit."""
    start = time.monotonic()
    running = {worker: launch(out, worker, n_workers, only) for worker in range(n_workers)}
    restarts = dict.fromkeys(running, 0)
    try:
        while running and time.monotonic() - start < limit_s:
            time.sleep(0.5)
            for worker, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[worker]
                if process.returncode and restarts[worker] < _MOST_RESTARTS:
                    restarts[worker] += 1
                    running[worker] = launch(out, worker, n_workers, only)
            collect(out, n_workers, only, sum(restarts.values()))
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return collect(out, n_workers, only, sum(restarts.values()))


def main() -> int:
    """0 where every case ran, right or wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--limit", type=float, default=400.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--worker", type=int)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.out, options.worker, options.workers, options.only)
        return 0
    whole = run(options.out, options.workers, options.limit, options.only)
    lines = [f"{whole['n_run']} of {whole['n_cases']} cases, {len(whole['wrong'])} wrong, {whole['restarts']} restarts"]
    lines += [f"  {entry['name']}: {entry['message'][:200]}" for entry in whole["wrong"]]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if whole["n_run"] == whole["n_cases"] else 1


if __name__ == "__main__":
    sys.exit(main())
