"""Do two methods differ? Paired by seed, with a 95% interval, and what the interval says of a claim.

    found = difference({0: ours_0, 1: ours_1}, {0: theirs_0, 1: theirs_1})
    found.decided, found.low, found.high, verdict("better", found)

A run gives the loss of every evaluation window, or one number. A table has few seeds and many windows, and two models differ
for three reasons: the seeds, the text of the windows, which all seeds read alike, and chance in each. A resample draws seeds,
then blocks of neighbouring windows, the same blocks for all its seeds (crossed, not nested: windows drawn anew for each seed
would average the share of the text away). Windows come in blocks because neighbours share a document and the models' memory.

A percentile interval of few draws is too narrow: for two seeds that differ at random it holds the truth half of the time.
Deviations at each level are therefore stretched by `sqrt(n / (n - 1))` and by the ratio of Student's t to the normal
quantile, n the number of seeds or of blocks (Hesterberg 2015, https://arxiv.org/abs/1411.5279, "expanded percentile
interval"). Two seeds then decide only what is large against the distance between them. Without windows the level of the seeds
is all there is, and its interval is exactly Student's: nothing is drawn.

Where a table has more methods, all of them show how much seeds differ: `seed_noise` pools what rows and seeds leave
unexplained (a randomised block design: a seed's start and order of the data, which all methods share, cancel in a difference).
Its many degrees of freedom take the place of a pair's own, and a single seed has an honest interval too. The price is the
assumption that methods scatter alike.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, Literal

import msgspec
import numpy as np

from sparseffn.errors import UserError

# The 95% that is stated everywhere.
LEVEL = 0.95
# The normal quantile that belongs to the 95% of Student's.
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
# Resamples drawn together, which bounds the memory: a chunk holds n_seeds x chunk x n_blocks numbers.
_CHUNK = 1000

Claimed = Literal["equal or better", "better", "worse", "different"]
"""What a difference is claimed to be, negative being better."""
Verdict = Literal["confirmed", "contradicted", "bounded", "undecided"]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A mean difference with its 95% interval, in the unit of the losses; result files hold it as it is."""

    difference: float
    """Mean of `ours - theirs` over seeds and windows."""
    low: float
    high: float
    decided: bool
    """Whether the interval excludes zero, and covers what it must."""
    covers_seeds: bool
    """Whether the interval covers the choice of the seed; of one seed without `SeedNoise` it covers that of the text alone."""
    n_seeds: int
    n_windows: int | None = None
    """None for runs of one number each."""

    def __post_init__(self) -> None:
        if not self.low <= self.difference <= self.high:
            raise UserError(f"`difference` must lie in its interval; got {self.difference} in [{self.low}, {self.high}]")
        if self.decided != (self.covers_seeds and (self.low > 0 or self.high < 0)):
            raise UserError(
                "`decided` must say whether the interval covers the seeds and excludes 0; "
                f"got {str(self.decided).lower()} for [{self.low}, {self.high}]"
            )

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def in_unit(self, unit: float) -> Difference:
        """Divided by a unit: `in_unit(math.log(2))` is in bits what this is in nats."""
        ends = (self.difference / unit, self.low / unit, self.high / unit)
        return _difference(*ends, covers_seeds=self.covers_seeds, n_seeds=self.n_seeds, n_windows=self.n_windows)

    def less(self, other: Difference) -> Difference:
        """Of two differences from one third method, the difference between the two.

        The standard deviation of a difference is at most the sum of both, whatever they have in common: the widths of the two
        intervals are added, which is too wide.
        """
        return _difference(
            self.difference - other.difference,
            self.low - other.high,
            self.high - other.low,
            covers_seeds=self.covers_seeds and other.covers_seeds,
            n_seeds=min(self.n_seeds, other.n_seeds),
            n_windows=self.n_windows,
        )


def verdict(claimed: Claimed, found: Difference | None, *, margin: float = 0.0) -> Verdict:
    """What the interval of a difference says of a claim.

    "confirmed": it lies where the claim says. "contradicted": it lies wholly elsewhere. "bounded": neither, but all of it is
    within `margin` of zero: if there is a difference, it is too small to matter. "undecided": all else, and any interval that
    does not cover seeds.

    Args:
        claimed: the claim; "different" is never contradicted.
        found: the difference; None where there is none yet.
        margin: in its unit: what "equal or better" may be worse by, and what is too small to matter.
    """
    if found is None or not found.covers_seeds:
        return "undecided"
    if claimed == "different":
        confirmed, contradicted = found.decided, False
    else:
        # Claimed is that the difference is below a bound; "worse" claims it of the negative.
        low, high = (-found.high, -found.low) if claimed == "worse" else (found.low, found.high)
        bound = margin if claimed == "equal or better" else 0.0
        confirmed, contradicted = high < bound, low > bound
    if confirmed or contradicted:
        return "confirmed" if confirmed else "contradicted"
    return "bounded" if -margin < found.low and found.high < margin else "undecided"


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """`ours - theirs` of every seed that both have."""
    return [ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))]


