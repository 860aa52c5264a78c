"""The inner part of relative attention: scores, softmax over the past, weighted values, as one function with its gradient.

    score[i, j] = content_i . k_j + position_i . r_{M + i - j} for j <= M + i,   mixed_i = sum_j softmax_j(score[i]) v_j

Relative positions (Dai 2019, arXiv 1901.02860) cost a second matrix of scores and a shift of its rows. Both are done block by
block of queries, so that a block's scores stay in the cache; the backward pass computes them again from the sum of
exponentials of each row, as flash attention does (Dao 2022, arXiv 2205.14135), so that no `[L, S]` matrix is kept.

Suffixes: B batch, L queries, S = M + L keys, N = S + 1 distances, H heads, C head size; Z is H times the block's sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparseffn.ops.autocast import has_autocast

# Scores of a block. CPU: 10 heads x 128 queries x 512 keys, the fastest of 64, 128 and 256 queries on two cores (14 ms against
# 14 and 18 forward, 32 against 32 and 39 backward). Elsewhere a bound on memory alone: half a gigabyte in float32.
_CPU_BLOCK, _DEVICE_BLOCK = 10 * 128 * 512, 2**27
# Below this a block's products are too thin to be fast, whatever the cache holds.
_MIN_ROWS = 64


def relative_shift(p: Tensor, n_keys: int) -> Tensor:
    """Scores by column of descending distance to scores by key, without moving data.

    Args:
        p: `[..., L, S + 1]`; column c belongs to distance S - 1 - c, the last column to none.
        n_keys: S.

    Returns:
        A view `[..., L, S]` whose entry (i, j) has distance S - L + i - j where that is not negative; the rest, the
        future, holds values of other rows and must be masked.
    """
    n_queries = p.shape[-2]
    start = n_queries - 1
    return p.flatten(-2)[..., start : start + n_queries * n_keys].unflatten(-1, (n_queries, n_keys))


def future_mask(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """bool `[L, S]`, True where a key lies in the query's future."""
    return torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).triu(n_keys - n_queries + 1)


def relative_mix(
    content_BLHC: Tensor,
    position_BLHC: Tensor,
    k_BSHC: Tensor,
    r_NHC: Tensor,
    v_BSHC: Tensor,
    *,
    padding_BS: Tensor | None = None,
    block_elements: int | None = None,
) -> Tensor:
    """Values mixed by the softmax of content and position scores over each query's past.

    Args:
        content_BLHC: scaled queries of the content term.
        position_BLHC: scaled queries of the position term.
        k_BSHC: keys of memory and window.
        r_NHC: position keys of the S + 1 distances S - 1, ..., 0, -1.
        v_BSHC: values of memory and window.
        padding_BS: bool, True for positions that nobody but themselves may see; None: there are none.
        block_elements: scores to hold at a time; None takes what suits the device.

    Returns:
        `[B, L, H, C]` in the inputs' common dtype; softmax in float32 at least.
    """
    sequences, rows = _block_shape(content_BLHC.shape, k_BSHC.shape[1], k_BSHC.device.type, block_elements)
    mixed = _RelativeMix.apply(content_BLHC, position_BLHC, k_BSHC, r_NHC, v_BSHC, padding_BS, sequences, rows)
    assert isinstance(mixed, Tensor), "autograd functions return the tensor of their forward"
    return mixed


