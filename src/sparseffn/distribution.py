"""Processes that work on one run together, as `torchrun` starts them: who they are, what they agree on, what stops them all.

    torchrun --nproc-per-node 2 -m sparseffn train --method sigma-moe --out runs/two

All of it is PyTorch's `torch.distributed`: gloo on the CPU, NCCL between GPUs. A `World` of one process communicates with
nobody, so that what is written for many runs alone as well.

A process that fails leaves its message in the store of the rendezvous; the others find their connections closed, read it, and
stop with it. One that neither fails nor answers is given up after `TIMEOUT`.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor

from sparseffn.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store

TIMEOUT = datetime.timedelta(minutes=10)
"""What a process waits for the others; the longest that only one of them works is a checkpoint's writing."""
JOIN_TIMEOUT = datetime.timedelta(minutes=2)
"""What a process waits for the others to come: a launcher starts all of them together."""
MESSAGE_AFTER = 10.0
"""Seconds that a process waits for the message of one that failed: it may still be on its way out of its step."""

_FAILED, _SAID = "sparseffn/failed", "sparseffn/said"
_JOINED: ContextVar[World | None] = ContextVar("joined", default=None)
"""Where `joined` has found others, as `torch.distributed` has a default group."""


class OtherProcessError(UserError):
    """Another process failed, and with it all of them; the text is that one's."""


class LostProcessError(OtherProcessError):
    """It is gone, in the middle of what was done together."""


