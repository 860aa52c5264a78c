"""A mixture whose experts lie on several processes computes what it computed on one, and is trained alike."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import PARTS, SEED, Spread, difference, join, leave, loss_of, run, wrong
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sparseffn.errors import UserError
from sparseffn.ffn import BatchGroup, FFNConfig, replicate_rest, set_batch_group, shard_experts, shard_rest, unshard_experts
from sparseffn.ffn.base import BASEConfig
from sparseffn.ffn.dense import DenseConfig
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.ffn.softmax_moe import SoftmaxMoEConfig
from sparseffn.ffn.switch import SwitchConfig

# Eight experts for at most 20 tokens of a rank, the first rank's alike: several get none.
CONFIGS: dict[str, FFNConfig] = {
    "sigma-moe": SigmaMoEConfig(d_model=6, n_experts=8, expert_size=4, k=2, expert_dropout=0.3, entropy_weight=0.1),
    "gated": SigmaMoEConfig(d_model=6, n_experts=8, expert_size=3, k=3, activation="silu", gated=True),
    "all-experts": SigmaMoEConfig(d_model=6, n_experts=4, expert_size=3, k=4),
    "switch-capacity": SwitchConfig(d_model=6, n_experts=4, expert_size=4, k=1, capacity_factor=0.5),
    "softmax": SoftmaxMoEConfig(d_model=6, n_experts=4, expert_size=5, k=2, activation="gelu"),
    "base": BASEConfig(d_model=6, n_experts=4, expert_size=5),
}


FSDP_WAYS = ("rest", "units", "replicas", "experts copied", "experts sharded", "drawn apart")


def drawn(config: FFNConfig) -> nn.Module:
    """A float64 layer, the same on every rank."""
    torch.manual_seed(1)
    layer = config.build().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.5)
    return layer


def whole_grad(parameter: nn.Parameter, size: int) -> Tensor:
    """Gradient of all experts; of another parameter the mean over ranks, as DDP takes it."""
    grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    if isinstance(grad, DTensor):
        return grad.full_tensor()
    dist.all_reduce(grad)
    return grad / size


def differences(config: FFNConfig, variant: str, mesh: DeviceMesh, training: bool) -> dict[str, float]:
    """Of a sharded layer on this rank's rows from the layer on all rows."""
    rank, size = dist.get_rank(), mesh.size()
    single, spread = drawn(config).train(training), Spread.of(variant, config.d_model, rank, size)
    layer, group, x_all = copy.deepcopy(single), BatchGroup(), spread.x.clone().requires_grad_()
    torch.manual_seed(SEED)
    y_all, _, loss = loss_of(single, x_all, spread.mask if variant == "masked" else None, spread.weights, 1.0)
    loss.backward()
    shard_experts(layer, mesh)
    set_batch_group(layer, group)
    group.seed(SEED)
    x = spread.x[spread.own].clone().requires_grad_()
    mask = spread.mask[spread.own] if spread.has_mask else None
    y, _, loss = loss_of(layer, x, mask, spread.weights[spread.own], size)
    loss.backward()
    found = {"y": difference(y, y_all[spread.own]), "x.grad": difference(x.grad / size, x_all.grad[spread.own])}
    for (name, parameter), wanted in zip(layer.named_parameters(), single.parameters(), strict=True):
        found[f"{name}.grad"] = difference(whole_grad(parameter, size), wanted.grad)
    return found


def with_ddp(mesh: DeviceMesh) -> dict[str, float]:
    """Two steps of Adam of a model under DDP with sharded experts, from two of the model on all rows."""
    rank, size = mesh.get_rank(), mesh.size()
    config = CONFIGS["sigma-moe"].replace(expert_dropout=0.0)
    torch.manual_seed(2)
    single = nn.Sequential(nn.Linear(6, 6).double(), drawn(config))
    model, spread = copy.deepcopy(single), Spread.of("even", 6, rank, size)
    names = shard_experts(model, mesh)
    set_batch_group(model, BatchGroup(mesh.get_group(), even=True))
    wrapped = replicate_rest(model)
    own = dict(model.named_parameters())
    groups = [{"params": [own[name] for name in names]}, {"params": [p for name, p in own.items() if name not in names]}]
    for net, optimizer, rows in (
        (single, torch.optim.Adam(single.parameters(), lr=0.1), slice(None)),
        (wrapped, torch.optim.Adam(groups, lr=0.1), spread.own),
    ):
        for _ in range(2):
            optimizer.zero_grad()
            (net(spread.x[rows]) * spread.weights[rows]).mean().backward()
            optimizer.step()
    unshard_experts(model)
    return {name: difference(p, dict(single.named_parameters())[name]) for name, p in model.named_parameters()}


