"""A mixture's whole evaluation in one operation: scores, top-K, gates, experts (equations 11 and 12). No gradients.

For a few tokens the calls between these steps would cost more than the work. Shapes: see ops/README.md.
"""
# Annotations stay real objects here: torch.library reads them to infer the schema.

import torch
from torch import Tensor

from sparseffn.errors import UserError, unknown_name
from sparseffn.ops._checks import require_one_device
from sparseffn.ops.activations import ACTIVATIONS
from sparseffn.ops.backends import is_traced, kernel, needs_gradient
from sparseffn.ops.route import GATES, GateName


@torch.library.custom_op("sparseffn::routed_mlp", mutates_args=())
def _routed_mlp(
    x: Tensor, selector: Tensor, keys: Tensor, values: Tensor, k: int, gate: str, activation: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return kernel("routed_mlp", x, backend)(x, selector, keys, values, k, gate, activation)


@_routed_mlp.register_fake
def _(x, selector, keys, values, k, gate, activation, backend):
    n_tokens, wide = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(n_tokens, k, dtype=torch.int64),
        x.new_empty(n_tokens, k, dtype=wide),
    )


def routed_mlp(
    x: Tensor,
    selector: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    k: int,
    gate: GateName,
    activation: str = "relu",
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`y = sum over the K largest of s = selector x:  gate(s) act(x keys[e]) values[e]`.

    Args:
        x: `[T, D]`, not under autocast.
        selector: `[E, D]`; its product is computed in float32 or wider.
        keys: `[E, D, G]`.
        values: `[E, G, D]`.
        k: experts of a token, 1 to E; ties go to the lowest index.
        gate: sigmoid of each logit, softmax over all of them, or softmax over the K chosen.
        activation: relu, gelu (exact), silu or identity.
        backend: see `ops.backends`.

    Returns:
        y `[T, D]` in the dtype of `x`; indices int64 `[T, K]`, largest logit first; gates `[T, K]`, float32 or wider.

    Raises:
        UserError: ranks, widths, dtypes or devices do not fit together, `k` is out of range, a name is unknown, or autograd
            would record the call.
        NonFiniteError: a gate is NaN or infinite.
    """
    check_routed(x, selector, keys, values, k, gate, activation)
    if needs_gradient(x, selector, keys, values):
        raise UserError(
            "`routed_mlp` has no gradients and must run where none is recorded; got a tensor that requires one; "
            "fix: torch.no_grad(), or router_logits, topk and expert_mlp"
        )
    if is_traced(x, selector, keys, values):
        return torch.ops.sparseffn.routed_mlp(x, selector, keys, values, k, gate, activation, backend)
    return kernel("routed_mlp", x, backend)(x, selector, keys, values, k, gate, activation)


def check_routed(x: Tensor, selector: Tensor, keys: Tensor, values: Tensor, k: int, gate: str, activation: str) -> None:
    """That they fit together; raises as `routed_mlp` documents."""
    n_experts, width = selector.shape if selector.dim() == 2 else (0, 0)
    if x.dim() != 2 or keys.dim() != 3 or keys.shape[:2] != (n_experts, width) or x.shape[1] != width:
        raise UserError(
            "`x`, `selector` and `keys` must be [T, D], [E, D] and [E, D, G]; "
            f"got {tuple(x.shape)}, {tuple(selector.shape)} and {tuple(keys.shape)}; fix: flatten leading dimensions first"
        )
    if values.shape != (n_experts, keys.shape[2], width):
        raise UserError(f"`values` must be {(n_experts, keys.shape[2], width)}; got {tuple(values.shape)}; fix: [E, G, D]")
    if not x.dtype == selector.dtype == keys.dtype == values.dtype or not x.is_floating_point():
        dtypes = f"{x.dtype}, {selector.dtype}, {keys.dtype}, {values.dtype}"
        raise UserError(f"`x`, `selector`, `keys` and `values` must share a floating dtype; got {dtypes}; fix: cast them")
    require_one_device(x, selector, keys, values)
    if not 1 <= k <= n_experts:
        raise UserError(f"`k` must be between 1 and the number of experts {n_experts}; got {k}; fix: lower k")
    if gate not in GATES:
        raise unknown_name("gate", gate, GATES)
    if activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS)


def gates_of(gate: GateName, logits_TE: Tensor, indices_TK: Tensor) -> Tensor:
    """Weights of the chosen experts."""
    chosen_TK = logits_TE.gather(1, indices_TK)
    match gate:
        case "sigmoid":
            return chosen_TK.sigmoid()
        case "softmax":
            return (chosen_TK - logits_TE.logsumexp(dim=1, keepdim=True)).exp()
        case _:
            return chosen_TK.softmax(dim=1)