def _block_shape(
    shape_BLHC: tuple[int, ...], n_keys: int, device_type: str, block_elements: int | None = None
) -> tuple[int, int]:
    """Sequences and queries of a block."""
    if block_elements is None:
        block_elements, min_rows = _CPU_BLOCK if device_type == "cpu" else _DEVICE_BLOCK, _MIN_ROWS
    else:
        min_rows = 1
    _, n_queries, n_heads, _ = shape_BLHC
    rows = max(min_rows, block_elements // (n_keys * n_heads))
    return max(1, block_elements // (n_queries * n_keys * n_heads)), rows


def scores_held(batch: int, n_queries: int, n_heads: int, n_keys: int, device_type: str) -> int:
    """Scores of the largest block, `[Z, L, S]`: what `relative_mix` works on at a time, in a few tensors of this size."""
    sequences, rows = _block_shape((batch, n_queries, n_heads, 0), n_keys, device_type)
    return min(batch, sequences) * min(n_queries, rows) * n_heads * n_keys


@dataclass(frozen=True, slots=True)
class _Block:
    """Some sequences and some of their queries, and the keys and distances that these can see."""

    batch: slice
    queries: slice
    keys: slice
    distances: slice

    @property
    def n_queries(self) -> int:
        return self.queries.stop - self.queries.start

    @property
    def n_keys(self) -> int:
        return self.keys.stop

    @property
    def query_rows(self) -> tuple[slice, slice]:
        """Index of the block in `[B, L, ...]`."""
        return self.batch, self.queries

    @property
    def key_rows(self) -> tuple[slice, slice]:
        """Index of what it sees in `[B, S, ...]`."""
        return self.batch, self.keys


def _blocks(batch: int, n_queries: int, n_keys: int, sequences: int, rows: int) -> Iterator[_Block]:
    # Equal blocks, where the last would be a rest.
    rows = -(-n_queries // -(-n_queries // rows))
    for start in range(0, n_queries, rows):
        stop = min(start + rows, n_queries)
        # A block's last query sees everything but the queries after it: its distances are the smallest ones.
        seen = n_keys - n_queries + stop
        for first in range(0, batch, sequences):
            yield _Block(
                slice(first, min(first + sequences, batch)),
                slice(start, stop),
                slice(0, seen),
                slice(n_keys - seen, n_keys + 1),
            )


def _heads(x_BnHC: Tensor) -> Tensor:
    """`[B, n, H, C] -> [H B, n, C]`, a view for one sequence."""
    return x_BnHC.permute(2, 0, 1, 3).flatten(0, 1)


def _head_rows(x_BnHC: Tensor) -> Tensor:
    """`[B, n, H, C] -> [H, B n, C]`, a view for one sequence: all sequences share the position keys."""
    return x_BnHC.permute(2, 0, 1, 3).flatten(1, 2)


def _unheads(x_ZnC: Tensor, n_heads: int) -> Tensor:
    """`[H B, n, C] -> [B, n, H, C]`, or from `[H, B n, C]` after a view as that."""
    return x_ZnC.unflatten(0, (n_heads, -1)).permute(1, 2, 0, 3)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """The inputs' dtype decides, and backward may run with or without autocast."""
    return torch.autocast(device.type, enabled=False) if has_autocast(device.type) else nullcontext()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and sums."""
    return torch.promote_types(dtype, torch.float32)


def _scores(
    block: _Block, content: Tensor, position: Tensor, k: Tensor, r: Tensor, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Masked scores `[Z, L, S]`, and the position scores before the shift, `[Z, L, S + 1]`, as room to work in."""
    rows_HTC, r_HNC = _head_rows(position[block.query_rows]), r[block.distances].transpose(0, 1)
    p = torch.bmm(rows_HTC, r_HNC.transpose(1, 2)).view(-1, block.n_queries, block.n_keys + 1)
    scores = torch.bmm(_heads(content[block.query_rows]), _heads(k[block.key_rows]).transpose(1, 2))
    scores = scores.to(_wide(scores.dtype)).add_(relative_shift(p, block.n_keys))
    # What lies before the block is past to all its queries; only the block itself has a future.
    ahead = scores[..., block.n_keys - block.n_queries :]
    ahead.masked_fill_(future_mask(block.n_queries, block.n_queries, scores.device), -torch.inf)
    if padding is not None:
        # A row without any key would be NaN, and NaN as a value would reach rows that give it no weight.
        own = ahead.diagonal(dim1=-2, dim2=-1)
        kept = own.clone()
        scores.unflatten(0, (k.shape[2], -1)).masked_fill_(padding[block.key_rows][:, None], -torch.inf)
        own.copy_(kept)
    return scores, p


class _RelativeMix(torch.autograd.Function):
    """`relative_mix`; the two integers are the size of a block in sequences and in queries."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        content: Tensor,
        position: Tensor,
        k: Tensor,
        r: Tensor,
        v: Tensor,
        padding: Tensor | None,
        sequences: int,
        rows: int,
    ) -> Tensor:
        """Block by block; keeps the logarithm of each row's sum of exponentials."""
        (batch, n_queries, n_heads, _), n_keys = content.shape, k.shape[1]
        mixed = content.new_empty(content.shape)
        log_sums = content.new_empty(batch, n_queries, n_heads, 1, dtype=_wide(content.dtype))
        with _without_autocast(content.device):
            for block in _blocks(batch, n_queries, n_keys, sequences, rows):
                scores, _ = _scores(block, content, position, k, r, padding)
                peak = scores.amax(dim=-1, keepdim=True)
                weights = scores.sub_(peak).exp_()
                total = weights.sum(dim=-1, keepdim=True)
                sums = torch.bmm(weights.to(v.dtype), _heads(v[block.key_rows]))
                mixed[block.query_rows] = _unheads(sums / total, n_heads)
                log_sums[block.query_rows] = _unheads(total.log_().add_(peak), n_heads)
        ctx.save_for_backward(content, position, k, r, v, padding, mixed, log_sums)
        ctx.block_shape = (sequences, rows)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The scores again, then the gradients of all five inputs."""
        content, position, k, r, v, padding, mixed, log_sums = ctx.saved_tensors
        (grad,) = grads
        (batch, n_queries, n_heads, d_head), n_keys = content.shape, k.shape[1]
        wide = log_sums.dtype
        grad_content, grad_position = torch.empty_like(mixed), torch.empty_like(mixed)
        # Keys and distances are shared by blocks: sums, transposed because that product is the faster one.
        grad_k, grad_v = (k.new_zeros(batch, n_heads, d_head, n_keys, dtype=wide) for _ in "kv")
        grad_r = r.new_zeros(n_heads, d_head, n_keys + 1, dtype=wide)
        with _without_autocast(content.device):
            # Softmax's backward subtracts sum_j weights dweights, which is grad . mixed.
            inner = (grad.to(wide) * mixed).sum(dim=-1, keepdim=True)
            for block in _blocks(batch, n_queries, n_keys, *ctx.block_shape):
                scores, p = _scores(block, content, position, k, r, padding)
                grad_ZLC, k_ZSC = _heads(grad[block.query_rows]), _heads(k[block.key_rows])
                weights = scores.sub_(_heads(log_sums[block.query_rows])).exp_()
                _add_keys(grad_v, block, torch.bmm(grad_ZLC.transpose(1, 2), weights.to(v.dtype)))
                grad_weights = torch.bmm(grad_ZLC, _heads(v[block.key_rows]).transpose(1, 2)).to(wide)
                grad_scores = weights.mul_(grad_weights.sub_(_heads(inner[block.query_rows]))).to(k.dtype)
                grad_content[block.query_rows] = _unheads(torch.bmm(grad_scores, k_ZSC), n_heads)
                content_ZLC = _heads(content[block.query_rows])
                _add_keys(grad_k, block, torch.bmm(content_ZLC.transpose(1, 2), grad_scores))
                grad_p = _unshift_(p, grad_scores).view(n_heads, -1, block.n_keys + 1)
                rows_HTC, r_HNC = _head_rows(position[block.query_rows]), r[block.distances].transpose(0, 1)
                grad_rows = torch.bmm(grad_p, r_HNC).view(-1, block.n_queries, d_head)
                grad_position[block.query_rows] = _unheads(grad_rows, n_heads)
                grad_r[..., block.distances].add_(torch.bmm(rows_HTC.transpose(1, 2), grad_p))
        return (
            grad_content,
            grad_position,
            grad_k.permute(0, 3, 1, 2).to(k.dtype),
            grad_r.permute(2, 0, 1).to(r.dtype),
            grad_v.permute(0, 3, 1, 2).to(v.dtype),
            None,
            None,
            None,
        )


def _add_keys(total_BHCS: Tensor, block: _Block, part_ZCS: Tensor) -> None:
    """Add a block's `[H B, C, S]` to the gradient of what it saw."""
    part_HBCS = part_ZCS.unflatten(0, (total_BHCS.shape[1], -1))
    total_BHCS[block.batch, :, :, block.keys].add_(part_HBCS.transpose(0, 1))


def _unshift_(p: Tensor, grad_scores: Tensor) -> Tensor:
    """The shift's transpose, written into `p`: what lies outside the view belongs to no key.

    Future entries need no care, their gradient is 0 because their weight is.
    """
    n_queries, n_keys = grad_scores.shape[-2:]
    flat = p.flatten(1)
    flat[:, : n_queries - 1] = 0
    flat[:, n_queries - 1 + n_queries * n_keys :] = 0
    relative_shift(p, n_keys).copy_(grad_scores)
    return p
