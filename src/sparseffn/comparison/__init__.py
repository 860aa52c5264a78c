"""Comparisons at equal parameter count, as data and functions."""

from sparseffn.comparison.experiment import CompareSettings
from sparseffn.comparison.job import NoProgress, Progress, compare
from sparseffn.comparison.matched import MatchedMethod, MethodChoice, match_methods, parse_methods

__all__ = [
    "CompareSettings",
    "MatchedMethod",
    "MethodChoice",
    "NoProgress",
    "Progress",
    "compare",
    "match_methods",
    "parse_methods",
]
