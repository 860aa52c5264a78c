"""One real compilation, with the default compiler."""

from __future__ import annotations

import pytest
import torch

from sparseffn.ffn.sigma_moe import SigmaMoEConfig


@pytest.mark.slow
# The compiler itself uses what PyTorch has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_real_compilation_agrees_with_eager() -> None:
    """torch.compile with its own code generation, forward and backward, two token counts."""
    layer = SigmaMoEConfig(d_model=16, n_experts=4, expert_size=8, k=2).build()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for n_tokens in (6, 9):
        x = torch.randn(n_tokens, 16)
        torch.testing.assert_close(compiled(x), layer(x))
        loss = compiled(x).square().sum()
        loss.backward()
