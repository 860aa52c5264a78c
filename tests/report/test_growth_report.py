"""By which power of a size something grows."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import linregress, t

from sparseffn.report.growth_report import exponent


def test_a_power_law_has_its_exponent_and_no_width() -> None:
    sizes = [64, 128, 256, 512]
    assert exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx((1.5, 1.5, 1.5))


def test_what_is_no_power_law_has_a_wide_interval() -> None:
    """A constant beside a linear part: between flat and linear, steeper with size."""
    sizes = [64, 128, 256, 512]
    values = [100 + size for size in sizes]
    found, expected = exponent(sizes, values), linregress(np.log(sizes), np.log(values))
    half = t.ppf(0.975, 2) * expected.stderr
    assert found == pytest.approx((expected.slope, expected.slope - half, expected.slope + half))
    assert found is not None and 0.5 < found[0] < 0.8 and half > 0.15


def test_two_sizes_say_nothing_of_the_law() -> None:
    assert exponent([64, 128], [1.0, 2.0]) is None
