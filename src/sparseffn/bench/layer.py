"""Time of one layer, of every method on every backend, against the dense block and the installed peers at equal parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparseffn.bench.backends import check_backends, why_not
from sparseffn.bench.candidates import Candidate, Setting
from sparseffn.bench.head import result
from sparseffn.bench.limits import Limit, limit
from sparseffn.bench.machine import find_device
from sparseffn.bench.peers import LeftOut, has_peers, peers_of
from sparseffn.bench.race import Race, Say, race
from sparseffn.bench.roofline import Roof
from sparseffn.bench.timing import Times, ratio, spread
from sparseffn.errors import UserError
from sparseffn.ffn import FFNConfig
from sparseffn.ffn.mixture import MixtureConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DENSE = "dense"
GROUPED_MM = "grouped_mm"
"""The backend on PyTorch's product of groups, timed on every GPU."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Blocks of equal parameters, by label."""

    name: str
    dense: FFNConfig
    methods: Mapping[str, FFNConfig]


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """How layers are timed."""

    tokens: tuple[int, ...]
    """Tokens of a call."""
    rounds: int = 7
    """Timed calls of each candidate, at least."""
    backends: tuple[str, ...] = ("auto",)
    dtype: str = "float32"
    device: str = "cpu"
    peers: bool = True
    """Also time other libraries' experts, where sigma-moe is among the methods."""

    def __post_init__(self) -> None:
        for name in ("tokens", "backends"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"`{name}` must name at least one, each once; got {list(values)}; fix: name each once")
        if min(self.tokens) < 1 or self.rounds < 1:
            raise UserError(
                f"`--tokens` and `--rounds` must be at least 1; got {list(self.tokens)}, {self.rounds}; fix: --tokens 1024"
            )
        if self.dtype not in DTYPES:
            raise UserError(f"`dtype` must be one of {', '.join(DTYPES)}; got {self.dtype!r}; fix: --dtype float32")

    def setting(self, n_tokens: int) -> Setting:
        """What the candidates of one size share."""
        return Setting(n_tokens=n_tokens, dtype=DTYPES[self.dtype], device=find_device(self.device))


def bench_layers(shapes: Sequence[Shape], settings: LayerSettings, *, say: Say = lambda text: None) -> dict[str, Any]:
    """Time every method of every shape at every number of tokens.

    Returns:
        The JSON-able result that `report` draws and prints.

    Raises:
        UserError: a candidate is wrong; a backend or the device is not there.
    """
    device = find_device(settings.device)
    check_backends(settings.backends, device, DTYPES[settings.dtype])
    sizes: list[_Size] = []
    roof = Roof.measure(DTYPES[settings.dtype], device)
    for shape in shapes:
        for n_tokens in settings.tokens:
            sizes.append(_one_size(shape, settings, n_tokens, say))
            # Again and again, as the machine may have been busy before; limits are computed from the best.
            roof = roof.highest(Roof.measure(DTYPES[settings.dtype], device))
    rows = [row for size in sizes for row in size.rows(roof)]
    left_out = [{**size.names(), **dataclasses.asdict(absent)} for size in sizes for absent in size.absent]
    described = [
        {"name": s.name, DENSE: s.dense.to_json(), "methods": {k: c.to_json() for k, c in s.methods.items()}} for s in shapes
    ]
    return result(
        "layer",
        device,
        dataclasses.asdict(settings),
        roof=dataclasses.asdict(roof),
        shapes=described,
        rows=rows,
        left_out=left_out,
    )


@dataclass(frozen=True, kw_only=True)
class _Size:
    """What was measured at one shape and number of tokens."""

    shape: Shape
    setting: Setting
    candidates: Sequence[Candidate]
    absent: Sequence[LeftOut]
    done: Race

    def names(self) -> dict[str, Any]:
        """Which size it is."""
        return {"shape": self.shape.name, "tokens": self.setting.n_tokens}

    def rows(self, roof: Roof) -> list[dict[str, Any]]:
        """One row a candidate."""
        return [{**self.names(), **_row(c, self.candidates, self.done, self.setting, roof)} for c in self.candidates]