def p_value(found: Difference, freedom: int) -> float:
    """Two-sided, of a difference whose interval is Student's with these degrees of freedom: below 5% where it excludes zero."""
    from scipy.special import stdtr

    towards_zero = found.difference - found.low if found.difference > 0 else found.high - found.difference
    if not towards_zero:
        return 1.0 if not found.difference else 0.0
    return 2 * float(stdtr(freedom, -abs(found.difference) / towards_zero * student_quantile(freedom)))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values of several comparisons, corrected for their number (Holm 1979): at 5% one of them errs in 5% of cases.

    The least is multiplied by their number, the next by one less, none is below the one before; valid however they depend.
    """
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = least
    return corrected


class MeanStd(msgspec.Struct, frozen=True, kw_only=True):
    """Of the runs of one method."""

    mean: float
    std: float | None
    """Standard deviation of one run; None where there is only one."""
    n: int


def mean_std(values: Sequence[float]) -> MeanStd | None:
    """Mean and standard deviation over seeds; None of nothing."""
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return MeanStd(mean=statistics.fmean(values), std=std, n=len(values))


class SeedNoise(msgspec.Struct, frozen=True, kw_only=True):
    """How much runs of one method differ by the seed, beyond what a seed does to all methods alike."""

    std: float
    """Of one run, in the unit of the losses; a difference of two runs has the square root of two times it."""
    freedom: int
    """Degrees of freedom behind it, at least 1."""


def seed_noise(losses: Mapping[Any, Mapping[int, float]]) -> SeedNoise | None:
    """Pool the scatter of seeds over methods: what remains of each loss after an effect of its method and one of its seed.

    `losses` maps method to seed to the mean loss of that run; methods may have seeds of their own number. None where nothing
    remains to estimate it from, as with one seed or one method.
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


def difference(
    ours: Mapping[int, np.ndarray | float],
    theirs: Mapping[int, np.ndarray | float],
    *,
    noise: SeedNoise | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Mean over shared seeds (and windows) of `ours - theirs` with its 95% interval; the same for equal arguments.

    Args:
        ours: seed to `[n_windows]`, the loss of each evaluation window in the order of the text; or seed to one number.
        theirs: the same of the other method; seeds that only one has are left out.
        noise: of seeds, pooled over more methods; None: what these two show.
        resamples: draws of the bootstrap over windows.
        seed: of the draws.

    Raises:
        UserError: no seed is common, windows differ in number or are fewer than two, a loss is not finite, or `resamples`
            is too small for a 95% interval.
    """
    if resamples < 100:
        raise UserError(f"`resamples` must be at least 100; got {resamples}; fix: leave it at its default")
    difference_SW = _differences(ours, theirs)
    n_seeds, n_windows = difference_SW.shape
    if n_windows == 1:
        differences = difference_SW[:, 0].tolist()
        mean, half = statistics.fmean(differences), _student_half_width(differences, noise)
        low, high = mean - half, mean + half
    else:
        generator = np.random.default_rng(seed)
        sizes = [min(_CHUNK, resamples - start) for start in range(0, resamples, _CHUNK)]
        deviations = np.concatenate([_deviations(difference_SW, generator, size, noise) for size in sizes])
        mean = float(difference_SW.mean())
        # The mean lies between the quantiles but for rounding, where nothing varies.
        below, above = np.quantile(deviations, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        low, high = mean + min(0.0, float(below)), mean + max(0.0, float(above))
    covers_seeds = n_seeds > 1 or noise is not None
    return _difference(
        mean, low, high, covers_seeds=covers_seeds, n_seeds=n_seeds, n_windows=None if n_windows == 1 else n_windows
    )


def _difference(mean: float, low: float, high: float, *, covers_seeds: bool, n_seeds: int, n_windows: int | None) -> Difference:
    return Difference(
        difference=mean,
        low=low,
        high=high,
        decided=covers_seeds and (low > 0 or high < 0),
        covers_seeds=covers_seeds,
        n_seeds=n_seeds,
        n_windows=n_windows,
    )


def _student_half_width(differences: Sequence[float], noise: SeedNoise | None) -> float:
    """Of the interval of the mean of one number a seed; 0 where nothing tells how much seeds differ."""
    n = len(differences)
    if noise is not None:
        return noise.std * math.sqrt(2 / n) * student_quantile(noise.freedom)
    return student_quantile(n - 1) * statistics.stdev(differences) / math.sqrt(n) if n > 1 else 0.0


def _differences(ours: Mapping[int, np.ndarray | float], theirs: Mapping[int, np.ndarray | float]) -> np.ndarray:
    """`[n_seeds, n_windows]` of the shared seeds, checked; one column for runs of one number."""
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
        if values.ndim > 1 or values.size < 2 - (values.ndim == 0):
            raise UserError(
                f"`{name}` must be one number, or one loss for each of at least 2 windows; got shape {values.shape}; "
                "fix: pass the losses of windows as a list"
            )
        if values.shape != shape:
            raise UserError(
                f"`{name}` must hold as many windows as `ours[{seeds[0]}]`, {_n_windows(shape)}; got {_n_windows(values.shape)}"
                "; fix: evaluate both on the same split with the same context and batch"
            )
        if not np.isfinite(values).all():
            raise UserError(f"`{name}` must be finite; got NaN or infinity; fix: leave a diverged run out")
    pairs = [losses[f"ours[{seed}]"] - losses[f"theirs[{seed}]"] for seed in seeds]
    return np.stack([np.atleast_1d(pair) for pair in pairs])


def _n_windows(shape: tuple[int, ...]) -> str:
    return str(shape[0]) if shape else "one number"


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
    # Imports in a third of a second.
    from scipy.special import stdtrit

    assert freedom >= 1, "one value has no spread"
    return float(stdtrit(freedom, (1 + LEVEL) / 2))
