"""Drawings of one run's `analysis.json`: active channels, use of units, co-occurrence, tokens by expert, routing over training.

Legible in print at the size they have (9 pt, one column, or the text's width for tables of panels), in grey, and for people who
do not tell colours apart: markers and line styles go with every colour; heat maps run from light to dark.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparseffn.report import formats, plotting
from sparseffn.report.plotting import Line, Plot
from sparseffn.report.usage_plots import Shown, active_plot, cooccurrence_plot, usage_plot
from sparseffn.results.analysis_result import AnalysisResult, RoutingOverTraining, ServedByExpert
from sparseffn.results.comparison_result import Cooccurrence

# Experts on such a picture, and tokens of each that fit on a line: bytes and characters, or words.
_MAX_ROWS, _SHORT_CELLS, _LONG_CELLS = 16, 6, 4
_ROW_HEIGHT = 0.23
# Characters that a token may have in a wide cell, where it is cut, and in a narrow one.
_TOKEN_LENGTH, _SHORT_LENGTH = 9, 4


def analysis_plots(analysis: AnalysisResult) -> list[Plot]:
    """Every drawing of a run."""
    plots = [active_channels_plot(analysis)]
    if any(share > 0 for layer in analysis.usage for share in layer.share):
        plots.append(usage_plot(analysis.usage, Shown(analysis.run.method, analysis.unit, "usage")))
    middle = len(analysis.cooccurrence) // 2
    if analysis.cooccurrence and analysis.cooccurrence[middle] is not None:
        plots.append(pairs_plot(analysis, middle))
    plots += [_tokens_plot(analysis, layer) for layer in range(len(analysis.tokens or ()))]
    return plots + (_training_plots(analysis, analysis.training) if analysis.training else [])


def active_channels_plot(analysis: AnalysisResult, *, label: str = "", name: str = "active") -> Plot:
    """Active channels (or values) of every layer."""
    unit = "channels" if analysis.unit == "experts" else analysis.unit
    return active_plot(analysis.active, Shown(label or analysis.run.method, unit, name))


def pairs_plot(analysis: AnalysisResult, layer: int, *, label: str = "", name: str = "cooccurrence") -> Plot:
    """Experts of one layer that are selected together; the layer must select several."""
    matrix = analysis.cooccurrence[layer]
    assert matrix is not None, "the layer selects several experts"
    shown = Shown(label or analysis.run.method, analysis.unit, name)
    return cooccurrence_plot(Cooccurrence(layer=layer, matrix=matrix), shown)


def _tokens_plot(analysis: AnalysisResult, layer: int) -> Plot:
    """A picture of text: the most loaded experts, each one's load and the tokens that it serves most."""
    assert analysis.tokens is not None, "there is a table of tokens"
    experts = sorted(analysis.tokens[layer], key=lambda e: (-e.load, e.expert))[:_MAX_ROWS]
    n_experts = len(analysis.tokens[layer])
    title = f"Tokens by expert: {analysis.run.method}, layer {layer}"
    top = max(expert.load for expert in experts) or 1.0
    n_cells = _cells(experts)
    with plotting.drawing(plotting.TEXT_WIDTH, _ROW_HEIGHT * (len(experts) + 1.2)) as (figure, axes):
        axes.set_axis_off()
        axes.set(xlim=(0, 1), ylim=(len(experts) - 0.4, -1.6))
        small = plotting.FONT_SIZE - 1
        head = {"color": plotting.GREY, "fontsize": small, "va": "center"}
        axes.text(0.045, -1.05, "expert", ha="right", **head)
        axes.text(0.06, -1.05, "share of selections", **head)
        axes.text(0.25, -1.05, "tokens, each with its lift", **head)
        for row, expert in enumerate(experts):
            if row % 2:
                axes.axhspan(row - 0.5, row + 0.5, color=plotting.HAIRLINE, alpha=0.5, linewidth=0, zorder=0)
            axes.text(0.045, row, str(expert.expert), ha="right", va="center")
            axes.barh(row, 0.095 * expert.load / top, left=0.06, height=0.55, color=plotting.PALETTE[1])
            axes.text(0.228, row, formats.percent(expert.load), ha="right", va="center", fontsize=small)
            for cell, token in enumerate(expert.tokens[:n_cells]):
                text = axes.text(0.25 + cell * 0.75 / n_cells, row, _cut(token.text), va="center")
                place = {"xy": (1, 0.5), "xycoords": text, "xytext": (4, 0), "textcoords": "offset points"}
                axes.annotate(formats.lift(token.lift), **place, va="center", color=plotting.GREY, fontsize=small)
        busiest = experts[0]
        first = f", first {busiest.tokens[0].text}" if busiest.tokens else ""
        description = f"Expert {busiest.expert} has the most selections, {formats.percent(busiest.load)}{first}"
        shown = "All" if len(experts) == n_experts else f"The {len(experts)} most used of {n_experts}"
        caption = (
            f"{shown} experts by their share of the selections (an even share is {formats.percent(1 / n_experts)}), and the "
            "tokens that set what each sees apart from the text. Lift: how many times as frequent the token is among the "
            "expert's as in the text. ␣ is a space."
        )
        return plotting.finished(figure, name=f"tokens-{layer}", title=title, caption=caption, description=description)


