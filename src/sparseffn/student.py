"""Student's t for a whole number of degrees of freedom, exactly, by the closed forms of its distribution.

Abramowitz and Stegun, 26.7.3 and 26.7.4.
"""

from __future__ import annotations

import functools
import math

# The 95% that is stated everywhere.
LEVEL = 0.95


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
