"""Initialisation schemes of the paper's blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scaled_std(fan: int, n_layers: int) -> float:
    """`sqrt(2 / (fan n_layers))`, the dense pre-layernorm block's standard deviation."""
    return math.sqrt(2.0 / (fan * n_layers))


@torch.no_grad()
def normal_(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Normal with the given standard deviation."""
    weight.normal_(0.0, std, generator=generator)


@torch.no_grad()
def truncated_normal_(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Normal truncated at two standard deviations, the sample then rescaled to exactly `std` (about zero)."""
    torch.nn.init.trunc_normal_(weight, generator=generator)
    weight.mul_(std / weight.square().mean().sqrt().clamp_min(1e-12))


@torch.no_grad()
def equal_norm_rows_(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Normal, every row rescaled to the same norm, then the matrix rescaled so that its standard deviation is `std`.

    A row's norm would otherwise favour or starve its expert whatever the angle between row and input.
    """
    weight.normal_(generator=generator)
    weight.div_(weight.norm(dim=-1, keepdim=True).clamp_min(1e-12))
    weight.mul_(std / weight.std(correction=0).clamp_min(1e-12) if weight.numel() > 1 else std)
