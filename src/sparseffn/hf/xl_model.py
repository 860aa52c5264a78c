"""`TransformerXLForCausalLM`: the model of `sparseffn train` and of the paper's runs, at home in transformers.

    import sparseffn.hf
    model = AutoModelForCausalLM.from_pretrained("runs/sigma-hf")        # what `sparseffn export` wrote
    model.generate(**tokenizer("The ", return_tensors="pt"), max_new_tokens=100)

The network is `models.TransformerXL`; here are the memory as a cache, the loss, checkpointing and what saves and loads it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_utils import slice_logits_to_keep

from sparseffn.errors import UserError
from sparseffn.ffn import RoutingStats
from sparseffn.hf.hub_model import HubModel
from sparseffn.hf.model_card import model_card
from sparseffn.hf.outputs import SparseCausalLMOutput
from sparseffn.hf.xl_config import TransformerXLHubConfig
from sparseffn.hf.xl_memory import XLMemory, XLMemoryLayer
from sparseffn.models import RelativeAttention, TransformerXL
from sparseffn.models.transformer_xl import Block


@final
class TransformerXLForCausalLM(HubModel, GenerationMixin):
    """A Transformer-XL language model whose feedforward blocks are any method's."""

    config_class = TransformerXLHubConfig
    config: TransformerXLHubConfig
    base_model_prefix = "transformer"
    # What the memory has forgotten cannot come back, as assisted generation would need.
    _is_stateful = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]

    def __init__(self, config: TransformerXLHubConfig) -> None:
        super().__init__(config)
        self.transformer = TransformerXL(config.model_config)
        self.gradient_checkpointing = False
        self._tied_weights_keys = self._shared_parameters()
        self.post_init()

    @classmethod
    def of_model(cls, trained: TransformerXL, *, memory_length: int, **fields: Any) -> TransformerXLForCausalLM:
        """A model of ours with a copy of its weights, in evaluation mode; `fields` are further ones of the config."""
        with torch.device("meta"):
            model = cls(TransformerXLHubConfig.of_model(trained.config, memory_length=memory_length, **fields))
        # A copy of the module: its layers may share one block, which a state dict does not say.
        model.transformer = copy.deepcopy(trained)
        return model.eval()

    def _shared_parameters(self) -> dict[str, str]:
        """What the parameters of layers that share one block are called, and whose they are."""
        if not self.config.shared_layers:
            return {}
        block, places = dict(self.transformer.layers[0].named_parameters()), range(1, self.config.num_hidden_layers)
        prefix = "transformer.layers"
        return {f"{prefix}.{place}.{name}": f"{prefix}.0.{name}" for place in places for name in block}

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Parameters of shared layers; transformers' own looks at embedding and output alone, which never are one here."""
        return dict(self._tied_weights_keys)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: `forward` makes the memory."""
        return False

    def new_memory(self) -> XLMemory:
        """An empty memory of `memory_length` positions a layer, to be passed as `past_key_values`."""
        return XLMemory(self.config.num_hidden_layers, self.config.memory_length)

    def card(self, name: str, *, notes: Sequence[str] = (), **parts: Any) -> str:
        """The model card: what the model is and how it is loaded; `parts` are further arguments of `model_card`."""
        sizes, memory = self.transformer.config, self.config.memory_length
        about_memory = (
            f"`past_key_values` is the memory of Transformer-XL: {memory:,} positions before a window. `generate` gives with "
            "it what it gives without as long as prompt and output fit; longer texts go on, and what is older is forgotten."
        )
        return model_card(
            name=name,
            kind="Transformer-XL",
            model_type=self.config.model_type,
            ffn=sizes.ffn,
            n_params=sizes.num_params(),
            sizes={
                "layers": f"{sizes.n_layers}{', one block that all share' if sizes.shared_layers else ''}",
                "width": f"{sizes.d_model}, {sizes.n_heads} heads of {sizes.d_head}",
                "vocabulary": f"{sizes.vocab_size:,}",
                "memory": f"{memory:,} positions",
            },
            notes=(about_memory, *notes),
            **parts,
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: XLMemory | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SparseCausalLMOutput | tuple[Any, ...]:
        """Logits of a window, and the loss where there are labels.

        Args:
            input_ids: int64 `[B, L]`.
            attention_mask: `[B, L]`, or `[B, n_seen + L]` with a memory: 0 for padding, which nobody sees and which takes no
                part in routing.
            past_key_values: memory of the windows before; changed in place.
            inputs_embeds: `[B, L, D]` in place of `input_ids`.
            labels: `[B, L]`, the tokens themselves; -100 is left out.
            use_cache: return a memory where none is given; None: as the config says, but not in training.
            logits_to_keep: compute logits of the last so many positions, or of these.
            output_hidden_states: also return each layer's input and the output of the last norm.
            return_dict: False for a tuple.
            kwargs: `num_items_in_batch`, by which the loss is divided; positions are relative and `position_ids` unused.
        """
        x = self._embedded(input_ids, inputs_embeds, kwargs)
        memory = past_key_values
        if memory is None and self._caches(use_cache):
            memory = self.new_memory()
        if memory is not None:
            self._check_memory(memory, x.shape[0])
        padding = None if attention_mask is None else self._padding(attention_mask, x.shape[1], memory)
        x, inputs, stats = self._layers(x, memory, padding, with_stats=self._balances(labels, kwargs))
        logits = self.transformer.project(slice_logits_to_keep(x, logits_to_keep))

        def states() -> tuple[Tensor, ...]:
            return (*inputs, self.transformer.norm(x))

        return self._answer(logits, labels, stats, memory, states, output_hidden_states, return_dict, kwargs)

    def _layers(
        self, x: Tensor, memory: XLMemory | None, padding: Tensor | None, *, with_stats: bool
    ) -> tuple[Tensor, tuple[Tensor, ...], list[RoutingStats]]:
        """All layers on the embedded window: the last output, every layer's input, and routing statistics."""
        x = F.dropout(x, self.config.dropout, self.training)
        inputs, collected = [], []
        for place, block in enumerate(self.transformer.layers):
            assert isinstance(block, Block), "the layers are blocks"
            kept = None if memory is None else memory.of(place)
            inputs.append(x)
            if kept is not None and not torch.is_grad_enabled():
                x, stats = _with_projections(block, x, kept, padding, with_stats=with_stats)
            else:
                x, stats = self._with_memory(block, x, kept, padding, with_stats=with_stats)
            if stats is not None:
                collected.append(stats)
        return x, tuple(inputs), collected

    def _with_memory(
        self, block: Block, x: Tensor, kept: XLMemoryLayer | None, padding: Tensor | None, *, with_stats: bool
    ) -> tuple[Tensor, RoutingStats | None]:
        """One layer, whose projections of the memory have gradient; recomputed in backward where that is asked for."""
        past = None
        if kept is not None:
            past, kept.projected, kept.positions_NHC = kept.memory(), None, None
            kept.remember(x)

        def run(x: Tensor) -> tuple[Tensor, RoutingStats | None]:
            return block(x, past, return_stats=with_stats, padding=padding)

        return self._gradient_checkpointing_func(run, x) if self.gradient_checkpointing and self.training else run(x)

    def _check_memory(self, memory: object, batch: int) -> None:
        """Raise a UserError for another cache than this model's, or one of another batch."""
        fix = "fix: pass model.new_memory() or nothing"
        n_layers = self.config.num_hidden_layers
        if not isinstance(memory, XLMemory) or len(memory.layers) != n_layers:
            got = f"{len(memory.layers)} layers" if isinstance(memory, XLMemory) else type(memory).__name__
            raise UserError(f"`past_key_values` must be an XLMemory of {n_layers} layers; got {got}; {fix}")
        past = memory.of(0).memory()
        if past is not None and past.shape[0] != batch:
            raise UserError(f"`past_key_values` must be of {batch} texts, as the window is; got {past.shape[0]}; {fix}")

    def _padding(self, attention_mask: Tensor, n_tokens: int, memory: XLMemory | None) -> Tensor | None:
        """bool `[B, M + L]`, True where nothing is; None where there is no padding."""
        n_seen = 0 if memory is None else memory.get_seq_length()
        if attention_mask.dim() != 2 or attention_mask.shape[1] not in (n_tokens, n_seen + n_tokens):
            raise UserError(
                f"`attention_mask` must be [batch, {n_seen + n_tokens}], one entry for each token seen; "
                f"got {tuple(attention_mask.shape)}; fix: pass the tokenizer's mask, continued by ones"
            )
        padding = attention_mask == 0
        if not bool(padding.any()):
            return None
        n_keys = n_tokens if memory is None else memory.get_mask_sizes(n_tokens, 0)[0]
        missing = n_seen + n_tokens - padding.shape[1]
        padding = F.pad(padding, (missing, 0), value=False)
        return padding[:, padding.shape[1] - n_keys :]


def _with_projections(
    block: Block, x: Tensor, kept: XLMemoryLayer, padding: Tensor | None, *, with_stats: bool
) -> tuple[Tensor, RoutingStats | None]:
    """One layer without gradient: keys and values of the memory are those of before."""
    attention = block.attention
    assert isinstance(attention, RelativeAttention), "the model is built with relative positions"
    past = kept.memory()
    if kept.projected is None and past is not None:
        kept.extend(*attention.project(block.attention_norm(past)))
    kept.remember(x)
    normed = block.attention_norm(x)
    keys, values = kept.extend(*attention.project(normed))
    positions = kept.position_keys(attention, keys.shape[1])
    x = x + block.drop(attention.attend(normed, keys, values, r_NHC=positions, padding_BS=padding))
    return block.feed_forward(x, return_stats=with_stats, padding=padding)
