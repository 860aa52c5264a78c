"""Hidden units inside a kernel: what `ops.activations.hidden_units` computes of both products, and its gradients, in float32.

Of what a kernel kept of an activation it may be given either: of relu and relu2 the product or ReLU's output.
Names: b_ block of values. Shapes: see ops/README.md.
"""

# Kernels call each other when compiled, never as Python functions, which is what their types say.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activation(b_h, ACTIVATION: tl.constexpr):
    """The activation of one product. Comparisons are such that a NaN stays one.

    Numbers: sqrt(1/2), 2 sqrt(2/pi) and the cubic term of the approximation by tanh, which is a sigmoid here.
    """
    if ACTIVATION == "relu":
        b_a = tl.where(b_h <= 0, 0.0, b_h)
    elif ACTIVATION == "relu2":
        b_a = tl.where(b_h <= 0, 0.0, b_h * b_h)
    elif ACTIVATION == "gelu":
        b_a = 0.5 * b_h * (1 + tl.erf(b_h * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        b_a = b_h * tl.sigmoid(1.5957691216057308 * (b_h + 0.044715 * b_h * b_h * b_h))
    elif ACTIVATION == "silu":
        b_a = b_h * tl.sigmoid(b_h)
    else:
        tl.static_assert(ACTIVATION == "identity", "an activation that has no kernel")
        b_a = b_h
    return b_a


@triton.jit
def activation_slope(b_h, ACTIVATION: tl.constexpr):
    """Its derivative; 0.3989... is 1 / sqrt(2 pi)."""
    if ACTIVATION == "relu":
        b_slope = tl.where(b_h <= 0, 0.0, 1.0)
    elif ACTIVATION == "relu2":
        b_slope = tl.where(b_h <= 0, 0.0, 2 * b_h)
    elif ACTIVATION == "gelu":
        b_slope = 0.5 * (1 + tl.erf(b_h * 0.7071067811865476)) + b_h * 0.3989422804014327 * tl.exp(-0.5 * b_h * b_h)
    elif ACTIVATION == "gelu_tanh":
        b_z = 1.5957691216057308 * (b_h + 0.044715 * b_h * b_h * b_h)
        b_s = tl.sigmoid(b_z)
        # Of a large argument 1 - sigmoid is rounding errors, which are multiplied by 20 here: 2e-6 of a slope near 1, not 2e-7.
        b_slope = b_s + b_h * b_s * tl.sigmoid(-b_z) * 1.5957691216057308 * (1 + 0.134145 * b_h * b_h)
    elif ACTIVATION == "silu":
        b_s = tl.sigmoid(b_h)
        b_slope = b_s * (1 + b_h * (1 - b_s))
    else:
        tl.static_assert(ACTIVATION == "identity", "an activation that has no kernel")
        b_slope = b_h * 0 + 1
    return b_slope


@triton.jit
def clamped(b_h, b_u, LIMIT: tl.constexpr):
    """Both products of the clamped SwiGLU: the first from above, the second from both sides."""
    b_u = tl.where(b_u > LIMIT, LIMIT, tl.where(b_u < -LIMIT, -LIMIT, b_u))
    return tl.where(b_h > LIMIT, LIMIT, b_h), b_u


@triton.jit
def units(b_h, b_u, GATED: tl.constexpr, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """Units from the keys' product and, gated, the gate keys'."""
    if ACTIVATION == "clamped_swiglu":
        b_g, b_v = clamped(b_h, b_u, LIMIT)
        b_a = (b_v + 1) * b_g * tl.sigmoid(ALPHA * b_g)
    else:
        b_a = activation(b_h, ACTIVATION)
        if GATED:
            b_a = b_a * b_u
    return b_a


@triton.jit
def units_backward(
    b_grad, b_h, b_u, GATED: tl.constexpr, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr
):  # fmt: skip
    """Gradients of both products; not gated, the second is none and means nothing."""
    if ACTIVATION == "clamped_swiglu":
        b_g, b_v = clamped(b_h, b_u, LIMIT)
        b_s = tl.sigmoid(ALPHA * b_g)
        b_slope = tl.where(b_h > LIMIT, 0.0, b_s + ALPHA * b_g * b_s * (1 - b_s))
        b_grad_h = b_grad * (b_v + 1) * b_slope
        b_grad_u = tl.where(tl.abs(b_u) > LIMIT, 0.0, b_grad * b_g * b_s)
    elif GATED:
        b_grad_h = b_grad * b_u * activation_slope(b_h, ACTIVATION)
        b_grad_u = b_grad * activation(b_h, ACTIVATION)
    else:
        b_grad_h = b_grad * activation_slope(b_h, ACTIVATION)
        b_grad_u = b_grad
    return b_grad_h, b_grad_u
