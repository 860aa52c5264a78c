"""Conclusions that pages draw from results, each as a question to the files."""

from __future__ import annotations

import math
import statistics

from found import Found, rounded
from msgspec import structs

from sparseffn.paper.claims import FLAT, LEVEL, STEEP
from sparseffn.paper.collapse import middle_of
from sparseffn.paper.experiments import judged, losses_of
from sparseffn.paper.published import published_values
from sparseffn.paper.rules import Contrast, rules
from sparseffn.report.growth_report import Exponent, exponents, points_of
from sparseffn.report.limits_report import limits_table
from sparseffn.report.study_contrasts import contrast_table
from sparseffn.results.bench_result import ExpertsResult, FiguresResult, LayerResult, OverPeer, WholeResult, WholeRow
from sparseffn.results.convert_result import read_conversions
from sparseffn.results.experiment_result import DecidedContrast
from sparseffn.results.study_result import StartRow
from sparseffn.stats import Difference, difference, holm, p_value
from sparseffn.storage import read, read_json

_GAP = {"sigma-MoE": 1.0, "dense": -1.0}


def ratio(row: StartRow, key: str = "variation") -> float:
    measured, predicted = row.measured[key], row.predicted[key]
    assert measured is not None and predicted is not None, key
    return measured[0] / predicted


def median(row: StartRow, key: str = "variation") -> float:
    measured = row.measured[key]
    assert measured is not None, key
    return measured[0]


def explained(found: Found, n_experts: int) -> float:
    return median(found.load("gaussian", "free", n_experts=n_experts), "norm_correlation") ** 2


def paired(found: Found) -> list[float]:
    sigma, dense = found.cell("table3", "sigma-moe"), found.cell("table3", "dense")
    return [round(ours - theirs, 4) for ours, theirs in zip(sigma.values, dense.values, strict=True)]


def against_zero(values: list[float]) -> Difference:
    return difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))


def includes_zero(values: list[float]) -> bool:
    return not against_zero(values).decided


def rates_of(found: Found) -> dict[float, list[float]]:
    rates = read_json(found.folder / "learning-rates.json", fix="-")["cpu"]["rates"]
    return {rate["lr"]: rate["valid"] for rate in rates}


def chosen_rate(found: Found) -> bool:
    """2e-3 the best of one seed, 4e-3 of the other and of the mean."""
    rates = rates_of(found)
    best = [min(rates, key=lambda lr, seed=seed: rates[lr][seed]) for seed in range(2)]
    return len(rates) == 4 and best == [0.002, 0.004] and min(rates, key=lambda lr: statistics.fmean(rates[lr])) == 0.004


def all_undecided(found: Found) -> bool:
    return all(row.cells[-2].text == "undecided" for row in contrast_table(list(found.studies.values())).rows)


def decided_here(found: Found) -> list[str]:
    """Of the claims that studies test too."""
    claims = [claim for claim in found.claims().claims if claim.numbers in ("10", "11", "12")]
    return [claim.words.partition(": ")[2] for claim in claims if claim.verdict != "undecided"]


def lowest_baseline(found: Found) -> bool:
    return all(first.test.mean < v.test.mean and first.valid.mean < v.valid.mean for first, v in found.variants())  # type: ignore[union-attr]


def shrinking(found: Found) -> bool:
    """Wider after 50 steps than at the end, and for the missing entropy loss the reverse."""
    shrink = ("softmax before top-k", "softmax after top-k", "standard, equal-norm", "switch, equal-norm")
    return all(abs(found.gap(name, 50)) > abs(found.gap(name, 300)) for name in shrink) and all(
        abs(found.gap(name, 50)) < abs(found.gap(name, 300)) for name in ("neither", "expert dropout")
    )


def equal_halves(found: Found) -> bool:
    free, equal = (median(found.load("gaussian", rows, k=16)) for rows in ("free", "equal-norm"))
    return abs(free / equal - 1) < 0.01


def unevenness(found: Found) -> list[int]:
    """Of 32 experts on text over Gaussian tokens, free rows and rows of one norm."""
    return [round(median(found.load("text", r)) / median(found.load("gaussian", r))) for r in ("free", "equal-norm")]


def cosines(found: Found) -> bool:
    rows = found.loads("text")
    return all(abs(1 / ratio(row) - 1) < 0.055 for row in rows if row.k >= 4) and all(
        1.05 < 1 / ratio(row) < 1.25 for row in rows if row.k < 4
    )


def evening_out(found: Found) -> bool:
    """Of the experiment on collapse."""
    runs = found.experiment("collapse").runs
    worse = [
        (run.candidate, run.seed) for run in runs for layer in run.loads if layer.entropy[-1] < layer.entropy[middle_of(layer)]
    ]
    return len(runs) == 10 and worse == [("Switch, released", 300), ("softmax after top-k, released", 301)]


