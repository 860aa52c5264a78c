"""The gallery: a page for each registered method, from its docstring, its config and its counts; nothing here names one."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable

from selection_picture import N_TOKENS, SHAPE, selection_svg

from sparseffn.accounting import BlockCounts, count_block
from sparseffn.errors import UserError
from sparseffn.ffn import FFNConfig, describe, field_infos, list_methods, method_class
from sparseffn.ffn.options import FieldInfo
from sparseffn.matching import match
from sparseffn.models.presets import get_preset
from sparseffn.report.formats import count, percent
from sparseffn.report.markdown import markdown_table
from sparseffn.report.table import Cell, Table

# The sizes at which costs are counted: the paper's smallest model.
PRESET = "wt-s"
# A line of a docstring that begins an indented section.
_SECTION = re.compile(r"^([A-Z][\w ]+):\n((?:    .*\n?|\n)+)", re.MULTILINE)


def gallery_page() -> str:
    """All methods with their pictures, each leading to its page."""
    parts = [
        "# The methods",
        "Every method is a drop-in layer and a choice of which key-value pairs take part for a token. Squares are pairs, rows "
        f"are {N_TOKENS} random tokens; dark squares have a large coefficient, empty ones are not computed or zero. Lines "
        "separate experts. All layers hold about as many pairs; each is drawn from its own code, freshly initialised.",
    ]
    for name in list_methods():
        config_class = method_class(name)
        parts += [f"## [{name}]({name}.md)", describe(config_class), selection_svg(config_class.from_shape(SHAPE))]
    parts += ["## What they cost", _cost_lead(), markdown_table(_costs(list_methods()))]
    parts += ["Yours is missing? [A method is one file](../add-a-method.md), and it appears here by itself."]
    return "\n\n".join(parts) + "\n"


def method_page(name: str) -> str:
    """One method: equations, picture, cost, when to use it, options."""
    config_class = method_class(name)
    first, text, sections = docstring_parts(config_class)
    small = config_class.from_shape(SHAPE)
    parts = [f"# {name}", f"**{describe(config_class)}**", first, text]
    parts += ["## What it selects", selection_svg(small), _picture_caption(small)]
    parts += ["## What it costs", _cost_lead(), markdown_table(_costs(dict.fromkeys(("dense", name))))]
    parts += [f"## {title}\n\n{words}" for title, words in sections.items()]
    parts += ["## In code", _example(config_class), "## Options", options_table(config_class)]
    parts += [f"Source: {config_class.paper}. Reference: [`{config_class.__name__}`][{_full_name(config_class)}]."]
    return "\n\n".join(filter(None, parts)) + "\n"


def docstring_parts(config_class: type[FFNConfig]) -> tuple[str, str, dict[str, str]]:
    """The docstring of a method's file: its first line, the text with the equations, and its sections by title."""
    first, _, rest = (sys.modules[config_class.__module__].__doc__ or "").strip().partition("\n")
    sections = {
        title: re.sub(r"^    ", "", words, flags=re.MULTILINE).strip() for title, words in _SECTION.findall(rest + "\n")
    }
    # An equation a paragraph of its own.
    text = re.sub(r"^(\$\$ .* \$\$)$", r"\n\1\n", _SECTION.sub("", rest + "\n"), flags=re.MULTILINE)
    return first, text.strip(), sections


def _picture_caption(config: FFNConfig) -> str:
    return (
        f"*A fresh layer in training: {N_TOKENS} random tokens (rows), {config.n_channels} pairs (columns), of which "
        f"{config.active_channels} take part for each. Light squares have a small coefficient; a pair that takes part but is "
        "zero after the activation is empty.*"
    )


def _cost_lead() -> str:
    shape = get_preset(PRESET).shape
    return (
        f"One block of d_model {shape.d_model} with the parameters of the dense block of d_ff {shape.d_ff}; shares of what the "
        "dense block uses, computes and keeps for a token, from closed forms that the contract suite holds against the layer."
    )


def _costs(names: Iterable[str]) -> Table:
    shape = get_preset(PRESET).shape
    dense = count_block(method_class("dense").from_shape(shape))
    columns = ("method", "parameters", "used", "FLOPs", "FLOPs, training", "kept for backward", "pairs")
    return Table.of(columns, [_cost_row(name, dense) for name in names])


def _at_equal_parameters(name: str) -> FFNConfig:
    """The method with the dense block's parameters; at the preset's own sizes where it cannot be matched."""
    shape = get_preset(PRESET).shape
    config = method_class(name).from_shape(shape)
    try:
        return match(config, method_class("dense").from_shape(shape).num_params()).config
    except UserError:
        return config


def _cost_row(name: str, dense: BlockCounts) -> list[str | Cell]:
    counts = count_block(_at_equal_parameters(name))
    costs = ("active_params", "forward_flops", "training_flops", "saved_bytes")
    ratios = [percent(getattr(counts, cost) / getattr(dense, cost)) for cost in costs]
    return [Cell(name, link=f"{name}.md"), count(counts.total_params), *ratios, percent(counts.active_fraction)]


def _example(config_class: type[FFNConfig]) -> str:
    config = _at_equal_parameters(config_class.name)
    infos = field_infos(config_class).values()
    given = {info.name: getattr(config, info.name) for info in infos if getattr(config, info.name) != info.default}
    fields = ", ".join(f"{key}={value!r}" for key, value in given.items() if key != "n_layers")
    return (
        f'```python\nimport torch\nimport sparseffn\n\nlayer = sparseffn.build("{config_class.name}", {fields})\n'
        f"y, stats = layer(torch.randn(2, 10, {config.d_model}), return_stats=True)\n```"
    )


def options_table(config_class: type[FFNConfig]) -> str:
    """Every field of a config: meaning, default, range."""
    rows = [(info.name, info.option.doc, _default(info), _values(info)) for info in field_infos(config_class).values()]
    return markdown_table(Table.of(("option", "meaning", "default", "values"), rows, n_words=4))


def _values(info: FieldInfo) -> str:
    kind = ", ".join(info.choices) or (
        "true, false" if info.kind is bool else f"{info.kind.__name__}, {info.option.range_text()}"
    )
    return kind + (" or none" if info.optional else "")


def _default(info: FieldInfo) -> str:
    return "required" if info.default is dataclasses.MISSING else str(info.default).lower()


def _full_name(config_class: type[FFNConfig]) -> str:
    return f"{config_class.__module__}.{config_class.__qualname__}"
