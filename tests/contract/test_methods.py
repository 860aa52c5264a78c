"""The contract, on every registered method."""

from __future__ import annotations

import pytest

from sparseffn.contract import list_checks, run_check
from sparseffn.ffn import list_methods, method_class

# Training a language model and compiling take seconds a method: the quick run has one of each kind.
HEAVY = ("learns", "compiles")
REPRESENTATIVES = ("dense", "topk", "pkm", "sigma-moe", "base")

CASES = [
    pytest.param(
        method,
        check,
        id=f"{method}-{check}",
        marks=[pytest.mark.slow] if check in HEAVY and method not in REPRESENTATIVES else [],
    )
    for method in list_methods()
    for check in list_checks()
]


@pytest.mark.parametrize(("method", "check"), CASES)
def test_method_keeps_the_contract(method: str, check: str) -> None:
    """Every check holds on every example of the method."""
    assert run_check(check, method_class(method)) >= 2
