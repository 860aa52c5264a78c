"""Parameter counts: closed forms, built models, and the sizes that the paper publishes."""

from __future__ import annotations

import pytest
import torch

from models.small import small_config
from sparseffn.errors import UserError
from sparseffn.ffn import list_methods, method_class
from sparseffn.ffn.pkm import PKMConfig
from sparseffn.models import TransformerXL, TransformerXLConfig
from sparseffn.models.presets import PRESETS, get_preset

# Spec, section 2: dense block, mixture's block, and the whole models in millions.
PUBLISHED = {
    "wt-s": (8000, 1_694_137, 1_694_144, 47, 47),
    "wt-s-star": (8000, 13_596_412, 13_553_152, 238, 237),
    "wt-b": (8000, 8_422_414, 8_421_376, 262, 262),
    "e8": (205, 2_104_837, 2_105_344, 41, 41),
}


def count(model: torch.nn.Module) -> int:
    """Elements of all parameters."""
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("method", list_methods())
def test_closed_form_is_what_is_built(method: str) -> None:
    """For every method: formula, model on the meta device, and real model."""
    ffn = method_class(method).examples()[0]
    config = TransformerXLConfig(vocab_size=11, d_model=ffn.d_model, n_layers=ffn.n_layers, n_heads=3, d_head=5, ffn=ffn)
    with torch.device("meta"):
        meta = TransformerXL(config)
    assert config.num_params() == count(meta) == count(TransformerXL(config))


def test_parts_sum_to_the_whole() -> None:
    """Attention and the rest are counted as built."""
    config = small_config("sigma-moe")
    model = TransformerXL(config)
    blocks = sum(count(layer) for _, layer in model.ffn_layers())
    assert config.attention_params() == count(model.layers[0].attention)
    assert config.other_params() == count(model) - blocks
    assert config.num_params() - config.active_params() == 2 * (5 - 2) * 2 * 4 * 8


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name: str) -> None:
    """Blocks to the parameter, models to the million; dense and mixture are within 0.3 percent."""
    vocab_size, *blocks, dense_total, mixture_total = PUBLISHED[name]
    preset = get_preset(name)
    ffns = [method_class(method).from_shape(preset.shape) for method in ("dense", "sigma-moe")]
    assert [ffn.num_params() for ffn in ffns] == blocks
    totals = [preset.model(ffn, vocab_size).num_params() for ffn in ffns]
    assert [round(total / 1e6) for total in totals] == [dense_total, mixture_total]
    assert abs(totals[1] / totals[0] - 1) < 0.003


@pytest.mark.parametrize(
    ("d_model", "n_subkeys", "expected"),
    [(412, 62, 1_685_904), (1024, 89, 8_475_648), (512, 62, 2_095_104)],
    ids=["wt-s", "wt-b", "e8"],
)
def test_product_keys_have_the_published_sizes(d_model: int, n_subkeys: int, expected: int) -> None:
    """Four heads and one table of values."""
    assert PKMConfig(d_model=d_model, n_subkeys=n_subkeys, k=32, n_heads=4).num_params() == expected


@pytest.mark.parametrize("name", PRESETS)
def test_memory_is_one_context_and_four_in_evaluation(name: str) -> None:
    """For every preset."""
    preset = get_preset(name)
    assert (preset.memory, preset.eval_memory) == (preset.context, 4 * preset.context)


def test_preset_names_take_both_signs_and_offer_the_nearest() -> None:
    """Hyphen or underscore; a misspelt name is corrected."""
    assert get_preset("wt_s_star") is get_preset("wt-s-star")
    with pytest.raises(UserError, match="unknown preset 'wt-x'; fix: did you mean 'wt-"):
        get_preset("wt-x")
