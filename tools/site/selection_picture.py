"""A picture of what a method selects: tokens in rows, key-value pairs in columns, dark where a pair's coefficient is large."""

from __future__ import annotations

from html import escape

import torch
from torch import Tensor

from sparseffn.ffn import BlockShape, FFNConfig

# Small enough to count the squares, and every method has a size of 64 pairs at it.
SHAPE = BlockShape(d_model=32, d_ff=64, n_experts=16, expert_size=4, k=4, n_heads=2)
N_TOKENS = 12

_CELL = 10
_MARGIN = 4
# Coefficients over the largest of the picture, below which a square has the class of that number.
_SHADES = (0.25, 0.5, 0.75)


def selection_svg(config: FFNConfig) -> str:
    """The picture of a freshly drawn layer, in training mode and without dropout, for random tokens; the same every time."""
    coefficients_TF = _coefficients(config.replace(**_without_dropout(config)))
    n_tokens, n_pairs = coefficients_TF.shape
    width, height = n_pairs * _CELL + 2 * _MARGIN, n_tokens * _CELL + 2 * _MARGIN
    shown = int((coefficients_TF != 0).sum())
    title = f"{config.name}: {shown} of {n_tokens * n_pairs} pairs have a coefficient that is not zero"
    drawn = [
        f'<rect class="ground" width="{width}" height="{height}"/>',
        *(f'<path class="shade-{i}" d="{_squares(chosen)}"/>' for i, chosen in enumerate(_by_shade(coefficients_TF))),
        *_expert_borders(config, height),
    ]
    return (
        f'<svg class="selection" viewBox="0 0 {width} {height}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{escape(title)}</title>{''.join(drawn)}</svg>"
    )


def _without_dropout(config: FFNConfig) -> dict[str, float]:
    return {name: 0.0 for name in ("dropout", "expert_dropout") if hasattr(config, name)}


@torch.no_grad()
def _coefficients(config: FFNConfig) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = config.build().train()
        return layer.coefficients(torch.randn(N_TOKENS, config.d_model)).abs()


def _by_shade(coefficients_TF: Tensor) -> list[Tensor]:
    """Which squares have which shade, from light to dark."""
    bounds = torch.tensor(_SHADES) * coefficients_TF.max().clamp_min(1e-30)
    shades_TF = torch.bucketize(coefficients_TF, bounds)
    return [(shades_TF == i) & (coefficients_TF != 0) for i in range(len(_SHADES) + 1)]


def _squares(chosen_TF: Tensor) -> str:
    side = _CELL - 1
    places = chosen_TF.nonzero().tolist()
    return "".join(f"M{_MARGIN + f * _CELL} {_MARGIN + t * _CELL}h{side}v{side}h-{side}z" for t, f in places)


def _expert_borders(config: FFNConfig, height: int) -> list[str]:
    """A line between neighbouring experts, where the method has experts."""
    size = getattr(config, "expert_size", config.n_channels)
    places = [_MARGIN + f * _CELL - 0.5 for f in range(size, config.n_channels, size)]
    return [f'<path class="border" d="{"".join(f"M{x} 0v{height}" for x in places)}"/>'] if places else []
