"""Gated experts as Hugging Face stores them, by us and by each of its implementations, over the very same weights.

    y = sum over the K chosen e of g_e W_e (silu(G_e x) * U_e x)       G, U: halves of `gate_up_proj` [E, 2 I, D]
                                                                       W: `down_proj` [E, D, I]
Of 64 model families in transformers 5.23, 59 have this layout (OLMoE, Qwen3-MoE, Mixtral, ...); OLMoE's class computes it.
`expert_speed` times what is prepared and checked here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseffn import ops
from sparseffn.bench.benchmark import COLD_TOKENS
from sparseffn.bench.correctness import TOLERANCES, deviation
from sparseffn.bench.machine import last_level_cache_bytes, memory_bytes
from sparseffn.bench.peers import HF_IMPLEMENTATIONS, MOST_GATHERED_BYTES
from sparseffn.devices import synchronize
from sparseffn.errors import UserError
from sparseffn.results.bench_result import Deviation, ExpertShape

OURS = "sparseffn"
"""Label of our own operation."""

# Part of the memory that the layers may take; in training, gradients and copies of other implementations come on top.
_MEMORY_SHARE = 0.5
# An implementation that takes so many times as long as the fastest of the others is left out: its loop would take minutes.
_FAR_SLOWER = 8.0


class Call(NamedTuple):
    """Arguments of a call, as the models of transformers pass them; gates are in the hidden dtype there."""

    x: Tensor
    indices: Tensor
    gates: Tensor


@final
class Stored(nn.Module):
    """A layer's experts in transformers' layout, computed by us without a copy of the weights."""

    def __init__(self, shape: ExpertShape, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(seed)

        def drawn(out: int, width: int) -> nn.Parameter:
            weight = torch.empty(shape.n_experts, out, width, device=device, dtype=dtype)
            return nn.Parameter(weight.normal_(std=width**-0.5, generator=generator))

        self.gate_up_proj = drawn(2 * shape.expert_size, shape.d_model)
        self.down_proj = drawn(shape.d_model, shape.expert_size)

    def forward(self, x: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
        keys, gate_keys = (half.transpose(1, 2) for half in ops.halves(self.gate_up_proj, dim=1))
        gates = gates.to(torch.promote_types(x.dtype, torch.float32))
        return ops.experts(x, keys, self.down_proj.transpose(1, 2), gates, indices, gate_keys=gate_keys, activation="silu")


def _of_transformers(stored: Stored, shape: ExpertShape, implementation: str) -> nn.Module:
    """OLMoE's experts over the weights of `stored`; importing takes seconds, hence only when it is used."""
    from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    config = OlmoeConfig(
        hidden_size=shape.d_model, intermediate_size=shape.expert_size, num_experts=shape.n_experts, num_experts_per_tok=shape.k
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = OlmoeExperts(config)
    experts.gate_up_proj, experts.down_proj = stored.gate_up_proj, stored.down_proj
    return experts


@dataclass(frozen=True, kw_only=True)
class Size:
    """One number of tokens of one shape in one dtype: its layers, and what each candidate makes of them."""

    shape: ExpertShape
    n_tokens: int
    dtype: torch.dtype
    device: torch.device
    n_layers: int
    layers: Sequence[Stored]
    modules: dict[str, Sequence[nn.Module]]
    """By candidate, one for each layer."""
    absent: dict[str, str]
    """By candidate, why it is left out."""

    @property
    def is_cold(self) -> bool:
        return self.n_tokens <= COLD_TOKENS

    @property
    def trains(self) -> bool:
        """Few tokens are decoded, many are trained on too."""
        return not self.is_cold

    def draw(self, seed: int) -> Call:
        """Tokens of unit scale that choose their experts evenly."""
        generator = torch.Generator(self.device).manual_seed(seed)
        x, scores = (
            torch.randn(self.n_tokens, width, generator=generator, device=self.device)
            for width in (self.shape.d_model, self.shape.n_experts)
        )
        gates, indices = scores.softmax(dim=1).topk(self.shape.k)
        return Call(x.to(self.dtype), indices, gates.to(self.dtype))

    def without(self, absent: dict[str, str]) -> Size:
        """The size without some candidates, with the reasons."""
        left = {label: modules for label, modules in self.modules.items() if label not in absent}
        return dataclasses.replace(self, modules=left, absent=self.absent | absent)

    def without_weights(self) -> Size:
        """What is left to describe it: the layers of the next size need their memory."""
        return dataclasses.replace(self, layers=(), modules=dict.fromkeys(self.modules, ()))


def prepare(shape: ExpertShape, n_tokens: int, dtype: torch.dtype, device: torch.device, stored: list[Stored]) -> Size:
    """The layers of a size, kept in `stored` from one number of tokens to the next, and all candidates over them."""
    n_layers = _layers_needed(shape, dtype, device) if n_tokens <= COLD_TOKENS else 1
    del stored[n_layers:]
    stored += [Stored(shape, dtype, device, seed) for seed in range(len(stored), n_layers)]
    modules: dict[str, Sequence[nn.Module]] = {OURS: stored[:]}
    gathered = 3 * shape.expert_size * shape.d_model * n_tokens * shape.k * dtype.itemsize
    absent = {}
    for name in HF_IMPLEMENTATIONS:
        if importlib.util.find_spec("transformers") is None:
            absent[f"hf {name}"] = "transformers is not installed; pip install 'sparseffn[hf]'"
        elif name == "batched_mm" and gathered > MOST_GATHERED_BYTES:
            absent[f"hf {name}"] = f"it would copy {gathered / 2**30:.1f} GiB of expert matrices a call"
        else:
            modules[f"hf {name}"] = [_of_transformers(layer, shape, name) for layer in stored]
    sizes = {"shape": shape, "n_tokens": n_tokens, "dtype": dtype, "device": device, "n_layers": n_layers}
    return Size(**sizes, layers=stored[:], modules=modules, absent=absent)


def _layers_needed(shape: ExpertShape, dtype: torch.dtype, device: torch.device) -> int:
    """Copies of a layer that fill four times the last-level cache, two at the least."""
    cache, _ = last_level_cache_bytes(device)
    n_layers = max(2, math.ceil(4 * cache / (shape.num_params * dtype.itemsize)))
    needed, most = n_layers * shape.num_params * dtype.itemsize, _MEMORY_SHARE * memory_bytes(device)
    if needed > most:
        raise UserError(
            f"`--shapes` must fit into half of the memory, {n_layers} layers of each; got {shape.label}, which needs "
            f"{needed / 2**30:.1f} of {most / 2**30:.1f} GiB; fix: name smaller shapes"
        )
    return n_layers


def check_experts(size: Size) -> tuple[dict[str, Deviation], Size]:
    """Hold every candidate against float64; a peer that does not compute this, or is far slower, is left out."""
    call, grad = size.draw(1), size.draw(0).x
    found, seconds, absent = {}, {}, {}
    truth = _truth(size.layers[0], call, grad, with_gradients=size.trains)
    for label, modules in size.modules.items():
        try:
            errors, seconds[label] = _deviations(modules[0], size, call, grad, truth)
        # What a library raises for what it cannot compute.
        except (RuntimeError, ValueError, TypeError, ImportError) as error:
            if label == OURS:
                raise
            absent[label] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]
            continue
        found[label] = Deviation(tokens=size.n_tokens, largest_deviation={name: most for name, (most, _) in errors.items()})
        wrong = _wrong(errors, size.dtype)
        if wrong and label == OURS:
            raise UserError(
                f"{label} must agree with float64 to be timed; got {wrong}, {size.shape.label}, {size.n_tokens} tokens; "
                "fix: the kernel"
            )
        if wrong:
            absent[label] = f"it differs from float64 by {wrong}"
    fastest = min((s for label, s in seconds.items() if label not in absent and label != OURS), default=math.inf)
    slow = {label: s for label, s in seconds.items() if label not in absent and s > _FAR_SLOWER * fastest and label != OURS}
    absent |= {label: f"a call took {s:.2f} s, {s / fastest:.0f} times as long as the fastest's" for label, s in slow.items()}
    return found, size.without(absent)


