"""Intervals of runs of one number, what they say of a claim, and the quantile of Student's t behind them."""

from __future__ import annotations

import math
import statistics

import msgspec
import numpy as np
import pytest
from scipy import stats

from sparseffn.stats import Claimed, Difference, MeanStd, SeedNoise, Verdict, difference, mean_std, student_quantile, verdict


def interval(low: float, high: float, *, covers_seeds: bool = True) -> Difference:
    return Difference(
        difference=(low + high) / 2,
        low=low,
        high=high,
        decided=covers_seeds and (low > 0 or high < 0),
        covers_seeds=covers_seeds,
        n_seeds=3,
    )


@pytest.mark.parametrize("freedom", [*range(1, 40), 100, 1000])
def test_quantile_is_students(freedom: int) -> None:
    """Against another function of SciPy, at every size that a table may have."""
    assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


@pytest.mark.parametrize("n", [2, 3, 12])
def test_interval_of_numbers_is_students(n: int) -> None:
    """Paired by seed; of one seed it has no width and decides nothing, with the noise of seeds it does."""
    values = np.random.default_rng(n).normal(1.0, 0.1, n).tolist()
    found = difference({**dict(enumerate(values)), 99: 0.0}, dict.fromkeys(range(n), 1.0))
    low, high = stats.t.interval(0.95, n - 1, statistics.fmean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low - 1, high - 1)) and (found.n_seeds, found.n_windows) == (n, None)
    assert found.half_width == pytest.approx((high - low) / 2)
    one = difference({0: 1.5}, {0: 1.0})
    assert (one.low, one.high, one.covers_seeds, one.decided) == (0.5, 0.5, False, False)
    noisy = difference({0: 1.5}, {0: 1.0}, noise=SeedNoise(std=0.1, freedom=9))
    assert noisy.decided and noisy.half_width == pytest.approx(2.2622 * 0.1 * math.sqrt(2), rel=1e-4)


def test_numbers_are_the_limit_of_windows_that_are_alike() -> None:
    """One procedure for both: the interval of the bootstrap is that of Student but for chance in its draws."""
    values = np.random.default_rng(0).normal(0.0, 1.0, 8)
    zero = dict.fromkeys(range(8), 0.0)
    numbers = difference(dict(enumerate(values)), zero)
    windows = difference({s: np.full(9, v) for s, v in enumerate(values)}, {s: np.zeros(9) for s in zero}, resamples=50_000)
    assert (windows.low, windows.high) == pytest.approx((numbers.low, numbers.high), rel=0.06)


@pytest.mark.parametrize(
    ("claimed", "low", "high", "margin", "wanted"),
    [
        pytest.param("better", -0.3, -0.1, 0.0, "confirmed", id="better"),
        pytest.param("better", 0.1, 0.3, 0.0, "contradicted", id="not better"),
        pytest.param("better", -0.3, 0.1, 0.0, "undecided", id="perhaps better"),
        pytest.param("better", -0.01, 0.01, 0.02, "bounded", id="neither better nor worse"),
        pytest.param("worse", 0.1, 0.3, 0.0, "confirmed", id="worse"),
        pytest.param("worse", -0.3, -0.1, 0.0, "contradicted", id="not worse"),
        pytest.param("equal or better", -0.3, 0.01, 0.02, "confirmed", id="equal"),
        pytest.param("equal or better", 0.03, 0.3, 0.02, "contradicted", id="not equal"),
        pytest.param("equal or better", 0.01, 0.3, 0.02, "undecided", id="perhaps equal"),
        pytest.param("different", 0.1, 0.3, 0.0, "confirmed", id="different"),
        pytest.param("different", -0.1, 0.3, 0.0, "undecided", id="perhaps different"),
    ],
)
def test_verdict_is_where_the_interval_lies(claimed: Claimed, low: float, high: float, margin: float, wanted: Verdict) -> None:
    """Of one seed alone, or of nothing, it is undecided."""
    assert verdict(claimed, interval(low, high), margin=margin) == wanted
    assert verdict(claimed, interval(low, high, covers_seeds=False), margin=margin) == verdict(claimed, None) == "undecided"


def test_differences_are_converted_and_subtracted() -> None:
    """Units divide all three figures; of two differences from one method the widths add."""
    assert interval(1.0, 3.0).in_unit(2.0) == interval(0.5, 1.5)
    assert interval(1.0, 3.0).less(interval(0.0, 1.0)) == msgspec.structs.replace(interval(0.0, 3.0), difference=1.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"low": 2.5}, "`difference` must lie in its interval"), ({"decided": False}, "`decided` must say .*; got false")],
    ids=["outside", "decided"],
)
def test_stored_difference_does_not_contradict_itself(change: dict[str, object], message: str) -> None:
    """A result file that was changed by hand is refused."""
    stored = msgspec.to_builtins(interval(1.0, 3.0)) | change
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(stored, Difference)


def test_mean_and_deviation_of_seeds() -> None:
    """A single run has no deviation, nothing has no mean."""
    assert mean_std([1.0, 2.0, 3.0]) == MeanStd(mean=2.0, std=1.0, n=3)
    assert mean_std([1.0]) == MeanStd(mean=1.0, std=None, n=1) and mean_std([]) is None
