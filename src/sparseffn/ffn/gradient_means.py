"""Over which processes gradients are averaged, where experts are spread over some.

Every process of the experts' mesh brings tokens, so that each loss depends on the parameters of each of them: gradients are
right if all are means over (at least) the processes of that mesh. Those of experts are, by their layer; those of all the rest
are averaged by DDP or FSDP2, over processes that its caller chose.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sparseffn.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh


def require_all(averaging: set[int], mesh: DeviceMesh, what: str) -> None:
    """Refuse a mean over fewer processes than share experts.

    Raises:
        UserError: `averaging`, ranks of `what`, lacks some of the mesh's.
    """
    sharing = ranks_of(mesh)
    if not sharing <= averaging:
        raise UserError(
            f"{what} must be of all processes that share experts, {sorted(sharing)}, as gradients of the rest are means over "
            f"it; got {sorted(averaging)}; fix: shard_rest(model, mesh) or replicate_rest(model), of all processes that train"
        )


def require_fsdp_over_all(experts: nn.Module, mesh: DeviceMesh) -> bool:
    """Refuse a forward pass, within modules under `fully_shard`, whose gradients would be means over fewer processes.

    `fully_shard` is PyTorch's and comes after the experts were spread; a forward pass is the first that is ours again.

    Returns:
        Whether FSDP2 is around the experts. It takes no other modules after its first forward pass, so that this need not be
        asked again.

    Raises:
        UserError: as `require_all`.
    """
    averaging = {id(other): other for other in _averaging_meshes(experts)}
    for other in averaging.values():
        require_all(ranks_of(other), mesh, "`mesh` of fully_shard")
    return bool(averaging)


def ranks_of(mesh: DeviceMesh) -> set[int]:
    return set(mesh.mesh.flatten().tolist())


def _averaging_meshes(experts: nn.Module) -> Iterator[DeviceMesh]:
    """Of all units of FSDP2 in the model that holds the experts, but those of sharded experts alone."""
    # PyTorch has no public way from a module to the units around it; these names are the same from 2.9 to 2.14.
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
