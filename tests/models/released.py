"""Small checkpoints as the code of arXiv 2310.10837 saves them, and what its models compute, in plain operations.

Written from the layout of the parameters and the equations of the paper; the attention is in the terms of that code: position
codes of `j - i`, sines and cosines in turn.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

VOCAB, D, H, C, F, E, G = 11, 8, 2, 3, 12, 5, 4
N_A, N_B, HEADS = 3, 4, 2
N_LAYERS = 2


def weights(variant: str, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a variant: preln_relative, preln_topk, preln_kvmem or preln_moe."""
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (VOCAB, D), "output.weight": (VOCAB, D), "output.bias": (VOCAB,)}
    shapes |= {"out_norm.weight": (D,), "out_norm.bias": (D,)}
    for n in range(N_LAYERS):
        layer: dict[str, tuple[int, ...]] = {
            "norm1.weight": (D,), "norm1.bias": (D,), "norm2.weight": (D,), "norm2.bias": (D,),
            "self_attn.data_to_q.weight": (H * C, D), "self_attn.data_to_kv.weight": (2 * H * C, D),
            "self_attn.pos_to_pq.weight": (H * C, D), "self_attn.multi_head_merge.weight": (D, H * C),
            "self_attn.global_content_bias": (H, C), "self_attn.global_pos_bias": (H, C),
            "self_attn.scale": (1,), "self_attn.s_bias": (1,),
        }  # fmt: skip
        if variant == "preln_moe":
            layer |= {"pkm.keys": (E, D, G), "pkm.values": (E, G, D), "pkm.expert_sel": (E, D), "pkm.kv_sel_counts_100": (E, G)}
        elif variant == "preln_kvmem":
            layer |= {
                "pkm.keys.0": (HEADS, N_A, D // 2),
                "pkm.keys.1": (HEADS, N_B, D // 2),
                "pkm.values.weight": (N_A * N_B, D),
            }
        else:
            layer |= {"linear1.weight": (F, D), "linear1.bias": (F,), "linear2.weight": (D, F), "linear2.bias": (D,)}
        shapes |= {f"layers.{n}.{name}": shape for name, shape in layer.items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.7 for name, shape in shapes.items()}


ARGUMENTS: dict[str, Any] = {
    "transformer.activation": "relu", "transformer.topk_value": 3, "transformer.topk_use_norm": 0, "dropout": 0.1,
    "moe.selection_mode": "sigmoid", "moe.activation_after_topk": 0, "moe.perplexity_reg": 0.01, "moe.reg_type": "entropy",
    "moe.drop_expert": 0.05, "moe.key_mode": "moe", "moe.sel_norm": "none", "lm.trafo.test_pos_clamp": "none",
    "kvmem.dropout": "none", "pkm.n_heads": 2, "pkm.knn": 0,
}  # fmt: skip


def arguments(variant: str, **changes: Any) -> dict[str, Any]:
    """Of `main.py`, those that matter; `__` stands for a dot."""
    return {**ARGUMENTS, "transformer.variant": variant, **{name.replace("__", "."): v for name, v in changes.items()}}


def logits(of: dict[str, Tensor], args: dict[str, Any], tokens: Tensor, past: list[Tensor] | None = None) -> tuple[Tensor, Any]:
    """Of one text, `[L, V]`, and the layers' inputs, which the next window attends to."""
    x, states = of["embedding.weight"][tokens], []
    for n in range(N_LAYERS):
        layer = {name.removeprefix(f"layers.{n}."): w for name, w in of.items() if name.startswith(f"layers.{n}.")}
        context = x if past is None else torch.cat((past[n], x))
        states.append(context)
        x = x + _attention(layer, _norm(x, layer, "norm1"), _norm(context, layer, "norm1"))
        x = x + torch.stack([_block(layer, args, token) for token in _norm(x, layer, "norm2")])
    return _norm(x, of, "out_norm") @ of["output.weight"].T + of["output.bias"], states


def _norm(x: Tensor, of: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * of[f"{name}.weight"] + of[f"{name}.bias"]


def _position_code(difference: int) -> Tensor:
    angles = [difference / 10000 ** (2 * i / D) for i in range(D // 2)]
    return torch.tensor([f(angle) for angle in angles for f in (math.sin, math.cos)], dtype=torch.float64)


def _attention(of: dict[str, Tensor], x: Tensor, context: Tensor) -> Tensor:
    of = {name.removeprefix("self_attn."): w for name, w in of.items()}
    kv = (context @ of["data_to_kv.weight"].T).view(len(context), H, 2, C)
    q = (x @ of["data_to_q.weight"].T).view(len(x), H, C)
    rows, offset = [], len(context) - len(x)
    for i in range(len(x)):
        mixed = []
        for h in range(H):
            seen = range(offset + i + 1)
            codes = [(of["pos_to_pq.weight"] @ _position_code(j - i - offset)).view(H, C)[h] for j in seen]
            content, place = q[i, h] + of["global_content_bias"][h], q[i, h] + of["global_pos_bias"][h]
            scores = torch.stack([content @ kv[j, h, 0] + place @ code for j, code in zip(seen, codes, strict=True)])
            mixed.append((scores * of["scale"]).softmax(0) @ kv[: offset + i + 1, h, 1])
        rows.append(torch.cat(mixed) @ of["multi_head_merge.weight"].T)
    return torch.stack(rows)


def _block(of: dict[str, Tensor], args: dict[str, Any], x: Tensor) -> Tensor:
    if "linear1.weight" in of:
        u = (of["linear1.weight"] @ x + of["linear1.bias"]).clamp_min(0)
        if args["transformer.variant"] == "preln_topk":
            kept = u.argsort(descending=True)[: args["transformer.topk_value"]]
            u = torch.zeros_like(u).scatter(0, kept, u[kept])
        return of["linear2.weight"] @ u + of["linear2.bias"]
    if "pkm.expert_sel" in of:
        return _mixture(of, args, x)
    sums = [(of["pkm.keys.0"][h] @ x[: D // 2])[:, None] + (of["pkm.keys.1"][h] @ x[D // 2 :])[None] for h in range(HEADS)]
    k, table = args["pkm.knn"], of["pkm.values.weight"]
    if k == 0 or (k >= N_A and k >= N_B):
        total = sum(sums[1:], sums[0]).flatten()
        return (total.softmax(0) if args["transformer.activation"] == "softmax" else total.clamp_min(0)) @ table
    y = torch.zeros(D, dtype=torch.float64)
    for scores in (s.flatten() for s in sums):
        for value in scores.argsort(descending=True)[:k]:
            y = y + scores[value].clamp_min(0) * table[value]
    return y


def _mixture(of: dict[str, Tensor], args: dict[str, Any], x: Tensor) -> Tensor:
    raw = of["pkm.expert_sel"] @ x
    softmax = args["moe.selection_mode"] == "gate"
    scores = raw.softmax(0) if softmax else raw.sigmoid()
    chosen = raw.argsort(descending=True)[: args["pkm.n_heads"]]
    gates = raw[chosen].softmax(0) if softmax and args["moe.activation_after_topk"] else scores[chosen]
    y = torch.zeros(D, dtype=torch.float64)
    for gate, e in zip(gates, chosen, strict=True):
        y = y + gate * (x @ of["pkm.keys"][e]).clamp_min(0) @ of["pkm.values"][e]
    return y
