"""Time of one layer, of every method on every backend, against the dense block and the installed peers at equal parameters.

Beside it `bench_expert_counts`: does a layer's time depend on how many experts it does not use? Forward reads the experts that
tokens choose; forward and backward also write the gradients of all experts, whose bytes stand beside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from sparseffn.bench.benchmark import Benchmark, benchmark
from sparseffn.bench.candidates import (
    DENSE,
    DTYPES,
    Candidate,
    Progress,
    Setting,
    Shape,
    backend_restored,
    build_layer,
    check_backends,
    draw_tokens,
    no_progress,
    resolved,
    use_backend,
    why_not,
)
from sparseffn.bench.machine import head
from sparseffn.bench.peers import has_peers, peers_of
from sparseffn.bench.roofline import highest, limit, measure_roof
from sparseffn.bench.timing import Times, ratio, spread
from sparseffn.devices import find_device, synchronize
from sparseffn.ffn.mixture import MixtureConfig
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.results.bench_result import (
    AbsentCandidate,
    CountedExperts,
    ExpertCounts,
    LayerResult,
    LayerRow,
    LayerSettings,
    LayerTime,
    LimitedTime,
    OverPeer,
    Roof,
    ShapeConfigs,
    WarmTime,
    WarmTimes,
)

GROUPED_MM = "grouped_mm"
"""The backend on PyTorch's product of groups, timed on every GPU."""

EXPERT_COUNTS = (8, 256)
"""The ends of the paper's figure 9."""
EXPERT_COUNT_TOKENS = 4096
# Enough to see whether a peer computes a layer at all.
_TRIED_TOKENS = 16

fields_of = msgspec.structs.asdict


def bench_layers(shapes: Sequence[Shape], settings: LayerSettings, *, progress: Progress = no_progress) -> LayerResult:
    """Time every method of every shape at every number of tokens.

    Raises:
        UserError: a candidate is wrong; a backend or the device is not there.
    """
    device, dtype = find_device(settings.device), DTYPES[settings.dtype]
    check_backends(settings.backends, device, dtype)
    sizes: list[_Size] = []
    roof = measure_roof(dtype, device)
    for shape in shapes:
        for n_tokens in settings.tokens:
            sizes.append(_one_size(shape, settings, n_tokens, progress))
            # Again and again, as the machine may have been busy before; limits are computed from the best.
            roof = highest(roof, measure_roof(dtype, device))
    return LayerResult(
        **head(device),
        settings=msgspec.structs.replace(settings, device=device.type),
        roof=roof,
        shapes=tuple(
            ShapeConfigs(name=s.name, dense=s.dense.to_json(), methods={k: c.to_json() for k, c in s.methods.items()})
            for s in shapes
        ),
        rows=tuple(size.row(candidate, roof) for size in sizes for candidate in size.candidates),
        left_out=tuple(absent for size in sizes for absent in size.absent),
    )


def candidates_of(shape: Shape, settings: LayerSettings, setting: Setting) -> tuple[list[Candidate], dict[str, str]]:
    """The dense block, every method on every backend, and the peers of sigma-MoE; and by label why others are left out."""
    candidates = [Candidate(label=DENSE, config=shape.dense)]
    absent: dict[str, str] = {}
    for label, config in shape.methods.items():
        if config == shape.dense:
            continue
        for backend in settings.backends:
            name = label if len(settings.backends) == 1 else f"{label} [{backend}]"
            candidates.append(Candidate(label=name, config=config, backend=backend))
        if setting.device.type == "cuda" and isinstance(config, MixtureConfig) and GROUPED_MM not in settings.backends:
            # PyTorch's own product for experts, which whoever has a GPU could use instead of our kernels.
            name, reason = f"{label} [{GROUPED_MM}]", why_not(GROUPED_MM, setting.device, setting.dtype)
            if reason is None:
                candidates.append(Candidate(label=name, config=config, backend=GROUPED_MM, optional=True))
            else:
                absent[name] = reason
    shared = next((c for c in shape.methods.values() if isinstance(c, MixtureConfig) and has_peers(c)), None)
    if settings.peers and shared is not None:
        peers, reasons = peers_of(shared, setting)
        candidates += peers
        absent |= reasons
    return candidates, absent


@dataclass(frozen=True, kw_only=True)
class _Size:
    """What was measured at one shape and number of tokens."""

    shape: Shape
    setting: Setting
    candidates: Sequence[Candidate]
    absent: Sequence[AbsentCandidate]
    done: Benchmark

    def row(self, candidate: Candidate, roof: Roof) -> LayerRow:
        """Everything that was measured of one candidate."""
        label, config, done = candidate.label, candidate.config, self.done
        passes = {
            name: LayerTime(
                **fields_of(timed),
                **_over_dense(candidate, done.times[name]),
                over_fastest_hf=self._over_fastest_peer(candidate, done.times[name]),
            )
            for name, timed in limited_times(candidate, done, self.setting, roof).items()
        }
        warm = {
            name: WarmTime(**fields_of(spread(times[label])), **_over_dense(candidate, times))
            for name, times in done.warm.items()
        }
        return LayerRow(
            shape=self.shape.name,
            tokens=self.setting.n_tokens,
            label=label,
            method=config.name,
            peer=candidate.is_peer,
            backend=candidate.backend_on(self.setting),
            cache="cold" if warm else "repeated",
            n_layers=done.n_layers,
            share=config.active_channels / config.n_channels,
            params=config.num_params(),
            touched_bytes=done.touched[label],
            gradient_bytes=config.num_params() * self.setting.dtype.itemsize,
            check=done.checks[label],
            **passes,
            warm=WarmTimes(**warm) if warm else None,
        )

    def _over_fastest_peer(self, candidate: Candidate, times: Times) -> OverPeer | None:
        """The time over that of the fastest of Hugging Face's implementations at this size; None for those not compared."""
        peers = [c.label for c in self.candidates if c.is_peer and c.label.startswith("hf ")]
        if not peers or candidate.is_peer or not has_peers(candidate.config):
            return None
        fastest = min(peers, key=lambda name: spread(times[name]).median_s)
        over = ratio(times, candidate.label, fastest)
        return OverPeer(fastest=fastest, over=over, times_faster=1 / over)