def line(found: Found, *widths: int) -> dict[str, float]:
    """Weights of the slope of sigma-MoE's gap to dense over the logarithm (base 2) of dense's parameters."""
    size = {one.name: math.log2(one.params) for one in found.experiment("scaling").candidates}
    x = [size[f"dense, {width}"] for width in widths]
    mean = statistics.fmean(x)
    slopes = [(value - mean) / sum((other - mean) ** 2 for other in x) for value in x]
    ours, theirs = ({f"{name}, {w}": s * sign for w, s in zip(widths, slopes, strict=True)} for name, sign in _GAP.items())
    return ours | theirs


def gap(width: int) -> dict[str, float]:
    return {f"{name}, {width}": sign for name, sign in _GAP.items()}


def kept(width: int) -> dict[str, float]:
    return {f"sigma-MoE, {width}": 1.0, f"dense, {width}": -0.5, f"dense of K G, {width}": -0.5}


def scaled(found: Found, weights: dict[str, float]) -> tuple[float, float]:
    """Interval of a contrast that the rule did not plan, as `Found.interval` has those that it did."""
    rule = structs.replace(rules()["scaling"], contrasts=(Contrast(name="unplanned", words="", weights=weights),))
    (one,) = judged(rule, losses_of(found.experiment("scaling").runs, "test"))
    return rounded(one)


def open_gaps(found: Found) -> bool:
    """Of all widths but the smallest."""
    return all(low < 0 < high for low, high in (scaled(found, gap(width)) for width in (96, 128, 224)))


def largest_keeps(found: Found) -> bool:
    return [width for width in (48, 96, 128, 224) if scaled(found, kept(width))[1] < 0] == [224]


def width_gains(found: Found) -> bool:
    """What dense is better by than a quarter of its pairs: in the mean of the widths, and at 96 within the interval."""
    gains = [{f"dense of K G, {width}": 1.0, f"dense, {width}": -1.0} for width in (48, 96, 128, 224)]
    mean = {name: weight / 4 for gain in gains for name, weight in gain.items()}
    return scaled(found, mean) == (2.7, 6.8) and scaled(found, gains[1])[0] < 0


def open_by_own_seeds(found: Found) -> bool:
    """No claim on the tables' losses is decided by its own two seeds, paired, corrected for the number that is tested."""
    tested = [c for c in found.claims().claims if c.topic == "loss" and c.numbers != "-" and c.p is not None]
    two = all(len(claim.values) == 2 for claim in tested)
    return two and min(holm([p_value(against_zero(claim.values), freedom=1) for claim in tested])) >= LEVEL


def dying(found: Found) -> bool:
    """Layers of the collapse experiment with more dead experts at the end than in the middle."""
    more = [
        (run.candidate, round(100 * layer.dead[middle_of(layer)]), round(100 * layer.dead[-1]))
        for run in found.experiment("collapse").runs for layer in run.loads if layer.dead[-1] > layer.dead[middle_of(layer)]
    ]  # fmt: skip
    return (
        len(more) == 3 and {name for name, *_ in more} == {"Switch, released"} and max(more, key=lambda m: m[2])[1:] == (6, 31)
    )


def exponents_of(found: Found, quantity: str) -> dict[int, Exponent]:
    """Of sigma-MoE, by figure."""
    measured = read(found.folder / "bench-figures-2-cores.json", FiguresResult, fix="measure again")
    fits = {figure: exponents(points_of(measured, figure))["sigma-moe", quantity] for figure in measured.figures}
    return {figure: fit for figure, fit in fits.items() if fit is not None}


def linear_times(found: Found) -> bool:
    """Within how much of 1 the exponents over d_model and G are; of figure 8 nothing is known."""
    times = exponents_of(found, "time")
    off = {figure: round(max(1 - low, high - 1), 2) for figure, (_, low, high) in times.items()}
    includes = all(times[figure][1] <= 1 <= times[figure][2] for figure in (2, 8, 10, 11))
    return includes and off[2] <= 0.25 and off[11] <= 0.06 and off[10] <= 0.4 and off[8] > 1


def whole_rows(found: Found) -> list[WholeRow]:
    result = read(found.folder / "bench-hf-2-cores.json", WholeResult, fix="measure again")
    return [row for row in result.rows if not row.peer]


# Of decoding within the layers and of the model, and of the prompt in both.
_AIMS = {"layers": 1.8, "model": 1.5, "prompt": 1.3, "its layers": 1.3}


def _times_faster(row: WholeRow) -> dict[str, tuple[OverPeer | None, float | None]]:
    """What was measured, and the most that the same run allows."""
    found = {}
    for time, layers, model in ((row.decoding, "layers", "model"), (row.prompt, "its layers", "prompt")):
        if time is not None and time.limit is not None:
            found[layers] = time.layers_over_fastest_hf, time.limit.layers_most_times_faster
            found[model] = time.over_fastest_hf, time.limit.most_times_faster
    return found


