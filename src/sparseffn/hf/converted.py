"""A model of transformers with replaced feedforward blocks, saved and loaded as a model of its own.

    replace_ffn(model, "topk", k=768)
    save_converted(model, "cheaper", tokenizer)

    import sparseffn.hf                                          # in another process
    model = AutoModelForCausalLM.from_pretrained("cheaper")

The folder's model type is ours, so that transformers without `sparseffn.hf` refuses it: under the old type it would load the
family's dense blocks with weights drawn at random. Inside is the family's own model, `model.model`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.initialization import no_init_weights

from sparseffn.errors import UserError
from sparseffn.ffn import FeedForward, config_from_json
from sparseffn.hf.converted_card import converted_card
from sparseffn.hf.fill import fill_of, mark_fill
from sparseffn.hf.loaded import LoadedWithCheck
from sparseffn.hf.model_card import PushedWithCard, write_card
from sparseffn.hf.swap import put
from sparseffn.storage import write_folder

MODEL_TYPE = "sparseffn_converted"


class ConvertedConfig(PreTrainedConfig):
    """The family's config, and what stands in place of its blocks."""

    model_type = MODEL_TYPE
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}  # noqa: RUF012

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    blocks: dict[str, dict[str, Any]] | None = None
    """By module name: `config`, as `FFNConfig.to_json` gives it, `dropout` on the output, and `fill`, how it began."""
    base_model: str | None = None
    """Name of the model that the blocks were replaced in; of a folder its last part."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if isinstance(self.text_config, PreTrainedConfig):
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))


@final
class ConvertedForCausalLM(LoadedWithCheck, PushedWithCard, PreTrainedModel, GenerationMixin):
    """A causal language model of transformers, `model`, with the blocks that its config names replaced."""

    config_class = ConvertedConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ConvertedConfig) -> None:
        super().__init__(config)
        self.model = AutoModelForCausalLM.from_config(config.text_config)
        made = {name: _built(block) for name, block in (config.blocks or {}).items()}
        for name in made:
            _check_place(self.model, name)
        put(self.model, {name: layer.to(self.model.dtype) for name, layer in made.items()})
        self.post_init()

    @classmethod
    def wrap(cls, model: PreTrainedModel) -> ConvertedForCausalLM:
        """The model as one that can be saved, itself where it is one; parameters are shared.

        Raises:
            UserError: none of its blocks is replaced.
        """
        if isinstance(model, ConvertedForCausalLM):
            return model
        blocks = _replaced(model)
        if not blocks:
            raise UserError("`model` must have replaced feedforward blocks; got none; fix: call replace_ffn first")
        config = ConvertedConfig(text_config=model.config, blocks=blocks, base_model=_base_name(model), dtype=model.dtype)
        with torch.device("meta"), no_init_weights():
            wrapped = cls(config)
        wrapped.model = model
        wrapped.generation_config = model.generation_config
        return wrapped.train(model.training)

    def _check_found(self, folder: str, missing: set[str], unexpected: set[str]) -> None:
        """A folder that lacks parameters is refused.

        Raises:
            UserError: a parameter is missing, which would else be drawn at random.
        """
        if missing:
            raise UserError(
                f"`{folder}` must hold every parameter; got none of {', '.join(sorted(missing)[:3])}"
                f"{' and others' if len(missing) > 3 else ''}; fix: convert the model again"
            )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As any model's; its config names the blocks that were replaced since, too."""
        self.config.blocks = _replaced(self.model)
        super().save_pretrained(*args, **kwargs)

    def card(self, name: str, **parts: Any) -> str:
        """The model card: what was replaced, and how it is loaded; `parts` are further arguments of `converted_card`."""
        return converted_card(
            name,
            model_type=MODEL_TYPE,
            family=self.config.text_config.model_type,
            base_model=self.config.base_model,
            blocks=self.config.blocks or {},
            n_params=self.num_parameters(),
            **parts,
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the family's model."""
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.prepare_inputs_for_generation(*args, **kwargs)

    def _supports_logits_to_keep(self) -> bool:
        return self.model._supports_logits_to_keep()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.set_output_embeddings(new_embeddings)


def save_converted(model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Write a model whose blocks were replaced, with a model card, as `AutoModelForCausalLM.from_pretrained` loads it.

    The folder is written whole or not at all.

    Raises:
        UserError: none of its blocks is replaced, or the folder has something in it.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"`folder` must be new or empty; got {str(folder)!r}; fix: choose another one")
    wrapped = ConvertedForCausalLM.wrap(model)
    with write_folder(folder) as made:
        wrapped.save_pretrained(made)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        write_card(wrapped, made, wrapped.card(folder.resolve().name, has_tokenizer=tokenizer is not None))
    return folder


def register_converted() -> None:
    """Make the model type known to transformers; importing `sparseffn.hf` does."""
    AutoConfig.register(MODEL_TYPE, ConvertedConfig, exist_ok=True)
    AutoModelForCausalLM.register(ConvertedConfig, ConvertedForCausalLM, exist_ok=True)


def _built(block: dict[str, Any]) -> nn.Module:
    layer = config_from_json(block["config"]).build()
    mark_fill(layer, block.get("fill"))
    return nn.Sequential(layer, nn.Dropout(block["dropout"])) if block["dropout"] else layer


def _check_place(model: nn.Module, name: str) -> None:
    try:
        model.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"`blocks` must name modules of {type(model).__name__}; got {name!r}; "
            "fix: load it with the release of transformers that saved it"
        ) from None


def _replaced(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Our layers in a model, with the dropout that follows them in a sequence of their own."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, FeedForward):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        dropout = 0.0
        if isinstance(parent, nn.Sequential) and len(parent) == 2 and isinstance(parent[1], nn.Dropout):
            name, dropout = name.rpartition(".")[0], parent[1].p
        found[name] = {"config": module.config.to_json(), "dropout": dropout, "fill": fill_of(module)}
    return found


def _base_name(model: PreTrainedModel) -> str | None:
    """What the model was loaded as: its name on the hub, or the last part of a path, which says nothing of a machine."""
    name = model.name_or_path
    if not name:
        return None
    is_on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()
    return name if is_on_hub else Path(name).resolve().name
