"""Small models in float64 whose every parameter, biases and norms included, matters."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseffn.ffn import FFNConfig, method_class
from sparseffn.models import PlainAttention, RelativeAttention, TransformerXL, TransformerXLConfig

VOCAB = 23
SIZES = {"vocab_size": VOCAB, "d_model": 8, "n_layers": 2, "n_heads": 2, "d_head": 3}
METHODS = ["dense", "sigma-moe"]


def small_ffn(method: str = "dense", d_model: int = 8, n_layers: int = 2) -> FFNConfig:
    """A block of a few units."""
    sizes = {"d_ff": 12} if method == "dense" else {"n_experts": 5, "expert_size": 4, "k": 2}
    return method_class(method)(d_model=d_model, n_layers=n_layers, **sizes)


def small_config(method: str = "dense", **changes: int | float) -> TransformerXLConfig:
    """Sizes that all differ, a head size that does not divide the width."""
    sizes = {**SIZES, **changes}
    return TransformerXLConfig(**sizes, ffn=small_ffn(method, int(sizes["d_model"]), int(sizes["n_layers"])))


def small_model(
    method: str = "dense",
    *,
    seed: int = 0,
    attention: type[RelativeAttention | PlainAttention] = RelativeAttention,
    **changes: int | float,
) -> TransformerXL:
    """In float64 and evaluation mode, noise on all parameters."""
    model = TransformerXL(small_config(method, **changes), attention).double().eval()
    model.init_parameters(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.5)
    return model


def text(length: int, batch: int = 2, seed: int = 1) -> Tensor:
    """Tokens `[batch, length]`."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal to float64 rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