def with_fsdp(way: str, mesh: DeviceMesh) -> dict[str, float]:
    """The same under FSDP2, its shards whole again at the end, and of the gradients before the last step."""
    rank, size = mesh.get_rank(), mesh.size()
    torch.manual_seed(2)
    single = nn.Sequential(nn.Linear(6, 6), drawn(CONFIGS["sigma-moe"].replace(expert_dropout=0.0)), nn.Linear(6, 6)).double()
    model, spread = copy.deepcopy(single), Spread.of("even", 6, rank, size)
    parts = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "ep"))
    over = {"experts copied": parts, "experts sharded": parts["ep"]}.get(way, mesh)
    shard_experts(model, over)
    if way == "experts sharded":
        # As owners of the same experts are the others' replicas, PyTorch may shard these once more.
        fully_shard(model[1].experts, mesh=parts["dp"])
    if way == "drawn apart" and rank > 0:
        with torch.no_grad():
            model[0].bias.add_(1.0)
    shard_rest(model, parts if way == "replicas" else mesh, units=[model[0], model[1]] if way == "units" else ())
    set_batch_group(model, BatchGroup(mesh.get_group(), even=True))
    kinds: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        kinds.setdefault(parameter.device_mesh, []).append(parameter)
    for net, optimizer, rows in (
        (single, torch.optim.Adam(single.parameters(), lr=0.1), slice(None)),
        (model, torch.optim.Adam([{"params": kind} for kind in kinds.values()], lr=0.1), spread.own),
    ):
        for _ in range(2):
            optimizer.zero_grad()
            (net(spread.x[rows]) * spread.weights[rows]).mean().backward()
            optimizer.step()
    wanted = dict(single.named_parameters())
    found = {name: difference(p.full_tensor(), wanted[name]) for name, p in model.named_parameters()}
    return found | {f"{name}.grad": difference(p.grad.full_tensor(), wanted[name].grad) for name, p in model.named_parameters()}


