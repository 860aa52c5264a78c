"""What a transformers' experts module computes, in the words of `ops.experts`, or why ours cannot compute it.

The decorator `use_experts_implementation` leaves on a module `has_gate, has_bias, is_transposed, has_post_expert_norm`, its
activation is `act_fn`, and its gate `_apply_gate`, which a class may override. A gate is known by the very function that it is,
and is called once on numbers beyond its limits before it is believed: another release may have changed it.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations as hf

from sparseffn.ops import explain_backend, halves, requested_backend
from sparseffn.ops.activations import ACTIVATIONS, CLAMPED_SWIGLU, SWIGLU_ALPHA, SWIGLU_LIMIT, hidden_units
from sparseffn.ops.module_state import has_hooks


@dataclass(frozen=True, kw_only=True)
class Formula:
    """Hidden units as `ops.experts` names them, and where in `gate_up_proj` the halves are."""

    activation: str
    alpha: float = SWIGLU_ALPHA
    limit: float = SWIGLU_LIMIT
    interleaved: bool = False


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A way to gate: attributes that hold alpha and limit of a clamped SwiGLU, None for `act_fn(gate) up`."""

    alpha: str | None = None
    limit: str | None = None
    interleaved: bool = False

    def formula(self, module: Any, activation: str) -> Formula:
        if self.alpha is None or self.limit is None:
            return Formula(activation=activation, interleaved=self.interleaved)
        numbers = {"alpha": float(getattr(module, self.alpha)), "limit": float(getattr(module, self.limit))}
        return Formula(activation=CLAMPED_SWIGLU, interleaved=self.interleaved, **numbers)


# Of transformers 5.23, by module and name. Beam's evaluates the product in float32, as our kernels do anyway.
GATES = {
    ("transformers.integrations.moe", "_default_apply_gate"): Gate(),
    ("transformers.models.beam.modeling_beam", "BeamExperts._apply_gate"): Gate(),
    ("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts._apply_gate"): Gate(
        alpha="alpha", limit="limit", interleaved=True
    ),
    (
        "transformers.models.openai_privacy_filter.modeling_openai_privacy_filter",
        "OpenAIPrivacyFilterExperts._apply_gate",
    ): Gate(alpha="alpha", limit="limit"),
    ("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl", "MiniMaxM3VLExperts._apply_gate"): Gate(
        alpha="swiglu_alpha", limit="swiglu_limit"
    ),
}

# By class, or by the function itself; a subclass may compute anything.
_ACTIVATIONS: dict[Any, str] = {
    nn.ReLU: "relu", F.relu: "relu", torch.relu: "relu",
    hf.ReLUSquaredActivation: "relu2",
    nn.SiLU: "silu", hf.SiLUActivation: "silu", F.silu: "silu",
    hf.GELUActivation: "gelu", F.gelu: "gelu",
    hf.GELUTanh: "gelu_tanh", hf.NewGELUActivation: "gelu_tanh", hf.FastGELUActivation: "gelu_tanh",
    hf.AccurateGELUActivation: "gelu_tanh",
    hf.LinearActivation: "identity", nn.Identity: "identity",
}  # fmt: skip

_NN_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def formula_of(module: nn.Module) -> Formula | str:
    """The module's experts in our words, or why they cannot be computed here."""
    m: Any = module
    if m.has_post_expert_norm:
        return "a norm follows every expert"
    if m._is_expert_parallel:
        return "its experts are spread over processes"
    if refused := _refused_weights(m):
        return refused
    if not m.has_gate:
        name = activation_name(m.act_fn)
        return f"the activation {_named(m.act_fn)} is unknown" if name is None else Formula(activation=name)
    function = getattr(m._apply_gate, "__func__", m._apply_gate)
    gate = known_gate(function)
    if gate is None:
        return f"the gate {function.__qualname__} is unknown"
    if gate.alpha is not None:
        return gate.formula(m, CLAMPED_SWIGLU)
    name = activation_name(m.act_fn)
    return f"the activation {_named(m.act_fn)} is unknown" if name is None else gate.formula(m, name)


def _refused_weights(m: Any) -> str | None:
    """Why weights and biases of these kinds, dtypes and devices are not computed."""
    names = ["gate_up_proj" if m.has_gate else "up_proj", "down_proj"]
    names += [f"{name}_bias" for name in names] if m.has_bias else []
    weights = [getattr(m, name) for name in names]
    first = weights[0]
    for name, weight in zip(names, weights, strict=True):
        # Quantised or spread over devices, whatever dtype they say they have.
        if type(weight) not in (Tensor, nn.Parameter):
            return f"{name} is of type {type(weight).__name__}"
        if not weight.is_floating_point() or weight.itemsize < 2:
            return f"{name} is {weight.dtype}"
        if (weight.dtype, weight.device) != (first.dtype, first.device):
            return f"{names[0]} is {first.dtype} on {first.device}, {name} {weight.dtype} on {weight.device}"
    return None if first.is_meta else _no_kernels(first.device.type, first.dtype)


@functools.cache
def _no_kernels(device_type: str, dtype: torch.dtype) -> str | None:
    """Why there are no kernels, only a composition of PyTorch's operations: transformers' is then as good."""
    if device_type not in ("cpu", "cuda"):
        return f"there are no kernels for {device_type}"
    name, reason = explain_backend(torch.device(device_type), dtype=dtype)
    return f"no kernels run here: {reason}" if name == "torch" and requested_backend() == "auto" else None


def activation_name(act: Any) -> str | None:
    """Our name of an activation module or function, None for one that we do not have."""
    if type(act) is nn.GELU:
        return _NN_GELU[act.approximate]
    name = _ACTIVATIONS.get(type(act) if isinstance(act, nn.Module) else act)
    # Somebody who looks at the activations, or changes them, must see them.
    return None if isinstance(act, nn.Module) and has_hooks(act) else name


def _named(act: Any) -> str:
    return type(act).__name__ if isinstance(act, nn.Module) else getattr(act, "__qualname__", repr(act))


@functools.cache
def known_gate(function: Callable[..., Tensor]) -> Gate | None:
    """The gate that a function is, None for one that we do not know or that no longer computes what we know."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    gate = GATES.get((module, name))
    if gate is None or operator.attrgetter(name)(sys.modules[module]) is not function:
        return None
    return gate if _computes(function, gate) else None


def _computes(function: Callable[..., Tensor], gate: Gate) -> bool:
    """Whether a function is the formula, on both sides of the limits."""
    alpha, limit = 1.3, 2.0
    numbers = {name: value for name, value in ((gate.alpha, alpha), (gate.limit, limit)) if name is not None}
    stand_in = SimpleNamespace(act_fn=ACTIVATIONS["silu"], **numbers)
    with torch.no_grad(), torch.device("cpu"):
        products = torch.linspace(-3, 3, 7).unsqueeze(1) + torch.tensor([[0.0, 0.5, -0.3, 0.2, 1.1, -1.3]])
        h, up = halves(products, dim=-1, interleaved=gate.interleaved)
        wanted = hidden_units(gate.formula(stand_in, "silu").activation, h, up, alpha=alpha, limit=limit)
        try:
            found = function(stand_in, products)
        # Whatever a gate of another release asks of its module.
        except (AttributeError, TypeError, RuntimeError):
            return False
        return found.shape == wanted.shape and math.isclose((found - wanted).abs().max().item(), 0.0, abs_tol=1e-5)
