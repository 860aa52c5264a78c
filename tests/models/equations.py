"""The language model as its equations say, one batch row, head, query and key at a time: the truth for tests in float64.

    x <- x + Attention(LN(x), LN(memory));  x <- x + FFN(LN(x));  logits = W_out LN(x) + b_out
    score[i, j] = scale ((q_i + u) . k_j + (q_i + v) . r_{M + i - j}),  r_d = W_r sinusoid(d),  j <= M + i
    Attention_i = W_o (mixed_i of head 1 | ... | mixed_i of head H),  mixed_i = sum_j softmax_j(score[i]) v_j

(Dai 2019, arXiv 1901.02860, with layer norms before the sub-blocks.) Nothing is dropped: this is the model in evaluation.

Suffixes: B batch, L queries, S = M + L keys, D model, H heads, C head size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparseffn.models.attention import RelativeAttention, sinusoids
from sparseffn.models.transformer_xl import Block, Memory, TransformerXL


def attention_reference(attention: RelativeAttention, x_BLD: Tensor, context_BSD: Tensor) -> Tensor:
    """Attend from `x` `[B, L, D]` to `context` `[B, S, D]`, whose last L positions are x itself."""
    return torch.stack([_attend(attention, x_LD, c_SD) for x_LD, c_SD in zip(x_BLD, context_BSD, strict=True)])


def model_reference(model: TransformerXL, tokens: Tensor, memory: Memory | None = None) -> Tensor:
    """Logits `[B, L, V]` of a window, int64 `[B, L]`, whose layers also see `memory`, `[B, M, D]` each."""
    rows = []
    for b, tokens_L in enumerate(tokens.tolist()):
        x_LD = torch.stack([model.embedding.weight[token] for token in tokens_L])
        for i, block in enumerate(model.layers):
            assert isinstance(block, Block), "layers of a TransformerXL are Blocks"
            past_MD = x_LD[:0] if memory is None else memory[i][b]
            x_LD = _apply_block(block, x_LD, past_MD)
        rows.append(torch.stack([model.output.weight @ y_D + model.output.bias for y_D in _norm(model.norm, x_LD)]))
    return torch.stack(rows)


def _apply_block(block: Block, x_LD: Tensor, past_MD: Tensor) -> Tensor:
    assert isinstance(block.attention, RelativeAttention), "the equations have relative positions"
    normed_LD, past_MD = _norm(block.attention_norm, x_LD), _norm(block.attention_norm, past_MD)
    x_LD = x_LD + _attend(block.attention, normed_LD, torch.cat((past_MD, normed_LD)))
    return x_LD + block.ffn.reference(_norm(block.ffn_norm, x_LD))


def _attend(attention: RelativeAttention, x_LD: Tensor, context_SD: Tensor) -> Tensor:
    """One sequence; query i is position M + i of the context."""
    n_memory = len(context_SD) - len(x_LD)
    rows = []
    for i, x_D in enumerate(x_LD):
        seen = context_SD[: n_memory + i + 1]
        mixed = torch.cat([_mix(attention, head, x_D, seen) for head in range(attention.n_heads)])
        rows.append(attention.output.weight @ mixed)
    return torch.stack(rows)


def _mix(attention: RelativeAttention, head: int, x_D: Tensor, seen_SD: Tensor) -> Tensor:
    """One head of one query, which is the last position of what it sees."""
    own = slice(head * attention.d_head, (head + 1) * attention.d_head)
    w_q, w_k, w_v = attention.query.weight[own], attention.key.weight[own], attention.value.weight[own]
    w_r, u, v = attention.position.weight[own], attention.content_bias[head], attention.position_bias[head]
    q = w_q @ x_D
    scores = []
    for j, x_j in enumerate(seen_SD):
        distance = torch.tensor([len(seen_SD) - 1 - j], device=x_D.device)
        r = w_r @ sinusoids(distance, attention.d_model)[0].to(x_D.dtype)
        scores.append(attention.scale * ((q + u) @ (w_k @ x_j) + (q + v) @ r))
    exponentials = torch.stack(scores).exp()
    weights = exponentials / exponentials.sum()
    return torch.stack([weight * (w_v @ x_j) for weight, x_j in zip(weights, seen_SD, strict=True)]).sum(dim=0)


def _norm(norm: nn.LayerNorm, x_nD: Tensor) -> Tensor:
    """`w (x - mean) / sqrt(variance + eps) + b`, each position by itself."""
    centred = x_nD - x_nD.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return norm.weight * centred / (variance + norm.eps).sqrt() + norm.bias