def _wrong(errors: dict[str, tuple[float, float]], dtype: torch.dtype) -> str:
    """The largest deviation beyond rounding in words, empty where there is none; a NaN is one."""
    most, most_rms = TOLERANCES[dtype]
    beyond = {name: error for name, (error, rms) in errors.items() if not (error <= most and rms <= most_rms)}
    if not beyond:
        return ""
    worst = max(beyond, key=lambda name: math.inf if math.isnan(beyond[name]) else beyond[name])
    return f"{beyond[worst]:.2g} in the {worst}, where {most:g} is allowed"


def _deviations(
    module: nn.Module, size: Size, call: Call, grad: Tensor, truth: dict[str, Tensor]
) -> tuple[dict[str, tuple[float, float]], float]:
    """Largest and root mean square deviations of a call in the timed mode, and the seconds that a second one takes."""
    x = call.x.clone().requires_grad_(size.trains)

    def run() -> Tensor:
        for tensor in (x, *module.parameters()):
            tensor.grad = None
        with torch.inference_mode(not size.trains):
            y = module(x, *call[1:])
        if size.trains:
            y.backward(grad)
        synchronize(size.device)
        return y

    run()
    start = time.perf_counter()
    found: dict[str, Any] = {"output": run().detach()}
    seconds = time.perf_counter() - start
    if size.trains:
        found |= {"gradient of x": x.grad, **{f"gradient of {n}": p.grad for n, p in module.named_parameters()}}
    return {name: _deviation(found[name], wanted) for name, wanted in truth.items()}, seconds


