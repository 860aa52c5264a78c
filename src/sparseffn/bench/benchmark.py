"""Candidates at one size: first each is checked against float64, then all are timed in turn.

Few tokens are timed cold: the calls go round as many layers as fill four times the last-level cache, with fresh tokens each
call, as in a model that decodes. As there the layer before has just been called, with the tokens of its own round: weights
come from memory, while threads are awake and the code is in the caches. (One token of sigma-MoE, 1024 wide in bfloat16, took
270 us on two cores after 10 ms of sleep, and 96 after another layer: the second thread had to wake.) A warm timing of one
layer and the same tokens, called again and again, stands beside it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from sparseffn.bench.candidates import (
    Candidate,
    Progress,
    Setting,
    backend_restored,
    build_layer,
    draw_tokens,
    no_progress,
    use_backend,
)
from sparseffn.bench.correctness import Truth, check, find_truth
from sparseffn.bench.machine import clock_of, last_level_cache_bytes, memory_bytes
from sparseffn.bench.roofline import touched_bytes
from sparseffn.bench.timing import Times, Turn, medians, take_turns
from sparseffn.errors import UserError
from sparseffn.ffn import FFNConfig
from sparseffn.results.bench_result import Deviation

# The most tokens of a call that are timed cold: decoding, not a prompt. Beyond, arithmetic dominates reading.
COLD_TOKENS = 64
# No model has more layers: where more would be needed to fill the cache, a whole model stays in it, and nothing is timed cold.
_MOST_LAYERS = 256
# Seconds for which the short calls of a size are timed, so that their medians settle.
_AT_LEAST_S = 1.5
# Part of the memory that the layers of all candidates may take.
_MEMORY_SHARE = 0.5
# Calls before the timed one of a warm timing, which bring weights and tokens into the caches.
_WARMING_CALLS = 2
# Rounds over which the weights that a call touches are averaged.
_TOUCHED_ROUNDS = 8


@final
class Rotation:
    """A candidate's layers, each with parameters of its own, visited one after the other."""

    def __init__(self, candidate: Candidate, setting: Setting, n_layers: int) -> None:
        self.candidate = candidate
        self.setting = setting
        self.layers = [build_layer(candidate.config, setting, seed) for seed in range(n_layers)]
        self.modules = [candidate.module(layer) for layer in self.layers]
        self.fixed = draw_tokens(candidate.config, setting, seed=1)
        # What a model would send back; the gradient of a sum would be one number repeated.
        self.grad = draw_tokens(candidate.config, setting, seed=0)

    def tokens(self, index: int) -> Tensor:
        """The tokens of a round: fresh ones where the layers rotate, else always the same."""
        return draw_tokens(self.candidate.config, self.setting, seed=1 + index) if len(self.layers) > 1 else self.fixed

    def touched_bytes(self) -> float:
        """Bytes of the weights that a call needs, mean over some rounds."""
        rounds = range(min(_TOUCHED_ROUNDS, len(self.layers)))
        use_backend(self.candidate.backend)
        return statistics.fmean(touched_bytes(self.layers[i], self.tokens(i)) for i in rounds)


