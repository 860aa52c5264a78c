"""The language models of the authors of arXiv 2310.10837, as their code saves them (`model-100000.pth`).

    model = load_released_model("save/enwik8/checkpoint/model-100000.pth")     # settings are in the file
    model = load_released_model("weights.pth", k=4)                            # a state dict alone: say what it lacks

Names, with N for a layer's number, and what differs from ours:

    embedding.weight  out_norm.{weight,bias}  output.{weight,bias}
    layers.N.norm1, norm2                           layer norms of attention and feedforward block
    layers.N.self_attn.data_to_q.weight             [H C, D]
                      .data_to_kv.weight            [H 2 C, D]: of each head its keys, then its values
                      .pos_to_pq.weight             [H C, D], for sines and cosines that alternate, of negative distances
                      .global_content_bias, .global_pos_bias [H, C], .scale [1], .multi_head_merge.weight [D, H C]
    layers.N.linear1, linear2                       dense and Top-K: keys [F, D]; values [D, F], transposed
    layers.N.pkm.{expert_sel,keys,values}           mixtures, as in `ffn.released_layers`
    layers.N.pkm.keys.{0,1} [H, n, D/2], .values.weight [n n, D]    product keys; value a n_b + b belongs to sub-keys a and b

H heads, C head size, D d_model, F d_ff. Evaluation with a memory is what `models.TransformerXL` does; no code of a file is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ffn.weight_files import read_weights
from sparseffn.models.model_config import TransformerXLConfig
from sparseffn.models.released_blocks import ReleasedBlock, block_of
from sparseffn.models.released_settings import ReleasedSettings
from sparseffn.models.transformer_xl import TransformerXL

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_OUTER = {
    "embedding.weight": "embedding.weight",
    "out_norm.weight": "norm.weight",
    "out_norm.bias": "norm.bias",
    "output.weight": "output.weight",
    "output.bias": "output.bias",
}
_IN_LAYER = {
    "norm1.weight": "attention_norm.weight",
    "norm1.bias": "attention_norm.bias",
    "norm2.weight": "ffn_norm.weight",
    "norm2.bias": "ffn_norm.bias",
    "self_attn.data_to_q.weight": "attention.query.weight",
    "self_attn.multi_head_merge.weight": "attention.output.weight",
    "self_attn.global_content_bias": "attention.content_bias",
    "self_attn.global_pos_bias": "attention.position_bias",
}
_KEY_VALUE, _POSITION, _SCALE = "self_attn.data_to_kv.weight", "self_attn.pos_to_pq.weight", "self_attn.scale"
# A parameter that the authors' attention never uses.
_UNUSED = {"self_attn.s_bias"}


def load_released_model(source: str | Path | Mapping[str, Any], **options: Any) -> TransformerXL:
    """A language model of the paper's authors as one of ours, in evaluation mode.

    Args:
        source: a checkpoint of their training code, or a file or dictionary of a model's weights alone.
        options: settings that a file of weights alone does not have, or that stand in place of the file's: `method`
            ("topk", where the layers are two matrices), `k`, `selection_mode`, `activation_after_topk`, `activation`,
            `dropout`, and further fields of the method's config.

    Raises:
        UserError: the file cannot be read safely; its names, shapes or settings are of a model that ours is not; a setting
            is missing.
    """
    found = read_weights(source)
    where = f"`{source}`" if isinstance(source, str | Path) else "`source`"
    inner = found.get("model")
    weights = {name: w for name, w in (inner if isinstance(inner, Mapping) else found).items() if isinstance(w, Tensor)}
    settings = ReleasedSettings.of_file(found, options, where=where)
    layers = _layers(weights, where)
    first = layers[0]
    bias = first.get("self_attn.global_content_bias")
    if bias is None or bias.dim() != 2 or "embedding.weight" not in weights or weights["embedding.weight"].dim() != 2:
        raise _unknown_layout(where, weights)
    block = block_of(_block_tensors(first), settings, n_layers=len(layers), where=where)
    vocab_size, d_model = weights["embedding.weight"].shape
    config = TransformerXLConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=len(layers),
        n_heads=bias.shape[0],
        d_head=bias.shape[1],
        dropout=settings.dropout,
        ffn=block.config,
    )
    model = TransformerXL(config).to(weights["embedding.weight"].dtype)
    _load(model, _our_state(weights, layers, block, config, where), where)
    return model.eval()


def _layers(weights: Mapping[str, Tensor], where: str) -> list[dict[str, Tensor]]:
    """Tensors of each layer by their names in it."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if matched := _LAYER.fullmatch(name):
            found.setdefault(int(matched[1]), {})[matched[2]] = tensor
    if not found or sorted(found) != list(range(len(found))):
        raise _unknown_layout(where, weights)
    return [found[number] for number in range(len(found))]


