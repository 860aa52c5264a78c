"""The quantile of Student's t."""

from __future__ import annotations

import pytest
from scipy import stats

from sparseffn.stats import student_quantile


@pytest.mark.parametrize("freedom", [*range(1, 40), 100, 1000])
def test_quantile_is_students(freedom: int) -> None:
    """Against SciPy, at every size that a table may have."""
    assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)
