"""Expert parallelism: the experts of a mixture are spread over the processes of a mesh, the tokens go to them.

    mesh = init_device_mesh("cuda", (8,), mesh_dim_names=("ep",))
    sharded = shard_experts(model, mesh)        # every mixture's experts.keys, values and gate_keys, E / 8 experts a process
    y = model(x)                                # each process its own tokens, all processes together

Routers, and everything else, stay whole on every process.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch.distributed as dist
from torch import Tensor, nn

from sparseffn.errors import UserError
from sparseffn.ffn.block_config import require
from sparseffn.ffn.gradient_means import ranks_of, require_all
from sparseffn.ffn.mixture import Experts, Mixture

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel


def shard_experts(model: nn.Module, mesh: DeviceMesh) -> list[str]:
    """Spread the experts of every mixture in `model` over the last dimension of a mesh; its process r keeps the r-th part.

    Afterwards `experts.keys`, `experts.values` and `experts.gate_keys` are DTensors sharded over their first dimension, made of
    the weights of the mesh's first process. A layer then computes what it computed, in training and in evaluation, wherever
    the experts lie: rows go to the owners of their experts by all-to-all, however uneven the loads, and come back. All
    processes of the mesh must run the layer together, backward too; a process may have no tokens.

    Gradients: of experts they are over the tokens of all processes of the mesh, divided by their number, that is the gradient
    of the mean of the processes' losses. `replicate_rest` gives the other parameters the same.

    An optimiser whose steps take many tensors at once needs the experts in a parameter group of their own. Balancing losses and
    other batch-wide quantities are over all processes after `set_batch_group(model, BatchGroup())`.

    Args:
        model: a layer, or any module with some; other methods' layers are left as they are.
        mesh: of all processes that train, with one dimension, or with two: replicas, and the parts of the experts.

    Returns:
        Names of the sharded parameters in `model`.

    Raises:
        UserError: `model` holds no mixture, the mesh has more than two dimensions or is of another device, the number of
            experts is not divisible by the last one, or a layer has an inner top-K or is distributed already. Nothing has
            changed then.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mixtures = _mixtures(model)
    require(mesh.ndim <= 2, "mesh", "of one or two dimensions", f"{mesh.ndim} of them", 'pass a slice of it, mesh["dp", "ep"]')
    placements = [*(Replicate() for _ in range(mesh.ndim - 1)), Shard(0)]
    for name, layer in mixtures.items():
        _check(name, layer, mesh)
    names = []
    for name, layer in mixtures.items():
        for parameter, weight in list(layer.experts.named_parameters()):
            sharded = distribute_tensor(weight.detach(), mesh, placements)
            layer.experts.register_parameter(parameter, nn.Parameter(sharded, requires_grad=weight.requires_grad))
            names.append(f"{name}.experts.{parameter}".lstrip("."))
        layer.experts.is_sharded, layer.experts.means_are_right = True, False
    return names