def _cells(experts: Sequence[ServedByExpert]) -> int:
    """How many tokens fit on a line."""
    longest = max((len(t.text) for expert in experts for t in expert.tokens[:_SHORT_CELLS]), default=0)
    return _SHORT_CELLS if longest <= _SHORT_LENGTH else _LONG_CELLS


def _cut(text: str) -> str:
    return text if len(text) <= _TOKEN_LENGTH else f"{text[: _TOKEN_LENGTH - 1]}…"


def _training_plots(analysis: AnalysisResult, training: RoutingOverTraining) -> list[Plot]:
    """Entropy and largest load at each step, and how much of a token's experts stays from step to step."""
    points, stability = training.points, training.stability
    if len(points) < 2:
        return []
    steps, chance = [point.step for point in points], training.chance.jaccard
    tokens = f"{formats.integer(training.n_tokens)} validation tokens"
    few = " The run kept only its last checkpoints' routing." if training.source == "checkpoints" else ""
    label = analysis.run.method
    plots = [
        _over_steps(
            steps,
            [[layer.entropy for layer in point.layers] for point in points],
            name="load-entropy",
            title=f"Entropy of the load over training: {label}",
            y_label="entropy of the load, even = 1",
            level=(1.0, "even", -3),
            caption=f"Entropy of the experts' shares of the selections over its maximum, on {tokens}: 1 when all are used "
            f"alike, 0 when one takes all.{few}",
        ),
        _over_steps(
            steps,
            [[layer.largest_over_mean for layer in point.layers] for point in points],
            name="largest-load",
            title=f"Largest load over training: {label}",
            y_label="largest over mean load",
            level=(1.0, "even", 3),
            caption=f"Load of the most used expert over the mean, on {tokens}: 1 when all are used alike.{few}",
        ),
    ]
    # One comparison is a number for the table, not a line.
    if len(stability) > 1:
        plots.append(
            _over_steps(
                [interval.to for interval in stability],
                [[layer.jaccard for layer in interval.layers] for interval in stability],
                name="stability",
                title=f"Routing stability over training: {label}",
                y_label="overlap with the point before (Jaccard)",
                level=(chance, "chance", 3),
                caption="Of the experts that a token selects now or selected at the point before, the share that it selects "
                f"both times; mean over {tokens}. Random choices would agree to {formats.percent(chance)}. At the end the "
                f"learning rate is near 0, and nothing moves.{few}",
            )
        )
    return plots


def _over_steps(
    steps: Sequence[int],
    by_step: Sequence[Sequence[float]],
    *,
    name: str,
    title: str,
    y_label: str,
    level: tuple[float, str, float],
    caption: str,
) -> Plot:
    """A line for each layer; `by_step` has the layers' values at each step, `level` a height, its name and its rise."""
    layers = list(zip(*by_step, strict=True))
    x = [float(step) for step in steps]
    lines = [
        Line(f"layer {layer}", x, list(values), plotting.layer_style(layer, len(layers), len(x)))
        for layer, values in enumerate(layers)
    ]
    heights = [level[0], *(y for values in layers for y in values)]
    room, margin = 0.02 * (max(x) - min(x)) or 1.0, 0.08 * (max(heights) - min(heights)) or 0.1

    def adjust(axes: plotting.Axes) -> None:
        axes.set(xlim=(min(x) - room, max(x) + room), ylim=(min(heights) - margin, max(heights) + margin))
        plotting.reference(axes, level[0], level[1], x=0.99, rise=level[2])

    return plotting.line_plot(
        lines,
        name=name,
        title=title,
        caption=caption,
        axes_names=("training step", y_label),
        adjust=adjust,
        description="; ".join(f"{line.label} ends at {line.y[-1]:.2f}" for line in lines),
    )
