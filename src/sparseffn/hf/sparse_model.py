"""`SparseFFNForCausalLM`: a decoder of today's kind with any method's feedforward blocks, at home in transformers.

    import sparseffn.hf
    ffn = {"method": "sigma-moe", "n_experts": 16, "expert_size": 128, "k": 4, "gated": True, "activation": "silu"}
    model = sparseffn.hf.SparseFFNForCausalLM(sparseffn.hf.SparseFFNConfig(vocab_size=len(tokenizer), ffn=ffn))
    Trainer(model, ...).train()
    model = AutoModelForCausalLM.from_pretrained("folder")

The network is `models.Decoder`; here are transformers' caches, masks and loss, and what saves and loads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.modeling_utils import slice_logits_to_keep

from sparseffn.errors import UserError
from sparseffn.hf.hub_model import HubModel
from sparseffn.hf.model_card import model_card
from sparseffn.hf.outputs import SparseCausalLMOutput
from sparseffn.hf.sparse_config import SparseFFNConfig
from sparseffn.models import Decoder
from sparseffn.models.decoder import DecoderBlock


@final
class SparseFFNForCausalLM(HubModel, GenerationMixin):
    """A decoder whose feedforward blocks are any method's."""

    config_class = SparseFFNConfig
    config: SparseFFNConfig
    base_model_prefix = "decoder"
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["DecoderBlock"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"decoder.output.weight": "decoder.embedding.weight"}

    def __init__(self, config: SparseFFNConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(config.model_config)
        self.post_init()

    @classmethod
    def of_model(cls, trained: Decoder, **fields: Any) -> SparseFFNForCausalLM:
        """A decoder of ours in transformers, with its weights; `fields` are further ones of the config."""
        model = cls(SparseFFNConfig.of_model(trained.config, **fields))
        model.decoder.load_state_dict(trained.state_dict())
        return model.eval()

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        for place, block in enumerate(self.decoder.layers):
            assert isinstance(block, DecoderBlock), "the layers are blocks"
            block.gradient_checkpointing = enable and place % every_n_layers == 0
            block._gradient_checkpointing_func = gradient_checkpointing_func

    def card(self, name: str, **parts: Any) -> str:
        """The model card: what the model is and how it is loaded; `parts` are further arguments of `model_card`."""
        # Of now: the vocabulary may have grown.
        sizes = self.config.model_config
        tied = ", which is also the output projection" if sizes.tied_embeddings else ""
        return model_card(
            name=name,
            kind="decoder",
            model_type=self.config.model_type,
            ffn=sizes.ffn,
            n_params=sizes.num_params(),
            sizes={
                "layers": f"{sizes.n_layers}, with RMS norms and rotary positions",
                "width": f"{sizes.d_model}, {sizes.n_heads} heads of {sizes.d_head}, {sizes.n_kv_heads} of keys and values",
                "vocabulary": f"{sizes.vocab_size:,}{tied}",
                "trained context": f"{self.config.max_position_embeddings:,} tokens",
            },
            **parts,
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **others: Any) -> Tensor | None:
        """The tokenizer's mask for a cache of a fixed size too, as `forward` takes it; the router must see padding."""
        return attention_mask

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SparseCausalLMOutput | tuple[Any, ...]:
        """Logits, and the loss where there are labels.

        Args:
            input_ids: int64 `[B, L]`.
            attention_mask: `[B, n_cached + L]`, 0 for padding, which nobody sees and which takes no part in routing.
            position_ids: int64 `[B, L]`; None: those after what is cached.
            past_key_values: keys and values of what came before; those of `input_ids` are added.
            inputs_embeds: `[B, L, hidden_size]` in place of `input_ids`.
            labels: `[B, L]`, the tokens themselves; -100 is left out.
            use_cache: return a cache where none is given; None: as the config says, but not in training.
            logits_to_keep: compute logits of the last so many positions, or of these.
            output_hidden_states: also return each layer's input and the last output; None: as the config says.
            return_dict: False for a tuple.
            kwargs: `num_items_in_batch` and `shift_labels` for the loss.

        Raises:
            UserError: something is missing, has another shape, or is asked for that this model has not.
        """
        x = self._embedded(input_ids, inputs_embeds, kwargs)
        if past_key_values is None and self._caches(use_cache):
            past_key_values = DynamicCache(config=self.config)
        mask = None if attention_mask is None else _token_mask(attention_mask, x.shape[1], past_key_values)
        if attention_mask is None and position_ids is not None:
            _refuse_packed(position_ids)
        return_stats = self._balances(labels, kwargs)
        states, stats = self.decoder.states(
            x, mask=mask, positions=position_ids, cache=past_key_values, return_stats=return_stats
        )
        logits = self.decoder.project(slice_logits_to_keep(states[-1], logits_to_keep))
        return self._answer(
            logits, labels, stats, past_key_values, lambda: tuple(states), output_hidden_states, return_dict, kwargs
        )  # fmt: skip


def _token_mask(attention_mask: Tensor, n_tokens: int, cache: Cache | None) -> Tensor | None:
    """bool `[B, n_cached + L]`; None where nothing is padding, which is faster."""
    wanted = n_tokens + (0 if cache is None else int(cache.get_seq_length()))
    if attention_mask.dim() != 2 or attention_mask.shape[1] != wanted:
        raise UserError(
            f"`attention_mask` must be [batch, {wanted}], an entry for each position so far; got "
            f"{tuple(attention_mask.shape)}; fix: pass the tokenizer's mask, with those of the cache"
        )
    mask = attention_mask != 0
    # A trace must not depend on values.
    return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask


def _refuse_packed(position_ids: Tensor) -> None:
    """Texts that follow one another in a row, each with positions from 0, would see one another."""
    if not torch.compiler.is_compiling() and bool((position_ids.diff(dim=-1) < 0).any()):
        raise UserError(
            "`position_ids` must not go back: texts that are packed into one row are not kept apart; got positions that do; "
            "fix: pad texts into rows of their own and pass `attention_mask`"
        )
