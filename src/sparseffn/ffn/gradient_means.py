"""Over which processes gradients are averaged, where experts are spread over some.

Every process of the experts' mesh brings tokens, so that each loss depends on the parameters of each of them: gradients are
right if all are means over (at least) the processes of that mesh. Those of experts are, by their layer; those of all the rest
are averaged by DDP or FSDP2, over processes that its caller chose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparseffn.errors import UserError
from sparseffn.ops.module_state import averaging_meshes

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
    averaging = {id(other): other for other in averaging_meshes(experts)}
    for other in averaging.values():
        require_all(ranks_of(other), mesh, "`mesh` of fully_shard")
    return bool(averaging)


def ranks_of(mesh: DeviceMesh) -> set[int]:
    return set(mesh.mesh.flatten().tolist())
