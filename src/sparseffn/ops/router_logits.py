"""Scores of a router: `x @ selector.T` in float32 or wider, also under autocast. Shapes: see ops/README.md."""
# Annotations stay real objects here: torch.library reads them to infer the schema.

import torch
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ops import _torch_kernels
from sparseffn.ops._checks import require_one_device
from sparseffn.ops._differentiable import differentiable
from sparseffn.ops.backends import direct_kernel, is_traced, kernel, needs_gradient, requested_backend

# Fewer go to PyTorch's product and its gradient: turning the selector would cost more. Measured with 16 and 256 experts of
# width 412 to 1024. `routed_training`, whose dot products are written for few tokens, ends there too.
FEW_TOKENS = 128


@torch.library.custom_op("sparseffn::router_logits", mutates_args=())
def _router_logits(x: Tensor, selector: Tensor, backend: str) -> Tensor:
    return kernel("router_logits", x, backend)(x, selector)


@_router_logits.register_fake
def _(x: Tensor, selector: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], selector.shape[0])


def _save(ctx, inputs, output) -> None:
    x, selector, _ = inputs
    ctx.save_for_backward(x, selector)


def _differentiate(ctx, grad):
    x, selector = ctx.saved_tensors
    needs_x, needs_selector, _ = ctx.needs_input_grad
    return grad @ selector if needs_x else None, grad.t() @ x if needs_selector else None, None


_router_logits.register_autograd(_differentiate, setup_context=_save)
_eager_router_logits = differentiable(
    lambda x, selector, backend: kernel("router_logits", x, backend)(x, selector), _save, _differentiate
)


def router_logits(x: Tensor, selector: Tensor, *, backend: str = "auto") -> Tensor:
    """`x @ selector.T` in float32 (float64 for float64 x): routing must not depend on a layer's dtype.

    Args:
        x: `[T, D]`, any floating dtype.
        selector: `[E, D]`.
        backend: see `ops.backends`.

    Returns:
        `[T, E]`, float32 or wider, outside autocast. NaN and infinity pass, as through `nn.Linear`: what chooses and weighs
        by the scores refuses them.

    Raises:
        UserError: ranks or widths do not fit together, a dtype is not floating, or the devices differ.
    """
    if x.dim() != 2 or selector.dim() != 2 or x.shape[1] != selector.shape[1]:
        raise UserError(f"`x` and `selector` must be [T, D] and [E, D]; got {tuple(x.shape)} and {tuple(selector.shape)}")
    if not x.is_floating_point() or not selector.is_floating_point():
        raise UserError(f"`x` and `selector` must be floating; got {x.dtype} and {selector.dtype}; fix: cast them")
    require_one_device(x, selector)
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, selector = x.to(dtype), selector.to(dtype)
    direct = direct_kernel("router_logits", backend)
    if direct is not None:
        return direct(x, selector)
    # Before a look at the number of tokens, which a compiled graph must not depend on.
    if is_traced(x, selector):
        return torch.ops.sparseffn.router_logits(x, selector, backend)
    if x.shape[0] < FEW_TOKENS and requested_backend(backend) == "auto":
        return _torch_kernels.router_logits(x, selector)
    if needs_gradient(x, selector):
        return _eager_router_logits(x, selector, backend)
    return kernel("router_logits", x, backend)(x, selector)
