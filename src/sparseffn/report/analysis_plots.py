"""Drawings of one run's `analysis.json`: active channels, use of units, co-occurrence, tokens by expert, routing over training.

Legible in print at the size they have (9 pt, one column, or the text's width for tables of panels), in grey, and for people who
do not tell colours apart: markers and line styles go with every colour; heat maps run from light to dark.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparseffn.report import formats
from sparseffn.report.comparison_plots import active_plots, cooccurrence_plots, usage_plots
from sparseffn.report.plotting import (
    FONT_SIZE,
    GREY,
    HAIRLINE,
    HEIGHT,
    PALETTE,
    TEXT_WIDTH,
    WIDTH,
    Line,
    Plot,
    drawing,
    finished,
    label_ends,
    layer_style,
    reference,
)

Analysis = Mapping[str, Any]

# Experts on such a picture, and tokens of each that fit on a line: bytes and characters, or words.
_MAX_ROWS, _SHORT_CELLS, _LONG_CELLS = 16, 6, 4
_ROW_HEIGHT = 0.23
# Characters that a token may have in a wide cell, where it is cut, and in a narrow one.
_TOKEN_LENGTH, _SHORT_LENGTH = 9, 4


def analysis_plots(analysis: Analysis) -> list[Plot]:
    """Every drawing of a run.

    Raises:
        UserError: matplotlib is not installed.
    """
    plots = [*active_plots(channels_result(analysis), pixels=True), *usage_plots(units_result(analysis), pixels=True)]
    layer = middle_layer(analysis)
    if layer is not None:
        plots += cooccurrence_plots(units_result(analysis, layer), pixels=True)
    # One run needs no number in its figures' names.
    plots = [dataclasses.replace(plot, name=plot.name.removesuffix("-0")) for plot in plots]
    if analysis["tokens"]:
        plots += [_tokens_plot(analysis, layer) for layer in range(len(analysis["tokens"]))]
    if analysis["training"]:
        plots += _training_plots(analysis)
    return plots


def units_result(analysis: Analysis, layer: int | None = None, *, label: str | None = None) -> dict[str, Any]:
    """An analysis as the page of a comparison takes it: its units, and the co-occurrence of one layer."""
    method = {"label": label or analysis["run"]["method"], "unit": analysis["unit"], "usage": analysis["usage"]}
    if layer is not None:
        method["cooccurrence"] = {"layer": layer, "matrix": analysis["cooccurrence"][layer]}
    return {"methods": [method]}


def channels_result(analysis: Analysis, *, label: str | None = None) -> dict[str, Any]:
    """An analysis as the page of a comparison takes it: its active channels (or values)."""
    unit = "channels" if analysis["unit"] == "experts" else analysis["unit"]
    return {"methods": [{"label": label or analysis["run"]["method"], "unit": unit, "active": analysis["active"]}]}


def middle_layer(analysis: Analysis) -> int | None:
    """The layer whose co-occurrence is drawn; None where no layer selects several experts."""
    matrices = analysis["cooccurrence"]
    layer = len(matrices) // 2
    return layer if matrices and matrices[layer] is not None else None


def _tokens_plot(analysis: Analysis, layer: int) -> Plot:
    """A picture of text: the most loaded experts, each one's load and the tokens that it serves most."""
    experts = sorted(analysis["tokens"][layer], key=lambda e: (-e["load"], e["expert"]))[:_MAX_ROWS]
    n_experts = len(analysis["tokens"][layer])
    title = f"Tokens by expert: {analysis['run']['method']}, layer {layer}"
    top = max(expert["load"] for expert in experts) or 1.0
    n_cells = _cells(experts)
    with drawing(TEXT_WIDTH, _ROW_HEIGHT * (len(experts) + 1.2)) as (figure, axes):
        axes.set_axis_off()
        axes.set(xlim=(0, 1), ylim=(len(experts) - 0.4, -1.6))
        small = FONT_SIZE - 1
        head = {"color": GREY, "fontsize": small, "va": "center"}
        axes.text(0.045, -1.05, "expert", ha="right", **head)
        axes.text(0.06, -1.05, "share of selections", **head)
        axes.text(0.25, -1.05, "tokens, each with its lift", **head)
        for row, expert in enumerate(experts):
            if row % 2:
                axes.axhspan(row - 0.5, row + 0.5, color=HAIRLINE, alpha=0.5, linewidth=0, zorder=0)
            axes.text(0.045, row, str(expert["expert"]), ha="right", va="center")
            axes.barh(row, 0.095 * expert["load"] / top, left=0.06, height=0.55, color=PALETTE[1])
            axes.text(0.228, row, formats.percent(expert["load"]), ha="right", va="center", fontsize=small)
            for cell, token in enumerate(expert["tokens"][:n_cells]):
                text = axes.text(0.25 + cell * 0.75 / n_cells, row, _cut(token["text"]), va="center")
                place = {"xy": (1, 0.5), "xycoords": text, "xytext": (4, 0), "textcoords": "offset points"}
                axes.annotate(formats.lift(token["lift"]), **place, va="center", color=GREY, fontsize=small)
        busiest = experts[0]
        first = f", first {busiest['tokens'][0]['text']}" if busiest["tokens"] else ""
        description = f"Expert {busiest['expert']} has the most selections, {formats.percent(busiest['load'])}{first}"
        shown = "All" if len(experts) == n_experts else f"The {len(experts)} most used of {n_experts}"
        caption = (
            f"{shown} experts by their share of the selections (an even share is {formats.percent(1 / n_experts)}), and the "
            "tokens that set what each sees apart from the text. Lift: how many times as frequent the token is among the "
            "expert's as in the text. ␣ is a space."
        )
        return finished(figure, name=f"tokens-{layer}", title=title, caption=caption, description=description)


