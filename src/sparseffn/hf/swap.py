"""`replace_ffn`: a cheaper feedforward block in a model of transformers, or in any module.

report = replace_ffn(model, "topk", k=768)                                              # the same weights, no training
report = replace_ffn(model, "sigma-moe", n_experts=32, k=16, calibration=input_ids)     # the pairs split into experts
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from sparseffn.errors import UserError, unknown_name
from sparseffn.ffn import FeedForward, FFNConfig, method_class
from sparseffn.ffn.dense import TwoMatricesConfig
from sparseffn.hf.dense_blocks import DenseBlock, Layers, Reader, find_blocks, read_block
from sparseffn.hf.fill import Fill, Random, Same, Upcycle, mark_fill
from sparseffn.hf.split import Split
from sparseffn.results.convert_result import ReplacedBlock
from sparseffn.storage import digest_of

FILLS: dict[str, type[Fill]] = {cls.name: cls for cls in (Same, Split, Upcycle, Random)}


@final
@dataclass(frozen=True, kw_only=True)
class Planned:
    """One block that can be replaced, with everything that decides by what."""

    name: str
    block: DenseBlock
    config: FFNConfig
    training: bool
    trains: bool
    """Whether its parameters ask for gradients."""

    def empty(self) -> FeedForward:
        """The new layer, its parameters not yet filled."""
        with torch.device(self.block.keys.device):
            return self.config.build().to(self.block.keys.dtype)

    def replaced(self) -> ReplacedBlock:
        """What the report says of it."""
        block, config = self.block, self.config
        return ReplacedBlock(
            name=self.name,
            kind=block.kind,
            method=config.name,
            n_pairs=config.n_channels,
            n_active=config.active_channels,
            params_before=block.num_params,
            params_after=config.num_params(),
            active_params=config.active_params(),
            flops_before=block.forward_flops,
            flops_after=config.forward_flops(),
        )


@final
class Replaced(tuple[ReplacedBlock, ...]):
    """The report of `replace_ffn`, a record for each block; printed, a table, and how such a model is saved."""

    __slots__ = ()

    def __str__(self) -> str:
        head = ("block", "was", "is", "pairs", "active", "parameters", "MFLOPs a token")
        rows = [
            (
                r.name, r.kind, r.method, f"{r.n_pairs:,}", f"{r.n_active:,}", f"{r.params_before:,} -> {r.params_after:,}",
                f"{r.flops_before / 1e6:.2f} -> {r.flops_after / 1e6:.2f}",
            )
            for r in self
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows)]
        return "\n".join(
            [*table, "save it by sparseffn.hf.save_converted(model, FOLDER): its own save_pretrained cannot be loaded"]
        )


def replace_ffn(
    model: nn.Module,
    method: str,
    layers: Layers = None,
    *,
    init: str | Fill | None = None,
    calibration: Tensor | None = None,
    seed: int = 0,
    reader: Reader | None = None,
    **options: Any,
) -> Replaced:
    """Replace dense feedforward blocks of a model in place: all of them or, where one cannot be, none.

    Args:
        model: Llama, Mistral, Ministral and Ministral 3, Qwen 2, 3 and 3.5, Qwen3-Next, Gemma 1 to 4, SmolLM3, GPT-2, GPT-NeoX,
            or a model whose blocks `layers` names.
        method: name of a method, as `sparseffn methods` lists them.
        layers: numbers among the model's blocks, names of modules (`*` stands for anything) or their class; None: all blocks
            of known families.
        init: how a new block is filled: "same" (topk's default), "split" (that of mixtures), "upcycle" or "random" (that of
            other methods), or one of `Same`, `Split`, `Upcycle`, `Random` with options.
        calibration: token ids `[n, length]` that the model is run on; `split` needs them, some thousand tokens.
        seed: of all that is drawn.
        reader: reads a module's `DenseBlock` where its parts have names that are unknown here.
        options: the method's fields but those that follow from the dense block: `k`, `n_experts`, ...

    Returns:
        What was replaced, block by block, with parameters and FLOPs; `print` shows a table.

    Raises:
        UserError: a block cannot be replaced, or an option does not fit; the model is then as it was.
    """
    fill = find_fill(init, method)
    plans = plan(model, method, fill, layers, options, reader)
    if fill.needs_inputs and calibration is None:
        raise UserError(
            f"`calibration` must be token ids that {fill.name} is fitted on; got none; "
            "fix: tokenizer(text, return_tensors='pt').input_ids, some thousand tokens"
        )
    if calibration is not None and not fill.needs_inputs:
        raise UserError(f"`calibration` must be left out for init={fill.name!r}, which needs none; got token ids; fix: drop it")
    made: dict[str, FeedForward] = {}

    def make(one: Planned, inputs_TD: Tensor | None) -> None:
        made[one.name] = filled(one, fill, inputs_TD, seed)

    if calibration is None:
        for one in plans.values():
            make(one, None)
    else:
        visit_inputs(model, plans, calibration, make)
    put(model, {name: with_dropout(layer, plans[name].block) for name, layer in made.items()})
    return Replaced(one.replaced() for one in plans.values())


def find_fill(init: str | Fill | None, method: str) -> Fill:
    """The way to fill that a name stands for; None: that of the method."""
    if isinstance(init, Fill):
        return init
    if init is None:
        config_class = method_class(method)
        gate = getattr(config_class, "gate", None)
        init = "same" if issubclass(config_class, TwoMatricesConfig) else "split" if gate else "random"
    if init not in FILLS:
        raise unknown_name("init", init, FILLS)
    return FILLS[init]()


def plan(
    model: nn.Module, method: str, fill: Fill, layers: Layers, options: Mapping[str, Any], reader: Reader | None = None
) -> dict[str, Planned]:
    """Every block that will be replaced, checked; raises UserError where one cannot be."""
    config_class = method_class(method)
    modules = find_blocks(model, layers)
    plans = {}
    for name, module in modules.items():
        block = read_block(name, module, reader)
        config = fill.config(config_class, block, options, len(modules))
        trains = any(p.requires_grad for p in module.parameters())
        plans[name] = Planned(name=name, block=block, config=config, training=module.training, trains=trains)
    return plans


def filled(one: Planned, fill: Fill, inputs_TD: Tensor | None, seed: int) -> FeedForward:
    """The new layer, filled; what is drawn depends on the seed and the block's name alone."""
    layer = one.empty()
    fill.fill(layer, one.block, inputs_TD, keyed_generator(seed, one.name))
    mark_fill(layer, fill.described())
    return layer.train(one.training).requires_grad_(one.trains)


