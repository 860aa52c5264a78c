"""Checks of a layer as others run it: compiled, exported, sharded, and fed with numbers that are not finite."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparseffn.contract.harness import (
    ATOL,
    Broken,
    contract,
    differ,
    make_layer,
    require,
    seeded,
    step,
    tokens,
    without_dropout,
)
from sparseffn.errors import UserError
from sparseffn.ffn import FeedForward, FFNConfig

Result = TypeVar("Result")


@contract
def compiles(config: FFNConfig) -> None:
    """`torch.compile(fullgraph=True, dynamic=True)` gives the eager output and gradients, for several token counts.

    In evaluation and in training, with the same random numbers.
    """
    for training in (False, True):
        layer = make_layer(config, training=training)
        torch.compiler.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
        how = "in training" if training else "in evaluation"
        for n_tokens in (6, 9):
            x = tokens(config, n_tokens)
            eager = seeded(lambda: step(layer, layer, x))  # noqa: B023
            ours = _or_broken(f"torch.compile {how}", lambda: seeded(lambda: step(layer, compiled, x)))  # noqa: B023
            require(len(eager) == len(ours), f"compiled {how}, {len(ours) - 1} gradients come and not {len(eager) - 1}")
            gap = max(differ(a, b) for a, b in zip(eager, ours, strict=True))
            require(gap <= ATOL, f"compiled {how}, results differ by {gap:.2g} for {n_tokens} tokens")


def _or_broken(what: str, compute: Callable[[], Result]) -> Result:
    """Whatever a compiler raises is the method's failure."""
    try:
        return compute()
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise Broken(f"{what} raises {type(error).__name__}: {first}") from error


@contract
def exports(config: FFNConfig) -> None:
    """`torch.export` with a number of tokens that it leaves open gives the eager output, in evaluation and in training."""
    shape = {0: torch.export.Dim("n_tokens", min=2, max=1 << 20)}
    for training in (False, True):
        layer = make_layer(config, training=training)
        how = "in training" if training else "in evaluation"
        exported = _or_broken(
            f"torch.export {how}",
            lambda: torch.export.export(layer, (tokens(config, 6),), dynamic_shapes={"x": shape}),  # noqa: B023
        )
        program = exported.module()
        for n_tokens in (6, 9):
            x = tokens(config, n_tokens)
            found = _or_broken(f"the program that was exported {how}", lambda: seeded(lambda: program(x)))  # noqa: B023
            gap = differ(found, seeded(lambda: layer(x)))  # noqa: B023
            require(gap <= ATOL, f"the program that was exported {how} differs by {gap:.2g} for {n_tokens} tokens")


@contract
def sharding(config: FFNConfig) -> None:
    """FSDP2 over the layer, its parts as units of their own or not, trains and evaluates like the layer; a distributed x is
    refused.
    """
    # Some builds of PyTorch have none; in a program that is distributed already, the group is not ours to use.
    if not dist.is_available() or (dist.is_initialized() and dist.get_world_size() > 1):
        return
    ours = not dist.is_initialized()
    if ours:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        _check_sharding(without_dropout(config))
    finally:
        if ours:
            dist.destroy_process_group()


def _check_sharding(config: FFNConfig) -> None:
    # Seconds of imports, for this check alone.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    layer, x = make_layer(config, training=True), tokens(config)
    wanted = [*seeded(lambda: step(layer, layer, x)), _evaluated(layer, x)]
    parts = [name for name, part in layer.named_children() if any(True for _ in part.parameters())]
    for units in dict.fromkeys(((), tuple(parts))):
        sharded = copy.deepcopy(layer)
        for module in (*(sharded.get_submodule(name) for name in units), sharded):
            fully_shard(module, mesh=mesh)
        try:
            got = [*seeded(lambda: step(sharded, sharded, x)), _evaluated(sharded, x)]  # noqa: B023
        except RuntimeError as error:
            require(False, f"with the units {units} it raises {error}")
            return
        whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in got]
        *gaps, evaluated = (differ(a, b) for a, b in zip(whole, wanted, strict=True))
        require(max(gaps) <= ATOL, f"sharded with the units {units} it differs by {max(gaps):.2g} in training")
        require(evaluated <= ATOL, f"sharded with the units {units} it differs by {evaluated:.2g} in evaluation")
    try:
        layer(distribute_tensor(x, mesh, [Replicate()]))
    except (UserError, RuntimeError) as error:
        kind = UserError if config.has_backends else RuntimeError
        require(isinstance(error, kind) and "DTensor" in str(error), f"the error for a distributed x does not say so: {error}")
    else:
        require(False, "a distributed x goes into a layer of plain weights")


def _evaluated(layer: nn.Module, x: Tensor) -> Tensor:
    """Output in evaluation; the layer trains again afterwards."""
    with torch.no_grad():
        y = layer.eval()(x)
    layer.train()
    return y


@contract
def hooks(config: FFNConfig) -> None:
    """Hooks on every part of the layer run, in evaluation and in training."""
    for training in (False, True):
        _check_hooks(make_layer(config, training=training), tokens(config, 4 if training else 1))


def _check_hooks(layer: FeedForward, x: Tensor) -> None:
    how = "in training" if layer.training else "in evaluation"
    for name, part in layer.named_modules():
        ran: list[str] = []
        handles = [
            part.register_forward_pre_hook(lambda *_: ran.append("before")),  # noqa: B023
            part.register_forward_hook(lambda *_: ran.append("after")),  # noqa: B023
        ]
        for context in (torch.enable_grad, torch.inference_mode):
            ran.clear()
            with context():
                layer(x)
            require(ran == ["before", "after"], f"hooks on {name or 'the layer'} ran as {ran} {how}")
        for handle in handles:
            handle.remove()


@contract
def non_finite(config: FFNConfig) -> None:
    """NaN or infinity in a token costs its own row, as in `nn.Linear`, and raises nothing."""
    config = without_dropout(config)
    for value in (torch.nan, torch.inf, -torch.inf):
        for training in (False, True):
            layer, x = make_layer(config, training=training), tokens(config)
            x[3], x[7, 0] = value, value
            what = f"{value} in {'training' if training else 'evaluation'}"
            # Routing over the batch meets all tokens: there it is enough that nothing raises.
            _check_rows(layer, x, what, alone=not training or "training_independence" not in config.xfail)


def _check_rows(layer: FeedForward, x: Tensor, what: str, *, alone: bool) -> None:
    clean = torch.tensor([t for t in range(len(x)) if t not in (3, 7)])
    x = x.requires_grad_()
    with torch.no_grad():
        inferred = seeded(lambda: layer(x))
    y, _ = seeded(lambda: layer(x, return_stats=True))
    y[clean].square().sum().backward()
    if not alone:
        return
    others = seeded(lambda: layer(torch.where(x.isfinite(), x, 0.5).detach()))
    for name, found in (("output", y), ("output without gradients", inferred)):
        require(differ(found[clean], others[clean]) <= ATOL, f"{what} reaches other rows of the {name}")
        require(not bool(found[3].isfinite().all()), f"{what} gives an {name} that looks right")
    assert x.grad is not None, "backward reached x"
    require(bool(x.grad[clean].isfinite().all()), f"{what} reaches the gradients of other rows")
