"""Feedforward blocks of released language models: which method they are, and their weights in our layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ffn import FFNConfig, make_config, method_class
from sparseffn.ffn.released_layers import mixture_state, mixture_weights, own_names, released_method
from sparseffn.models.released_settings import ReleasedSettings


@dataclass(frozen=True)
class ReleasedBlock:
    """The blocks of a model: all of one config."""

    config: FFNConfig
    state: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """From a layer's tensors to our block's."""


def block_of(tensors: Mapping[str, Tensor], settings: ReleasedSettings, *, n_layers: int, where: str) -> ReleasedBlock:
    """The blocks of a model, of the first of which these are the tensors.

    Raises:
        UserError: the names are of no block that we have, or a setting is missing.
    """
    names = set(tensors)
    shared = {"n_layers": n_layers, "activation": settings.activation, **settings.fields}
    if names == {"linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias"}:
        return _two_matrices(tensors, settings, shared)
    if names == {"pkm.keys.0", "pkm.keys.1", "pkm.values.weight"}:
        return _product_keys(tensors, settings, shared)
    if "pkm.expert_sel" in names and all(name.startswith("pkm.") for name in names):
        return _mixture(tensors, settings, shared, where)
    shown = ", ".join(sorted(names)[:5]) or "none"
    raise UserError(
        f"{where} must have dense, Top-K, product-key or mixture blocks; got layers with {shown}; "
        "fix: our models have no block of that kind"
    )


def _config(method: str, fields: Mapping[str, Any]) -> FFNConfig:
    return make_config(method_class(method), fields)


def _two_matrices(tensors: Mapping[str, Tensor], settings: ReleasedSettings, shared: Mapping[str, Any]) -> ReleasedBlock:
    d_ff, d_model = tensors["linear1.weight"].shape
    of_file = "topk" if settings.arguments.get("transformer.variant") == "preln_topk" else "dense"
    method = str(settings.options.get("method", of_file))
    sizes: dict[str, Any] = {"d_model": d_model, "d_ff": d_ff, "dropout": settings.dropout}
    if method == "topk":
        by_norm = bool(settings.arguments.get("transformer.topk_use_norm", False))
        sizes |= {"k": int(settings.need("k", "transformer.topk_value")), "use_norm": by_norm}

    def state(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            "keys": found["linear1.weight"],
            "key_bias": found["linear1.bias"],
            "values": found["linear2.weight"].t(),
            "bias": found["linear2.bias"],
        }

    return ReleasedBlock(_config(method, {**sizes, **shared}), state)


def _product_keys(tensors: Mapping[str, Tensor], settings: ReleasedSettings, shared: Mapping[str, Any]) -> ReleasedBlock:
    """Their first half of x numbers the rows of the table of values, ours its columns."""
    (n_heads, n_a, half), n_b = tensors["pkm.keys.0"].shape, tensors["pkm.keys.1"].shape[1]
    k = settings.get("k", "pkm.knn")
    # As many as there are sub-keys, or none: the released dense form.
    dense = not k or (n_a <= k and n_b <= k)
    if not dense and settings.activation == "softmax" and n_heads > 1:
        raise UserError(
            f"{settings.where} must have one head for a softmax over selected values; got {n_heads}, over all of whose values "
            "theirs runs; fix: our models do not compute that"
        )
    config = _config(
        "pkm",
        {
            "d_model": 2 * half,
            "n_subkeys": n_a,
            "n_subkeys_b": None if n_b == n_a else n_b,
            "n_heads": n_heads,
            "k": None if dense else int(k),
            **shared,
        },
    )

    def state(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        table = found["pkm.values.weight"].unflatten(0, (n_a, n_b)).transpose(0, 1)
        return {"keys_a": found["pkm.keys.0"], "keys_b": found["pkm.keys.1"], "values": table.flatten(0, 1)}

    return ReleasedBlock(config, state)


def _mixture(tensors: Mapping[str, Tensor], settings: ReleasedSettings, shared: Mapping[str, Any], where: str) -> ReleasedBlock:
    weights = mixture_weights(own_names(tensors, "pkm."), where=f"{where} in a layer")
    n_experts, d_model, expert_size = weights.keys_EDG.shape
    if settings.arguments.get("pkm.knn"):
        raise UserError(
            f"{where} must have pkm.knn = 0; got {settings.arguments['pkm.knn']}; fix: our models select no channels so"
        )
    after_topk = bool(settings.get("activation_after_topk", "moe.activation_after_topk", False))
    method, extra = released_method(settings.selection_mode, after_topk=after_topk)
    fields = {
        "d_model": d_model,
        "n_experts": n_experts,
        "expert_size": expert_size,
        "k": int(settings.need("k", "pkm.n_heads")),
        **_training(settings, n_experts, by_slot=method == "softmax-renorm-moe"),
        **extra,
        **shared,
    }

    def state(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return mixture_state(mixture_weights(own_names(found, "pkm."), where=f"{where} in a layer"))

    return ReleasedBlock(_config(method, fields), state)


def _training(settings: ReleasedSettings, n_experts: int, *, by_slot: bool) -> dict[str, float]:
    """Dropout and balancing, which evaluation does not have: for a model that is trained on.

    After top-k, their entropy is that of the selected logits.
    """
    given = settings.arguments
    if not given:
        return {}
    dropped = settings.dropout * float(given.get("moe.dropout_factor", 1.0)) if given.get("kvmem.dropout") == "score" else 0.0
    weight = float(given.get("moe.perplexity_reg", 0.0))
    fields = {"dropout": dropped, "expert_dropout": float(given.get("moe.drop_expert", 0.0)), "entropy_weight": 0.0}
    match given.get("moe.reg_type", "entropy"):
        case "entropy":
            return {**fields, "slot_entropy_weight" if by_slot else "entropy_weight": weight}
        case "switch":
            # Theirs is the mean over experts of f p, ours N_E times the sum.
            return {**fields, "switch_weight": weight / n_experts**2}
        case _:
            return fields