def with_dropout(layer: FeedForward, block: DenseBlock) -> nn.Module:
    """The layer, with the dropout on its output that the dense block had."""
    return nn.Sequential(layer, nn.Dropout(block.dropout)).train(layer.training) if block.dropout else layer


def put(model: nn.Module, made: Mapping[str, nn.Module]) -> None:
    """Put modules in their places, also where a module has several."""
    shared = {id(model.get_submodule(name)): module for name, module in made.items()}
    for _, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if id(child) in shared:
                setattr(parent, name, shared[id(child)])


class _AllSeen(Exception):
    """The last block's inputs are there: what follows is not needed."""


@torch.no_grad()
def visit_inputs(
    model: nn.Module, names: Sequence[str] | Mapping[str, Any], input_ids: Tensor, visit: Callable[[Any, Tensor], None]
) -> None:
    """Run the model on tokens, and call `visit` with each block (or name) and its inputs `[T, D]` as they come by.

    The model is put into evaluation mode, and back; nothing behind the last block is computed.
    """
    if input_ids.dim() != 2 or input_ids.is_floating_point() or not input_ids.numel():
        raise UserError(
            f"`calibration` must be token ids [n, length]; got {tuple(input_ids.shape)} of {input_ids.dtype}; "
            "fix: tokenizer(text, return_tensors='pt').input_ids"
        )
    left = set(names)

    def hook(name: str) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            visit(names[name] if isinstance(names, Mapping) else name, args[0].flatten(0, -2))
            left.discard(name)
            if not left:
                raise _AllSeen

        return seen

    with evaluating(model):
        handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
        try:
            # A cache would hold keys and values of all layers for nothing.
            without = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
            model(input_ids.to(next(model.parameters()).device), **without)
        except _AllSeen:
            pass
        finally:
            for handle in handles:
                handle.remove()
    if left:
        raise UserError(
            f"`layers` must name blocks that run; got {', '.join(sorted(left))}, which did not; fix: leave them out"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every module back in its own on leaving."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def keyed_generator(seed: int, *key: object) -> torch.Generator:
    """A generator of its own for each key."""
    return torch.Generator().manual_seed(int(digest_of(str(seed), *map(str, key))[:15], 16))
