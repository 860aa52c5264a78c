"""What `sparseffn plan` says against what steps in 1, 2 and 4 processes do: writes results/planned.json.

    python tools/planned.py

Sent by a process: the tensors that every collective of a step is given, each at what a ring sends of it, as the plan counts;
and on Linux as root the bytes that really pass the network, in a network namespace of their own. Peak: as PyTorch's allocator
reports it. The processes are on this machine and join by gloo, which has no reduce-scatter: PyTorch sends an all-reduce.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from sparseffn.cli.process import leave
from sparseffn.comparison import match_methods, parse_methods
from sparseffn.distribution import World, joined
from sparseffn.ffn import list_methods, shard_experts
from sparseffn.models import build_model
from sparseffn.models.presets import get_preset
from sparseffn.results.planned_result import PlannedResult, PlannedRun
from sparseffn.storage import environment, write_json
from sparseffn.training import from_preset
from sparseffn.training.layout import Layout, Strategy
from sparseffn.training.planner import plan
from sparseffn.training.replicas import replicate
from sparseffn.training.stepper import Stepper, training_losses

ROOT = Path(__file__).resolve().parent.parent
PRESET, BATCH, CONTEXT, VOCABULARY = "small", 8, 128, 300
SPREAD = "experts over 2"
"""Expert parallelism beside DDP."""
# Number of processes, strategy, method, micro-batches.
WAYS = [(1, "-", method, 1) for method in list_methods()]
WAYS += [(n, strategy, "sigma-moe", m) for strategy in ("ddp", "fsdp") for n, m in ((2, 1), (4, 1), (4, 2))]
WAYS += [(2, "ddp", method, 1) for method in ("dense", "base", "s-base", "switch")]
WAYS += [(2, "fsdp", "dense", 1), (2, SPREAD, "sigma-moe", 1), (4, SPREAD, "sigma-moe", 1)]
WAYS += [(2, "ep-fsdp", "sigma-moe", 1), (4, "ep-fsdp", "sigma-moe", 1), (4, "ep-fsdp", "sigma-moe", 2)]


class SentBytes(TorchDispatchMode):
    """Adds up what a process sends for the collectives that it sees, by a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            of = [sum(t.nbytes for t in tensors_in(arg)) for arg in args[:2]]
            n = next(dist.ProcessGroup.unbox(arg).size() for arg in args if isinstance(arg, torch.ScriptObject))
            share = (n - 1) / n
            match func.name().removeprefix("c10d::").rstrip("_"):
                case "allreduce":
                    self.total += 2 * share * of[0]
                case "allgather" | "_allgather_base" | "allgather_into_tensor_coalesced":
                    self.total += share * of[0]
                case "_reduce_scatter_base" | "alltoall_base":
                    self.total += share * of[1]
                case other:
                    raise SystemExit(f"{other} must be counted too")
        return func(*args, **(kwargs or {}))


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Those of nested lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def storages(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct storages, of a sharded tensor this process's part."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


def on_the_wire() -> int:
    """Bytes that the loopback device has sent."""
    found = re.search(r"lo:\s*(?:\d+\s+){8}(\d+)", Path("/proc/net/dev").read_text())
    assert found is not None, "every machine has a loopback device"
    return int(found[1])


def work(strategy: str, method: str, accumulation: int, out: str, *, counts_wire: bool) -> None:
    """One process: a plan, and steps that are measured; the first process writes both."""
    torch.set_num_threads(1)
    chosen = dataclasses.replace(get_preset(PRESET), batch=BATCH, context=CONTEXT)
    model = match_methods(parse_methods([method]), chosen, VOCABULARY)[0].model
    config = from_preset(chosen, accumulation=accumulation)
    with joined("cpu") as world:
        built = build_model(model).train()
        built.init_parameters(0)
        if strategy == SPREAD:
            layout = Layout(gpus=world.size, expert_parallel=2, device_type="cpu")
        else:
            layout = Layout.of(world.size, known(strategy), "cpu")
        planned = plan(model, config, layout)
        step, there = steps_of(built, config, world, strategy)
        for _ in range(3):
            step()
        sent, wire, peak = measured(step, there, world, counts_wire=counts_wire)
        if world.leads:
            run = PlannedRun(
                processes=world.size,
                strategy=strategy,
                method=method,
                accumulation=accumulation,
                planned_sent=planned.communication.total,
                counted_sent=round(sent),
                wire_sent=wire,
                planned_peak=planned.memory.peak,
                measured_peak=peak,
            )
            write_json(Path(out), run)


def steps_of(built: Any, config: Any, world: World, strategy: str) -> tuple[Callable[[], None], Callable[[], list[Tensor]]]:
    """A step of training, and what lies on the device between steps."""
    own = config.batch // world.size
    generator = torch.Generator().manual_seed(world.rank)
    inputs, targets = (torch.randint(VOCABULARY, (own, config.context), generator=generator) for _ in "xy")
    if strategy == SPREAD:
        return spread_steps(built, config, world, inputs, targets)
    stepper = Stepper(built, config, world=world, replica=replicate(built, config, world, known(strategy)))

    def there() -> list[Tensor]:
        if strategy != "ddp":
            stepper.optimizer.zero_grad(set_to_none=True)
        states = [value for state in stepper.optimizer.state.values() for value in state.values()]
        memories = [states for memory in stepper.memories for states in memory or ()]
        gradients = [p.grad for p in built.parameters() if p.grad is not None]
        return [*built.parameters(), *states, *memories, *gradients]

    return lambda: void(stepper.take(inputs, targets, lr=1e-4)), there


def known(strategy: str) -> Strategy:
    """That of a run in one process, which has none, is as good as any."""
    return next((each for each in get_args(Strategy) if each == strategy), "ddp")


def void(_: object) -> None:
    """Nothing."""


def measured(
    step: Callable[[], None], there: Callable[[], list[Tensor]], world: World, *, counts_wire: bool
) -> tuple[float, int | None, int]:
    """Bytes sent by one process, counted and on the wire, and the peak of a step."""
    with SentBytes() as counter:
        step()
    wire = None
    if counts_wire and not world.is_alone:
        dist.barrier()
        before, n = on_the_wire(), 3
        for _ in range(n):
            step()
        dist.barrier()
        wire = round((on_the_wire() - before) / n / world.size)
    base = storages(there())
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results: Any = profiler.profiler
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return counter.total, wire, base + peak


def spread_steps(
    built: Any, config: Any, world: World, inputs: Tensor, targets: Tensor
) -> tuple[Callable[[], None], Callable[[], list[Tensor]]]:
    """Forward and backward with experts spread over pairs of processes; the optimiser is left out, its state is counted."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world.size // 2, 2), mesh_dim_names=("dp", "ep"))
    sharded = shard_experts(built, mesh["ep"])
    experts = [p for name, p in built.named_parameters() if name in sharded]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(built, sharded)
    replica = replicate(built, config, world, "ddp")
    memory = None

    def step() -> None:
        nonlocal memory
        built.zero_grad(set_to_none=True)
        losses, balance, memory = training_losses(replica.run, inputs, targets, memory, config)
        (losses.mean() + balance).backward()
        if world.size > 2:
            for expert in experts:
                assert isinstance(expert.grad, DTensor), "a sharded weight has a sharded gradient"
                dist.all_reduce(expert.grad.to_local(), group=mesh["dp"].get_group())

    def there() -> list[Tensor]:
        moments = [torch.empty_like(p.to_local() if isinstance(p, DTensor) else p) for p in built.parameters() for _ in "mv"]
        others = [p.grad for p in built.parameters() if p.grad is not None and not isinstance(p, DTensor)]
        for expert in experts:
            expert.grad = None
        return [*built.parameters(), *moments, *others, *(memory or ())]

    return step, there


def measure(n: int, strategy: str, method: str, accumulation: int, folder: Path) -> PlannedRun:
    """Start the processes, in a network of their own where this user may make one."""
    out = folder / "run.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
    words = [sys.executable, *launcher, str(Path(__file__)), "--worker", str(out), "--method", method]
    words += ["--strategy", strategy, "--accumulation", str(accumulation)]
    if n > 1 and os.geteuid() == 0 and shutil.which("unshare") and shutil.which("ip"):
        words = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *words, "--wire"]
    with contextlib.suppress(FileNotFoundError):
        out.unlink()
    subprocess.run(words, check=True)
    return msgspec.json.decode(out.read_bytes(), type=PlannedRun)


def main() -> int:
    """Measure all ways, or be a process of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--strategy", help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--accumulation", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--wire", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.strategy, options.method, options.accumulation, options.worker, counts_wire=options.wire)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        runs = [measure(*way, Path(folder)) for way in WAYS]
    result = PlannedResult(preset=PRESET, batch=BATCH, context=CONTEXT, environment=environment("cpu"), runs=runs)
    write_json(ROOT / "results" / "planned.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(leave(main()))
