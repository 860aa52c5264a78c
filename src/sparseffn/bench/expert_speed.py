"""Times of gated experts, ours against transformers' implementations: `sparseffn bench experts`.

Routing is not timed. Up to `COLD_TOKENS` tokens nothing is in the caches: every call draws its tokens and its experts, and goes
to another copy of the layer than the call before it, of which there are as many as fill four times the last-level cache. A call
that is not timed goes first: as in a model, code and threads are ready, the weights of the next layer are not.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import final

import msgspec
import torch

from sparseffn.accounting import BACKWARD_OVER_FORWARD
from sparseffn.bench.candidates import DTYPES, Progress, backend_restored, check_backends, no_progress, resolved, use_backend
from sparseffn.bench.gated_experts import OURS, Size, Stored, check_experts, prepare
from sparseffn.bench.machine import clock_of, head
from sparseffn.bench.roofline import highest, measure_roof
from sparseffn.bench.timing import Times, Turn, ratio, spread, take_turns
from sparseffn.devices import find_device
from sparseffn.results.bench_result import (
    AbsentCandidate,
    Deviation,
    ExpertsResult,
    ExpertsRow,
    ExpertsSettings,
    ExpertsTime,
    OverPeer,
    Roof,
)

# Seconds for which the calls of a size are timed, so that their medians settle.
_AT_LEAST_S = 1.5


@final
class _CallTurn(Turn):
    """A call of one candidate; all of them take their layers and calls from one counter, so that none finds another's."""

    def __init__(self, size: Size, label: str, counter: Iterator[int], *, training: bool) -> None:
        self.size, self.modules, self.counter, self.training = size, size.modules[label], counter, training
        self.grad = size.draw(0).x

    def prepare(self, index: int) -> Callable[[], object]:
        if self.size.is_cold:
            self._call()()
        return self._call()

    def _call(self) -> Callable[[], object]:
        """Of the next layer."""
        count = next(self.counter)
        module = self.modules[count % len(self.modules)]
        call = self.size.draw(1 + count if self.size.is_cold else 1)

        def infer() -> object:
            with torch.inference_mode():
                return module(*call)

        def train() -> object:
            return module(call.x.detach().requires_grad_(), *call[1:]).backward(self.grad)

        return train if self.training else infer

    def finish(self) -> None:
        for layer in self.size.layers:
            layer.zero_grad(set_to_none=True)


def bench_experts(settings: ExpertsSettings, *, progress: Progress = no_progress) -> ExpertsResult:
    """Check, then time, every shape in every dtype at every number of tokens.

    Raises:
        UserError: our operation is wrong, so that no speed is reported; a backend or the device is not there; or the layers do
            not fit into memory.
    """
    device = find_device(settings.device)
    for name in settings.dtypes:
        check_backends((settings.backend,), device, DTYPES[name])
    rows: list[ExpertsRow] = []
    absent: list[AbsentCandidate] = []
    roofs: dict[str, Roof] = {}
    with backend_restored():
        use_backend(settings.backend)
        for name in settings.dtypes:
            measured, roofs[name] = _measure(settings, DTYPES[name], device, progress)
            backend = resolved(settings.backend, device, DTYPES[name])
            rows += [row for one in measured for row in _rows(*one, roofs[name], backend)]
            absent += [
                AbsentCandidate(shape=f"{size.shape.label}, {name}", tokens=size.n_tokens, label=label, reason=reason)
                for size, *_ in measured
                for label, reason in size.absent.items()
            ]
    settings = msgspec.structs.replace(settings, device=device.type)
    return ExpertsResult(**head(device), settings=settings, roofs=roofs, rows=tuple(rows), left_out=tuple(absent))


def _measure(
    settings: ExpertsSettings, dtype: torch.dtype, device: torch.device, progress: Progress
) -> tuple[list[tuple[Size, dict[str, Deviation], dict[str, Times]]], Roof]:
    """All sizes in one dtype, and the best speeds of the machine that were seen between them."""
    measured, roof = [], measure_roof(dtype, device)
    for shape in settings.shapes:
        stored: list[Stored] = []
        for n_tokens in settings.tokens:
            what = f"{shape.label} at {n_tokens} tokens in {str(dtype).removeprefix('torch.')}"
            progress(f"checking {what}")
            checks, size = check_experts(prepare(shape, n_tokens, dtype, device, stored))
            progress(f"timing {', '.join(size.modules)}, {what}")
            times = _times(size, settings.rounds)
            # What the size holds on to must not keep the layers of the next shape out of memory.
            measured.append((size.without_weights(), checks, times))
            # As the machine may have been busy before.
            roof = highest(roof, measure_roof(dtype, device))
    return measured, roof


def _times(size: Size, rounds: int) -> dict[str, Times]:
    """Seconds of every candidate's calls, by pass."""
    found = {}
    for name in ("forward", "training") if size.trains else ("forward",):
        counter = iter(range(10**9))
        turns = {label: _CallTurn(size, label, counter, training=name == "training") for label in size.modules}
        found[name] = take_turns(turns, rounds=rounds, at_least_s=_AT_LEAST_S, clock=clock_of(size.device))
    return found


def _rows(size: Size, checks: dict[str, Deviation], times: dict[str, Times], roof: Roof, backend: str) -> list[ExpertsRow]:
    """Everything that was measured at one size."""
    touched = statistics.fmean(_touched_bytes(size, seed) for seed in range(1, 9))
    return [
        ExpertsRow(
            shape=size.shape.label,
            dtype=str(size.dtype).removeprefix("torch."),
            tokens=size.n_tokens,
            label=label,
            peer=label != OURS,
            backend=backend if label == OURS else None,
            cache="cold" if size.is_cold else "repeated",
            n_layers=size.n_layers,
            touched_bytes=touched,
            check=checks[label],
            forward=_time(label, times["forward"], size, roof, touched, training=False),
            training=_time(label, times["training"], size, roof, touched, training=True) if size.trains else None,
        )
        for label in size.modules
    ]


def _touched_bytes(size: Size, seed: int) -> float:
    """Bytes of the weights of the experts that a call's tokens choose."""
    chosen = len(size.draw(seed).indices.unique())
    return chosen / size.shape.n_experts * size.shape.num_params * size.dtype.itemsize


def _time(label: str, times: Times, size: Size, roof: Roof, touched: float, *, training: bool) -> ExpertsTime:
    """The calls of a candidate over their limit, and ours over the fastest of transformers' implementations."""
    shape, timed = size.shape, spread(times[label])
    flops = 2 * size.n_tokens * shape.k * shape.num_params / shape.n_experts
    flops *= 1 + BACKWARD_OVER_FORWARD if training else 1
    arithmetic_s, bytes_s = flops / roof.flops_per_s, touched / roof.bytes_per_s
    peers, over = [name for name in times if name != OURS], None
    if label == OURS and peers:
        fastest = min(peers, key=lambda name: spread(times[name]).median_s)
        slowness = ratio(times, label, fastest)
        over = OverPeer(fastest=fastest, over=slowness, times_faster=1 / slowness)
    return ExpertsTime(
        **msgspec.structs.asdict(timed),
        limit_s=max(arithmetic_s, bytes_s),
        limit_arithmetic_s=arithmetic_s,
        limit_bytes_s=bytes_s,
        gradient_s=shape.num_params * size.dtype.itemsize / roof.bytes_per_s if training else 0.0,
        over_limit=timed.median_s / max(arithmetic_s, bytes_s),
        over_fastest_hf=over,
    )