def reached_by_models(found: Found) -> bool:
    """1.8 of the layers and 1.5 of the model in decoding, 1.3 for the prompt."""
    reached = {
        (row.model, row.dtype, what)
        for row in whole_rows(found)
        for what, (over, _) in _times_faster(row).items()
        if over is not None and over.times_faster >= _AIMS[what]
    }
    prompts = {("qwen3-moe", "float32"), ("granite-1b", "float32"), ("granite-1b", "bfloat16")}
    models = {("olmoe", "float32"), ("granite-1b", "float32"), ("granite-1b", "bfloat16")}
    return reached == (
        {(*one, what) for one in prompts for what in ("prompt", "its layers")}
        | {(*one, "model") for one in models}
        | {("granite-1b", "float32", "layers")}
    )


def beyond_reach(found: Found) -> set[tuple[str, str, str]]:
    """Aims that the rest of the model and the experts' limits forbid."""
    return {
        (row.model, row.dtype, what)
        for row in whole_rows(found)
        for what, (_, most) in _times_faster(row).items()
        if most is not None and most < _AIMS[what]
    }


def layers_of_olmoe(found: Found) -> list[int]:
    """Milliseconds of a decoded token, and what experts that return zeros leave of them."""
    (row,) = (row for row in whole_rows(found) if (row.model, row.dtype) == ("olmoe", "bfloat16"))
    assert row.decoding.limit is not None, "it is ours"
    return [round(1000 * seconds) for seconds in (row.decoding.layers.median_s, row.decoding.limit.layers_rest_s)]


def change_of_topk(found: Found, context: int) -> float:
    """Percent of perplexity that half of the pairs cost, in windows of so many tokens."""
    results = read_conversions(found.folder / "convert")
    (one,) = [r for r in results if r.facts.options == {"k": 768} and r.facts.context == context]
    assert one.filled.change is not None, "it is compared with the dense model"
    return round(100 * one.filled.change, 1)


def gains_of_copies(found: Found) -> tuple[float, float]:
    """Least and most percent by which copies of the whole block, distilled, end below the dense model's perplexity."""
    results = [result for result in read_conversions(found.folder / "convert") if result.facts.fill == "upcycle"]
    copies = [result for result in results if not result.facts.fill_options.get("redraw")]
    changes = [result.converted.change for result in copies]
    assert changes and None not in changes, "they are compared with the dense model"
    below = [round(-100 * change, 1) for change in changes if change is not None]
    return min(below), max(below)


def flat_is_open(found: Found) -> bool:
    _, low, high = exponents_of(found, "time")[9]
    return low < FLAT < high < STEEP


def sublinear_memory(found: Found) -> bool:
    memory = {figure: (round(low, 2), round(high, 2)) for figure, (_, low, high) in exponents_of(found, "memory").items()}
    less = all(memory[figure][1] < 1 for figure in (2, 10, 11))
    return less and memory[8][0] < 1 < memory[8][1] and memory[9] == (0.0, 0.0)


def no_better_at_96(found: Found) -> bool:
    """Dense, by the means of seeds."""
    small, large = (statistics.mean(run.test for run in found.of("scaling", f"dense, {width}")) for width in (48, 96))
    return large >= small


def other_choices(found: Found) -> list[DecidedContrast]:
    """Ablations of all but K."""
    return [one for one in found.experiment("ablations").contrasts if not one.name.startswith("27")]


def left_open(found: Found) -> bool:
    """The other choices are bounded."""
    rest = other_choices(found)
    lows, highs = zip(*(found.interval("ablations", one.name) for one in rest), strict=True)
    return {one.verdict for one in rest} == {"bounded"} and highs == (0.8, 0.4, 0.4, 0.4) and min(lows) == -1.2


def by_another_table(found: Found) -> bool:
    """Published effects of the four with table 3's perplexity of sigma-MoE, and the upper ends of their intervals."""
    table3, table10 = (math.log(published_values(table)["sigma-moe", "WT-S"]) for table in ("table3", "table10"))
    less = 100 * (table3 / table10 - 1)
    rest = {one.name: one for one in other_choices(found)}
    inside = {name for name, one in rest.items() if one.published_percent - less < one.high_percent}
    hair = rest["12"].published_percent - less - rest["12"].high_percent
    return inside == {"10", "11"} and 0 < hair < 0.1


def uneven_without(found: Found) -> bool:
    """Mean busiest experts on validation."""
    loads = [[run.load.valid for run in found.of("ablations", name) if run.load] for name in ("sigma-MoE", "no entropy loss")]
    return [round(statistics.mean(of), 2) for of in loads] == [1.82, 2.46]


