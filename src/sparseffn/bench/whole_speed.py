"""Tokens per second of whole models under each implementation of the experts: `sparseffn bench hf`.

Decoding is what `generate` does for one sequence: a token at a time after a prompt, with transformers' cache of keys and
values. The prompt is one pass whose last logits alone are computed. The decoder layers are timed within the same calls, from
the first one's begin to the last one's end: a model that is cut to a few layers still reads its whole output matrix. Experts
that return zeros take their turn too: the rest of the model, and what memory and products allow the experts, are the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import msgspec
import torch
from torch import Tensor

import sparseffn.hf
from sparseffn.bench.candidates import DTYPES, Progress, backend_restored, check_backends, no_progress, resolved, use_backend
from sparseffn.bench.machine import clock_of, head
from sparseffn.bench.peers import HF_IMPLEMENTATIONS, MOST_GATHERED_BYTES
from sparseffn.bench.roofline import highest, measure_roof
from sparseffn.bench.timing import Clock, Times, Turn, ratio, spread, take_turns
from sparseffn.bench.whole_models import (
    WITHOUT_EXPERTS,
    WholeModel,
    build_whole,
    check_implementations,
    experts_work,
    find_shape,
    gathered_bytes,
    without_experts,
)
from sparseffn.devices import find_device
from sparseffn.errors import UserError
from sparseffn.hf.formulas import Formula, formula_of
from sparseffn.results.bench_result import (
    AbsentCandidate,
    OverPeer,
    Roof,
    WholeLimit,
    WholeResult,
    WholeRow,
    WholeSettings,
    WholeTime,
)

OURS = sparseffn.hf.IMPLEMENTATION
"""Label of our own implementation."""

# Tokens before those that are decoded.
_CONTEXT = 32


def bench_whole_models(settings: WholeSettings, *, progress: Progress = no_progress) -> WholeResult:
    """Check, then time, every model in every dtype.

    Raises:
        UserError: our implementation is wrong, so that no speed is reported; a model, a backend or the device is not there; or
            a model does not fit into memory.
    """
    device = find_device(settings.device)
    for model in settings.models:
        find_shape(model)
    for name in settings.dtypes:
        check_backends((settings.backend,), device, DTYPES[name])
    measured: list[_Measured] = []
    with backend_restored(), without_experts():
        use_backend(settings.backend)
        roofs = {name: measure_roof(DTYPES[name], device) for name in settings.dtypes}
        for model in settings.models:
            for name in settings.dtypes:
                progress(f"building and checking {model} in {name}")
                whole = build_whole(model, DTYPES[name], device, settings.layers)
                measured.append(_measure(whole, settings, progress))
                # The next one needs its memory.
                del whole
                # As the machine may have been busy before.
                roofs[name] = highest(roofs[name], measure_roof(DTYPES[name], device))
        backends = {name: resolved(settings.backend, device, DTYPES[name]) for name in settings.dtypes}
    return WholeResult(
        **head(device),
        settings=msgspec.structs.replace(settings, device=device.type),
        roofs=roofs,
        rows=tuple(row for one in measured for row in _rows(one, settings, roofs[one.dtype], backends[one.dtype])),
        left_out=tuple(absent for one in measured for absent in one.left),
    )


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """A model in both passes, by every implementation that computes it there."""

    dtype: str
    sizes: dict[str, Any]
    """Of a row's fields, those that say which model it is, beside the dtype."""
    errors: dict[str, float]
    times: dict[str, dict[str, Times]]
    """By pass: of the whole model, and of its layers."""
    work: dict[str, tuple[float, float]]
    """By pass: FLOPs and bytes of the experts."""
    left: list[AbsentCandidate]


