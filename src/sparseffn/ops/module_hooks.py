"""Whether somebody looks at a module's calls, which PyTorch keeps in private parts of it."""

from __future__ import annotations

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether the module itself, not its parts, carries a hook that a call of it or its backward pass runs."""
    forward = module._forward_pre_hooks or module._forward_hooks
    return bool(forward or module._backward_pre_hooks or module._backward_hooks)