def scatter(found: Found) -> bool:
    """Standard deviations of the six differences between seeds, in percent of sigma-MoE's loss."""
    unit = statistics.mean(run.test for run in found.of("ablations", "sigma-MoE")) / 100
    each = [statistics.stdev(one.values) / unit for one in found.experiment("ablations").contrasts]
    return (round(min(each), 1), round(max(each), 1)) == (0.4, 0.8)


def weak_by_that_scatter(found: Found) -> bool:
    """Softmax before top-k, two seeds, with the scatter of softmax after top-k: normal theory, corrected as in the tables."""
    tested = {c.words: c for c in found.claims().claims if c.topic == "loss" and c.numbers != "-" and c.p is not None}
    (before,) = [words for words in tested if "softmax before top-k" in words]
    assert tested[before].percent is not None
    after = found.contrast("ablations", "10").values
    unit = statistics.mean(run.test for run in found.of("ablations", "sigma-MoE")) / 100
    z = tested[before].percent.difference / (statistics.stdev(after) / unit / math.sqrt(2))
    p = {words: claim.p for words, claim in tested.items()} | {before: math.erfc(abs(z) / math.sqrt(2))}
    return dict(zip(p, holm(list(p.values())), strict=True))[before] >= LEVEL


def released_sbase(found: Found) -> tuple[float, float]:
    """Interval of its difference from the paper's form, in percent."""
    (one,) = [c for c in found.claims().claims if c.words.startswith("s-base") and "differs from the paper's form" in c.words]
    assert one.percent is not None
    return round(one.percent.low, 1), round(one.percent.high, 1)


def rates_of_gated(found: Found) -> list[int]:
    """Percent of the measured rate of products: Hugging Face's fastest forward, ours, ours with gradients; the larger shape."""
    result = read(found.folder / "bench-experts-2-cores.json", ExpertsResult, fix="measure again")
    (row,) = [
        row
        for row in result.rows
        if (row.shape, row.dtype, row.tokens, row.label) == ("2048x1024x64x8", "bfloat16", 512, "sparseffn")
    ]
    assert row.training is not None and row.forward.over_fastest_hf is not None
    forward, training = (100 * of.limit_arithmetic_s / of.median_s for of in (row.forward, row.training))
    return [round(forward / row.forward.over_fastest_hf.times_faster), round(forward), round(training)]


_LAYERS = ("bench-layer-paper-2-cores-bfloat16", "bench-layer-paper-2-cores")


def scattered_over_long_pass(found: Found) -> list[float]:
    """Limits of one token: how many times as long blocks take from scattered places, bfloat16 and float32."""
    roofs = [read(found.folder / f"{name}.json", LayerResult, fix="measure again").roof for name in _LAYERS]
    return [round(roof.bytes_per_s / roof.scattered_bytes_per_s, 1) for roof in roofs]


def _timed(found: Found) -> tuple[list[LayerResult], ExpertsResult]:
    layers = [read(found.folder / f"{name}.json", LayerResult, fix="measure again") for name in _LAYERS]
    return layers, read(found.folder / "bench-experts-2-cores.json", ExpertsResult, fix="measure again")


def speeds_of_memory(found: Found) -> list[int]:
    """GB/s of the slowest and of the fastest long pass in the measurements of layers, experts and models."""
    layers, experts = _timed(found)
    models = read(found.folder / "bench-hf-2-cores.json", WholeResult, fix="measure again")
    roofs = [*(result.roof for result in layers), *experts.roofs.values(), *models.roofs.values()]
    speeds = [roof.bytes_per_s / 1e9 for roof in roofs]
    return [round(min(speeds)), round(max(speeds))]


def missed(found: Found, shape: str, dtype: str, tokens: int) -> bool:
    """Whether an aim of sigma-MoE was missed at a shape and a number of tokens."""
    layers, experts = _timed(found)
    rows = [row for result in layers if result.settings.dtype == dtype for row in result.rows]
    assert any((row.shape, row.tokens, row.label) == (shape, tokens, "sigma-moe") for row in rows), "it was not measured"
    return f"{shape}, {dtype}, {tokens:,}" in {row.cells[0].text for row in limits_table(layers, experts).rows}


def dead_as_released(found: Found) -> bool:
    """Every run of the released forms ends with dead experts, none of the others."""
    runs = found.experiment("collapse").runs
    return all(any(layer.dead[-1] > 0 for layer in run.loads) == run.candidate.endswith("released") for run in runs)


def within(found: Found, source: str, keys: tuple[str, ...], tolerance: float) -> bool:
    """Medians of output and gradients at every size and scheme."""
    rows = [row for row in found.studies["init"].start if row.input == source and row.selector == "equal-norm"]
    return all(abs(ratio(row, key) - 1) < tolerance for row in rows for key in keys)
