"""What is read off a module of transformers: never a formula that it does not compute."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")

import torch.nn.functional as F
from transformers.activations import ACT2FN
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from hf.tiny import CONFIGS
from sparseffn import ops
from sparseffn.hf import experts, formulas
from sparseffn.hf.formulas import Formula, activation_name, formula_of, known_gate
from sparseffn.ops.activations import ACTIVATIONS


class Quantised(Tensor):
    """Says that it is float32."""


def olmoe() -> Any:
    return OlmoeExperts(CONFIGS["olmoe"]())


def gpt_oss() -> Any:
    return GptOssExperts(CONFIGS["gpt_oss"]())


def nemotron_h() -> Any:
    """Not gated."""
    return NemotronHExperts(CONFIGS["nemotron_h"]())


def aria() -> Any:
    """Transposed, without biases."""
    return AriaExperts(CONFIGS["aria"]())


def drawn(module: Any) -> Any:
    """With numbers in place of what `torch.empty` left."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


class Doubled(OlmoeExperts):
    """Its gate is inherited in name alone."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return 2 * super()._apply_gate(gate_up)


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_activations_are_what_they_are_called(name: str) -> None:
    """Every one of transformers: ours of that name computes it, or it has none."""
    act = ACT2FN[name]
    ours = activation_name(act)
    assert (ours is not None) == (name in {
        "gelu", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh",
        "linear", "relu", "relu2", "silu", "swish",
    })  # fmt: skip
    if ours is not None:
        x = torch.linspace(-6, 6, 101)
        torch.testing.assert_close(ACTIVATIONS[ours](x), act(x), rtol=1e-5, atol=1e-5)


def test_limits_and_the_slope_are_the_module_s_own() -> None:
    """gpt-oss's; they are read at every call."""
    module = gpt_oss()
    module.alpha, module.limit = 1.5, 3.0
    assert formula_of(module) == Formula(activation="clamped_swiglu", alpha=1.5, limit=3.0, interleaved=True)


def spoilt(change: Callable[[Any], None]) -> Any:
    module = olmoe()
    change(module)
    return module


def quantise(name: str) -> Callable[[Any], None]:
    return lambda m: setattr(m, name, nn.Parameter(Quantised(2, 4, 4)))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: Doubled(CONFIGS["olmoe"]()), "the gate Doubled._apply_gate is unknown"),
        (lambda: spoilt(lambda m: setattr(m, "_apply_gate", lambda both: both)), "gate"),
        (lambda: spoilt(lambda m: setattr(m, "act_fn", nn.Tanh())), "the activation Tanh is unknown"),
        (lambda: spoilt(lambda m: m.act_fn.register_forward_hook(lambda *_: None)), "is unknown"),
        (lambda: spoilt(lambda m: setattr(m, "has_post_expert_norm", True)), "a norm follows every expert"),
        (lambda: spoilt(lambda m: setattr(m, "_is_expert_parallel", True)), "spread over processes"),
        (lambda: spoilt(lambda m: m.to(torch.float8_e4m3fn)), "gate_up_proj is torch.float8_e4m3fn"),
        (lambda: spoilt(quantise("gate_up_proj")), "gate_up_proj is of type Quantised"),
        (lambda: spoilt(quantise("down_proj")), "down_proj is of type Quantised"),
        (lambda: spoilt(lambda m: setattr(m, "down_proj", nn.Parameter(m.down_proj.bfloat16()))), "down_proj torch.bfloat16"),
    ],
    ids=["gate-subclass", "instance", "activation", "hook", "norm", "parallel", "dtype", "type", "type-down", "dtypes"],
)
def test_what_is_not_known_is_refused_with_its_reason(module: Callable[[], Any], reason: str) -> None:
    """Of the very module that runs on our kernels without the change."""
    assert isinstance(formula_of(olmoe()), Formula)
    found = formula_of(module())
    assert isinstance(found, str) and reason in found


