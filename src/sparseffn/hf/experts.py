"""`experts_implementation="sparseffn"`: the experts of transformers' models on our kernels, forward and backward.

    y[t] = sum over the selections (e, s) of token t:  s (a down_proj[e] + down_proj_bias[e])
    a = act(x gate_up_proj[e] + gate_up_proj_bias[e]), gated or not, see `ops.experts`

No weight is copied: transposed layouts, concatenated and interleaved halves are views. What ours cannot compute goes to
transformers' own `grouped_mm`, and one line for each class of experts says why.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from sparseffn import ops
from sparseffn.hf.formulas import Formula, formula_of

logger = logging.getLogger(__name__)

IMPLEMENTATION = "sparseffn"
"""What `experts_implementation=` calls it."""


def register() -> None:
    """Make the implementation known to transformers; importing `sparseffn.hf` does."""
    ExpertsInterface.register(IMPLEMENTATION, experts_forward)


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts as transformers calls them: `[T, D]`, `[T, K]`, `[T, K]` to `[T, D]` in the dtype of the hidden states."""
    formula = _formula(self)
    if formula is None:
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    m: Any = self
    keys, gate_keys, key_bias, gate_bias = _keys(m, formula)
    y = ops.experts(
        hidden_states.to(keys.dtype),
        keys,
        m.down_proj if m.is_transposed else m.down_proj.transpose(1, 2),
        top_k_weights.to(torch.promote_types(keys.dtype, torch.float32)),
        top_k_index.to(torch.int64),
        gate_keys=gate_keys,
        key_bias=key_bias,
        gate_bias=gate_bias,
        value_bias=m.down_proj_bias if m.has_bias else None,
        activation=formula.activation,
        alpha=formula.alpha,
        limit=formula.limit,
    )
    return y.to(hidden_states.dtype)


def _keys(m: Any, formula: Formula) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Keys and gate keys `[E, D, G]` and their biases, views of the module's parameters.

    The parameter is split before it is transposed: its gradient is then made in one piece.
    """
    if not m.has_gate:
        keys = m.up_proj if m.is_transposed else m.up_proj.transpose(1, 2)
        return keys, None, m.up_proj_bias if m.has_bias else None, None
    keys, gate_keys = ops.halves(m.gate_up_proj, dim=2 if m.is_transposed else 1, interleaved=formula.interleaved)
    if not m.is_transposed:
        keys, gate_keys = keys.transpose(1, 2), gate_keys.transpose(1, 2)
    if not m.has_bias:
        return keys, gate_keys, None, None
    key_bias, gate_bias = ops.halves(m.gate_up_proj_bias, dim=1, interleaved=formula.interleaved)
    return keys, gate_keys, key_bias, gate_bias


@torch.compiler.assume_constant_result
def _formula(module: nn.Module) -> Formula | None:
    """What the module computes, a constant of a trace; None, said once a class, for what ours cannot compute."""
    formula = formula_of(module)
    if isinstance(formula, Formula):
        return formula
    _say_once(type(module), formula)
    return None


@functools.cache
def _say_once(experts_class: type[nn.Module], reason: str) -> None:
    name = f"{experts_class.__module__.removeprefix('transformers.models.')}.{experts_class.__qualname__}"
    logger.warning("%s is computed by transformers' grouped_mm: %s", name, reason)
