"""A batch spread over processes, and what every process tells of how far it is from one process: what tests of it share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from sparseffn.ffn import FeedForward
from sparseffn.ffn.routing_stats import RoutingStats

LENGTH = 5
SEED = 7
# Sequences of each rank, as many as there are ranks.
PARTS = {"even": (2, 2, 2, 2), "masked": (1, 3, 2, 4), "empty": (0, 4, 2, 2)}


@dataclass
class Spread:
    """A batch `[sequences, length, d_model]` over the processes, and what one process makes of it."""

    x: Tensor
    mask: Tensor
    weights: Tensor
    own: slice
    has_mask: bool

    @classmethod
    def of(cls, variant: str, d_model: int, rank: int, size: int) -> Spread:
        """The same numbers on every rank; the first tokens, of rank 0, are nearly one, so that few experts get any."""
        counts = PARTS[variant][:size]
        generator = torch.Generator().manual_seed(3)
        x, weights = (torch.randn(sum(counts), LENGTH, d_model, dtype=torch.float64, generator=generator) for _ in range(2))
        x[: counts[0]] = x[:1, :1] + 1e-3 * x[: counts[0]]
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        if variant == "masked":
            mask[counts[0] :, 2:] = False
            mask[-1] = False
        first = sum(counts[:rank])
        # Rank 0 has no padding and knows of none.
        return cls(x, mask, weights, slice(first, first + counts[rank]), variant == "masked" and rank > 0)


def loss_of(
    layer: FeedForward, x: Tensor, mask: Tensor | None, weights: Tensor, scale: float
) -> tuple[Tensor, RoutingStats, Tensor]:
    """Output, statistics, and a loss that is a sum over tokens, times a scale, and in training the balancing loss."""
    y, stats = layer(x, mask=mask, return_stats=True)
    loss = scale * (y * weights).sum()
    return y, stats, loss + stats.balance_loss if layer.training else loss


def difference(a: Tensor, b: Tensor) -> float:
    """Largest, infinite where one is NaN; of sums in float32, which the order of terms changes, only what is more than that."""
    if a.shape != b.shape:
        return math.inf
    if a.dtype == torch.float32 and torch.allclose(a, b, rtol=1e-6):
        return 0.0
    largest = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    return largest if math.isfinite(largest) else math.inf


def join(rank: int, size: int, folder: str) -> None:
    """Begin the work of one of the processes."""
    torch.set_num_threads(1)
    patience = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=patience)


def leave(rank: int, folder: str, report: dict[str, Any]) -> None:
    """End it."""
    Path(folder, f"{rank}.json").write_text(json.dumps(report))
    # A process that leaves while another still waits can make that one abort.
    dist.barrier()
    dist.destroy_process_group()


def run(work: Callable[[int, int, str], None], size: int, folder: Path) -> list[dict[str, Any]]:
    """The reports of that many processes."""
    # Processes branch off from one that has done the imports, which take longer than the work.
    mp.get_context("forkserver").set_forkserver_preload(["sparseffn.ffn", "torch.distributed.tensor"])
    mp.start_processes(work, args=(size, str(folder)), nprocs=size, start_method="forkserver")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def wrong(reports: list[dict[str, Any]], prefix: str = "") -> dict[str, float]:
    """Everything that differs by more than float64 explains."""
    found = {}
    for rank, report in enumerate(reports):
        for case, of_case in report["differences"].items():
            if case.startswith(prefix):
                found |= {f"rank {rank}: {case} {what}": d for what, d in of_case.items() if not d < 1e-9}
    return found