def _deviation(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """As `deviation`, expert by expert: a whole layer's weights in float64 are gibibytes."""
    if found.dim() < 3:
        return deviation(found, wanted)
    parts = [deviation(one, other) for one, other in zip(found, wanted, strict=True) if bool(other.any())]
    idle = [one for one, other in zip(found, wanted, strict=True) if not bool(other.any())]
    assert not any(bool(one.any()) for one in idle), "an expert without tokens has no gradient"
    return max(error for error, _ in parts), max(rms for _, rms in parts)


def _truth(layer: Stored, call: Call, grad: Tensor, *, with_gradients: bool) -> dict[str, Tensor]:
    """Output and gradients in float64, expert by expert; those of weights are kept in float32, which is exact enough."""
    x, y = call.x.double().requires_grad_(with_gradients), torch.zeros_like(call.x, dtype=torch.float64)
    gradients = {f"gradient of {n}": torch.zeros_like(p, dtype=torch.float32) for n, p in layer.named_parameters()}
    for expert in call.indices.unique().tolist():
        token, slot = torch.where(call.indices == expert)
        gate_up, down = (
            weight.detach()[expert].double().requires_grad_(with_gradients) for weight in (layer.gate_up_proj, layer.down_proj)
        )
        gate, up = F.linear(x[token], gate_up).chunk(2, dim=1)
        part = F.linear(F.silu(gate) * up, down) * call.gates[token, slot, None].double()
        y.index_add_(0, token, part.detach())
        if with_gradients:
            part.backward(grad[token].double())
            for name, leaf in (("gate_up_proj", gate_up), ("down_proj", down)):
                assert leaf.grad is not None, "the expert has rows"
                gradients[f"gradient of {name}"][expert] = leaf.grad
    if not with_gradients:
        return {"output": y}
    assert x.grad is not None, "every token chose an expert"
    return {"output": y, "gradient of x": x.grad, **gradients}
