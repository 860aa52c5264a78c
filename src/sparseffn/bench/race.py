"""Candidates at one size: first each is held against the truth, then all are timed in turn.

Few tokens are timed cold: the calls go round as many layers as fill four times the last-level cache, with fresh tokens each
call, as in a model that decodes. A warm timing of one layer and the same tokens, called again and again, stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from sparseffn.bench.backends import backend_restored, use_backend
from sparseffn.bench.candidates import (
    Candidate,
    Rotation,
    Setting,
    forward_turns,
    layers_to_leave_cache,
    training_turns,
)
from sparseffn.bench.correctness import Truth, check, find_truth
from sparseffn.bench.machine import clock_of, last_level_cache_bytes, memory_bytes
from sparseffn.bench.timing import Times, medians, take_turns
from sparseffn.errors import UserError
from sparseffn.ffn import FFNConfig

# The most tokens of a call that are timed cold: decoding, not a prompt. Beyond, arithmetic dominates reading.
COLD_TOKENS = 64
# No model has more layers: where more would be needed to fill the cache, a whole model stays in it, and nothing is timed cold.
_MOST_LAYERS = 256
# Seconds for which the short calls of a size are timed, so that their medians settle.
_AT_LEAST_S = 1.5
# Part of the memory that the layers of all candidates may take.
_MEMORY_SHARE = 0.5

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Race:
    """Timings of one size, by candidate."""

    n_layers: int
    """Layers that the timed calls go round; 1 where they are not cold."""
    forward: Times
    training: Times
    warm_forward: Times = field(default_factory=dict)
    """Empty where nothing is timed cold."""
    warm_training: Times = field(default_factory=dict)
    errors: dict[str, dict[str, float]]
    """Largest deviations from the truth, by candidate and quantity."""
    n_compared: dict[str, int]
    """Tokens on which each candidate was compared."""
    touched: dict[str, float]
    """Bytes of the weights that a call needs, mean over some calls."""

    @property
    def is_cold(self) -> bool:
        """Whether weights come from memory in every call."""
        return self.n_layers > 1


def race(
    candidates: Sequence[Candidate],
    setting: Setting,
    *,
    rounds: int,
    cold_tokens: int = COLD_TOKENS,
    say: Say = lambda text: None,
) -> Race:
    """Gate, then time.

    Args:
        candidates: with distinct labels.
        setting: tokens, dtype, device.
        rounds: timed calls of each, at least.
        cold_tokens: up to so many tokens are timed cold.
        say: told what is being done.

    Raises:
        UserError: a candidate is wrong, so that no speed is told; or the layers do not fit into memory.
    """
    n_layers = _layers_needed(candidates, setting) if setting.n_tokens <= cold_tokens else 1
    with backend_restored():
        rotations = {c.label: Rotation(c, setting, n_layers) for c in candidates}
        errors, n_compared = _gate(rotations, setting, say)
        say(f"timing {len(candidates)} candidates at {setting.n_tokens} tokens")

        def timed(make_turns: Callable[..., dict], *, warm: bool) -> dict[str, list[float]]:
            turns = make_turns(rotations, warm=warm)
            return take_turns(turns, rounds=rounds, at_least_s=_AT_LEAST_S, clock=clock_of(setting.device))

        cold = n_layers > 1
        return Race(
            n_layers=n_layers,
            forward=timed(forward_turns, warm=False),
            training=timed(training_turns, warm=False),
            warm_forward=timed(forward_turns, warm=True) if cold else {},
            warm_training=timed(training_turns, warm=True) if cold else {},
            errors=errors,
            n_compared=n_compared,
            touched={label: rotation.touched_bytes() for label, rotation in rotations.items()},
        )


def gate_blocks(
    configs: Mapping[str, FFNConfig], setting: Setting, *, backend: str = "auto", say: Say = lambda text: None
) -> None:
    """Hold blocks that are timed inside something larger, a training step, against the truth at their size.

    Raises:
        UserError: one is wrong, so that no speed is told.
    """
    candidates = [Candidate(label=label, config=config, backend=backend) for label, config in configs.items()]
    with backend_restored():
        _gate({c.label: Rotation(c, setting, 1) for c in candidates}, setting, say)


def _gate(rotations: dict[str, Rotation], setting: Setting, say: Say) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Hold every candidate against the truth of its config, which peers share with the layer that they imitate."""
    truths: dict[FFNConfig, Truth] = {}
    errors, n_compared = {}, {}
    for label, rotation in rotations.items():
        config = rotation.candidate.config
        if config not in truths:
            say(f"checking {label} at {setting.n_tokens} tokens")
            # What the formula takes from the operations, a mixture's logits, must not come from a kernel under test.
            use_backend("torch")
            truths[config] = find_truth(config, setting)
        truth = truths[config]
        errors[label] = check(rotation.candidate, rotation.layers[0], rotation.modules[0], truth)
        n_compared[label] = len(truth.tokens)
    return errors, n_compared


def _layers_needed(candidates: Sequence[Candidate], setting: Setting) -> int:
    """Layers a candidate, and a refusal where all candidates' layers together would not fit."""
    itemsize = setting.dtype.itemsize
    cache, _ = last_level_cache_bytes(setting.device)
    n_layers = max(layers_to_leave_cache(c.config, itemsize, cache) for c in candidates)
    if n_layers > _MOST_LAYERS:
        return 1
    needed = sum(n_layers * c.config.num_params() * itemsize for c in candidates)
    if needed > _MEMORY_SHARE * memory_bytes(setting.device):
        raise UserError(
            f"layers of four times the cache must fit into half of the memory; got {len(candidates)} candidates that need "
            f"{needed / 2**30:.1f} GiB; fix: name fewer --methods or --backends, or --tokens above {COLD_TOKENS}"
        )
    return n_layers


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """Median seconds of one layer."""

    forward_s: float
    """Evaluation forward, `inference_mode`."""
    training_s: float
    """Training forward and backward, gradients freed between calls."""


def time_layers(configs: Mapping[str, FFNConfig], *, n_tokens: int = 1024, rounds: int = 7) -> dict[str, LayerTime]:
    """Median times of each layer on the same random tokens, float32 on the CPU, layers in turn, after the gate.

    Args:
        configs: label to block.
        n_tokens: tokens of a call.
        rounds: timed calls of each.

    Raises:
        UserError: a layer is wrong; no speed is told of it.
    """
    setting = Setting(n_tokens=n_tokens, dtype=torch.float32, device=torch.device("cpu"))
    candidates = [Candidate(label=label, config=config) for label, config in configs.items()]
    done = race(candidates, setting, rounds=rounds, cold_tokens=0)
    forward, training = medians(done.forward), medians(done.training)
    return {label: LayerTime(forward_s=forward[label], training_s=training[label]) for label in configs}