def _one_size(shape: Shape, settings: LayerSettings, n_tokens: int, say: Say) -> _Size:
    setting = settings.setting(n_tokens)
    candidates, absent = entrants(shape, settings, setting)
    done = race(candidates, setting, rounds=settings.rounds, say=lambda text: say(f"{shape.name}: {text}"))
    return _Size(shape=shape, setting=setting, candidates=candidates, absent=absent, done=done)


def entrants(shape: Shape, settings: LayerSettings, setting: Setting) -> tuple[list[Candidate], list[LeftOut]]:
    """The dense block, every method on every backend, and the peers of sigma-MoE; and who is left out."""
    candidates = [Candidate(label=DENSE, config=shape.dense)]
    absent: list[LeftOut] = []
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
                candidates.append(Candidate(label=name, config=config, backend=GROUPED_MM))
            else:
                absent.append(LeftOut(label=name, reason=reason))
    shared = next((c for c in shape.methods.values() if isinstance(c, MixtureConfig) and has_peers(c)), None)
    if settings.peers and shared is not None:
        peers, absent_peers = peers_of(shared, setting)
        candidates += peers
        absent += absent_peers
    return candidates, absent


def _row(candidate: Candidate, candidates: Sequence[Candidate], done: Race, setting: Setting, roof: Roof) -> dict[str, Any]:
    """Everything that was measured of one candidate at one size."""
    label, config, itemsize = candidate.label, candidate.config, setting.dtype.itemsize
    share = config.active_channels / config.n_channels
    row: dict[str, Any] = {
        "label": label,
        "method": config.name,
        "peer": candidate.is_peer,
        "backend": candidate.backend_on(setting),
        "cache": "cold" if done.is_cold else "repeated",
        "n_layers": done.n_layers,
        "share": share,
        "params": config.num_params(),
        "touched_bytes": done.touched[label],
        "gradient_bytes": config.num_params() * itemsize,
        "gate": {"tokens": done.n_compared[label], "largest_deviation": done.errors[label]},
    }
    limits = over_limits(candidate, done, setting, roof)
    for name, times in (("forward", done.forward), ("training", done.training)):
        row[name] = {**_timing(times, label, share), **limits[name]}
        row[name]["over_fastest_hf"] = _over_fastest_peer(candidate, candidates, times)
    if done.is_cold:
        warm = (("forward", done.warm_forward), ("training", done.warm_training))
        row["warm"] = {name: _timing(times, label, share) for name, times in warm}
    return row


def _timing(times: Times, label: str, share: float) -> dict[str, Any]:
    over_dense = ratio(times, label, DENSE)
    return {**dataclasses.asdict(spread(times[label])), "over_dense": over_dense, "over_dense_over_share": over_dense / share}


def over_limits(candidate: Candidate, done: Race, setting: Setting, roof: Roof) -> dict[str, dict[str, Any]]:
    """The limits of a candidate's passes, and its times over them."""
    label, passes = candidate.label, (("forward", done.forward, False), ("training", done.training, True))
    size: dict[str, Any] = {"n_tokens": setting.n_tokens, "itemsize": setting.dtype.itemsize}
    return {
        name: _limit(limit(candidate.config, roof, touched_bytes=done.touched[label], training=training, **size), times, label)
        for name, times, training in passes
    }


def _limit(bound: Limit, times: Times, label: str) -> dict[str, Any]:
    return {
        "limit_s": bound.seconds,
        "limit_arithmetic_s": bound.arithmetic_s,
        "limit_bytes_s": bound.bytes_s,
        "gradient_s": bound.gradient_s,
        "over_limit": spread(times[label]).median_s / bound.seconds,
    }


def _over_fastest_peer(candidate: Candidate, candidates: Sequence[Candidate], times: Times) -> dict[str, Any] | None:
    """Which of Hugging Face's implementations is fastest at this size, and the time over its; None for those not compared."""
    peers = [c.label for c in candidates if c.is_peer and c.label.startswith("hf ")]
    if not peers or candidate.is_peer or not has_peers(candidate.config):
        return None
    fastest = min(peers, key=lambda name: spread(times[name]).median_s)
    over = ratio(times, candidate.label, fastest)
    return {"fastest": fastest, "over": over, "times_faster": 1 / over}