def _block_tensors(layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to the feedforward block."""
    attention = {*_IN_LAYER, _KEY_VALUE, _POSITION, _SCALE, *_UNUSED}
    return {name: tensor for name, tensor in layer.items() if name not in attention}


def _our_state(
    weights: Mapping[str, Tensor],
    layers: list[dict[str, Tensor]],
    block: ReleasedBlock,
    config: TransformerXLConfig,
    where: str,
) -> dict[str, Tensor]:
    """All weights under our names and in our layout."""
    unknown = [name for name in weights if name not in _OUTER and not _LAYER.fullmatch(name)]
    missing = [name for name in _OUTER if name not in weights]
    missing += [
        f"layers.{n}.{name}"
        for n, t in enumerate(layers)
        for name in (*_IN_LAYER, _KEY_VALUE, _POSITION, _SCALE)
        if name not in t
    ]
    if unknown or missing:
        said = f"unknown {', '.join(unknown[:4])}" if unknown else f"no {', '.join(missing[:4])}"
        raise _unknown_layout(where, weights, said)
    state = {ours: weights[theirs] for theirs, ours in _OUTER.items()}
    for number, tensors in enumerate(layers):
        layer = {ours: tensors[theirs] for theirs, ours in _IN_LAYER.items()} | _attention(tensors, config)
        layer |= {f"ffn.{name}": tensor for name, tensor in block.state(_block_tensors(tensors)).items()}
        state |= {f"layers.{number}.{name}": tensor for name, tensor in layer.items()}
    return state


def _attention(tensors: Mapping[str, Tensor], config: TransformerXLConfig) -> dict[str, Tensor]:
    """What of the attention is laid out otherwise.

    Their position keys are of `j - i`, ours of `i - j`: sines change their sign. Theirs alternate, ours are sines first.
    """
    joined = tensors[_KEY_VALUE].reshape(config.n_heads, 2, config.d_head, -1)
    position = tensors[_POSITION]
    return {
        "attention.key.weight": joined[:, 0].flatten(0, 1),
        "attention.value.weight": joined[:, 1].flatten(0, 1),
        "attention.position.weight": torch.cat((-position[:, 0::2], position[:, 1::2]), dim=1),
        "attention.scale": tensors[_SCALE].reshape(()),
    }


def _load(model: TransformerXL, state: Mapping[str, Tensor], where: str) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        # "size mismatch for NAME: ..." a line each, after a heading.
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise UserError(
            f"{where} must have the shapes of one model; got another: {'; '.join(lines[:2])}; fix: get the file again"
        ) from None


def _unknown_layout(where: str, weights: Mapping[str, Tensor], said: str = "") -> UserError:
    shown = said or ", ".join(list(weights)[:4]) or "no tensor"
    return UserError(
        f"{where} must be a Transformer-XL with pre-layernorm of the authors' code (embedding, layers.N.self_attn, out_norm, "
        f"output); got {shown}; fix: use a checkpoint of variant preln_relative, preln_topk, preln_kvmem or preln_moe"
    )
