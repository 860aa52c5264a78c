"""Mixture layers that others trained, by the names and layouts of their parameters.

    layer = load_released_layer("layer.pth", k=4)                              # a layer of `moe_layer`
    layer = load_released_layer(weights, k=2, prefix="h.3.mlp.ff.")            # one inside of a model

`moe_layer` (the authors of arXiv 2310.10837):    expert_sel [E, D], keys [E, D, G], values [E, G, D]
`sigma-moe` (IBM, for transformers):              expert_sel.weight [E, D], and either the same keys and values, or
    flat, after a pass on a CPU:                  keys [E G, D], values [D, E G]
    one linear layer an expert ("traceable"):     keys.e.weight [G, D], values.e.weight [D, G]

K, the selection and the activation are not in the weights. Both layers return their balancing loss without its weight, which is
`entropy_weight` here. E experts, D d_model, G expert size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparseffn.errors import UserError, unknown_name
from sparseffn.ffn.methods import build
from sparseffn.ffn.mixture import Mixture
from sparseffn.ffn.weight_files import read_weights

SelectionMode = Literal["sigmoid", "softmax", "sinkmoid"]

# What the layers count for their plots.
_COUNTERS = {"kv_sel_counts", "kv_sel_counts_100", "seq"}
_BIASES = re.compile(r"bias|o_bias|keys\.\d+\.bias|values\.\d+\.bias")


@dataclass(frozen=True)
class MixtureWeights:
    """A mixture's weights in our layout."""

    selector_ED: Tensor
    keys_EDG: Tensor
    values_EGD: Tensor


def load_released_layer(
    weights: str | Path | Mapping[str, Tensor],
    *,
    k: int,
    selection_mode: SelectionMode = "sigmoid",
    activation_after_topk: bool = False,
    prefix: str = "",
    **options: Any,
) -> Mixture:
    """A layer of ours with the weights of a `moe_layer` or `sigma-moe` layer, in their dtype.

    Args:
        weights: a file (`.safetensors`, or of `torch.save`, of which nothing is run), or a state dict.
        k: experts a token.
        selection_mode: as those layers call it: sigmoid is `sigma-moe`, softmax `softmax-moe` or, after top-k,
            `softmax-renorm-moe`, sinkmoid `s-base` with the released Sinkhorn.
        activation_after_topk: whether the softmax is over the selected logits alone.
        prefix: of the layer's names among the weights, with its dot.
        options: further fields of the method's config: `activation`, `expert_dropout`, `dropout`, `entropy_weight`.

    Raises:
        UserError: the file cannot be read safely, the layout is unknown, or our layers lack what the layer has: biases, an
            output of another width.
    """
    found = mixture_weights(own_names(read_weights(weights), prefix), where=_shown(weights, prefix))
    n_experts, d_model, expert_size = found.keys_EDG.shape
    name, extra = released_method(selection_mode, after_topk=activation_after_topk)
    sizes = {"d_model": d_model, "n_experts": n_experts, "expert_size": expert_size, "k": k}
    layer = build(name, **{**sizes, **extra, **options})
    assert isinstance(layer, Mixture), "all of `released_method`'s are"
    layer = layer.to(found.keys_EDG.dtype)
    layer.load_state_dict(mixture_state(found))
    return layer


def released_method(selection_mode: str, *, after_topk: bool) -> tuple[str, dict[str, Any]]:
    """The method of a selection, and the fields that make it the released one.

    Raises:
        UserError: there is no such selection.
    """
    methods = {
        "sigmoid": ("sigma-moe", {}),
        "softmax": ("softmax-renorm-moe", {}) if after_topk else ("softmax-moe", {}),
        "sinkmoid": ("s-base", {"sinkhorn": "released"}),
    }
    if selection_mode not in methods:
        raise unknown_name("selection_mode", selection_mode, methods)
    return methods[selection_mode]


def mixture_state(found: MixtureWeights) -> dict[str, Tensor]:
    """Weights by the names of our mixtures."""
    return {"router.selector": found.selector_ED, "experts.keys": found.keys_EDG, "experts.values": found.values_EGD}


def own_names(weights: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    named = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def mixture_weights(tensors: Mapping[str, Tensor], *, where: str) -> MixtureWeights:
    """Selector, keys and values of one layer in any of the layouts.

    Raises:
        UserError: a name is missing or unknown, a shape does not fit, or a bias is not zero; `where` says of what.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if name not in _COUNTERS}
    selector = tensors.get("expert_sel", tensors.get("expert_sel.weight"))
    if selector is None or selector.dim() != 2:
        raise _unknown_layout(where, tensors)
    n_experts, d_model = selector.shape
    keys = _experts(tensors, "keys", n_experts, d_model, flat_transposed=True)
    values = _experts(tensors, "values", n_experts, d_model, flat_transposed=False)
    names = {"expert_sel", "expert_sel.weight", "keys", "values"}
    names |= {f"{part}.{e}.weight" for part in ("keys", "values") for e in range(n_experts)}
    biases = {name: tensor for name, tensor in tensors.items() if _BIASES.fullmatch(name)}
    if keys is None or values is None or set(tensors) - names - set(biases):
        raise _unknown_layout(where, tensors)
    if any(bool(bias.any()) for bias in biases.values()):
        raise UserError(
            f"{where} must have no biases, which our mixtures lack; got {', '.join(sorted(biases))}; "
            "fix: use a layer that was trained with bias=False"
        )
    n_values = values.shape[2]
    if keys.shape != (n_experts, d_model, keys.shape[2]) or values.shape[:2] != (n_experts, keys.shape[2]):
        raise _unknown_layout(where, tensors)
    if n_values != d_model:
        raise UserError(
            f"{where} must have outputs as wide as its inputs, {d_model}; got {n_values}; fix: use a layer without v_dim"
        )
    return MixtureWeights(selector, keys.contiguous(), values.contiguous())


def _experts(tensors: Mapping[str, Tensor], part: str, n_experts: int, d_model: int, *, flat_transposed: bool) -> Tensor | None:
    """Keys `[E, D, G]` or values `[E, G, D]`; None where they are in no known layout."""
    whole = tensors.get(part)
    if whole is not None and whole.dim() == 3:
        return whole
    if whole is not None and whole.dim() == 2:
        rows = whole if flat_transposed else whole.t()
        if rows.shape[1] != d_model or rows.shape[0] % n_experts:
            return None
        split = rows.unflatten(0, (n_experts, -1))
        return split.transpose(1, 2) if flat_transposed else split
    single = [tensors.get(f"{part}.{e}.weight") for e in range(n_experts)]
    if whole is not None or any(weight is None for weight in single):
        return None
    return torch.stack([weight.t() for weight in single if weight is not None])


def _unknown_layout(where: str, tensors: Mapping[str, Tensor]) -> UserError:
    shown = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items())[:6])
    return UserError(
        f"{where} must have expert_sel, keys and values as moe_layer or sigma-moe lay them out; got {shown or 'no tensor'}; "
        "fix: check `prefix`, the layer's place among the weights"
    )


def _shown(weights: object, prefix: str) -> str:
    place = f" under {prefix!r}" if prefix else ""
    return f"`{weights}`{place}" if isinstance(weights, str | Path) else f"`weights`{place}"
