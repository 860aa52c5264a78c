"""What PyTorch knows of a module and has no public way to ask: who looks at its calls, and the units of FSDP2 around it.

The private names are the same from PyTorch 2.9 to 2.14.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh


def has_hooks(module: nn.Module) -> bool:
    """Whether the module itself, not its parts, carries a hook that a call of it or its backward pass runs."""
    forward = module._forward_pre_hooks or module._forward_hooks
    return bool(forward or module._backward_pre_hooks or module._backward_hooks)


def averaging_meshes(experts: nn.Module) -> Iterator[DeviceMesh]:
    """Of all units of FSDP2 in the model that holds the experts, but those of sharded experts alone."""
    from torch.distributed._composable_state import _module_state_mapping

    states: list[tuple[nn.Module, Any]] = [(m, reference()) for m, reference in list(_module_state_mapping.items())]
    for module, state in states:
        if _is_root(state) and any(inner is experts for inner in module.modules()):
            for group in (group for unit in state._state_ctx.all_states for group in _groups(unit)):
                if any(p.sharded_param.requires_grad and not p.is_dtensor for p in group.fsdp_params):
                    yield group.mesh_info.mesh


def _is_root(state: Any) -> bool:
    """Whether it is FSDP2's of a module that was called itself, and knows of all units within."""
    return bool(getattr(state, "_is_root", None)) and hasattr(state, "_state_ctx")


def _groups(unit: Any) -> list[Any]:
    """Of parameters: one or none until PyTorch 2.9, later any number."""
    groups = getattr(unit, "_fsdp_param_groups", None)
    if groups is None:
        groups = [unit._fsdp_param_group]
    return [group for group in groups if group is not None]
