"""How close a kernel must come to the truth, for every operation and gradient; the one place of such tolerances.

Truth is `reference.py` in float64 on the very inputs of the kernel, of unit scale. A kernel passes if

- its largest error is at most twice that of plain PyTorch in the same dtype, plus two roundings of the largest true entry (a
  gradient is rounded at least twice on its way, and where few entries are compared plain PyTorch may be lucky), and
- the root mean square of its error, over that of the truth, is at most `RMS_BOUNDS`.

The second alone would miss a single wrong entry, the first alone an error shared with plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORSE_THAN_PLAIN = 2.0

# Relative RMS error in machine epsilons of the dtype that is computed in, for (half precision, float32).
# Half precision: one rounding of the result is 0.4 epsilons at most, a rounded factor or addend adds another. Float32: sums
# of n rounded products wander by sqrt(n) / 4 epsilons or so, and the widths of the tests stay under 300.
RMS_BOUNDS: dict[str, tuple[float, float]] = {
    "cvmm": (0.5, 4.0),
    "cvmm.x": (0.8, 4.0),
    "cvmm.weight": (0.5, 4.0),
    "experts": (1.0, 4.0),
    "experts.x": (1.0, 4.0),
    "experts.keys": (1.0, 4.0),
    "experts.values": (1.0, 4.0),
    "experts.gates": (1.0, 4.0),
    "experts.gate_keys": (1.0, 4.0),
    "experts.key_bias": (1.0, 4.0),
    "experts.gate_bias": (1.0, 4.0),
    "experts.value_bias": (1.0, 4.0),
    # Float32 in half precision too, as logits are.
    "route": (0.5, 4.0),
    "route.gates": (0.5, 4.0),
    "route.x": (1.0, 4.0),
    "route.selector": (1.0, 4.0),
    "choose": (0.5, 4.0),
    "choose.logits": (1.0, 4.0),
    "choose.spread": (1.0, 4.0),
    "sinkhorn": (0.5, 4.0),
    "router_logits": (0.5, 4.0),
    "weighted_rows": (0.8, 4.0),
    "weighted_rows.values": (0.8, 4.0),
    "weighted_rows.weights": (0.8, 4.0),
}


def check_against_truth(name: str, got: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Raise unless a result is as close to the truth as its operation must come.

    Args:
        name: a key of `RMS_BOUNDS`: the operation, or `operation.input` for a gradient.
        got: what the kernel computed.
        plain: what plain PyTorch computes from the same inputs in the same dtype.
        truth: the reference's result in float64 from the same inputs.
        dtype: what the kernel computes in, which need not be the dtype of the result.

    Raises:
        AssertionError: with the largest error, its place, the RMS and the limits.
    """
    assert got.shape == truth.shape and got.dtype == plain.dtype, (
        f"{name}: got {tuple(got.shape)} {got.dtype}, expected {tuple(truth.shape)} {plain.dtype}"
    )
    if truth.numel() == 0:
        return
    assert bool(got.isfinite().all()), f"{name}: {int((~got.isfinite()).sum())} of {got.numel()} entries are not finite"
    eps = torch.finfo(dtype).eps
    error = (got.double() - truth).abs()
    limit = WORSE_THAN_PLAIN * (plain.double() - truth).abs().max() + eps * truth.abs().max()
    place = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    assert bool(error.max() <= limit), f"{name}: error {error.max():.3g} at {place}, at most {limit:.3g} is allowed"
    # A truth that is zero everywhere leaves the first criterion, which then demands zeros of whoever plain gives them.
    rms = error.square().mean().sqrt() / truth.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    allowed = RMS_BOUNDS[name][dtype == torch.float32] * eps
    assert bool(rms <= allowed), f"{name}: relative RMS error {rms:.3g}, at most {allowed:.3g} is allowed"
