"""Is a layer bound by its kernels or by issuing them? Host time against the same call replayed as a CUDA graph.

    python -m sparseffn.bench.launches OUT.json [--device cuda] [--dtype bfloat16] [--tokens ...] [--shapes D,E ...]

Beside the times stand the longest kernels, and where a call waits for the device. A part of `make gpu`.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
import tyro

from sparseffn.bench.candidates import (
    DENSE,
    DTYPES,
    Candidate,
    Setting,
    backend_restored,
    build_layer,
    draw_tokens,
    print_progress,
    use_backend,
    why_not,
)
from sparseffn.bench.machine import head
from sparseffn.devices import Precision, find_device, synchronize
from sparseffn.ffn.dense import DenseConfig
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.results.gpu_result import LaunchesResult, LaunchRow
from sparseffn.storage import write_json

T = TypeVar("T")
# The experts of the paper's models.
_EXPERT_SIZE, _K = 128, 4
_WARMUP, _REPEATS = 3, 3
_LONGEST = 8


class _Calls:
    """One layer's calls at one size."""

    def __init__(self, candidate: Candidate, setting: Setting) -> None:
        self.layer = build_layer(candidate.config, setting, seed=0)
        self.x = draw_tokens(candidate.config, setting, seed=1)
        self.grad = draw_tokens(candidate.config, setting, seed=2)
        self.leaf = self.x.clone().requires_grad_()

    def forward(self) -> None:
        with torch.inference_mode():
            self.layer(self.x)

    def training(self) -> None:
        self.layer(self.leaf).backward(self.grad)
        self._free()

    def with_statistics(self) -> None:
        y, stats = self.layer(self.leaf, return_stats=True)
        (y.float().mean() + stats.balance_loss).backward()
        self._free()

    def _free(self) -> None:
        for tensor in (self.leaf, *self.layer.parameters()):
            tensor.grad = None


def bench_launches(
    out: Path,
    *,
    device: str = "cuda",
    dtype: Precision = "bfloat16",
    tokens: tuple[int, ...] = (1024, 8192, 32768),
    shapes: tuple[str, ...] = ("412,16", "512,16", "1024,32"),
    calls: int = 30,
) -> None:
    """Measure the dense block and sigma-MoE on every backend; the file is written after every row.

    Args:
        out: the file.
        device: a GPU, or the CPU for host times alone.
        dtype: of parameters and tokens.
        tokens: of a call.
        shapes: d_model and number of experts.
        calls: timed in one go, a third of it from 16,384 tokens.
    """
    place = find_device(device)
    result = LaunchesResult(**head(place), dtype=dtype, rows=())
    for shape in shapes:
        d_model, n_experts = map(int, shape.split(","))
        for n_tokens in tokens:
            setting = Setting(n_tokens=n_tokens, dtype=DTYPES[dtype], device=place)
            for candidate in _candidates(d_model, n_experts, setting):
                row = _row(candidate, setting, n_experts, calls if n_tokens < 16384 else max(3, calls // 3))
                result = msgspec.structs.replace(result, rows=(*result.rows, row))
                times = f"{row.forward_us} and {row.training_us} us"
                print_progress(f"{d_model} {n_experts} {n_tokens} {row.label}: {times} {' '.join(row.notes)}")
                write_json(out, result)


def _candidates(d_model: int, n_experts: int, setting: Setting) -> list[Candidate]:
    sigma = SigmaMoEConfig(d_model=d_model, n_experts=n_experts, expert_size=_EXPERT_SIZE, k=_K)
    backends = [name for name in ("triton", "grouped_mm", "torch") if why_not(name, setting.device, setting.dtype) is None]
    dense = Candidate(label=DENSE, config=DenseConfig(d_model=d_model, d_ff=n_experts * _EXPERT_SIZE))
    return [dense, *(Candidate(label=f"sigma-moe [{name}]", config=sigma, backend=name) for name in backends)]


def _row(candidate: Candidate, setting: Setting, n_experts: int, n: int) -> LaunchRow:
    """All that can be measured; what fails is a note, as one backend must not cost the others' rows."""
    notes: list[str] = []

    def tried(what: str, measure: Callable[[], T]) -> T | None:
        try:
            return measure()
        except Exception as error:
            notes.append(f"{what}: {type(error).__name__}: {error}"[:200])
            return None

    with backend_restored():
        use_backend(candidate.backend)
        calls = _Calls(candidate, setting)
        calls.layer.eval()
        forward = tried("forward", lambda: _host_us(calls.forward, n, setting.device)) or (None, None)
        calls.layer.train()
        training = tried("training", lambda: _host_us(calls.training, n, setting.device)) or (None, None)
        on_gpu: dict[str, Any] = {}
        if setting.device.type == "cuda" and training[0] is not None:
            waits = tried("waits", lambda: _waits(calls.training))
            kernels = tried("kernels", lambda: _kernels(calls.training)) or []
            on_gpu = {
                "waits": waits,
                "waits_with_statistics": tried("statistics", lambda: _waits(calls.with_statistics)),
                "n_kernels": sum(count for _, count, _ in kernels) or None,
                "kernels_us": round(sum(us for _, _, us in kernels), 1) or None,
                "longest": tuple(kernels[:_LONGEST]),
            }
        # A capture that fails, as of a call that reads offsets back, may spoil later ones.
        if on_gpu.get("waits") == "":
            calls.layer.eval()
            on_gpu["forward_graph_us"] = tried("graph", lambda: _graph_us(calls.forward, n))
            calls.layer.train()
            on_gpu["training_graph_us"] = tried("graph", lambda: _graph_us(calls.training, n))
    return LaunchRow(
        d_model=candidate.config.d_model,
        n_experts=n_experts,
        tokens=setting.n_tokens,
        label=candidate.label,
        forward_us=forward[0],
        forward_issued_us=forward[1],
        training_us=training[0],
        training_issued_us=training[1],
        **on_gpu,
        notes=tuple(notes),
    )


def _host_us(call: Callable[[], None], n: int, device: torch.device) -> tuple[float, float]:
    """Microseconds a call until the device is done, and until the host had issued it: the best of a few."""
    for _ in range(_WARMUP):
        call()
    synchronize(device)
    found = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for _ in range(n):
            call()
        issued = time.perf_counter()
        synchronize(device)
        found.append((1e6 * (time.perf_counter() - start) / n, 1e6 * (issued - start) / n))
    whole, issued = min(found)
    return round(whole, 1), round(issued, 1)


def _graph_us(call: Callable[[], None], n: int) -> float:
    """Microseconds of the captured call, best of a few, by the device's own clock."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(n):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / n)
    return round(min(times), 1)


def _kernels(call: Callable[[], None]) -> list[tuple[str, int, float]]:
    """Name, calls and microseconds of every kernel of a call, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    events = [e for e in found.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    return [(e.key[:60], e.count, round(e.self_device_time_total, 1)) for e in events]


def _waits(call: Callable[[], None]) -> str:
    """Where a call waits for the device; empty if nowhere."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return "".join(traceback.format_exception(error)[-3:])[-200:]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


if __name__ == "__main__":
    tyro.cli(bench_launches, config=(tyro.conf.PositionalRequiredArgs,))
