"""Comparisons as data and functions."""

from sparseffn.recipes.compare import CompareSettings, compare
from sparseffn.recipes.contenders import Contender, MethodChoice, contenders, parse_methods

__all__ = ["CompareSettings", "Contender", "MethodChoice", "compare", "contenders", "parse_methods"]