def replicate_rest(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """`model`, whose experts `shard_experts` has sharded, under DDP, which averages the gradients of everything else.

    Parameters and buffers that are whole become those of the first process. `options` are `DistributedDataParallel`'s.

    Raises:
        UserError: its `process_group` lacks processes that share experts.
    """
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    averaging = set(dist.get_process_group_ranks(options.get("process_group")))
    for experts in _spread_experts(model):
        require_all(averaging, _mesh_of(experts), "`process_group`")
    sharded = [parameter for parameter in model.parameters() if isinstance(parameter.data, DTensor) and parameter.requires_grad]
    _send_the_first_s(model, [None])
    # DDP takes the parameters that need a gradient when it is made.
    for parameter in sharded:
        parameter.requires_grad_(False)
    replicated = DistributedDataParallel(model, init_sync=False, **options)
    for parameter in sharded:
        parameter.requires_grad_(True)
    return replicated


def shard_rest(model: nn.Module, mesh: DeviceMesh, units: Iterable[nn.Module] = (), **options: Any) -> nn.Module:
    """Put `model`, whose experts `shard_experts` has spread, under FSDP2, which shards and averages everything else.

    `fully_shard` for each of the `units`, modules of the model in the order of their use, and then for the model, with the
    experts among `ignored_params`: their owners keep them, and their gradients are means already. With an `mp_policy` the
    experts compute in its `param_dtype` too. Parameters that are whole become those of the mesh's first process.

    Args:
        model: with experts that are spread.
        mesh: of all processes that train; FSDP2's, of one dimension, or of two (replicas, shards).
        units: what is gathered together, commonly a layer.
        options: `fully_shard`'s.

    Returns:
        `model`, changed in place.

    Raises:
        UserError: the mesh lacks processes that share experts; nothing has changed then.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    spread = _spread_experts(model)
    for experts in spread:
        require_all(ranks_of(mesh), _mesh_of(experts), "`mesh`")
    ignored = {*options.pop("ignored_params", ()), *(p for p in model.parameters() if isinstance(p.data, DTensor))}
    _send_the_first_s(model, [mesh.get_group(dim) for dim in range(mesh.ndim)])
    policy: MixedPrecisionPolicy | None = options.get("mp_policy")
    for experts in spread:
        experts.compute_dtype = None if policy is None else policy.param_dtype
    for module in (*units, model):
        fully_shard(module, mesh=mesh, ignored_params=ignored, **options)
    return model


def unshard_experts(model: nn.Module) -> None:
    """Undo `shard_experts`: every process gets all experts, as they are now. All processes of the mesh must call it together.

    Raises:
        UserError: `model` holds no mixture.
    """
    for layer in _mixtures(model).values():
        if not layer.experts.is_sharded:
            continue
        for parameter, weight in list(layer.experts.named_parameters()):
            whole = cast("DTensor", weight.detach()).full_tensor()
            layer.experts.register_parameter(parameter, nn.Parameter(whole, requires_grad=weight.requires_grad))
        layer.experts.is_sharded, layer.experts.compute_dtype = False, None


def _spread_experts(model: nn.Module) -> list[Experts]:
    return [m.experts for m in model.modules() if isinstance(m, Mixture) and m.experts.is_sharded]


def _mesh_of(experts: Experts) -> DeviceMesh:
    return cast("DTensor", experts.keys).device_mesh


def _send_the_first_s(model: nn.Module, groups: Iterable[dist.ProcessGroup | None]) -> None:
    """Parameters and buffers that are whole become those of the first process of a group, of each in turn; None: of all."""
    from torch.distributed.tensor import DTensor

    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor.data, DTensor):
            for group in groups:
                dist.broadcast(tensor.detach(), group=group, group_src=0)


def _mixtures(model: nn.Module) -> dict[str, Mixture]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, Mixture)}
    if not found:
        raise UserError(
            "`model` must hold a mixture of experts; got none; fix: build one, `SigmaMoE(...)`, with experts to spread"
        )
    return found


def _check(name: str, layer: Mixture, mesh: DeviceMesh) -> None:
    """Raises as `shard_experts` documents."""
    config, size, keys = layer.config, mesh.size(mesh.ndim - 1), layer.experts.keys
    where = f" in {name}" if name else ""
    require(
        config.n_experts % size == 0,
        "n_experts",
        f"divisible by the {size} processes that share them{where}",
        config.n_experts,
        "take a mesh or a number of experts that fits",
    )
    require(
        config.survivors is None,
        "inner_k",
        f"none where experts are sharded{where}, as it compares units of experts on several processes",
        config.survivors,
        "leave inner_k out",
    )
    require(
        type(keys.data) is Tensor,
        "model",
        f"of whole tensors{where}",
        type(keys.data).__name__,
        "shard the experts first, and once",
    )
    require(
        keys.device.type == mesh.device_type,
        "mesh",
        f"of the device of the experts{where}, {keys.device.type}",
        mesh.device_type,
        f"model.to({mesh.device_type!r}) first",
    )
