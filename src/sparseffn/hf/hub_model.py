"""What our models have in common in transformers: how they are drawn, saved with a card, asked for logits and answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from sparseffn.errors import UserError
from sparseffn.ffn import RoutingStats
from sparseffn.hf.loaded import LoadedWithCheck
from sparseffn.hf.model_card import PushedWithCard
from sparseffn.hf.outputs import SparseCausalLMOutput, causal_lm_loss
from sparseffn.models import keyed_generator
from sparseffn.models.language_model import LanguageModel


class HubModel(LoadedWithCheck, PushedWithCard, PreTrainedModel):
    """A `LanguageModel`, which is the attribute that `base_model_prefix` names."""

    supports_gradient_checkpointing = True
    # Logits of experts are float32 anyway; rounded weights would select others.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["router"]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        # Drawn here, so that `torch.manual_seed` decides it, and one model has one seed for all its parameters.
        self._seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_(2**62))

    def _check_found(self, folder: str, missing: set[str], unexpected: set[str]) -> None:
        """Parameters that a checkpoint lacks are drawn, and transformers logs their names.

        Raises:
            UserError: the checkpoint has none of the model's parameters, those that are tied left aside: it is another model's.
        """
        # Transformers takes tied parameters off what is missing, whether or not one of them was there.
        tied = {*self.all_tied_weights_keys.keys(), *self.all_tied_weights_keys.values()}
        names = [name for name, _ in self.named_parameters() if name not in tied]
        if names and missing.issuperset(names):
            others = sorted(unexpected)[:2]
            instead = f", but {' and '.join(others)}" if others else ""
            raise UserError(
                f"`{folder}` must hold parameters such as {names[0]}; got none of {type(self).__name__}'s"
                f"{instead}; fix: load what this class saved or `sparseffn export` wrote"
            )

    @property
    def network(self) -> LanguageModel:
        return cast(LanguageModel, getattr(self, self.base_model_prefix))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw parameters that no checkpoint gave, as the network's `init_parameters` does.

        Transformers calls this for every module that lacks one. The first time all of them are drawn, so that a block is drawn
        once for its parts.
        """
        own = {id(parameter) for parameter in self.network.parameters()}
        if any(id(parameter) in own for parameter in module.parameters(recurse=False)):
            parameters = self.network.named_parameters()
            missing = {n: p for n, p in parameters if not (p.is_meta or getattr(p, "_is_hf_initialized", False))}
            self.network.init_parameters(self._seed, only=missing.keys())
            for parameter in missing.values():
                parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
            return
        # An embedding or projection with which transformers replaces ours when the vocabulary grows.
        name = "embedding.weight" if isinstance(module, nn.Embedding) else "output.weight"
        for parameter in (p for p in module.parameters(recurse=False) if not p.is_meta):
            drawn = torch.empty_like(parameter, device="cpu")
            self.network.draw(name, drawn, keyed_generator(self._seed, f"new {name}"))
            parameter.copy_(drawn)

    def get_input_embeddings(self) -> nn.Module:
        return self.network.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding), "transformers sets embeddings"
        self.network.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.network.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        assert isinstance(new_embeddings, nn.Linear), "transformers sets linear layers"
        self.network.output = new_embeddings

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, others: dict[str, Any]) -> Tensor:
        """The window `[B, L, D]`; from `others` goes what is asked for in vain.

        Raises:
            UserError: neither or both are given, or attention weights are asked for.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("`input_ids` or `inputs_embeds` must be given; got both or neither; fix: pass one of them")
        if others.pop("output_attentions", None):
            raise UserError("`output_attentions` must be false: weights are never computed; got true; fix: leave it out")
        return self.network.embedding(input_ids) if inputs_embeds is None else inputs_embeds

    def _caches(self, use_cache: bool | None) -> bool:
        """Whether a cache is made where none is given."""
        return bool(self.config.use_cache) and not self.training if use_cache is None else use_cache

    def _balances(self, labels: Tensor | None, others: dict[str, Any]) -> bool:
        """Whether the balancing loss is wanted, for methods that have one."""
        targets = labels if labels is not None else others.get("shift_labels")
        return any(w > 0 for w in self.network.config.ffn.balancing().values()) and (self.training or targets is not None)

    def _answer(
        self,
        logits: Tensor,
        labels: Tensor | None,
        stats: Sequence[RoutingStats],
        cache: Cache | None,
        states: Callable[[], tuple[Tensor, ...]],
        output_hidden_states: bool | None,
        return_dict: bool | None,
        others: dict[str, Any],
    ) -> SparseCausalLMOutput | tuple[Any, ...]:
        output = causal_lm_loss(self, logits, labels, stats, **others)
        output.past_key_values = cache
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            output.hidden_states = states()
        as_tuple = not (self.config.return_dict if return_dict is None else return_dict)
        return output.to_tuple() if as_tuple else output
