"""The difference of two methods on the same windows under the same seeds, with a bootstrap interval.

    difference = paired_difference({0: ours_0, 1: ours_1}, {0: theirs_0, 1: theirs_1})
    difference.decided, difference.low, difference.high

A table has few seeds and many windows, and two models differ for three reasons: the seeds, the text of the windows, which all
seeds read alike, and chance in each. So a resample draws seeds, then blocks of neighbouring windows, the same blocks for all
its seeds (crossed, not nested: windows drawn anew for each seed would take the text for another one each time, and average its
share away). Windows come in blocks because neighbours share a document and the models' memory.

A percentile interval of few draws is too narrow: for two seeds that differ at random it holds the truth half of the time.
Deviations at each level are therefore stretched by `sqrt(n / (n - 1))` and by the ratio of Student's t to the normal
quantile, n the number of seeds or of blocks (Hesterberg 2015, https://arxiv.org/abs/1411.5279, "expanded percentile
interval"). Two seeds then decide only what is large against the distance between them.

Where a table has more methods, all of them tell how much seeds differ: `seed_noise` pools what rows and seeds leave
unexplained (a randomised block design: a seed's start and order of the data, which all methods share, cancel in a difference).
Its many degrees of freedom take the place of a pair's own, and a single seed has an honest interval too. The price is the
assumption that methods scatter alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from sparseffn.errors import UserError

# The 95% that is stated everywhere.
LEVEL = 0.95
# The normal quantile that belongs to the 95% of Student's.
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
# Resamples drawn at once, which bounds the memory: a chunk holds n_seeds x chunk x n_blocks numbers.
_CHUNK = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """A mean difference with its 95% interval, in the unit of the losses."""

    difference: float
    """Mean of `ours - theirs` over seeds and windows."""
    low: float
    high: float
    n_seeds: int
    n_windows: int
    covers_seeds: bool
    """Whether the interval covers the choice of the seed; of one seed without `SeedNoise` it covers that of the text alone."""

    @property
    def decided(self) -> bool:
        """Whether the interval excludes zero, and covers what it must."""
        return self.covers_seeds and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedNoise:
    """How much runs of one method differ by the seed, beyond what a seed does to all methods alike."""

    std: float
    """Of one run, in the unit of the losses; a difference of two runs has the square root of two times it."""
    freedom: int
    """Degrees of freedom behind it, at least 1."""


def seed_noise(losses: Mapping[Any, Mapping[int, float]]) -> SeedNoise | None:
    """Pool the scatter of seeds over methods: what remains of each loss after an effect of its method and one of its seed.

    Args:
        losses: method to seed to the mean loss of that run; methods may have seeds of their own number.

    Returns:
        None where nothing remains to estimate it from, as with one seed or one method.
    """
    runs = [(method, seed, loss) for method, by_seed in losses.items() for seed, loss in by_seed.items()]
    methods = list(losses)
    seeds = sorted({seed for _, seed, _ in runs})
    design = np.zeros((len(runs), len(methods) + len(seeds)))
    for n, (method, seed, _) in enumerate(runs):
        design[n, methods.index(method)] = design[n, len(methods) + seeds.index(seed)] = 1.0
    freedom = len(runs) - (int(np.linalg.matrix_rank(design)) if runs else 0)
    if freedom < 1:
        return None
    found = np.array([loss for _, _, loss in runs])
    rest = found - design @ np.linalg.lstsq(design, found, rcond=None)[0]
    return SeedNoise(std=math.sqrt(float(rest @ rest) / freedom), freedom=freedom)


def paired_difference(
    ours: Mapping[int, np.ndarray],
    theirs: Mapping[int, np.ndarray],
    *,
    noise: SeedNoise | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Mean over shared seeds and windows of `ours - theirs`, with a two-level bootstrap interval; the same for equal arguments.

    Args:
        ours: seed to `[n_windows]`, the loss of each evaluation window in the order of the text.
        theirs: the same of the other method; seeds that only one has are left out.
        noise: of seeds, pooled over more methods; None: what these two show.
        resamples: draws of the bootstrap.
        seed: of the draws.

    Raises:
        UserError: no seed is common, windows differ in number or are fewer than two, a loss is not finite, or `resamples`
            is too small for a 95% interval.
    """
    if resamples < 100:
        raise UserError(f"`resamples` must be at least 100; got {resamples}; fix: leave it at its default")
    difference_SW = _differences(ours, theirs)
    n_seeds, n_windows = difference_SW.shape
    generator = np.random.default_rng(seed)
    sizes = [min(_CHUNK, resamples - start) for start in range(0, resamples, _CHUNK)]
    deviations = np.concatenate([_deviations(difference_SW, generator, size, noise) for size in sizes])
    mean = float(difference_SW.mean())
    low, high = np.quantile(deviations, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return PairedDifference(
        difference=mean,
        low=mean + float(low),
        high=mean + float(high),
        n_seeds=n_seeds,
        n_windows=n_windows,
        covers_seeds=n_seeds > 1 or noise is not None,
    )


def _differences(ours: Mapping[int, np.ndarray], theirs: Mapping[int, np.ndarray]) -> np.ndarray:
    """`[n_seeds, n_windows]` of the shared seeds, checked."""
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        raise UserError(
            f"`ours` and `theirs` must share a seed; got {sorted(ours)} and {sorted(theirs)}; fix: run both with the same seeds"
        )
    losses = {
        f"{name}[{seed}]": np.asarray(values[seed], dtype=np.float64)
        for seed in seeds
        for name, values in (("ours", ours), ("theirs", theirs))
    }
    shape = losses[f"ours[{seeds[0]}]"].shape
    for name, values in losses.items():
        if values.ndim != 1 or len(values) < 2:
            raise UserError(f"`{name}` must be one loss for each of at least 2 windows; got shape {values.shape}")
        if values.shape != shape:
            raise UserError(
                f"`{name}` must hold as many windows as `ours[{seeds[0]}]`, {shape[0]}; got {len(values)}; "
                "fix: evaluate both on the same split with the same context and batch"
            )
        if not np.isfinite(values).all():
            raise UserError(f"`{name}` must be finite; got NaN or infinity; fix: leave a diverged run out")
    return np.stack([losses[f"ours[{seed}]"] - losses[f"theirs[{seed}]"] for seed in seeds])


def _deviations(difference_SW: np.ndarray, generator: np.random.Generator, n: int, noise: SeedNoise | None) -> np.ndarray:
    """`[n]`: how far a resample's mean lies from the mean, each level stretched for its number of draws."""
    n_seeds, n_windows = difference_SW.shape
    # The root of the number of windows: long enough for neighbours' likeness, and enough blocks to draw from.
    length = math.ceil(math.sqrt(n_windows))
    n_blocks = -(-n_windows // length)
    # Blocks wrap around, so that every window is drawn equally often.
    starts_NB = generator.integers(0, n_windows, (n, n_blocks))
    windows_SN = _block_means(difference_SW, length)[:, starts_NB].mean(axis=2)
    if noise is not None:
        scale = noise.std * math.sqrt(2 / n_seeds) * student_quantile(noise.freedom) / _Z
        from_windows = windows_SN.mean(axis=0) - difference_SW.mean()
        return scale * generator.standard_normal(n) + _stretch(n_blocks) * from_windows
    share_NS = generator.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=n) / n_seeds
    seed_means_S = difference_SW.mean(axis=1)
    from_seeds = share_NS @ seed_means_S - seed_means_S.mean()
    from_windows = np.einsum("ns,sn->n", share_NS, windows_SN - seed_means_S[:, None])
    return _stretch(n_seeds) * from_seeds + _stretch(n_blocks) * from_windows


def _block_means(difference_SW: np.ndarray, length: int) -> np.ndarray:
    """`[n_seeds, n_windows]`: the mean of the `length` windows from each window on."""
    wrapped = np.concatenate([difference_SW, difference_SW[:, : length - 1]], axis=1)
    sums = np.pad(wrapped.cumsum(axis=1), ((0, 0), (1, 0)))
    return (sums[:, length:] - sums[:, :-length]) / length


def _stretch(n: int) -> float:
    """What makes a percentile interval of n draws as wide as Student's; 1 for a level of one draw, which does not vary."""
    return 1.0 if n == 1 else math.sqrt(n / (n - 1)) * student_quantile(n - 1) / _Z


@functools.cache
def student_quantile(freedom: int) -> float:
    """The t that 95% of the distribution lies within, on both sides; for at least one degree of freedom."""
    assert freedom >= 1, "one value has no spread"
    # Bisection over the angle theta of t = sqrt(freedom) tan(theta), until the two ends are neighbouring numbers.
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _within(middle, freedom) < LEVEL else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(theta: float, freedom: int) -> float:
    """The probability of |t| < sqrt(freedom) tan(theta)."""
    cosine, odd = math.cos(theta), freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for n in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (n - 1) / n
        total += term
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
