"""How numbers are written in tables and figures: one function per quantity, each taking None for "not measured"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sparseffn.stats import MeanStd

NOT_MEASURED = "\u2013"
"""Stands for a number that was not measured or has no meaning for a method; tables explain it in a note."""


def count(number: int | None) -> str:
    """A count with its magnitude: `2.40 M`, `0.84 M` (so that a column keeps one unit), `8.1 k`, `812`."""
    if number is None:
        return NOT_MEASURED
    for least, size, suffix, digits in ((1e9, 1e9, "B", 2), (1e5, 1e6, "M", 2), (1e3, 1e3, "k", 1)):
        if abs(number) >= least:
            return f"{number / size:,.{digits}f} {suffix}"
    return f"{number:,}"


def integer(number: float | None) -> str:
    """A whole number with its thousands set apart: `9,800`."""
    return NOT_MEASURED if number is None else f"{number:,.0f}"


def percent(fraction: float | None) -> str:
    """A fraction as a percentage: 0.253 is `25.3%`."""
    return NOT_MEASURED if fraction is None else f"{100 * fraction:.1f}%"


def signed_percent(percentage: float | None) -> str:
    """A deviation that is a percentage already: `+0.12%`, and `0.00%` for what rounds to nothing."""
    if percentage is None:
        return NOT_MEASURED
    text = f"{percentage:+.2f}%"
    return "0.00%" if text in ("+0.00%", "-0.00%") else text


def times(ratio: float | None) -> str:
    """A ratio to the dense block: `0.42×`; three decimals below a tenth."""
    if ratio is None:
        return NOT_MEASURED
    return f"{ratio:.{2 if ratio >= 0.1 else 3}f}\u00d7"


def lift(ratio: float) -> str:
    """How many times as frequent: `7.2×`, `104×`."""
    return f"{ratio:.{1 if ratio < 100 else 0}f}\u00d7"


def seconds(duration: float | None) -> str:
    """A duration in seconds: `0.213 s`, `61.2 s`, `4,210 s`; no line breaks between number and unit."""
    if duration is None:
        return NOT_MEASURED
    return (f"{duration:.3g}" if duration < 100 else f"{duration:,.0f}") + "\u00a0s"


def loss(value: float | None, metric: str) -> str:
    """A loss: two decimals for a perplexity, none from 1,000 on, three for bits."""
    return NOT_MEASURED if value is None else f"{value:,.{_decimals(value, metric)}f}"


def _decimals(value: float, metric: str) -> int:
    return 3 if metric != "perplexity" else 2 if value < 1000 else 0


def spread(found: MeanStd | None, metric: str, *, say_n: bool = False) -> str:
    """A loss over seeds: `2.310 ± 0.012`, or `2.310` alone where one seed leaves the spread unknown.

    Args:
        found: mean and standard deviation.
        metric: the unit of the loss, which sets the decimals.
        say_n: add the number of seeds, for tables whose rows differ in it.
    """
    if found is None:
        return NOT_MEASURED
    digits = _decimals(found.mean, metric)
    text = loss(found.mean, metric) + ("" if found.std is None else f" ± {found.std:,.{digits}f}")
    return f"{text} (n = {found.n})" if say_n else text


def milliseconds(duration: float | None) -> str:
    """Three significant digits of a duration in seconds: `0.00713`, `0.0713`, `12.4`, `1,250`."""
    if duration is None:
        return NOT_MEASURED
    value = 1e3 * duration
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0}f}"


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.2f}"


def fixed(value: float | None, digits: int = 2) -> str:
    """A number with as many decimals: `1,250.00`."""
    return NOT_MEASURED if value is None else f"{value:,.{digits}f}"


def significant(value: float | None) -> str:
    """Three significant digits, without an exponent: `0.0705`, `2.25`, `13.8`."""
    if value is None:
        return NOT_MEASURED
    # What a sum of rounding errors leaves is no number to look at.
    if abs(value) < 5e-7:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def ranged(values: Sequence[float] | None) -> str:
    """Median, least and greatest: `0.0712 [0.0660, 0.0748]`, or one number where all are alike."""
    if values is None:
        return NOT_MEASURED
    middle, low, high = map(significant, values)
    return middle if low == high else f"{middle} [{low}, {high}]"


def setting(value: object) -> str:
    """A configuration value as one would type it: `true`, `0.001`, `none`, `tiny`."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(setting(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={setting(item)}" for key, item in value.items())
    return str(value)