def runnable_candidates(
    shape: Shape, settings: LayerSettings, setting: Setting
) -> tuple[list[Candidate], list[AbsentCandidate]]:
    """`candidates_of` without the peers and optional ones that cannot compute this shape, which a call shows."""
    candidates, reasons = candidates_of(shape, settings, setting)
    refusals = {c.label: refusal(c, setting) for c in candidates if c.is_peer or c.optional}
    reasons |= {label: why for label, why in refusals.items() if why is not None}
    size = {"shape": shape.name, "tokens": setting.n_tokens}
    absent = [AbsentCandidate(**size, label=label, reason=why) for label, why in reasons.items()]
    return [c for c in candidates if c.label not in reasons], absent


def refusal(candidate: Candidate, setting: Setting) -> str | None:
    """Why a candidate does not compute its layer in this dtype and on this device, None if a call on a few tokens passes.

    PyTorch's product of groups, for one, wants rows to start at multiples of 16 bytes: no width of 412 in bfloat16.
    """
    few = dataclasses.replace(setting, n_tokens=min(setting.n_tokens, _TRIED_TOKENS))
    layer = build_layer(candidate.config, few, seed=0)
    with backend_restored():
        use_backend(candidate.backend)
        try:
            y = candidate.module(layer)(draw_tokens(candidate.config, few, seed=1).requires_grad_())
            y.backward(draw_tokens(candidate.config, few, seed=2))
            synchronize(few.device)
        # What a library raises for what it cannot compute, or for an interface of another version.
        except (RuntimeError, ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
            first_line = next(iter(str(error).strip().splitlines()), "no message")
            return f"{type(error).__name__}: {first_line}"[:300]
    return None


def _one_size(shape: Shape, settings: LayerSettings, n_tokens: int, progress: Progress) -> _Size:
    setting = Setting.of(settings, n_tokens)
    candidates, absent = runnable_candidates(shape, settings, setting)
    done = benchmark(candidates, setting, rounds=settings.rounds, progress=lambda text: progress(f"{shape.name}: {text}"))
    return _Size(shape=shape, setting=setting, candidates=candidates, absent=absent, done=done)


def _over_dense(candidate: Candidate, times: Times) -> dict[str, Any]:
    over_dense, config = ratio(times, candidate.label, DENSE), candidate.config
    return {"over_dense": over_dense, "over_dense_over_share": over_dense / (config.active_channels / config.n_channels)}


def limited_times(candidate: Candidate, done: Benchmark, setting: Setting, roof: Roof) -> dict[str, LimitedTime]:
    """A candidate's `forward` and `training`, over their limits."""
    found = {}
    for name, times in done.times.items():
        bound = limit(
            candidate.config,
            roof,
            n_tokens=setting.n_tokens,
            touched_bytes=done.touched[candidate.label],
            itemsize=setting.dtype.itemsize,
            training=name == "training",
        )
        timed = spread(times[candidate.label])
        found[name] = LimitedTime(
            **fields_of(timed),
            limit_s=bound.limit_s,
            limit_arithmetic_s=bound.arithmetic_s,
            limit_bytes_s=bound.bytes_s,
            gradient_s=bound.gradient_s,
            over_limit=timed.median_s / bound.limit_s,
        )
    return found


def bench_expert_counts(
    settings: LayerSettings,
    *,
    counts: tuple[int, int] = EXPERT_COUNTS,
    n_tokens: int = EXPERT_COUNT_TOKENS,
    progress: Progress = no_progress,
) -> ExpertCounts:
    """Time of figure 9's sigma-MoE, the larger number of experts over the smaller, interleaved in one run.

    Args:
        settings: rounds, dtype, device and the backend, the first of those named.
        counts: few and many.
        n_tokens: of a call.
        progress: receives what is being done.

    Raises:
        UserError: a kernel is wrong.
    """
    setting, backend = Setting.of(settings, n_tokens), settings.backends[0]
    few, many = (f"N_E {count}" for count in counts)
    sizes: dict[str, Any] = {"d_model": 512, "expert_size": 128, "k": 4}
    candidates = [
        Candidate(label=label, config=SigmaMoEConfig(n_experts=count, **sizes), backend=backend)
        for label, count in zip((few, many), counts, strict=True)
    ]
    roof = measure_roof(setting.dtype, setting.device)
    done = benchmark(candidates, setting, rounds=settings.rounds, cold_tokens=0, progress=progress)
    roof = highest(roof, measure_roof(setting.dtype, setting.device))
    layers = {
        c.label: CountedExperts(
            **limited_times(c, done, setting, roof), gradient_bytes=c.config.num_params() * setting.dtype.itemsize
        )
        for c in candidates
    }
    return ExpertCounts(
        tokens=n_tokens,
        fixed="d_model = 512, G = 128, d_ff = G N_E, K = 4",
        backend=resolved(backend, setting.device, setting.dtype),
        layers=layers,
        forward_over_few=ratio(done.times["forward"], many, few),
        training_over_few=ratio(done.times["training"], many, few),
    )