def _measure(whole: WholeModel, settings: WholeSettings, progress: Progress) -> _Measured:
    dtype = str(whole.dtype).removeprefix("torch.")
    formula = formula_of(whole.experts)
    if not isinstance(formula, Formula):
        raise UserError(f"`backend` must have kernels for {whole.name}; got none: {formula}; fix: see `sparseffn doctor`")
    errors, absent = check_implementations(whole, (*HF_IMPLEMENTATIONS, OURS), OURS)
    times: dict[str, dict[str, Times]] = {}
    work, left = {}, []
    for name, n_tokens in (("decoding", 1), ("prompt", settings.prompt)):
        reasons = dict(absent)
        gathered = gathered_bytes(whole, n_tokens)
        if gathered > MOST_GATHERED_BYTES:
            reasons["batched_mm"] = f"it would copy {gathered / 2**30:.1f} GiB of expert matrices a layer"
        labels = [label for label in errors if label not in reasons]
        progress(f"timing {', '.join(labels)}, {name} of {whole.name}, {whole.n_layers} layers in {dtype}")
        times[name] = _times(whole, [*labels, WITHOUT_EXPERTS], n_tokens, settings)
        work[name] = experts_work(whole, n_tokens)
        left += [
            AbsentCandidate(shape=f"{whole.name}, {dtype}", tokens=n_tokens, label=label, reason=reason)
            for label, reason in reasons.items()
        ]
    sizes = {"n_layers": whole.n_layers, "n_published": whole.n_published, "num_params": whole.num_params}
    return _Measured(dtype=dtype, sizes={"model": whole.name, **sizes}, errors=errors, times=times, work=work, left=left)


def _rows(measured: _Measured, settings: WholeSettings, roof: Roof, backend: str) -> list[WholeRow]:
    def timed(label: str, name: str, n_tokens: int, n_passes: int) -> WholeTime | None:
        times, (flops, n_bytes) = measured.times[name], measured.work[name]
        if label not in times["whole"]:
            return None
        per_pass: dict[str, Times] = {
            part: {one: [t / n_passes for t in taken] for one, taken in of.items()} for part, of in times.items()
        }
        limits = flops / roof.flops_per_s, n_bytes / roof.bytes_per_s
        return _time(label, per_pass, n_tokens, _limit(per_pass, *limits) if label == OURS else None)

    rows = []
    for label, error in measured.errors.items():
        decoding = timed(label, "decoding", 1, settings.decoded)
        # What copies too much for one token is among what was left out.
        if decoding is not None:
            prompt, own = timed(label, "prompt", settings.prompt, 1), label == OURS
            times = {"deviation": error, "decoding": decoding, "prompt": prompt}
            sizes = {"dtype": measured.dtype, **measured.sizes}
            rows.append(WholeRow(**sizes, label=label, peer=not own, backend=backend if own else None, **times))
    return rows


def _times(whole: WholeModel, labels: list[str], n_tokens: int, settings: WholeSettings) -> dict[str, Times]:
    """Seconds of the calls of every implementation: of the whole model, and of its layers."""
    clock = clock_of(whole.device)
    turns: dict[str, _Turn] = {}
    for label in labels:
        turns[label] = _Decoding(whole, label, settings.decoded) if n_tokens == 1 else _Prompt(whole, label, n_tokens)
    with _layer_clock(whole, clock) as taken:
        for turn in turns.values():
            turn.taken = taken
        found = take_turns(turns, rounds=settings.rounds, warmup=1, clock=clock)
    return {"whole": found, "layers": {label: turn.in_layers[-len(found[label]) :] for label, turn in turns.items()}}


@contextmanager
def _layer_clock(whole: WholeModel, clock: Clock) -> Iterator[list[float]]:
    """Seconds of each pass through the decoder layers, appended as they end."""
    taken: list[float] = []
    began = [0.0]

    def begin(*_: Any) -> None:
        began[0] = clock()

    def end(*_: Any) -> None:
        taken.append(clock() - began[0])

    with whole.layers[0].register_forward_pre_hook(begin), whole.layers[-1].register_forward_hook(end):
        yield taken


