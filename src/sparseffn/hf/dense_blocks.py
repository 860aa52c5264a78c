"""Dense feedforward blocks in models of transformers: where they are, and what they compute.

    y = sum_i alpha_i v_i + b,  alpha_i = act(k_i . x + c_i)  or gated  act(k_i . x + c_i) (g_i . x + d_i)

A block is read by the names of its parts, and believed once its own forward gives the same numbers.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparseffn.errors import UserError
from sparseffn.hf.formulas import activation_name
from sparseffn.ops.activations import hidden_units
from sparseffn.ops.module_state import has_hooks

Layers = int | str | type[nn.Module] | Sequence[int | str | type[nn.Module]] | None
"""Blocks by their number among those of known families, by name (`*` stands for anything) or by class; None: all known."""

_FAMILIES = {
    "gemma": "GemmaMLP",
    "gemma2": "Gemma2MLP",
    "gemma3": "Gemma3MLP",
    "gemma4": "Gemma4TextMLP",
    "gpt2": "GPT2MLP",
    "gpt_neox": "GPTNeoXMLP",
    "llama": "LlamaMLP",
    "ministral": "MinistralMLP",
    "ministral3": "Ministral3MLP",
    "mistral": "MistralMLP",
    "qwen2": "Qwen2MLP",
    "qwen3": "Qwen3MLP",
    "qwen3_5": "Qwen3_5MLP",
    "qwen3_next": "Qwen3NextMLP",
    "smollm3": "SmolLM3MLP",
}
KNOWN = {f"transformers.models.{family}.modeling_{family}.{name}": family for family, name in _FAMILIES.items()}
"""Classes that are found without being named, with their family; not where one stands beside experts, as part of a mixture."""

# Names that libraries give to the parts: keys, gate keys or None, values.
_PARTS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("c_fc", None, "c_proj"),
    ("dense_h_to_4h", None, "dense_4h_to_h"),
    ("fc1", None, "fc2"),
    ("fc_in", None, "fc_out"),
    ("lin1", None, "lin2"),
    ("up_proj", None, "down_proj"),
)
_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")
# Numbers that a block's forward may deviate by from its formula: other orders of summation, and in half precision other
# intermediate roundings. A missing bias or another activation changes more than a tenth.
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseBlock:
    """The parameters of a dense block, as views where its own layout allows."""

    kind: str
    """Name of the module's class."""
    activation: str
    keys: Tensor
    """`[F, D]`"""
    values: Tensor
    """`[F, D]`"""
    gate_keys: Tensor | None = None
    """`[F, D]`"""
    key_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    value_bias: Tensor | None = None
    dropout: float = 0.0
    """Rate on the output, as GPT-2 has it inside the block."""

    @property
    def d_ff(self) -> int:
        return self.keys.shape[0]

    @property
    def d_model(self) -> int:
        return self.keys.shape[1]

    @property
    def gated(self) -> bool:
        return self.gate_keys is not None

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by name."""
        names = ("keys", "values", "gate_keys", "key_bias", "gate_bias", "value_bias")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    @property
    def has_biases(self) -> bool:
        return any(name.endswith("bias") for name in self.tensors())

    @property
    def num_params(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors().values())

    @property
    def forward_flops(self) -> int:
        """FLOPs a token: 2 for each multiply-add of its products."""
        return 2 * (2 + self.gated) * self.d_model * self.d_ff

    def coefficients(self, x_TD: Tensor) -> Tensor:
        """alpha, `[T, F]`."""
        scores_TF = F.linear(x_TD, self.keys, self.key_bias)
        gates_TF = None if self.gate_keys is None else F.linear(x_TD, self.gate_keys, self.gate_bias)
        return hidden_units(self.activation, scores_TF, gates_TF)

    def __call__(self, x_TD: Tensor) -> Tensor:
        """The output without dropout, `[T, D]`."""
        return F.linear(self.coefficients(x_TD), self.values.t(), self.value_bias)


Reader = Callable[[nn.Module], DenseBlock]
"""Reads the dense block of a module whose parts have other names."""


def find_blocks(model: nn.Module, layers: Layers = None) -> dict[str, nn.Module]:
    """The blocks to replace by name, in the model's order.

    Raises:
        UserError: no block is of a known family, or `layers` names what is not there.
    """
    known = {
        name: module
        for name, module in model.named_modules()
        if _full_name(type(module)) in KNOWN and not _beside_experts(model, name)
    }
    if layers is None:
        if not known:
            raise UserError(
                f"`model` must hold feedforward blocks of {', '.join(_FAMILIES)}; got {type(model).__name__}, which has none; "
                "fix: name them in layers=, by module name or by class"
            )
        return known
    wanted = [layers] if isinstance(layers, int | str | type) else list(layers)
    if not wanted:
        raise UserError("`layers` must name at least one block; got none; fix: leave it out to replace all")
    chosen: set[str] = set()
    for one in wanted:
        chosen.update(_chosen(model, one, list(known)))
    return {name: module for name, module in model.named_modules() if name in chosen}


def _beside_experts(model: nn.Module, name: str) -> bool:
    """Whether a block is the shared expert of a mixture, or computed next to one as in Gemma 4's."""
    return any(child == "experts" for child, _ in model.get_submodule(name.rpartition(".")[0]).named_children())


