"""What the paper's figures 2, 8, 9, 10 and 11 vary (arXiv 2310.10837): the blocks at each point of each figure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparseffn.ffn.dense import DenseConfig
from sparseffn.ffn.sigma_moe import SigmaMoEConfig

_K = 4


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One figure: time and memory of one layer over one size."""

    number: int
    variable: str
    values: tuple[int, ...]
    fixed: str
    """What is held fixed, for the caption."""
    mixture: Callable[[int], SigmaMoEConfig]
    """The mixture at a value; the dense block has as many channels."""

    def blocks(self, value: int) -> tuple[DenseConfig, SigmaMoEConfig]:
        """The dense block and the mixture at a point."""
        mixture = self.mixture(value)
        return DenseConfig(d_model=mixture.d_model, d_ff=mixture.n_channels), mixture


def _mixture(d_model: int, n_experts: int, expert_size: int) -> SigmaMoEConfig:
    return SigmaMoEConfig(d_model=d_model, n_experts=n_experts, expert_size=expert_size, k=_K)


SWEEPS = {
    sweep.number: sweep
    for sweep in (
        Sweep(
            number=2,
            variable="d_model",
            values=(256, 512, 1024, 2048, 4096),
            fixed="d_ff = 4 d_model, G = 128, N_E = d_ff / G, K = 4",
            mixture=lambda value: _mixture(value, 4 * value // 128, 128),
        ),
        Sweep(
            number=8,
            variable="d_model",
            values=(256, 512, 1024, 2048, 4096),
            fixed="d_ff = 4 d_model, N_E = 32, G = d_ff / N_E, K = 4",
            mixture=lambda value: _mixture(value, 32, 4 * value // 32),
        ),
        Sweep(
            number=9,
            variable="N_E",
            values=(8, 16, 32, 64, 128, 256),
            fixed="d_model = 512, G = 128, d_ff = G N_E, K = 4",
            mixture=lambda value: _mixture(512, value, 128),
        ),
        Sweep(
            number=10,
            variable="G",
            values=(64, 128, 256, 512, 1024),
            fixed="d_model = 512, N_E = 32, d_ff = G N_E, K = 4",
            mixture=lambda value: _mixture(512, 32, value),
        ),
        Sweep(
            number=11,
            variable="d_model",
            values=(128, 256, 512, 1024, 2048),
            fixed="N_E = 32, G = 128, d_ff = 4096, K = 4",
            mixture=lambda value: _mixture(value, 32, 128),
        ),
    )
}
