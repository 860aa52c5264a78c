"""Comparisons as data and functions."""

from sparseffn.comparison.job import CompareSettings, compare
from sparseffn.comparison.matched import Contender, MethodChoice, contenders, parse_methods

__all__ = ["CompareSettings", "Contender", "MethodChoice", "compare", "contenders", "parse_methods"]