def test_a_gate_of_another_release_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of the right name in the right place that computes something else."""

    def _apply_gate(self: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up[..., ::2].clamp(max=self.limit), gate_up[..., 1::2]
        return up * gate * torch.sigmoid(gate * self.alpha)

    assert known_gate(GptOssExperts._apply_gate) is not None
    _apply_gate.__module__, _apply_gate.__qualname__ = GptOssExperts.__module__, "GptOssExperts._apply_gate"
    assert known_gate(_apply_gate) is None, "it is not the class's"
    monkeypatch.setattr(GptOssExperts, "_apply_gate", _apply_gate)
    known_gate.cache_clear()
    assert known_gate(_apply_gate) is None, "it is, and computes something else"


def test_without_kernels_transformers_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's composition is no gain over transformers' own, unless somebody asks for it."""
    formulas._no_kernels.cache_clear()
    monkeypatch.setattr(formulas, "explain_backend", lambda device, dtype: ("torch", "no C++ compiler"))
    assert formula_of(olmoe()) == "no kernels run here: no C++ compiler"
    formulas._no_kernels.cache_clear()
    monkeypatch.setenv("SPARSEFFN_BACKEND", "torch")
    assert isinstance(formula_of(olmoe()), Formula)
    formulas._no_kernels.cache_clear()


def test_experts_of_other_processes_add_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selections of them have the number of experts as their index; transformers computes the rest, and its own loop agrees."""
    module, calls = drawn(olmoe()), []
    module._is_expert_parallel = True
    x, gates = torch.randn(6, 32, requires_grad=True), torch.rand(6, 2)
    indices = torch.tensor([[0, 8], [8, 8], [3, 1], [8, 7], [7, 8], [2, 2]])
    gates = gates.masked_fill(indices == 8, 0.0).requires_grad_()
    grouped = experts.grouped_mm_experts_forward
    monkeypatch.setattr(experts, "grouped_mm_experts_forward", lambda *args: calls.append(1) or grouped(*args))
    monkeypatch.setattr(experts, "ops", None)
    found = []
    for call in (experts.experts_forward, grouped, type(module).forward.__wrapped__):
        y = call(module, x, indices, gates)
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, gates, *module.parameters()))])
    assert calls == [1] and all(map(torch.equal, found[0], found[1]))
    for ours, loop in zip(found[0], found[2], strict=True):
        torch.testing.assert_close(ours, loop)
    y, x_grad = found[0][:2]
    assert not y[1].any() and not x_grad[1].any() and y[[0, 2, 3, 4, 5]].any(1).all()


@pytest.mark.parametrize("make", [olmoe, gpt_oss, nemotron_h, aria], ids=lambda make: make.__name__)
def test_no_weight_is_copied(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The operation gets views of the parameters."""
    module = make()
    given: dict[str, Tensor] = {}

    def seen(x: Tensor, keys: Tensor, values: Tensor, gates: Tensor, indices: Tensor, **named: Any) -> Tensor:
        given.update(keys=keys, values=values, **{n: t for n, t in named.items() if isinstance(t, Tensor)})
        return ops.experts(x, keys, values, gates, indices, **named)

    monkeypatch.setattr(experts, "ops", SimpleNamespace(experts=seen, halves=ops.halves))
    experts.experts_forward(module, torch.randn(3, 32), torch.tensor([[0, 1]] * 3), torch.rand(3, 2))
    storages = {p.untyped_storage().data_ptr() for p in module.parameters()}
    assert {t.untyped_storage().data_ptr() for t in given.values()} == storages
    assert len(given) == 2 + module.has_gate + module.has_bias * (2 + module.has_gate)


def test_gates_of_the_router_s_dtype_and_no_tokens() -> None:
    """bfloat16 gates and int32 indices; hidden states wider than the weights come back as they went in."""
    module = olmoe().to(torch.bfloat16)
    indices, gates = torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
    y = experts.experts_forward(module, torch.randn(3, 32), indices.int(), gates.to(torch.bfloat16))
    assert y.dtype == torch.float32
    assert experts.experts_forward(module, torch.randn(0, 32), indices[:0], gates[:0]).shape == (0, 32)


def test_functions_are_known_too() -> None:
    """Not only modules."""
    assert activation_name(F.silu) == "silu" and activation_name(F.mish) is None
