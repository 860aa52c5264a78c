"""The contract catches methods that are wrong on purpose, each by name."""

from __future__ import annotations

import pytest
from wrong_methods import (
    WRONG,
    FalseXfailConfig,
    FixedTokensInTraining,
    GraphBreakInTraining,
    MuteErrorConfig,
    NamelessErrorConfig,
    UncalledInEvaluation,
    UncalledInTraining,
    wrong,
)

from sparseffn.contract import ContractError, check_method, list_checks, run_check
from sparseffn.errors import UserError
from sparseffn.ffn import FFNConfig
from sparseffn.ffn.dense import DenseConfig


@pytest.mark.parametrize(("check", "config_class"), WRONG.items(), ids=[c.name for c in WRONG.values()])
def test_wrong_method_is_caught_by_name(check: str, config_class: type[FFNConfig]) -> None:
    """The check that guards the broken promise fails, and says which method and check."""
    with pytest.raises(ContractError, match=f"{config_class.name} fails {check}") as caught:
        run_check(check, config_class)
    assert caught.value.check == check


IN_ONE_MODE = {
    "graph-break": ("compiles", GraphBreakInTraining, "torch.compile in training raises"),
    "fixed-tokens": ("exports", FixedTokensInTraining, "torch.export in training raises"),
    "uncalled-in-training": ("hooks", UncalledInTraining, r"ran as \[\] in training"),
    "uncalled-in-evaluation": ("hooks", UncalledInEvaluation, r"ran as \[\] in evaluation"),
    "unsharded": ("sharding", UncalledInEvaluation, "with the units"),
}


@pytest.mark.parametrize("name", IN_ONE_MODE)
def test_a_mistake_in_one_mode_is_caught(name: str) -> None:
    """A layer that keeps the promise in the other mode is told where it is wrong."""
    check, layer, words = IN_ONE_MODE[name]
    with pytest.raises(ContractError, match=f"{name} fails {check}: .*{words}"):
        run_check(check, wrong(name, layer))


@pytest.mark.parametrize(
    ("config_class", "lacks"), [(MuteErrorConfig, "value"), (NamelessErrorConfig, "field")], ids=["no-value", "no-field"]
)
def test_error_that_hides_field_or_value_is_caught(config_class: type[FFNConfig], lacks: str) -> None:
    """A refusal alone does not help whoever reads it."""
    with pytest.raises(ContractError, match=f"fails bad_values.* does not name the {lacks}"):
        run_check("bad_values", config_class)


def test_right_method_passes_where_the_wrong_ones_fail() -> None:
    """The checks above hold on the dense block that the wrong methods derive from."""
    for check in WRONG:
        assert run_check(check, DenseConfig) == len(DenseConfig.examples())


def test_check_method_stops_at_the_first_broken_promise() -> None:
    """The whole suite raises for a wrong method."""
    with pytest.raises(ContractError, match="wrong-weight fails reference"):
        check_method(WRONG["reference"])


def test_declared_failure_that_does_not_happen_is_a_failure() -> None:
    """`xfail` cannot be used to hide a check that passes."""
    with pytest.raises(ContractError, match="declares to fail"):
        run_check("permutation", FalseXfailConfig)


def test_unknown_check_offers_the_nearest() -> None:
    """A misspelt check is answered with what there is."""
    with pytest.raises(UserError, match="permutation"):
        run_check("permutations", DenseConfig)


def test_suite_has_the_promised_checks() -> None:
    """No check vanishes unnoticed."""
    assert len(list_checks()) == 32