@final
class World:
    """The processes of a run, and which of them this one is."""

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None) -> None:
        self.rank, self.size, self._store = rank, size, store
        self.announces = False
        """Whether the others wait to hear what this process trains."""
        self._n_said, self._n_efforts = 0, 0
        self._agreed: Exception | None = None
        self._broken_by: str | None = None
        self._second_group: ProcessGroup | None = None

    @classmethod
    def here(cls) -> World:
        """The processes that `joined` or `torch.distributed` has joined, or this one alone."""
        if (world := _JOINED.get()) is not None:
            return world
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    def second_group(self) -> ProcessGroup:
        """The same processes in a group of their own, for what goes on beside the first one's exchanges; made once."""
        if self._second_group is None:
            import torch.distributed as dist

            self._second_group = cast("ProcessGroup", dist.new_group())
        return self._second_group

    def agreed(self, error: Exception) -> Exception:
        """An error that every process has here, after which they can go on together."""
        self._agreed = error
        return error

    def is_agreed(self, error: Exception) -> bool:
        """Whether all processes have the error, or its like."""
        return error is self._agreed

    def share(self, n: int, what: str) -> slice:
        """This process's part of n things in order.

        Raises:
            UserError: the processes do not divide them.
        """
        if n % self.size:
            fits = next(k for k in range(self.size, 0, -1) if n % k == 0)
            raise self.agreed(
                UserError(
                    f"{what} must be a multiple of the {self.size} processes; got {n}; fix: change it, or start {fits} of them"
                )
            )
        each = n // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over the processes of a tensor that each has; it is overwritten."""
        if not self.is_alone:
            import torch.distributed as dist

            dist.all_reduce(x)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """Elementwise mean over the processes of a tensor that each has; it is overwritten."""
        return x if self.is_alone else self.sum(x).div_(self.size)

    def gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """The processes' tensors of one shape, put together along a dimension in the order of ranks, on each of them."""
        if self.is_alone:
            return x
        import torch.distributed as dist

        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim)

    def max(self, n: int, device: torch.device) -> int:
        """The largest of the processes' numbers."""
        return n if self.is_alone else int(self.gather(torch.tensor([n], device=device)).max())

    def texts(self, text: str) -> list[str]:
        """What each process has to say, by rank; all of them must ask as often as the others."""
        if self.is_alone:
            return [text]
        import torch.distributed as dist

        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
        said = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)
        length = torch.tensor([len(text.encode())], device=device)
        lengths = self.gather(length).tolist()
        padded = torch.zeros(max(1, *lengths), dtype=torch.uint8)
        padded[: len(said)] = said[: len(padded)]
        rows = self.gather(padded[None].to(device)).cpu().numpy()
        return [bytes(row[:n]).decode() for row, n in zip(rows, lengths, strict=True)]

    def agree(self, what: str, value: object) -> None:
        """Refuse, in every process with one message, a value (JSON) that they do not share.

        Raises:
            UserError: a process has another one than the first.
        """
        said = self.texts(json.dumps(value, sort_keys=True, default=str))
        other = next((rank for rank, text in enumerate(said) if text != said[0]), None)
        if other is not None:
            a, b = json.loads(said[0]), json.loads(said[other])
            first, theirs = _difference(a, b), _difference(b, a)
            message = (
                f"{what} must be the same in all {self.size} processes; got {first} in process 0 and {theirs} in process "
                f"{other}; fix: start all of them with the same command, on the same files"
            )
            raise self.agreed(UserError(message))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Do what may fail in one process alone, as reading a file: the error of one of them ends it in all.

        Raises:
            Exception: this process's own.
            OtherProcessError: with the text of the first process that has one.
        """
        if self.is_alone:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        said = self.texts("" if own is None else _in_words(own))
        if own is not None:
            raise self.agreed(own)
        for rank, text in enumerate(said):
            if text:
                raise self.agreed(OtherProcessError(f"{text} (process {rank} of {self.size})"))

    def say(self, value: object) -> None:
        """Leave a value (JSON) for the others, who hear all that was said, one after the other."""
        assert self._store is not None, "made by `joined`"
        self._n_said += 1
        self._store.set(f"{_SAID}/{self._n_said}", json.dumps(value))

    def heard(self) -> str | None:
        """The next value that the first process said, as JSON text, removed by the last to hear; None if there is none."""
        assert self._store is not None, "made by `joined`"
        key = f"{_SAID}/{self._n_said + 1}"
        if not self._store.check([key]):
            return None
        self._n_said += 1
        text, listeners = self._store.get(key).decode(), f"{key}/heard"
        # A reproduction of a thousand runs would leave as many of them, with their corpora's tokenizers.
        if self._store.add(listeners, 1) == self.size - 1:
            self._store.delete_key(key)
            self._store.delete_key(listeners)
        return text

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
        """Tell the others of an error that this process has alone, and end with theirs where they have gone.

        Raises:
            LostProcessError: another process is gone, or an error of one alone has parted them before.
        """
        if self._broken_by is not None:
            raise LostProcessError(f"the processes must be in step; they are not any more: {self._broken_by}")
        # One that failed in an earlier run, which a comparison went on without, failed then.
        self._n_efforts += 1
        try:
            yield
        except Exception as error:
            if self.is_alone or self.is_agreed(error):
                raise
            self._broken_by = self._broken_by or _in_words(error)
            if isinstance(error, LostProcessError):
                raise
            if _lost_connection(error):
                raise LostProcessError(self._what_failed(error)) from error
            self._tell(error)
            raise

    def _tell(self, error: Exception) -> None:
        if self._store is not None:
            # The store may be gone with the process that had it.
            with contextlib.suppress(RuntimeError):
                # The first one to fail: the others may fail by it.
                said = json.dumps([self.rank, _in_words(error)])
                self._store.compare_set(f"{_FAILED}/{self._n_efforts}", "", said)

    def _what_failed(self, error: Exception) -> str:
        said: list[Any] | None = None
        key, waits_until = f"{_FAILED}/{self._n_efforts}", time.monotonic() + MESSAGE_AFTER
        # The store lives with the launcher, or in process 0, and may be gone as well.
        with contextlib.suppress(RuntimeError):
            while said is None and self._store is not None and time.monotonic() < waits_until:
                said = json.loads(self._store.get(key)) if self._store.check([key]) else None
                time.sleep(0.05)
        after = "fix: the same command goes on from the last checkpoint, or begins anew where there is none"
        if said is not None and said[0] != self.rank:
            return f"process {said[0]} of {self.size} failed, and process {self.rank} with it: {said[1]}"
        return f"a process of {self.size} must not go away; process {self.rank} lost it ({_first_line(error)}); {after}"


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _lost_connection(error: Exception) -> bool:
    """Whether a collective failed because another process is not there any more; gloo raises no error of its own."""
    import torch.distributed as dist

    words = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "gloo", "NCCL", "Socket")
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or any(word in str(error) for word in words))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _difference(a: Any, b: Any) -> str:
    """What is in a and not in b, as short as may be."""
    while isinstance(a, dict) and isinstance(b, dict):
        key = next((key for key in a if a[key] != b.get(key)), None)
        if key is None:
            break
        if not (isinstance(a[key], dict) and isinstance(b.get(key), dict)):
            return f"{key} = {json.dumps(a[key])}"
        a, b = a[key], b[key]
    return json.dumps(a)


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """Join the processes that a launcher such as `torchrun` started, by what it left in the environment; else stay alone.

    Args:
        device: where models are: `auto` takes this process's GPU where there is one; `cpu` joins by gloo.

    Raises:
        UserError: the environment is incomplete, or no other process comes.
    """
    n_processes = os.environ.get("WORLD_SIZE") or "1"
    if not n_processes.isdecimal():
        raise UserError(f"WORLD_SIZE must be a number of processes; got {n_processes!r}; fix: start them with torchrun")
    if int(n_processes) <= 1:
        yield World()
        return
    import torch.distributed as dist

    if dist.is_available():
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous
    else:
        raise UserError("this PyTorch must be built with torch.distributed; got one without; fix: install another build")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"`--device` of several processes must be auto, cpu or cuda; got {device!r}; fix: auto gives each its own GPU"
        )
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        backend, gpu = "nccl", int(os.environ.get("LOCAL_RANK", "0"))
        if gpu >= torch.cuda.device_count():
            raise UserError(
                f"processes of a machine must have a GPU each; got {torch.cuda.device_count()} for process {gpu} of it; "
                "fix: lower --nproc-per-node, or --device cpu"
            )
        torch.cuda.set_device(gpu)
    try:
        store, rank, size = next(rendezvous("env://", timeout=JOIN_TIMEOUT))
        own = PrefixStore("sparseffn", store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"processes must find each other by MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE; got {_first_line(error)}; "
            "fix: start them with torchrun"
        ) from error
    world = World(rank, size, store)
    token = _JOINED.set(world)
    try:
        yield world
        # Gloo may abort a process whose peers are still in their last exchange.
        with contextlib.suppress(RuntimeError):
            dist.barrier()
    finally:
        _JOINED.reset(token)
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
