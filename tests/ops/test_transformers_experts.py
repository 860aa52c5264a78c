"""`ops.experts` over the weights of transformers' own experts classes, where they lie: same output, same gradients.

OLMoE         gated, [E, out, in], keys and gate keys halves of one tensor (59 of its 64 families)
gpt_oss       gated, [E, in, out], interleaved, biases of both products, clamped SwiGLU
nemotron_h    not gated, [E, out, in], ReLU squared
aria          gated, [E, in, out]
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparseffn import ops

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers: pip install 'sparseffn[hf]'"
)

D, G, E, K = 20, 12, 6, 3
Ours = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def olmoe() -> nn.Module:
    from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    return OlmoeExperts(OlmoeConfig(hidden_size=D, intermediate_size=G, num_experts=E, num_experts_per_tok=K))


def gpt_oss() -> nn.Module:
    from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    return GptOssExperts(GptOssConfig(hidden_size=D, intermediate_size=G, num_local_experts=E, num_experts_per_tok=K))


def nemotron_h() -> nn.Module:
    from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    return NemotronHExperts(NemotronHConfig(hidden_size=D, moe_intermediate_size=G, n_routed_experts=E))


def aria() -> nn.Module:
    from transformers.models.aria.configuration_aria import AriaTextConfig
    from transformers.models.aria.modeling_aria import AriaExperts

    return AriaExperts(AriaTextConfig(hidden_size=D, intermediate_size=G, moe_num_experts=E, moe_topk=K, num_attention_heads=2))


def by_halves(m: nn.Module, x: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
    keys, gate_keys = m.gate_up_proj.transpose(1, 2).chunk(2, dim=2)
    return ops.experts(x, keys, m.down_proj.transpose(1, 2), gates, indices, gate_keys=gate_keys, activation="silu")


def interleaved(m: nn.Module, x: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
    weight, bias = m.gate_up_proj, m.gate_up_proj_bias
    return ops.experts(
        x, weight[..., ::2], m.down_proj, gates, indices, gate_keys=weight[..., 1::2], key_bias=bias[..., ::2],
        gate_bias=bias[..., 1::2], value_bias=m.down_proj_bias, activation="clamped_swiglu", alpha=m.alpha, limit=m.limit,
    )  # fmt: skip


def squared(m: nn.Module, x: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
    return ops.experts(x, m.up_proj.transpose(1, 2), m.down_proj.transpose(1, 2), gates, indices, activation="relu2")


def transposed(m: nn.Module, x: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
    keys, gate_keys = m.gate_up_proj.chunk(2, dim=2)
    return ops.experts(x, keys, m.down_proj, gates, indices, gate_keys=gate_keys, activation="silu")


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Ours]] = {
    "olmoe": (olmoe, by_halves),
    "gpt_oss": (gpt_oss, interleaved),
    "nemotron_h": (nemotron_h, squared),
    "aria": (aria, transposed),
}


def drawn(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """The module with weights and biases of unit scale; scores then reach gpt_oss's limit of 7."""
    module = make().to(dtype)
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0 if "bias" in name else 2 * parameter.shape[1] ** -0.5)
    return module


def routed(n_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, experts and gates; one expert is nobody's."""
    scores = torch.randn(n_tokens, E)
    scores[:, 4] = -torch.inf
    gates, indices = scores.softmax(dim=1).topk(K)
    return 3 * torch.randn(n_tokens, D, dtype=dtype), indices, gates.to(torch.promote_types(dtype, torch.float32))


def call(function: Ours, module: nn.Module, x: Tensor, indices: Tensor, gates: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and all gradients."""
    module.zero_grad(set_to_none=True)
    leaves = {"x": x.clone().requires_grad_(), "gates": gates.clone().requires_grad_()}
    y = function(module, leaves["x"], indices, leaves["gates"])
    y.backward(grad)
    grads = {name: leaf.grad for name, leaf in (*leaves.items(), *module.named_parameters())}
    assert all(grad is not None for grad in grads.values())
    return {"y": y.detach(), **{name: grad.clone() for name, grad in grads.items()}}


@pytest.mark.parametrize("n_tokens", [1, 5, 40], ids=lambda n: f"{n}-tokens")
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-11), (torch.float32, 2e-4)], ids=["float64", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_familys_own_class(family: str, dtype: torch.dtype, near: float, n_tokens: int) -> None:
    """Forward, and the gradients of tokens, gates, weights and biases, without a copy of the weights."""
    torch.manual_seed(n_tokens)
    make, ours = FAMILIES[family]
    module = drawn(make, dtype)
    x, indices, gates = routed(n_tokens, dtype)
    grad = torch.randn_like(x)
    wanted = call(lambda m, *args: m(*args), module, x, indices, gates, grad)
    found = call(ours, module, x, indices, gates, grad)
    assert set(found) == set(wanted) and len(found) >= 5
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=near, rtol=near, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_nearer_to_float64_than_the_family_itself(family: str) -> None:
    """At most twice its error, as everywhere; tokens are small, as scores beside gpt_oss's limit take either slope."""
    torch.manual_seed(0)
    make, ours = FAMILIES[family]
    module = drawn(make, torch.bfloat16)
    x, indices, gates = routed(40, torch.bfloat16)
    x = x / 8
    grad = torch.randn_like(x)
    theirs = call(lambda m, x, i, g: m(x, i, g.to(x.dtype)), module, x, indices, gates, grad)
    found = call(ours, module, x, indices, gates, grad)
    truth = call(lambda m, *args: m(*args), module.double(), x.double(), indices, gates.double(), grad.double())
    for name, wanted in truth.items():
        error, allowed = (float((one[name].double() - wanted).abs().max()) for one in (found, theirs))
        assert error <= 2 * allowed + 1e-6, f"{name}: {error:.3g}, {family} itself {allowed:.3g}"


def test_gpt_oss_reaches_its_limits() -> None:
    """The cases above clamp some scores on each side, and leave others."""
    torch.manual_seed(40)
    module, (x, *_) = drawn(gpt_oss, torch.float64), routed(40, torch.float64)
    scores = torch.einsum("td,edg->teg", x, module.gate_up_proj) + module.gate_up_proj_bias
    keys, gate_keys = scores[..., ::2], scores[..., 1::2]
    assert (keys > module.limit).any() and (keys < module.limit).any()
    assert (gate_keys > module.limit).any() and (gate_keys < -module.limit).any()