def in_bfloat16(mesh: DeviceMesh) -> dict[str, Any]:
    """Under a policy that computes in bfloat16: dtypes, and how far that is from float32, in parts of its norm."""
    single, spread = CONFIGS["gated"].build(), Spread.of("even", 6, mesh.get_rank(), mesh.size())
    with torch.no_grad():
        for parameter in single.parameters():
            dist.broadcast(parameter.normal_(0.0, 0.5), 0)
    layer, x = copy.deepcopy(single), spread.x[spread.own].float()
    shard_experts(layer, mesh)
    shard_rest(layer, mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    y = layer(x)
    y.float().square().mean().backward()
    single(spread.x.float()).square().mean().backward()
    grad, wanted = layer.experts.keys.grad, single.experts.keys.grad
    off = (y.float() - single(x)).norm() / single(x).norm(), (grad.full_tensor() - wanted).norm() / wanted.norm()
    return {"dtypes": [str(y.dtype), str(grad.dtype)], "off": max(part.item() for part in off)}


def too_few(mesh: DeviceMesh) -> dict[str, str]:
    """Gradients of the rest averaged over some of the processes that share experts: each process is its own part of them."""
    parts = init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("dp", "ep"))
    alone, found = parts["dp"], {}

    def forward(shard: Callable[[nn.Module, set[nn.Parameter]], object]) -> None:
        model = nn.Sequential(nn.Linear(6, 6), CONFIGS["gated"].build())
        shard_experts(model, parts["ep"])
        shard(model, {p for p in model.parameters() if isinstance(p.data, DTensor)})
        left.append(model)
        model(torch.zeros(2, 6))

    left: list[nn.Module] = []
    group = dist.new_group([mesh.get_rank()], use_local_synchronization=True)
    calls: dict[str, Callable[[nn.Module, set[nn.Parameter]], object]] = {
        "fully_shard": lambda model, _: fully_shard(model, mesh=alone),
        "fully_shard the rest": lambda model, experts: fully_shard(model, mesh=alone, ignored_params=experts),
        "one unit": lambda model, _: (fully_shard(model[0], mesh=alone), shard_rest(model, mesh)),
        "shard_rest": lambda model, _: shard_rest(model, alone),
        "replicate_rest": lambda model, _: replicate_rest(model, process_group=group),
    }
    for name, call in calls.items():
        try:
            forward(call)
        except UserError as error:
            found[name] = str(error)
    # What was refused is alive, and no other model suffers from it.
    other = CONFIGS["gated"].build()
    shard_experts(other, mesh)
    other(torch.zeros(2, 6))
    return found | {"left": str(len(left))}


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    """What cannot be sharded, or asked of a sharded layer, with the error."""
    layer = CONFIGS["sigma-moe"].build()
    shard_experts(layer, mesh)
    inner = SigmaMoEConfig(d_model=6, n_experts=8, expert_size=4, k=2, inner_k=3).build()
    size = mesh.size()
    other = nn.ModuleList([CONFIGS["gated"].build(), SigmaMoEConfig(d_model=6, n_experts=size + 1, expert_size=4, k=1).build()])
    calls = {
        "dense": lambda: shard_experts(DenseConfig(d_model=6, d_ff=8).build(), mesh),
        "odd": lambda: shard_experts(other, mesh),
        "inner_k": lambda: shard_experts(inner, mesh),
        "twice": lambda: shard_experts(layer, mesh),
        "mesh": lambda: shard_experts(CONFIGS["gated"].build(), init_device_mesh("cpu", (1, 1, size))),
        "coefficients": lambda: layer.coefficients(torch.zeros(2, 6)),
        "reference": lambda: layer.reference(torch.zeros(2, 6)),
        "keys": lambda: layer.keys_matrix(),
        "values": lambda: layer.values_matrix(),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
        except UserError as error:
            found[name] = str(error)
    found["nothing changed"] = str(not any(isinstance(p, DTensor) for p in other.parameters()))
    return found


def others(mesh: DeviceMesh) -> dict[str, Any]:
    """Round trip, copies, what a process holds, and the dtype under autocast."""
    layer = CONFIGS["gated"].build()
    before = {name: p.clone() for name, p in layer.named_parameters()}
    for p in before.values():
        dist.broadcast(p, 0)
    names = shard_experts(layer, mesh)
    held = layer.experts.keys.to_local().shape[0]
    x = torch.randn(4, 6)
    again = copy.deepcopy(layer)
    with torch.autocast("cpu", torch.bfloat16):
        dtype = str(layer(x).dtype)
    copied = difference(layer(x).double(), again(x).double())
    unshard_experts(layer)
    same = all(torch.equal(p, before[name]) for name, p in layer.named_parameters() if name in names)
    return {"held": held, "names": names, "dtype": dtype, "copied": copied, "same": same}


def work(rank: int, size: int, folder: str) -> None:
    """One of the processes."""
    warnings.simplefilter("error")
    # Of what a linear layer returns for sequences; nobody writes to it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    join(rank, size, folder)
    mesh = init_device_mesh("cpu", (size,))
    found = {
        f"{name} {variant} {'training' if training else 'evaluation'}": differences(config, variant, mesh, training)
        for name, config in CONFIGS.items()
        for variant in PARTS
        for training in (True, False)
        if training or variant == "empty"
    }
    found["ddp"] = with_ddp(mesh)
    found |= {f"fsdp {way}": with_fsdp(way, mesh) for way in FSDP_WAYS}
    # Every process, or every second one, holds all experts.
    for name, shape in (("replicas", (size, 1)), ("both", (2, size // 2))):
        found[name] = differences(CONFIGS["gated"], "masked", init_device_mesh("cpu", shape), True)
    leave(
        rank,
        folder,
        {
            "differences": found,
            "refusals": refusals(mesh),
            "few": too_few(mesh),
            "bfloat16": in_bfloat16(mesh),
            "others": others(mesh),
        },
    )


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """Of two processes."""
    yield run(work, 2, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", [*CONFIGS, "ddp", "replicas", "both", *(f"fsdp {way}" for way in FSDP_WAYS)])
def test_a_sharded_layer_is_the_layer(name: str, reports: list[dict[str, Any]]) -> None:
    """Outputs and all gradients to 1e-9, whatever the loads; under DDP the weights after two steps."""
    assert any(case.startswith(name) for case in reports[0]["differences"])
    assert wrong(reports, name) == {}


@pytest.mark.slow
def test_a_layer_on_four_processes_is_the_layer(tmp_path: Path) -> None:
    """The same of every case."""
    assert wrong(run(work, 4, tmp_path)) == {}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("dense", "`model` must hold a mixture"),
        ("odd", "`n_experts` must be divisible by the 2 processes that share them in 1; got 3"),
        ("inner_k", "`inner_k` must be none"),
        ("twice", "`model` must be of whole tensors; got 'DTensor'"),
        ("mesh", "`mesh` must be of one or two dimensions; got '3 of them'"),
        *((call, "fix: unshard_experts(model)") for call in ("coefficients", "reference", "keys", "values")),
        ("nothing changed", "True"),
    ],
)
def test_what_does_not_work_is_refused_on_every_rank(case: str, words: str, reports: list[dict[str, Any]]) -> None:
    """By one message, before anything is changed."""
    assert words in reports[0]["refusals"][case]
    assert reports[0]["refusals"] == reports[1]["refusals"]


@pytest.mark.parametrize("call", ["fully_shard", "fully_shard the rest", "one unit", "shard_rest", "replicate_rest"])
def test_a_mean_over_few_of_the_processes_that_share_experts_is_refused(call: str, reports: list[dict[str, Any]]) -> None:
    """Before a wrong gradient: PyTorch's own call in the first forward pass, ours at once."""
    for rank, report in enumerate(reports):
        assert "must be of all processes that share experts, [0, 1], as gradients" in report["few"][call]
        assert f"got [{rank}]; fix: shard_rest(model, mesh) or replicate_rest(model)" in report["few"][call]


def test_experts_compute_in_the_dtype_of_the_rest(reports: list[dict[str, Any]]) -> None:
    """Their gradients are in their own."""
    for report in reports:
        assert report["bfloat16"]["dtypes"] == ["torch.bfloat16", "torch.float32"]
        assert report["bfloat16"]["off"] < 0.02


def test_sharded_experts_are_copied_and_put_together_again(reports: list[dict[str, Any]]) -> None:
    """Half of the experts a process; bit for bit those of the first rank afterwards."""
    for report in reports:
        others = report["others"]
        assert others["names"] == ["experts.keys", "experts.values", "experts.gate_keys"]
        assert (others["held"], others["copied"], others["same"], others["dtype"]) == (4, 0.0, True, "torch.bfloat16")
