"""Bounds for a comparison that is looked at more than once, by simulation of Student's t at these numbers of seeds.

Each look adds a chance to err. The error that may have been made up to a look with n of N seeds is `alpha (n / N)^power`: power
1 lets a look that may be the last one decide, power 3 keeps most for the last. Bounds of the normal theory (Pocock, O'Brien and
Fleming) are far too small at few seeds, where the standard deviation itself is a guess; here t statistics of nested samples are
drawn and the bound of each look is the quantile that spends its share.

    |t| > bound at a look  <=>  mean +- bound * std / sqrt(n) excludes 0
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sparseffn.errors import UserError

# Draws at a time, which bounds the memory.
_CHUNK = 250_000


def spent_error(looks: Sequence[int], alpha: float, power: float) -> list[float]:
    """The error that may have been made up to each look."""
    return [alpha * (n / looks[-1]) ** power for n in looks]


def t_statistics(looks: Sequence[int], n_draws: int, seed: int) -> NDArray[np.float64]:
    """`[n_draws, n_looks]`: |t| of the first n of one sample of standard normal numbers, n the seeds of each look."""
    generator = np.random.default_rng(seed)
    chunks: list[NDArray[np.float64]] = []
    for start in range(0, n_draws, _CHUNK):
        sample = generator.standard_normal((min(_CHUNK, n_draws - start), looks[-1]))
        parts = [sample[:, :n] for n in looks]
        columns = [np.abs(part.mean(axis=1)) * math.sqrt(part.shape[1]) / part.std(axis=1, ddof=1) for part in parts]
        chunks.append(np.stack(columns, axis=1))
    return np.concatenate(chunks)


def t_bounds(looks: Sequence[int], alpha: float, *, power: float = 1.0, n_draws: int = 4_000_000, seed: int = 0) -> list[float]:
    """Bounds of |t| at each look with which a comparison without a difference is decided in `alpha` of all cases.

    Args:
        looks: numbers of seeds, ascending.
        alpha: two-sided error over all looks.
        power: of the share of seeds, for the share of the error.
        n_draws: of the simulation.
        seed: of the draws.

    Raises:
        UserError: looks do not ascend from two seeds, or `alpha` is no error.
    """
    if not looks or looks[0] < 2 or list(looks) != sorted(set(looks)):
        raise UserError(f"`looks` must be ascending numbers of at least 2 seeds; got {list(looks)}; fix: looks = [4, 8]")
    if not 0 < alpha < 1:
        raise UserError(f"`alpha` must be between 0 and 1; got {alpha}; fix: alpha = 0.05")
    values, undecided, bounds, before = t_statistics(looks, n_draws, seed), np.ones(n_draws, dtype=bool), [], 0.0
    for column, spent in zip(values.T, spent_error(looks, alpha, power), strict=True):
        # As many of those that are still open cross here as the look may spend.
        open_values = column[undecided]
        bound = float(np.quantile(open_values, 1 - (spent - before) * n_draws / len(open_values)))
        undecided &= column <= bound
        bounds.append(bound)
        before = spent
    return bounds


def error_rate(looks: Sequence[int], bounds: Sequence[float], *, n_draws: int, seed: int) -> float:
    """How often some look decides where there is no difference."""
    return float((t_statistics(looks, n_draws, seed) > np.asarray(bounds)).any(axis=1).mean())