class _Turn(Turn):
    """A call of the model with one implementation, and the seconds of its calls that went by in the layers."""

    def __init__(self, whole: WholeModel, label: str) -> None:
        self.whole, self.label = whole, label
        self.taken: list[float] = []
        self.in_layers: list[float] = []

    def finish(self) -> None:
        self.in_layers.append(sum(self.taken))


@final
class _Prompt(_Turn):
    """One pass over a sequence, other tokens in every round."""

    def __init__(self, whole: WholeModel, label: str, n_tokens: int) -> None:
        super().__init__(whole, label)
        self.n_tokens = n_tokens

    def prepare(self, index: int) -> Callable[[], object]:
        self.whole.model.set_experts_implementation(self.label)
        ids = self.whole.draw(self.n_tokens, index)
        self.taken.clear()
        return torch.inference_mode()(lambda: self.whole.model(ids, use_cache=True, logits_to_keep=1))


@final
class _Decoding(_Turn):
    """Some tokens after a prompt, one by one; their ids are drawn, so that all implementations decode the same."""

    def __init__(self, whole: WholeModel, label: str, n_tokens: int) -> None:
        super().__init__(whole, label)
        self.n_tokens = n_tokens

    def prepare(self, index: int) -> Callable[[], object]:
        self.whole.model.set_experts_implementation(self.label)
        ids = self.whole.draw(_CONTEXT + self.n_tokens, index)
        with torch.inference_mode():
            cache = self.whole.model(ids[:, :_CONTEXT], use_cache=True, logits_to_keep=1).past_key_values
        self.taken.clear()
        return torch.inference_mode()(lambda: self._decode(ids[:, _CONTEXT:], cache))

    def _decode(self, ids: Tensor, cache: Any) -> None:
        for one in ids.split(1, dim=1):
            cache = self.whole.model(one, past_key_values=cache, use_cache=True).past_key_values


def _time(label: str, times: dict[str, Times], n_tokens: int, limit: WholeLimit | None) -> WholeTime:
    """Seconds of one pass of an implementation, and ours over the fastest of transformers'."""
    whole = spread(times["whole"][label])
    return WholeTime(
        **msgspec.structs.asdict(whole),
        layers=spread(times["layers"][label]),
        tokens_per_s=n_tokens / whole.median_s,
        over_fastest_hf=_over(label, times["whole"]),
        layers_over_fastest_hf=_over(label, times["layers"]),
        limit=limit,
    )


def _limit(times: dict[str, Times], arithmetic_s: float, bytes_s: float) -> WholeLimit:
    """Of one pass, and how many times as fast as transformers' fastest it allows."""

    def most(of: Times) -> float | None:
        fastest = _fastest(of)
        # Of each round: what slows the machine slows both.
        limits = [rest + max(arithmetic_s, bytes_s) for rest in of[WITHOUT_EXPERTS]]
        return None if fastest is None else 1 / ratio({"limit": limits, fastest: of[fastest]}, "limit", fastest)

    return WholeLimit(
        rest_s=spread(times["whole"][WITHOUT_EXPERTS]).median_s,
        layers_rest_s=spread(times["layers"][WITHOUT_EXPERTS]).median_s,
        arithmetic_s=arithmetic_s,
        bytes_s=bytes_s,
        most_times_faster=most(times["whole"]),
        layers_most_times_faster=most(times["layers"]),
    )


def _over(label: str, times: Times) -> OverPeer | None:
    """Ours over the fastest of transformers' implementations, None for those."""
    fastest = _fastest(times)
    if label != OURS or fastest is None:
        return None
    slowness = ratio(times, label, fastest)
    return OverPeer(fastest=fastest, over=slowness, times_faster=1 / slowness)


def _fastest(times: Times) -> str | None:
    """Of transformers' implementations."""
    peers = [name for name in times if name not in (OURS, WITHOUT_EXPERTS)]
    return min(peers, key=lambda name: spread(times[name]).median_s, default=None)
