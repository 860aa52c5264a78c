"""Running checks over a method's examples, and what they share."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparseffn.errors import UserError, unknown_name
from sparseffn.ffn import FeedForward, FFNConfig, field_infos, method_class

Check = Callable[[FFNConfig], None]

CHECKS: dict[str, Check] = {}

# In the order in which they run.
_MODULES = ("check_function", "check_routing", "check_transforms", "check_graphs", "check_config", "check_modes")

# Largest difference in float64 between two ways to compute one thing.
ATOL = 1e-9


class ContractError(AssertionError):
    """A method breaks the contract; `check` names how."""

    def __init__(self, check: str, config: FFNConfig, reason: str) -> None:
        super().__init__(f"{config.name} fails {check}: {reason} [{config!r}]")
        self.check = check


class Broken(Exception):
    """Raised inside a check: what is wrong, in words."""


def contract(check: Check) -> Check:
    """Decorator: a function that raises `Broken` is the check of its name."""
    CHECKS[check.__name__] = check
    return check


def list_checks() -> list[str]:
    """Names of all checks."""
    for module in _MODULES:
        importlib.import_module(f"sparseffn.contract.{module}")
    return list(CHECKS)


def run_check(name: str, config_class: type[FFNConfig]) -> int:
    """Run one check on every example of a method.

    Returns:
        How many configs it ran on.

    Raises:
        ContractError: the method breaks it, or declares in `xfail` that it does and does not.
        UserError: there is no such check, or the method has no examples.
    """
    if name not in list_checks():
        raise unknown_name("check", name, CHECKS)
    configs = config_class.examples()
    if len(configs) < 2:
        raise UserError(f"`examples` of {config_class.name} must return 2 to 4 configs; got {len(configs)}; fix: add some")
    failures = []
    for config in configs:
        try:
            with torch.random.fork_rng():
                CHECKS[name](config)
        except Broken as broken:
            failures.append(ContractError(name, config, str(broken)))
    declared = config_class.xfail.get(name)
    if failures and declared is None:
        raise failures[0]
    if declared is not None and not failures:
        raise ContractError(name, configs[0], f"it declares to fail ({declared}) but passes; remove it from `xfail`")
    return len(configs)


def check_method(method: str | type[FFNConfig]) -> dict[str, int]:
    """Run the whole contract on a method.

    Args:
        method: a registered name or a config class.

    Returns:
        Number of configs that each check ran on.

    Raises:
        ContractError: the first check that fails.
    """
    config_class = method_class(method) if isinstance(method, str) else method
    return {name: run_check(name, config_class) for name in list_checks()}


def require(condition: bool, reason: str) -> None:
    """Raise `Broken` unless the condition holds."""
    if not condition:
        raise Broken(reason)


def make_layer(config: FFNConfig, *, dtype: torch.dtype = torch.float64, training: bool = False) -> FeedForward:
    """A layer with parameters drawn from a fixed seed, biases and zero-initialised selectors included."""
    torch.manual_seed(0)
    layer = config.build().to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            # Parameters that start at zero hide mistakes in what they multiply.
            if not bool(parameter.any()):
                parameter.normal_(0.0, 0.3)
    return layer.train(training)


def tokens(config: FFNConfig, n_tokens: int = 12, *, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Random tokens `[T, d_model]` of unit scale."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_tokens, config.d_model, generator=generator, dtype=torch.float64).to(dtype)


def seeded(function: Callable[[], Any], seed: int = 7) -> Any:
    """Call with PyTorch's generator in a known state."""
    torch.manual_seed(seed)
    return function()


def step(layer: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output of the layer, or of a function in its place, and gradients of x and of all parameters that have one."""
    leaf = x.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    y = function(leaf)
    y.square().sum().backward()
    return [y.detach(), *(t.grad for t in (leaf, *layer.parameters()) if t.grad is not None)]


def without_dropout(config: FFNConfig) -> FFNConfig:
    """The config with its dropout on units off; routing noise and expert dropout stay."""
    return config.replace(dropout=0.0) if "dropout" in field_infos(type(config)) else config


def without_random_numbers(config: FFNConfig) -> FFNConfig:
    """The config with all dropout off; noise that is not an option stays."""
    has = [name for name in ("dropout", "expert_dropout") if name in field_infos(type(config))]
    return config.replace(**dict.fromkeys(has, 0.0))


def differ(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite where shapes differ or one is not finite."""
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    gap = float((a.detach().double() - b.detach().double()).abs().max())
    return gap if gap == gap else float("inf")
