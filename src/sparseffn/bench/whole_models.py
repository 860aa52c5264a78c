"""Whole models of transformers with random weights, of the layer shapes of models that are used: OLMoE, Qwen3-MoE, Granite.

As many layers as fit into half of the memory, the model's own number at most; nothing is downloaded. Every implementation of
the experts computes on the same weights: `set_experts_implementation` changes it between two calls.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseffn.bench.correctness import TOLERANCES, deviation
from sparseffn.bench.machine import memory_bytes
from sparseffn.errors import UserError, unknown_name

WITHOUT_EXPERTS = "without experts"
"""What `experts_implementation=` calls experts that return zeros, while the bench runs."""

# Part of the memory that a model may take; activations, the cache of attention and the reading of files need some too.
_MEMORY_SHARE = 0.5
# A model is filled with one drawn block again and again: drawing gibibytes would take longer than timing them.
_DRAWN = 2**20
_CHECKED_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The config of a published model, as far as a layer's time depends on it."""

    published: str
    """The model on the hub whose shape it is."""
    config_class: str
    config: Mapping[str, Any]
    layers: Mapping[str, Any]
    """Fields that count layers: their number is the config's own."""

    def build_config(self, n_layers: int) -> Any:
        config = getattr(importlib.import_module("transformers"), self.config_class)
        return config(**self.config, **dict.fromkeys(self.layers, n_layers))

    @property
    def n_layers(self) -> int:
        return next(iter(self.layers.values()))


