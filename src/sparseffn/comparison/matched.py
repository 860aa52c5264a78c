"""The methods of a comparison, each sized to the dense model's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sparseffn.errors import UnmatchedError, UserError
from sparseffn.ffn import FFNConfig, field_infos, method_class, parse_options
from sparseffn.ffn.dense import DenseConfig
from sparseffn.matching import TOLERANCE, Match, match
from sparseffn.models import ModelConfig
from sparseffn.models.presets import Preset

# Compute that differs more than this from the preset's K x G is marked in the table.
COMPUTE_TOLERANCE = 0.10


@dataclass(frozen=True)
class MethodChoice:
    """A method and the options that a user sets on it."""

    method: str
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return " ".join([self.method, *(f"{key}={value}" for key, value in self.options.items())])


@dataclass(frozen=True, kw_only=True)
class MatchedMethod:
    """A method sized to the dense model's parameters, in a model."""

    label: str
    match: Match
    model: ModelConfig
    marks: tuple[str, ...]
    """What a reader must know of the sizes."""

    @property
    def config(self) -> FFNConfig:
        return self.match.config


def parse_methods(words: Sequence[str]) -> list[MethodChoice]:
    """`dense topk k=128 sigma-moe` as methods: words with "=" are options of the method before them.

    Raises:
        UserError: an option comes first, or a method is named twice with the same options.
    """
    choices: list[tuple[str, dict[str, str]]] = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            choices.append((method_class(word).name, {}))
        elif not choices:
            raise UserError(f"an option must follow its method; got {word!r} first; fix: write METHOD {word}")
        else:
            choices[-1][1][key] = value
    parsed = [MethodChoice(method, options) for method, options in choices]
    labels = [choice.label for choice in parsed]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"each method must be named once; got {label!r} twice; fix: remove one or vary its options")
    return parsed


def match_methods(choices: Sequence[MethodChoice], preset: Preset, vocab_size: int) -> list[MatchedMethod]:
    """Every method at the preset's sizes, matched to the dense model.

    Raises:
        UnmatchedError: methods cannot be brought within 0.5% of the dense model's parameters; it names all of them.
        UserError: an option is unknown or out of range.
    """
    dense = preset.block(DenseConfig)
    other = preset.model(dense, vocab_size).other_params()
    found = [_match(choice, preset, vocab_size, dense.num_params(), other) for choice in choices]
    unequal = [f"{m.label} has {m.match.model_params:,} ({m.match.residual_percent:+.2f}%)" for m in found if not m.match.equal]
    if unequal:
        raise UnmatchedError(
            f"every method must come within {TOLERANCE:.1%} of the dense model's {found[0].match.model_target:,} parameters; "
            f"got {'; '.join(unequal)}; fix: change the options or leave the method out"
        )
    return found


def _match(choice: MethodChoice, preset: Preset, vocab_size: int, target: int, other: int) -> MatchedMethod:
    config_class = method_class(choice.method)
    options = parse_options(choice.method, config_class, choice.options)
    fixed = {key: value for key, value in options.items() if key not in ("d_model", "n_layers")}
    if len(fixed) < len(options):
        raise UserError("`d_model` and `n_layers` must be the preset's; got other values; fix: choose another --preset")
    config = preset.block(config_class).replace(**fixed)
    matched = match(config, target, n_blocks=preset.shape.n_layers, other_params=other)
    marks = [
        f"{key} is matched, not the {fixed[key]} asked for"
        for key in config.size_fields
        if key in fixed and getattr(matched.config, key) != fixed[key]
    ]
    marks += _compute_marks(matched.config, preset)
    return MatchedMethod(label=choice.label, match=matched, model=preset.model(matched.config, vocab_size), marks=tuple(marks))


def _compute_marks(config: FFNConfig, preset: Preset) -> list[str]:
    """Say where a sparse method computes another number of channels than the preset's K x G."""
    if config.active_channels == config.n_channels and "k" not in field_infos(type(config)):
        return []
    wanted = preset.shape.active_channels
    deviation = config.active_channels / wanted - 1
    if abs(deviation) <= COMPUTE_TOLERANCE:
        return []
    return [f"computes {config.active_channels} channels a token, {deviation:+.0%} against the preset's K x G = {wanted}"]
