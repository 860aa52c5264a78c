"""Every class of experts of the installed transformers: ours computes what its own loop computes, or says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")

from sparseffn.hf import experts, families
from sparseffn.hf.families import built

N_EXPERTS, WIDTH, SIZE = 5, 7, 6

FALLING_BACK = {
    "deepseek_v4": "gate",
    "glm5_next": "gate",
    "hy_v4": "gate",
    "inkling2": "gate",
    "muse_spark": "norm",
}


def shrunk(module: Any) -> Any:
    """The module with few small experts; its class reads the sizes from there."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> nn.Parameter:
        return nn.Parameter(2 * torch.randn(shape, generator=generator) / shape[-1] ** 0.5)

    def matrix(width: int, out: int) -> nn.Parameter:
        return drawn(N_EXPERTS, width, out) if module.is_transposed else drawn(N_EXPERTS, out, width)

    up, wide = ("gate_up_proj", 2 * SIZE) if module.has_gate else ("up_proj", SIZE)
    setattr(module, up, matrix(WIDTH, wide))
    module.down_proj = matrix(SIZE, WIDTH)
    if module.has_bias:
        setattr(module, f"{up}_bias", drawn(N_EXPERTS, wide))
        module.down_proj_bias = drawn(N_EXPERTS, WIDTH)
    module.num_experts, module.hidden_dim, module.intermediate_dim = N_EXPERTS, WIDTH, SIZE
    return module


def found(call: Any, module: nn.Module) -> list[Tensor]:
    """Output, and gradients of x, the gates and all parameters; x reaches beyond every limit."""
    x = (4 * torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1))).requires_grad_()
    scores = torch.rand(9, N_EXPERTS, generator=torch.Generator().manual_seed(2))
    gates, indices = scores.topk(2)
    gates.requires_grad_()
    y = call(module, x, indices, gates)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, gates, *module.parameters()))]


@pytest.fixture(scope="module")
def modules() -> dict[str, nn.Module]:
    return {type(module).__name__: module for _, module in built()}


def test_every_class_has_an_entry(modules: dict[str, nn.Module]) -> None:
    """transformers 5.23 has 65 classes in 64 families; five of them need something that we do not have."""
    table = families()
    assert {f.experts for f in table} == modules.keys() and len(table) >= 65
    refused = {f.family: f.reason for f in table if f.formula is None}
    assert refused.keys() == FALLING_BACK.keys()
    assert all(FALLING_BACK[family] in reason for family, reason in refused.items())


def test_ours_is_each_class_s_own_loop(modules: dict[str, nn.Module]) -> None:
    """Value and all gradients, of those that run on our kernels."""
    names = [f.experts for f in families() if f.formula is not None]
    for name in names:
        module = shrunk(modules[name])
        own = type(module).forward.__wrapped__
        pairs = zip(found(experts.experts_forward, module), found(own, module), strict=True)
        assert max(float((a - b).norm() / b.norm()) for a, b in pairs) < 1e-6, name