def _cells(experts: Sequence[Mapping[str, Any]]) -> int:
    """How many tokens fit on a line."""
    longest = max((len(t["text"]) for expert in experts for t in expert["tokens"][:_SHORT_CELLS]), default=0)
    return _SHORT_CELLS if longest <= _SHORT_LENGTH else _LONG_CELLS


def _cut(text: str) -> str:
    return text if len(text) <= _TOKEN_LENGTH else f"{text[: _TOKEN_LENGTH - 1]}…"


def _training_plots(analysis: Analysis) -> list[Plot]:
    """Entropy and largest load at each step, and how much of a token's experts stays from step to step."""
    training = analysis["training"]
    points, stability = training["points"], training["stability"]
    if len(points) < 2:
        return []
    chance = training["chance"]["jaccard"]
    tokens = f"{formats.integer(training['n_tokens'])} validation tokens"
    few = " The run kept only its last checkpoints' routing." if training["source"] == "checkpoints" else ""
    label = analysis["run"]["method"]
    plots = [
        _over_steps(
            _by_layer(points, "step", lambda at: at["entropy"]),
            name="load-entropy",
            title=f"Entropy of the load over training: {label}",
            y_label="entropy of the load, even = 1",
            level=(1.0, "even", -3),
            caption=f"Entropy of the experts' shares of the selections over its maximum, on {tokens}: 1 when all are used "
            f"alike, 0 when one takes all.{few}",
        ),
        _over_steps(
            _by_layer(points, "step", lambda at: at["largest_over_mean"]),
            name="largest-load",
            title=f"Largest load over training: {label}",
            y_label="largest over mean load",
            level=(1.0, "even", 3),
            caption=f"Load of the most used expert over the mean, on {tokens}: 1 when all are used alike.{few}",
        ),
        _over_steps(
            _by_layer(stability, "to", lambda at: at["jaccard"]),
            name="stability",
            title=f"Routing stability over training: {label}",
            y_label="overlap with the point before (Jaccard)",
            level=(chance, "chance", 3),
            caption=f"Of the experts that a token selects now or selected at the point before, the share that it selects both "
            f"times; mean over {tokens}. Random choices would agree to {formats.percent(chance)}. At the end the learning rate "
            f"is near 0, and nothing moves.{few}",
        ),
    ]
    # One comparison is a number for the table, not a line.
    return plots if len(stability) > 1 else plots[:2]


def _by_layer(points: Sequence[Mapping[str, Any]], step: str, value: Callable[[Mapping[str, float]], float]) -> list[Line]:
    """A line for each layer."""
    n_layers = len(points[0]["layers"])
    x = [float(point[step]) for point in points]
    return [
        Line(
            label=f"layer {layer}",
            x=x,
            y=[value(point["layers"][layer]) for point in points],
            style=layer_style(layer, n_layers, len(points)),
        )
        for layer in range(n_layers)
    ]


def _over_steps(
    lines: Sequence[Line], *, name: str, title: str, y_label: str, level: tuple[float, str, float], caption: str
) -> Plot:
    values = [y for line in lines for y in line.y] + [level[0]]
    margin = 0.08 * (max(values) - min(values)) or 0.1
    with drawing(WIDTH, HEIGHT) as (figure, axes):
        for line in lines:
            axes.plot(line.x, line.y, **line.style)
        steps = [x for line in lines for x in line.x]
        room = 0.02 * (max(steps) - min(steps)) or 1.0
        axes.set(xlabel="training step", ylabel=y_label)
        axes.set(xlim=(min(steps) - room, max(steps) + room), ylim=(min(values) - margin, max(values) + margin))
        reference(axes, level[0], level[1], x=0.99, rise=level[2])
        label_ends(axes, lines)
        description = "; ".join(f"{line.label} ends at {line.y[-1]:.2f}" for line in lines)
        return finished(figure, name=name, title=title, caption=caption, description=description)