def _chosen(model: nn.Module, one: int | str | type[nn.Module], known: list[str]) -> Iterable[str]:
    if isinstance(one, int) and not isinstance(one, bool):
        if not -len(known) <= one < len(known):
            raise UserError(
                f"`layers` must be numbers below {len(known)}, the known blocks; got {one}; fix: count from 0, or name a module"
            )
        return [known[one]]
    names = [name for name, _ in model.named_modules()]
    if isinstance(one, str):
        found = fnmatch.filter(names, one)
    elif isinstance(one, type) and issubclass(one, nn.Module):
        found = [name for name, module in model.named_modules() if type(module) is one]
    else:
        raise UserError(f"`layers` must be numbers, names or classes of modules; got {one!r}; fix: as 'model.layers.*.mlp'")
    # The model itself cannot be put into a place of its own.
    found = [name for name in found if name]
    if not found:
        shown = repr(one) if isinstance(one, str) else one.__name__
        raise UserError(f"`layers` must name modules of the model; got {shown}, which none is; fix: see model.named_modules()")
    return found


def read_block(name: str, module: nn.Module, reader: Reader | None = None) -> DenseBlock:
    """The block of a module, checked against the module's own forward.

    Args:
        name: what errors call it.
        module: on a real device, not quantised.
        reader: for modules whose parts have names that are not known here.

    Raises:
        UserError: it is no such block, or one that cannot be replaced as it is.
    """
    if has_hooks(module) or hasattr(module, "_hf_hook"):
        raise _refused(name, "carries hooks, which its replacement would lose", "remove them, or load without offloading")
    block = reader(module) if reader is not None else _by_parts(name, module)
    _check_tensors(name, block)
    deviation = _deviation(module, block)
    limit = _TOLERANCES.get(block.keys.dtype, 0.0)
    if not deviation <= limit:
        raise _refused(
            name,
            f"computes something else than its parts say (deviation {deviation:.2g}, allowed {limit:g})",
            "pass reader=, a function that returns its DenseBlock",
        )
    return block


def _by_parts(name: str, module: nn.Module) -> DenseBlock:
    if isinstance(module, nn.Sequential):
        keys, activation, values = _in_sequence(name, module)
        gate_keys = None
    else:
        keys, gate_keys, values = _named_parts(name, module)
        activation = next((getattr(module, a) for a in _ACTIVATIONS if hasattr(module, a)), None)
    act = None if activation is None else activation_name(activation)
    if act is None:
        shown = type(activation).__name__ if isinstance(activation, nn.Module) else getattr(activation, "__name__", "nothing")
        raise _refused(name, f"has an activation that is unknown here, {shown}", "choose other layers=")
    keys_FD, key_bias = _matrix(name, keys)
    values_DF, value_bias = _matrix(name, values)
    gate_FD, gate_bias = (None, None) if gate_keys is None else _matrix(name, gate_keys)
    drops = [m.p for m in module.children() if isinstance(m, nn.Dropout) and m.p > 0]
    return DenseBlock(
        kind=type(module).__name__,
        activation=act,
        keys=keys_FD,
        values=values_DF.t(),
        gate_keys=gate_FD,
        key_bias=key_bias,
        gate_bias=gate_bias,
        value_bias=value_bias,
        dropout=_output_dropout(name, module, drops),
    )