# From the config.json of each on the hub.
SHAPES = {
    "olmoe": ModelShape(
        published="allenai/OLMoE-1B-7B-0924",
        config_class="OlmoeConfig",
        layers={"num_hidden_layers": 16},
        config={
            "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_attention_heads": 16,
            "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "eos_token_id": 50279, "pad_token_id": 1,
        },
    ),
    "qwen3-moe": ModelShape(
        published="Qwen/Qwen3-30B-A3B",
        config_class="Qwen3MoeConfig",
        layers={"num_hidden_layers": 48},
        config={
            "vocab_size": 151936, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
            "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
    ),
    "granite-1b": ModelShape(
        published="ibm-granite/granite-3.0-1b-a400m-base",
        config_class="GraniteMoeConfig",
        layers={"num_hidden_layers": 24},
        config={
            "vocab_size": 49155, "hidden_size": 1024, "intermediate_size": 512, "num_attention_heads": 16,
            "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 8, "tie_word_embeddings": True,
            "embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "residual_multiplier": 0.22, "logits_scaling": 6.0,
        },
    ),
    # What tests measure, in a second.
    "tiny": ModelShape(
        published="none",
        config_class="OlmoeConfig",
        layers={"num_hidden_layers": 2},
        config={
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
            "num_experts": 8, "num_experts_per_tok": 2, "eos_token_id": 2, "pad_token_id": 1,
        },
    ),
}  # fmt: skip


def find_shape(name: str) -> ModelShape:
    """A shape by name.

    Raises:
        UserError: there is none of that name, or transformers is not installed.
    """
    if name not in SHAPES:
        raise unknown_name("model", name, SHAPES)
    if importlib.util.find_spec("transformers") is None:
        raise UserError("`bench hf` must have transformers; got none; fix: pip install 'sparseffn[hf]'")
    return SHAPES[name]


@dataclass(frozen=True, kw_only=True)
class WholeModel:
    """A model that is there, and how much of the published one it is."""

    name: str
    model: Any
    dtype: torch.dtype
    device: torch.device
    n_layers: int
    n_published: int
    num_params: int

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.model.layers

    @property
    def experts(self) -> Any:
        """The first layer's."""
        return next(module for module in self.layers[0].modules() if hasattr(module, "has_gate"))

    def draw(self, n_tokens: int, seed: int) -> Tensor:
        """Ids of a sequence, `[1, n_tokens]`."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randint(self.model.config.vocab_size, (1, n_tokens), generator=generator, device=self.device)


def build_whole(name: str, dtype: torch.dtype, device: torch.device, most_layers: int | None) -> WholeModel:
    """The model with as many layers as fit, `most_layers` at most.

    Raises:
        UserError: not even one layer fits.
    """
    from transformers import AutoModelForCausalLM, initialization

    shape = find_shape(name)
    with torch.device("meta"):
        small = [_num_params(AutoModelForCausalLM.from_config(shape.build_config(n))) for n in (1, 2)]
    each, allowed = small[1] - small[0], _MEMORY_SHARE * memory_bytes(device)
    fits = int((allowed / dtype.itemsize - (small[0] - each)) // each)
    n_layers = min(shape.n_layers, fits, most_layers or shape.n_layers)
    if n_layers < 1:
        raise UserError(
            f"`models` must fit into half of the memory; got {name}, one layer of which needs "
            f"{small[0] * dtype.itemsize / 2**30:.1f} of {allowed / 2**30:.1f} GiB; fix: another model or --dtype bfloat16"
        )
    with initialization.no_init_weights(), device:
        model = AutoModelForCausalLM.from_config(shape.build_config(n_layers), dtype=dtype).eval()
    _fill(model)
    num_params = small[0] + (n_layers - 1) * each
    sizes = {"n_layers": n_layers, "n_published": shape.n_layers, "num_params": num_params}
    return WholeModel(name=name, model=model, dtype=dtype, device=device, **sizes)


def _num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Matrices that keep the scale of what they multiply, norms of ones."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.fill_(1.0)
            continue
        # Blocks of different weights must not begin at the same place of a row.
        block = torch.randn(_DRAWN - 1, generator=generator).mul_(parameter.shape[-1] ** -0.5).to(parameter)
        flat = parameter.view(-1)
        whole = flat[: flat.numel() // len(block) * len(block)].view(-1, len(block))
        whole.copy_(block.expand_as(whole))
        flat[whole.numel() :].copy_(block[: flat.numel() - whole.numel()])


def check_implementations(
    whole: WholeModel, implementations: tuple[str, ...], ours: str
) -> tuple[dict[str, float], dict[str, str]]:
    """Hold every implementation of the first layer's experts against float64, on what that layer gives them.

    Deviations of those that agree, and why others are left out. Whole models are not compared: rounding in one layer changes
    what the router of the next selects.

    Raises:
        UserError: ours differs.
    """
    experts = whole.experts
    given: list[Any] = []
    with experts.register_forward_pre_hook(lambda _, inputs: given.append(inputs)), torch.inference_mode():
        whole.model.set_experts_implementation("eager")
        whole.model(whole.draw(_CHECKED_TOKENS, 0))
    wanted, found, absent = _truth(experts, *given[0]), {}, {}
    for name in implementations:
        whole.model.set_experts_implementation(name)
        with torch.inference_mode():
            error, rms = deviation(experts(*given[0]), wanted)
        most, most_rms = TOLERANCES[whole.dtype]
        if error <= most and rms <= most_rms:
            found[name] = error
        elif name == ours:
            raise UserError(f"{name} must agree with float64 to be timed; got a deviation of {error:.2g}; fix: the kernel")
        else:
            absent[name] = f"it differs from float64 by {error:.2g}, where {most:g} is allowed"
    return found, absent


def _truth(experts: Any, x: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
    """`silu(G x) * U x`, expert by expert in float64, as all of these models have it."""
    y = torch.zeros_like(x, dtype=torch.float64)
    for expert in indices.unique().tolist():
        token, slot = torch.where(indices == expert)
        gate, up = F.linear(x[token].double(), experts.gate_up_proj[expert].detach().double()).chunk(2, dim=1)
        part = F.linear(F.silu(gate) * up, experts.down_proj[expert].detach().double())
        y.index_add_(0, token, part * gates[token, slot, None].double())
    return y


def gathered_bytes(whole: WholeModel, n_tokens: int) -> float:
    """What `batched_mm` copies of the experts' matrices in a layer."""
    return _selected_params(whole, n_tokens) * whole.dtype.itemsize


def experts_work(whole: WholeModel, n_tokens: int) -> tuple[float, float]:
    """FLOPs of the experts in all layers, and bytes of those that tokens need which choose evenly."""
    n_experts, k = whole.experts.num_experts, whole.model.config.num_experts_per_tok
    touched = _num_params(whole.experts) * (1 - (1 - k / n_experts) ** n_tokens) * whole.dtype.itemsize
    return whole.n_layers * 2 * _selected_params(whole, n_tokens), whole.n_layers * touched


def _selected_params(whole: WholeModel, n_tokens: int) -> float:
    """Parameters of a layer's experts that its products use, an expert's once for each token that selects it."""
    size = _num_params(whole.experts) / whole.experts.num_experts
    return size * n_tokens * whole.model.config.num_experts_per_tok


@contextmanager
def without_experts() -> Iterator[None]:
    """Transformers knows `WITHOUT_EXPERTS` meanwhile: what is left of a model's time is not the experts'."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def zeros(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)

    ALL_EXPERTS_FUNCTIONS[WITHOUT_EXPERTS] = zeros
    try:
        yield
    finally:
        del ALL_EXPERTS_FUNCTIONS[WITHOUT_EXPERTS]
