"""Solve a method's size for a parameter budget.

A method declares its integer size fields in order of preference. The simplest solution, the first field alone, is taken if the
whole model is then within the tolerance. Else the second field, which also sets the compute of a token (expert size), changes
as little as it must to come within it; and where no pair does, the pair with the smallest residual is taken. Tolerance and
residuals are those of the whole model where one is given, else of the block.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from sparseffn.errors import UnmatchedError, UserError
from sparseffn.ffn import FFNConfig

# Largest deviation of a whole model's parameters that still counts as equal.
TOLERANCE = 0.005
# How far the second field may leave its value: farther and the method's character (expert size) would change.
_SECOND_FIELD_RANGE = (0.5, 2.0)


@dataclass(frozen=True, kw_only=True)
class Match:
    """A config sized for a budget, and how far it is off. Residuals are negative where there are too few parameters."""

    config: FFNConfig
    target_params: int
    """Of the block to be matched."""
    block_params: int
    """Of the matched block."""
    n_blocks: int
    other_params: int
    """Parameters of the model outside its feedforward blocks; 0 where blocks are matched by themselves."""
    tolerance: float

    @property
    def model_params(self) -> int:
        """Parameters of the whole model with the matched block."""
        return self.other_params + self.n_blocks * self.block_params

    @property
    def model_target(self) -> int:
        """Parameters of the whole model to be matched."""
        return self.other_params + self.n_blocks * self.target_params

    @property
    def residual(self) -> int:
        """Parameters that the whole model has too many."""
        return self.model_params - self.model_target

    @property
    def block_residual(self) -> int:
        return self.block_params - self.target_params

    @property
    def residual_percent(self) -> float:
        """The residual in percent of the target model."""
        return 100.0 * self.residual / self.model_target

    @property
    def block_residual_percent(self) -> float:
        return 100.0 * self.block_residual / self.target_params

    @property
    def equal(self) -> bool:
        """Whether the model may be called parameter-equal."""
        return abs(self.residual) <= self.tolerance * self.model_target


def match(
    config: FFNConfig, target_params: int, *, n_blocks: int = 1, other_params: int = 0, tolerance: float = TOLERANCE
) -> Match:
    """The config with its size fields changed so that its block has `target_params` parameters, as nearly as they allow.

    Args:
        config: the method and every option that matching leaves alone.
        target_params: parameters of the block to match.
        n_blocks: feedforward blocks of the whole model.
        other_params: parameters of the whole model outside them.
        tolerance: of the whole model, as a fraction.

    Returns:
        The nearest size; `Match.equal` tells whether it is within the tolerance.

    Raises:
        UserError: the method declares no size fields, or the budget is below its smallest size.
    """
    if not config.size_fields:
        raise UserError(f"method {config.name!r} must declare `size_fields` to be matched; fix: name its integer sizes")

    def sized(candidate: FFNConfig) -> Match:
        return Match(
            config=candidate,
            target_params=target_params,
            block_params=candidate.num_params(),
            n_blocks=n_blocks,
            other_params=other_params,
            tolerance=tolerance,
        )

    simplest = sized(_solve(config, config.size_fields[0], target_params))
    if simplest.equal or len(config.size_fields) == 1:
        return simplest
    best = simplest
    for candidate in map(sized, _pairs(config, target_params)):
        if candidate.equal:
            return candidate
        best = min(best, candidate, key=lambda m: abs(m.block_residual))
    return best


def _solve(config: FFNConfig, field: str, target: int) -> FFNConfig:
    """The value of one size field whose count is nearest to the target, by bisection on a monotone count."""

    def count(value: int) -> int:
        return config.replace(**{field: value}).num_params()

    low = _smallest(config, field)
    base = config.replace(**{field: low})
    if base.num_params() > target and low > 1:
        return base
    if base.num_params() > 2 * target:
        raise UnmatchedError(
            f"`target_params` must be at least {base.num_params()}, the least that {config.name} can have at these "
            f"options; got {target}; fix: raise the budget or shrink its other sizes"
        )
    high = low + 1
    while count(high) < target:
        low, high = high, 2 * high
    high = low + 1 + bisect.bisect_left(range(low + 1, high), target, key=count)
    return config.replace(**{field: min((high - 1, high), key=lambda value: abs(count(value) - target))})


def _smallest(config: FFNConfig, field: str) -> int:
    """The smallest value of a size field that the config accepts (k experts must exist, for example)."""

    def accepted(value: int) -> bool:
        try:
            config.replace(**{field: value})
        except UserError:
            return False
        return True

    return 1 + bisect.bisect_left(range(1, getattr(config, field) or 1), True, key=accepted)


def _pairs(config: FFNConfig, target: int) -> Iterator[FFNConfig]:
    """For every value of the second field, its own first and then farther ones, the value of the first that fits best."""
    first, second = config.size_fields[:2]
    start = _solve(config, first, target)
    centre = getattr(start, second)
    centre = getattr(start, first) if centre is None else centre
    low, high = max(1, int(centre * _SECOND_FIELD_RANGE[0])), int(centre * _SECOND_FIELD_RANGE[1])
    for value in sorted(range(low, high + 1), key=lambda v: (abs(v - centre), v)):
        try:
            yield _solve(config.replace(**{second: value}), first, target)
        except UserError:
            # This value does not go with the other options, k for instance.
            continue