def _named_parts(name: str, module: nn.Module) -> tuple[nn.Module, nn.Module | None, nn.Module]:
    for keys, gate_keys, values in _PARTS:
        names = [part for part in (keys, gate_keys, values) if part is not None]
        if all(isinstance(getattr(module, part, None), nn.Module) for part in names):
            return getattr(module, keys), getattr(module, gate_keys) if gate_keys else None, getattr(module, values)
    raise _refused(
        name,
        f"is a {type(module).__name__}, whose parts are unknown here",
        "choose other layers=, or pass reader=, a function that returns its DenseBlock",
    )


def _in_sequence(name: str, module: nn.Sequential) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Linear, activation, Linear, with a dropout at the end or none."""
    parts = [part for part in module if not (isinstance(part, nn.Dropout) and (part.p == 0 or part is module[-1]))]
    if len(parts) != 3:
        raise _refused(name, f"is a sequence of {len(module)} modules", "a block is linear, activation, linear")
    return parts[0], parts[1], parts[2]


def _output_dropout(name: str, module: nn.Module, rates: list[float]) -> float:
    """The rate of the one dropout that GPT-2's block and a sequence end with."""
    if len(rates) > 1 or (rates and not isinstance(module, nn.Sequential) and "gpt2" not in type(module).__module__):
        raise _refused(name, "has dropout at places that are unknown here", "set its rates to 0")
    return rates[0] if rates else 0.0


def _matrix(name: str, part: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight `[out, in]` and bias of a linear layer."""
    if type(part) is Conv1D:
        return part.weight.t(), part.bias
    if type(part) is not nn.Linear:
        raise _refused(
            name,
            f"holds a {type(part).__name__} in place of nn.Linear",
            "load the model without quantisation, and merge adapters first",
        )
    return part.weight, part.bias


def _check_tensors(name: str, block: DenseBlock) -> None:
    tensors = block.tensors()
    kinds = {type(t).__name__ for t in tensors.values() if type(t) not in (Tensor, nn.Parameter)}
    if kinds:
        raise _refused(name, f"has weights of type {', '.join(sorted(kinds))}", "load it without quantisation, on one device")
    if any(t.is_meta for t in tensors.values()):
        raise _refused(name, "is on the meta device, without numbers", "load the model's weights first")
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    if len(dtypes) > 1:
        raise _refused(name, f"mixes {' and '.join(dtypes)}", f"model.to(torch.{dtypes[-1]})")
    if block.keys.dtype not in _TOLERANCES:
        raise _refused(name, f"has weights of {dtypes[0]}", "load the model in float32, bfloat16 or float16")
    if len({t.device for t in tensors.values()}) > 1:
        raise _refused(name, "is spread over devices", "load it on one")
    wanted = {"keys": 2, "values": 2, "gate_keys": 2}
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    fits = all(len(shape) == wanted.get(n, 1) for n, shape in shapes.items()) and all(
        shapes.get(n, block.keys.shape) == block.keys.shape for n in wanted
    )
    if not fits:
        raise _refused(name, f"has parts that do not fit: {shapes}", "choose other layers=")


@torch.no_grad()
def _deviation(module: nn.Module, block: DenseBlock) -> float:
    """Of the module's forward from the formula, over the formula's size."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(8, block.d_model, generator=generator).to(block.keys.device, block.keys.dtype)
    was_training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        found: Any = module(x_TD[None])
    # Whatever a module of another kind asks for.
    except (AttributeError, TypeError, RuntimeError):
        return float("inf")
    finally:
        for m in was_training:
            m.training = True
    wanted = block(x_TD).double()
    if not isinstance(found, Tensor) or found.shape[1:] != wanted.shape:
        return float("inf")
    return float((found[0].double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _refused(name: str, why: str, fix: str) -> UserError:
    return UserError(f"`{name}` must be a dense feedforward block that can be replaced; got one that {why}; fix: {fix}")


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
