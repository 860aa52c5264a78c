"""What is computed over a whole batch where the batch is spread over processes: sums, rows of all, and random numbers.

Ranks hold the batch's rows one after the other, rank 0 the first. Collectives are differentiable, and the gradients that they
give are to be averaged over the ranks, as DDP and FSDP do: of a loss `L = f(S)`, `S = sum_r s_r(w)`, which every rank computes
alike, rank r gets

    backward of the sum:  sum over ranks of f'(S) = W f'(S)      for W ranks
    its gradient:         W f'(S) ds_r/dw
    mean over ranks:      f'(S) sum_r ds_r/dw = dL/dw

Only public functions of `torch.distributed` are called, with gloo on a CPU and nccl on a GPU; they are blocking collectives, so
that every rank must run the same layers in the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from sparseffn.errors import UserError
from sparseffn.ops.library import runs_in_backward

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Draw(Protocol):
    """`torch.rand`, `torch.randn` and their like."""

    def __call__(self, *size: int, generator: torch.Generator, device: torch.device, dtype: torch.dtype | None) -> Tensor: ...


@final
class BatchGroup:
    """The processes that a batch is spread over; `set_batch_group` gives it to a model's layers.

    Its generators draw the random numbers of routers (expert dropout, noise) for the whole batch, the same on every rank, of
    which each keeps those of its own rows: as many processes as there may be, and a single one whose global generator starts
    from the same seed, draw the same numbers. Nothing else draws from them.

    A deep copy of a layer shares the group; a layer that is pickled leaves it behind, as it means nothing elsewhere.

    Args:
        group: the processes; None: all.
        seed: of the generators, the same on every rank.
        even: the promise that every rank always holds equally many rows. Without it ranks tell each other before they gather or
            draw, and a GPU waits for that. On a CPU they do so in any case, and a broken promise is an error on every rank.

    Raises:
        UserError: PyTorch cannot run several processes here, or they have not been brought together yet.
    """

    def __init__(self, group: ProcessGroup | None = None, *, seed: int = 0, even: bool = False) -> None:
        if not dist.is_available() or not dist.is_initialized():
            missing = "has not been called" if dist.is_available() else "is not in this build of PyTorch"
            raise UserError(
                f"`group` must be processes that work together; got none: torch.distributed.init_process_group {missing}; "
                "fix: start them with torchrun and call it first"
            )
        self.group = group
        self.even = even
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        if self.rank < 0:
            raise UserError("`group` must hold this process; got a group of others; fix: set none on this one")
        self.seed(seed)

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchGroup:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks of a tensor that has one shape on all of them, differentiable."""
        return sum_over(x, self.group)

    def stack(self, x: Tensor) -> Tensor:
        """`[W, ...]`: each rank's tensor, of one shape on all of them, differentiable."""
        return _Stack.apply(x, self.group, self.rank, self.size)

    def before(self, x: Tensor) -> Tensor:
        """Sum of a tensor over the ranks before this one, whose rows come first; without gradient."""
        return self.stack(x.detach())[: self.rank].sum(dim=0)

    def rows(self, n_rows: int, device: torch.device) -> Rows:
        """Where the rows of all ranks lie, of which `n_rows` are this one's.

        Raises:
            UserError: on a CPU, the ranks hold differently many although all were to hold equally many.
        """
        if self.even and device.type != "cpu":
            return Rows(self, (n_rows,) * self.size)
        counts = tuple(self.stack(torch.tensor(n_rows, device=device)).tolist())
        if self.even and min(counts) < max(counts):
            raise UserError(
                f"`even` must be true of every batch; got {', '.join(map(str, counts))} tokens on the ranks; "
                "fix: give all equally many, or make the BatchGroup without even=True"
            )
        return Rows(self, counts)

    def draw(
        self, make: Draw, n_rows: int, n_columns: int, *, device: torch.device, dtype: torch.dtype | None = None
    ) -> Tensor:
        """This rank's rows of `make(rows of all, n_columns)`.

        Raises:
            UserError: backward computes a checkpointed region again, which has to draw the numbers of the first time, and does
                not do it under `checkpoint_contexts`.
        """
        if runs_in_backward() and not self._replays:
            raise UserError(
                "random numbers of a batch over several processes must be drawn once; got a region that is checkpointed and "
                "computed again; fix: checkpoint(..., context_fn=group.checkpoint_contexts)"
            )
        rows = self.rows(n_rows, device)
        return rows.own(make(sum(rows.counts), n_columns, generator=self._generator(device), device=device, dtype=dtype))

    def seed(self, seed: int) -> None:
        """Start all generators from a seed, the same on every rank."""
        self.first_seed = seed
        self._generators: dict[str, torch.Generator] = {}
        self._restored: dict[str, Tensor] = {}
        self._replays = False

    def generator_states(self) -> dict[str, Tensor]:
        """States of the generators by type of device, uint8 vectors on the CPU; the same on every rank."""
        return self._restored | {kind: generator.get_state() for kind, generator in self._generators.items()}

    def restore(self, states: Mapping[str, Tensor]) -> None:
        """Put back what `generator_states` returned; a generator whose state is not among it starts from the seed."""
        self._generators.clear()
        self._restored = dict(states)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        """For `checkpoint(..., use_reentrant=False, context_fn=group.checkpoint_contexts)`: what is computed again draws the
        numbers of the first time.
        """
        return nullcontext(), self._replaying(self.generator_states())

    @contextmanager
    def _replaying(self, states: Mapping[str, Tensor]) -> Iterator[None]:
        now, was = self.generator_states(), self._replays
        self.restore(states)
        self._replays = True
        try:
            yield
        finally:
            self.restore(now)
            self._replays = was

    def _generator(self, device: torch.device) -> torch.Generator:
        """That of a device, made at its first use."""
        if device.type not in self._generators:
            generator = torch.Generator(device).manual_seed(self.first_seed)
            if device.type in self._restored:
                generator.set_state(self._restored.pop(device.type))
            self._generators[device.type] = generator
        return self._generators[device.type]


@final
@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a batch, which rank after rank holds."""

    group: BatchGroup
    counts: tuple[int, ...]
    """Rows of each rank."""

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all ranks, differentiable, of x `[own rows, ...]`."""
        if x.dtype == torch.bool:
            return self.gather(x.to(torch.uint8)).bool()
        most = max(self.counts)
        padded = pad(x, (0, 0) * (x.dim() - 1) + (0, most - x.shape[0]))
        stacked = self.group.stack(padded)
        if min(self.counts) == most:
            return stacked.flatten(0, 1)
        return torch.cat([of_rank[:n] for of_rank, n in zip(stacked, self.counts, strict=True)])

    def own(self, x: Tensor) -> Tensor:
        """This rank's of the rows of all ranks."""
        first, last = list(itertools.pairwise((0, *itertools.accumulate(self.counts))))[self.group.rank]
        return x[first:last]


def sum_over(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the ranks of a group of a tensor that has one shape on all of them, differentiable."""
    return _Sum.apply(x, group)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Sum.apply(grad, ctx.group), None


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None, rank: int, size: int) -> Tensor:
        ctx.group, ctx.rank = group, rank
        stacked = x.new_empty(size, *x.shape)
        dist.all_gather(list(stacked.unbind()), x.contiguous(), group=group)
        return stacked

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Sum.apply(grad, ctx.group)[ctx.rank], None, None, None
