"""What another package wrote for version 0.1 goes on working."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparseffn.ffn import BlockShape, config_from_json
from sparseffn.ffn.dense import DenseConfig
from sparseffn.ffn.sigma_moe import SigmaMoE, SigmaMoEConfig
from sparseffn.matching import match


@dataclass(frozen=True, kw_only=True, slots=True)
class OldConfig(DenseConfig):
    """A config in the words of 0.1."""

    name: ClassVar[str] = "old"
    knobs: ClassVar[tuple[str, ...]] = ("d_ff",)
    takes: ClassVar[tuple[str, ...]] = ("d_model", "d_ff")


def test_knobs_and_takes_are_understood() -> None:
    """Matching changes the knobs; a preset hands over what is taken, here neither depth nor dropout."""
    shape = BlockShape(d_model=8, d_ff=24, n_experts=2, expert_size=12, k=1, n_layers=3, dropout=0.5)
    config = OldConfig.from_shape(shape)
    assert config == OldConfig(d_model=8, d_ff=24)
    assert match(config, 2 * 8 * 40 + 48).config == config.replace(d_ff=40)
    assert (OldConfig.size_fields, OldConfig.preset_fields) == (("d_ff",), ("d_model", "d_ff"))


def test_knobs_and_takes_can_be_read() -> None:
    """A config that extends those of its base finds them."""
    assert SigmaMoEConfig.knobs == ("n_experts", "expert_size")  # pyright: ignore[reportAttributeAccessIssue]
    assert SigmaMoEConfig.takes == SigmaMoEConfig.preset_fields  # pyright: ignore[reportAttributeAccessIssue]


def test_configs_json_and_parameter_names_are_those_of_0_1() -> None:
    """A config builds its layer; stored configs and state dicts are read."""
    stored = {"method": "sigma-moe", "d_model": 8, "n_experts": 4, "expert_size": 2, "k": 2}
    layer = config_from_json(stored).build()
    assert isinstance(layer, SigmaMoE)
    assert list(layer.state_dict()) == ["router.selector", "experts.keys", "experts.values"]