@final
class LayerTurn(Turn):
    """A forward under `inference_mode`, or in training a forward and a backward whose gradients are freed afterwards."""

    def __init__(self, rotation: Rotation, *, training: bool, warm: bool = False) -> None:
        self.rotation = rotation
        self.training = training
        self.warm = warm
        self.parameters: Sequence[nn.Parameter] = ()

    def prepare(self, index: int) -> Callable[[], object]:
        """Tokens, backend, and untimed calls: for a warm timing of the layer itself, for a cold one of the one before."""
        use_backend(self.rotation.candidate.backend)
        if self.warm:
            call = self._call(0)
            for _ in range(_WARMING_CALLS):
                call()
                self.finish()
            return call
        if len(self.rotation.layers) > 1:
            self._call(index - 1)()
            self.finish()
        return self._call(index)

    def _call(self, index: int) -> Callable[[], object]:
        """The call of a round, by one layer."""
        place = index % len(self.rotation.layers)
        module = self.rotation.modules[place].train(self.training)
        self.parameters = list(self.rotation.layers[place].parameters())
        x, grad = self.rotation.tokens(index), self.rotation.grad

        def infer() -> object:
            with torch.inference_mode():
                return module(x)

        def train() -> object:
            return module(x.detach().requires_grad_()).backward(grad)

        return train if self.training else infer

    def finish(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What was measured at one size, by candidate; times by pass before, `forward` and `training`."""

    n_layers: int
    """Layers that the timed calls go round; 1 where they are not cold."""
    times: dict[str, Times]
    warm: dict[str, Times]
    """Empty where nothing is timed cold."""
    checks: dict[str, Deviation]
    touched: dict[str, float]
    """Bytes of the weights that a call needs, mean over some calls."""


def benchmark(
    candidates: Sequence[Candidate],
    setting: Setting,
    *,
    rounds: int,
    cold_tokens: int = COLD_TOKENS,
    progress: Progress = no_progress,
) -> Benchmark:
    """Check, then time.

    Args:
        candidates: with distinct labels.
        setting: of all of them.
        rounds: timed calls of each, at least.
        cold_tokens: up to so many tokens are timed cold.
        progress: receives what is being done.

    Raises:
        UserError: a candidate is wrong, so that no speed is reported; or the layers do not fit into memory.
    """
    n_layers = _layers_needed(candidates, setting) if setting.n_tokens <= cold_tokens else 1
    with backend_restored():
        rotations = {c.label: Rotation(c, setting, n_layers) for c in candidates}
        checks = _check(rotations, setting, progress)
        progress(f"timing {len(candidates)} candidates at {setting.n_tokens} tokens")

        def timed(*, training: bool, warm: bool) -> Times:
            turns = {label: LayerTurn(rotation, training=training, warm=warm) for label, rotation in rotations.items()}
            return take_turns(turns, rounds=rounds, at_least_s=_AT_LEAST_S, clock=clock_of(setting.device))

        def both(*, warm: bool) -> dict[str, Times]:
            return {name: timed(training=name == "training", warm=warm) for name in ("forward", "training")}

        return Benchmark(
            n_layers=n_layers,
            times=both(warm=False),
            warm=both(warm=True) if n_layers > 1 else {},
            checks=checks,
            touched={label: rotation.touched_bytes() for label, rotation in rotations.items()},
        )


def check_blocks(
    configs: Mapping[str, FFNConfig], setting: Setting, *, backend: str = "auto", progress: Progress = no_progress
) -> None:
    """Check blocks that are timed inside something larger, a training step, at their size.

    Raises:
        UserError: one is wrong, so that no speed is reported.
    """
    candidates = [Candidate(label=label, config=config, backend=backend) for label, config in configs.items()]
    with backend_restored():
        _check({c.label: Rotation(c, setting, 1) for c in candidates}, setting, progress)


def _check(rotations: dict[str, Rotation], setting: Setting, progress: Progress) -> dict[str, Deviation]:
    """Compare every candidate with the truth of its config, which peers share with the layer that they imitate."""
    truths: dict[FFNConfig, Truth] = {}
    found = {}
    for label, rotation in rotations.items():
        config = rotation.candidate.config
        if config not in truths:
            progress(f"checking {label} at {setting.n_tokens} tokens")
            # What the formula takes from the operations, a mixture's logits, must not come from a kernel under test.
            use_backend("torch")
            truths[config] = find_truth(config, setting)
        truth = truths[config]
        deviations = check(rotation.candidate, rotation.layers[0], rotation.modules[0], truth)
        found[label] = Deviation(tokens=len(truth.tokens), largest_deviation=deviations)
    return found


def layers_to_leave_cache(config: FFNConfig, itemsize: int, cache_bytes: int) -> int:
    """How many layers fill four times the last-level cache, so that none is there when it is called again."""
    return max(2, math.ceil(4 * cache_bytes / (config.num_params() * itemsize)))


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


def time_layers(
    configs: Mapping[str, FFNConfig],
    *,
    n_tokens: int = 1024,
    dtype: torch.dtype = torch.float32,
    rounds: int = 7,
    device: torch.device | None = None,
) -> dict[str, dict[str, float]]:
    """Median `forward_s` and `training_s` of each layer, in turn, after the correctness check.

    Args:
        configs: label to block.
        n_tokens: of a call.
        dtype: of parameters and tokens.
        rounds: timed calls of each, at least.
        device: the CPU unless another is given.

    Raises:
        UserError: a layer is wrong; no speed is reported for it.
    """
    setting = Setting(n_tokens=n_tokens, dtype=dtype, device=device or torch.device("cpu"))
    candidates = [Candidate(label=label, config=config) for label, config in configs.items()]
    done = benchmark(candidates, setting, rounds=rounds, cold_tokens=0)
    found = {f"{name}_s": medians(times) for name, times in done.times.items()}
    return {label: {name: seconds[label] for name, seconds in found.items()} for label in configs}
