"""Sentences of README.md and docs/ that conclude from results: each must stand on its page, and follow from the files.

`tools/generated.py --check` asks both, so that neither a figure nor the words about it change alone. Blocks need no entry.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from msgspec import structs

from sparseffn.paper.claims import FLAT, LEVEL, STEEP
from sparseffn.paper.collapse import middle_of
from sparseffn.paper.experiments import judged, losses_of
from sparseffn.paper.published import published_values
from sparseffn.paper.rules import Contrast, rules
from sparseffn.report.growth_report import Exponent, exponents, points_of
from sparseffn.report.study_contrasts import contrast_table
from sparseffn.report.study_report import read_study
from sparseffn.results.bench_result import FiguresResult, WholeResult, WholeRow
from sparseffn.results.evidence_result import ClaimsResult
from sparseffn.results.experiment_result import DecidedContrast, ExperimentResult, ExperimentRun
from sparseffn.results.study_result import StartRow, StudyResult, Variant
from sparseffn.results.table_result import Cell, TableResult
from sparseffn.stats import Difference, difference, holm, p_value
from sparseffn.storage import read, read_json

README, HF = "README.md", "docs/huggingface.md"
_GAP = {"sigma-MoE": 1.0, "dense": -1.0}
WHY, RESULTS, STATISTICS = (f"docs/{name}.md" for name in ("why-this-selector", "results", "statistics"))
STUDIES = ("init", "competition", "balance")


class Found:
    """What the files of results say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def studies(self) -> dict[str, StudyResult]:
        return {name: read_study(self.folder / f"study-{name}.json") for name in STUDIES}

    def load(self, source: str, rows: str, *, n_experts: int = 32, k: int = 4) -> StartRow:
        """At initialisation."""
        (found,) = [
            row
            for row in self.loads(source)
            if (row.selector, row.n_experts, row.k, row.expert_size) == (rows, n_experts, k, 64)
        ]
        return found

    def loads(self, source: str) -> list[StartRow]:
        start = self.studies["init"].start
        return [row for row in start if (row.input, row.init, row.n_layers) == (source, "shared", 4)]

    def variants(self) -> Iterator[tuple[Variant, Variant]]:
        """The first of each study, and every other."""
        for study in self.studies.values():
            for variant in study.variants[1:]:
                yield study.variants[0], variant

    def gap(self, name: str, step: int) -> float:
        """Of load entropy, to the baseline."""
        ((first, variant),) = [pair for pair in self.variants() if pair[1].name == name]
        at = [{run.seed: p.load_entropy for run in of.runs for p in run.probes if p.step == step} for of in (variant, first)]
        return difference(*at).difference

    def cell(self, table: str, label: str) -> Cell:
        found = read(self.folder / "evidence" / f"{table}.json", TableResult, fix="run `make evidence` again")
        return next(cell for cell in found.cells if found.rows[cell.row].label == label)

    def experiment(self, name: str) -> ExperimentResult:
        return read(self.folder / "evidence" / f"{name}.json", ExperimentResult, fix="run `make evidence` again")

    def of(self, experiment: str, candidate: str) -> list[ExperimentRun]:
        return [run for run in self.experiment(experiment).runs if run.candidate == candidate]

    def interval(self, experiment: str, contrast: str) -> tuple[float, float]:
        """In percent of the loss, as tables round it further; of a contrast that had a look."""
        found = self.experiment(experiment)
        (one,) = [one for one in found.contrasts if one.name == contrast]
        return _rounded(one)

    def decided_at(self, experiment: str, contrast: str) -> int:
        """Seeds of the look that its verdict is of."""
        (one,) = [one for one in self.experiment(experiment).contrasts if one.name == contrast]
        return one.n_seeds

    def claims(self) -> ClaimsResult:
        return read(self.folder / "evidence" / "claims.json", ClaimsResult, fix="run `make evidence` again")


def _ratio(row: StartRow, key: str = "variation") -> float:
    measured, predicted = row.measured[key], row.predicted[key]
    assert measured is not None and predicted is not None, key
    return measured[0] / predicted


def _median(row: StartRow, key: str = "variation") -> float:
    measured = row.measured[key]
    assert measured is not None, key
    return measured[0]


def _explained(found: Found, n_experts: int) -> float:
    return _median(found.load("gaussian", "free", n_experts=n_experts), "norm_correlation") ** 2


def _paired(found: Found) -> list[float]:
    sigma, dense = found.cell("table3", "sigma-moe"), found.cell("table3", "dense")
    return [round(ours - theirs, 4) for ours, theirs in zip(sigma.values, dense.values, strict=True)]


def _against_zero(values: list[float]) -> Difference:
    return difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))


def _includes_zero(values: list[float]) -> bool:
    return not _against_zero(values).decided


def _rounded(one: DecidedContrast) -> tuple[float, float]:
    """Its interval in percent of the loss, as tables round it further."""
    assert one.n_seeds and one.low_percent is not None and one.high_percent is not None, one.name
    return round(one.low_percent, 1), round(one.high_percent, 1)


def _rates(found: Found) -> dict[float, list[float]]:
    rates = read_json(found.folder / "learning-rates.json", fix="-")["cpu"]["rates"]
    return {rate["lr"]: rate["valid"] for rate in rates}


def _chosen_rate(found: Found) -> bool:
    """2e-3 the best of one seed, 4e-3 of the other and of the mean."""
    rates = _rates(found)
    best = [min(rates, key=lambda lr, seed=seed: rates[lr][seed]) for seed in range(2)]
    return len(rates) == 4 and best == [0.002, 0.004] and min(rates, key=lambda lr: statistics.fmean(rates[lr])) == 0.004


def _all_undecided(found: Found) -> bool:
    return all(row.cells[-2].text == "undecided" for row in contrast_table(list(found.studies.values())).rows)


def _decided_here(found: Found) -> list[str]:
    """Of the claims that studies test too."""
    claims = [claim for claim in found.claims().claims if claim.numbers in ("10", "11", "12")]
    return [claim.words.partition(": ")[2] for claim in claims if claim.verdict != "undecided"]


def _lowest_baseline(found: Found) -> bool:
    return all(first.test.mean < v.test.mean and first.valid.mean < v.valid.mean for first, v in found.variants())  # type: ignore[union-attr]


def _shrinking(found: Found) -> bool:
    """Wider after 50 steps than at the end, and for the missing entropy loss the reverse."""
    shrink = ("softmax before top-k", "softmax after top-k", "standard, equal-norm", "switch, equal-norm")
    return all(abs(found.gap(name, 50)) > abs(found.gap(name, 300)) for name in shrink) and all(
        abs(found.gap(name, 50)) < abs(found.gap(name, 300)) for name in ("neither", "expert dropout")
    )


def _equal_halves(found: Found) -> bool:
    free, equal = (_median(found.load("gaussian", rows, k=16)) for rows in ("free", "equal-norm"))
    return abs(free / equal - 1) < 0.01


def _unevenness(found: Found) -> list[int]:
    """Of 32 experts on text over Gaussian tokens, free rows and rows of one norm."""
    return [round(_median(found.load("text", r)) / _median(found.load("gaussian", r))) for r in ("free", "equal-norm")]


def _cosines(found: Found) -> bool:
    rows = found.loads("text")
    return all(abs(1 / _ratio(row) - 1) < 0.055 for row in rows if row.k >= 4) and all(
        1.05 < 1 / _ratio(row) < 1.25 for row in rows if row.k < 4
    )


def _evening_out(found: Found) -> bool:
    """Of the experiment on collapse."""
    runs = found.experiment("collapse").runs
    worse = [
        (run.candidate, run.seed) for run in runs for layer in run.loads if layer.entropy[-1] < layer.entropy[middle_of(layer)]
    ]
    return len(runs) == 10 and worse == [("Switch, released", 300), ("softmax after top-k, released", 301)]


def _line(found: Found, *widths: int) -> dict[str, float]:
    """Weights of the slope of sigma-MoE's gap to dense over the logarithm (base 2) of dense's parameters."""
    size = {one.name: math.log2(one.params) for one in found.experiment("scaling").candidates}
    x = [size[f"dense, {width}"] for width in widths]
    mean = statistics.fmean(x)
    slopes = [(value - mean) / sum((other - mean) ** 2 for other in x) for value in x]
    ours, theirs = ({f"{name}, {w}": s * sign for w, s in zip(widths, slopes, strict=True)} for name, sign in _GAP.items())
    return ours | theirs


def _gap(width: int) -> dict[str, float]:
    return {f"{name}, {width}": sign for name, sign in _GAP.items()}


def _kept(width: int) -> dict[str, float]:
    return {f"sigma-MoE, {width}": 1.0, f"dense, {width}": -0.5, f"dense of K G, {width}": -0.5}


def _scaled(found: Found, weights: dict[str, float]) -> tuple[float, float]:
    """Interval of a contrast that the rule did not plan, as `Found.interval` has those that it did."""
    rule = structs.replace(rules()["scaling"], contrasts=(Contrast(name="unplanned", words="", weights=weights),))
    (one,) = judged(rule, losses_of(found.experiment("scaling").runs, "test"))
    return _rounded(one)


def _open_gaps(found: Found) -> bool:
    """Of all widths but the smallest."""
    return all(low < 0 < high for low, high in (_scaled(found, _gap(width)) for width in (96, 128, 224)))


def _largest_keeps(found: Found) -> bool:
    return [width for width in (48, 96, 128, 224) if _scaled(found, _kept(width))[1] < 0] == [224]


def _width_gains(found: Found) -> bool:
    """What dense is better by than a quarter of its pairs: in the mean of the widths, and at 96 within the interval."""
    gains = [{f"dense of K G, {width}": 1.0, f"dense, {width}": -1.0} for width in (48, 96, 128, 224)]
    mean = {name: weight / 4 for gain in gains for name, weight in gain.items()}
    return _scaled(found, mean) == (2.7, 6.8) and _scaled(found, gains[1])[0] < 0


def _open_by_own_seeds(found: Found) -> bool:
    """No claim on the tables' losses is decided by its own two seeds, paired, corrected for the number that is tested."""
    tested = [c for c in found.claims().claims if c.topic == "loss" and c.numbers != "-" and c.p is not None]
    two = all(len(claim.values) == 2 for claim in tested)
    return two and min(holm([p_value(_against_zero(claim.values), freedom=1) for claim in tested])) >= LEVEL


def _dying(found: Found) -> bool:
    """Layers of the collapse experiment with more dead experts at the end than in the middle."""
    more = [
        (run.candidate, round(100 * layer.dead[middle_of(layer)]), round(100 * layer.dead[-1]))
        for run in found.experiment("collapse").runs for layer in run.loads if layer.dead[-1] > layer.dead[middle_of(layer)]
    ]  # fmt: skip
    return (
        len(more) == 3 and {name for name, *_ in more} == {"Switch, released"} and max(more, key=lambda m: m[2])[1:] == (6, 31)
    )


def _exponents(found: Found, quantity: str) -> dict[int, Exponent]:
    """Of sigma-MoE, by figure."""
    measured = read(found.folder / "bench-figures-2-cores.json", FiguresResult, fix="measure again")
    fits = {figure: exponents(points_of(measured, figure))["sigma-moe", quantity] for figure in measured.figures}
    return {figure: fit for figure, fit in fits.items() if fit is not None}


def _linear_times(found: Found) -> bool:
    """Within how much of 1 the exponents over d_model and G are; of figure 8 nothing is known."""
    times = _exponents(found, "time")
    off = {figure: round(max(1 - low, high - 1), 2) for figure, (_, low, high) in times.items()}
    includes = all(times[figure][1] <= 1 <= times[figure][2] for figure in (2, 8, 10, 11))
    return includes and off[2] <= 0.25 and off[11] <= 0.06 and off[10] <= 0.4 and off[8] > 1


def _whole_rows(found: Found) -> list[WholeRow]:
    result = read(found.folder / "bench-hf-2-cores.json", WholeResult, fix="measure again")
    return [row for row in result.rows if not row.peer]


def _reached_by_models(found: Found) -> bool:
    """1.8 of the layers and 1.5 of the model in decoding, 1.3 for the prompt."""
    reached = set()
    for row in _whole_rows(found):
        passes = (("layers", 1.8, row.decoding.layers_over_fastest_hf), ("model", 1.5, row.decoding.over_fastest_hf))
        if row.prompt is not None:
            prompt = row.prompt
            passes += (("prompt", 1.3, prompt.over_fastest_hf), ("its layers", 1.3, prompt.layers_over_fastest_hf))
        reached |= {(row.model, row.dtype, what) for what, aim, over in passes if over is not None and over.times_faster >= aim}
    prompts = {(model, "float32", what) for model in ("qwen3-moe", "granite-1b") for what in ("prompt", "its layers")}
    return reached == prompts | {("granite-1b", "float32", "layers")}


def _layer_of_olmoe(found: Found) -> bool:
    (row,) = (row for row in _whole_rows(found) if (row.model, row.dtype) == ("olmoe", "bfloat16"))
    return round(1000 * row.decoding.layers.median_s / row.n_layers, 1) == 5.2


def _flat_is_open(found: Found) -> bool:
    _, low, high = _exponents(found, "time")[9]
    return low < FLAT < high < STEEP


def _sublinear_memory(found: Found) -> bool:
    memory = {figure: (round(low, 2), round(high, 2)) for figure, (_, low, high) in _exponents(found, "memory").items()}
    less = all(memory[figure][1] < 1 for figure in (2, 10, 11))
    return less and memory[8][0] < 1 < memory[8][1] and memory[9] == (0.0, 0.0)


def _no_better_at_96(found: Found) -> bool:
    """Dense, by the means of seeds."""
    small, large = (statistics.mean(run.test for run in found.of("scaling", f"dense, {width}")) for width in (48, 96))
    return large >= small


def _left_open(found: Found) -> bool:
    """Of the ablations: all but those of K are bounded."""
    rest = [one for one in found.experiment("ablations").contrasts if not one.name.startswith("27")]
    lows, highs = zip(*(found.interval("ablations", one.name) for one in rest), strict=True)
    return {one.verdict for one in rest} == {"bounded"} and highs == (0.8, 0.4, 0.4, 0.4) and min(lows) == -1.2


def _by_another_table(found: Found) -> bool:
    """Published effects of the four with table 3's perplexity of sigma-MoE, and the upper ends of their intervals."""
    table3, table10 = (math.log(published_values(table)["sigma-moe", "WT-S"]) for table in ("table3", "table10"))
    less = 100 * (table3 / table10 - 1)
    rest = {one.name: one for one in found.experiment("ablations").contrasts if not one.name.startswith("27")}
    inside = {name for name, one in rest.items() if one.published_percent - less < one.high_percent}
    hair = rest["12"].published_percent - less - rest["12"].high_percent
    return inside == {"10", "11"} and 0 < hair < 0.1


def _uneven_without(found: Found) -> bool:
    """Mean busiest experts on validation."""
    loads = [[run.load.valid for run in found.of("ablations", name) if run.load] for name in ("sigma-MoE", "no entropy loss")]
    return [round(statistics.mean(of), 2) for of in loads] == [1.82, 2.46]


def _scatter(found: Found) -> bool:
    """Standard deviations of the six differences between seeds, in percent of sigma-MoE's loss."""
    unit = statistics.mean(run.test for run in found.of("ablations", "sigma-MoE")) / 100
    each = [statistics.stdev(one.values) / unit for one in found.experiment("ablations").contrasts]
    return (round(min(each), 1), round(max(each), 1)) == (0.4, 0.8)


def _dead_as_released(found: Found) -> bool:
    """Every run of the released forms ends with dead experts, none of the others."""
    runs = found.experiment("collapse").runs
    return all(any(layer.dead[-1] > 0 for layer in run.loads) == run.candidate.endswith("released") for run in runs)


@dataclass(frozen=True)
class Sentence:
    page: str
    words: str
    """As they stand on the page; where lines break does not matter."""
    holds: Callable[[Found], bool]


def _within(found: Found, source: str, keys: tuple[str, ...], tolerance: float) -> bool:
    """Medians of output and gradients at every size and scheme."""
    rows = [row for row in found.studies["init"].start if row.input == source and row.selector == "equal-norm"]
    return all(abs(_ratio(row, key) - 1) < tolerance for row in rows for key in keys)


SENTENCES = (
    Sentence(WHY, "every median of 5 seeds is within 5% of the prediction", lambda f: (
        f.studies["init"].settings.start_seeds == 5 and _within(f, "gaussian", ("output",), 0.05)
    )),
    Sentence(WHY, "On text the medians are within 18%", lambda f: _within(f, "text", ("output",), 0.18)),
    Sentence(WHY, "**Gradients (3): hold on isotropic tokens**, the medians within 5%", lambda f: (
        _within(f, "gaussian", ("keys", "values", "input"), 0.05)
    )),
    Sentence(WHY, "the median of 100 seeds within 7% of the prediction at every size", lambda f: (
        all(abs(_ratio(row) - 1) < 0.07 and row.load_seeds == 100 for row in f.loads("gaussian"))
    )),
    Sentence(WHY, "the norm explains 78% (16 experts) to 91% (64) of it", lambda f: (
        [round(100 * _explained(f, n)) for n in (16, 64)] == [78, 91]
    )),
    Sentence(WHY, "have the same load to 1%", _equal_halves),
    Sentence(WHY, "the load of 32 experts is 13 (free rows) to 38 times (equal norms) as uneven", lambda f: (
        _unevenness(f) == [13, 38]
    )),
    Sentence(WHY, "predict the unevenness to within 5% for K of 4 and more", _cosines),
    Sentence(WHY, "6.5 measured against 4.5 predicted for 32 experts, 40 against 13 for 256", lambda f: (
        all(
            (round(_median(row, "largest_over_mean"), d), round(row.predicted["largest_over_mean"] or 0, d)) == wanted
            for n, d, wanted in ((32, 1, (6.5, 4.5)), (256, None, (40, 13)))
            for row in [f.load("text", "equal-norm", n_experts=n)]
        )
    )),
    Sentence(WHY, "Corrected for their number none is decided", _all_undecided),
    Sentence(WHY, "which happens to be the lowest of the nine means", _lowest_baseline),
    Sentence(WHY, "are wider after 50 steps than at the end, only that of the missing entropy loss grows", _shrinking),
    Sentence(RESULTS, "its own three pairs leave it undecided", lambda f: _includes_zero(_paired(f))),
    Sentence(RESULTS, "none of these differences is decided on either page but for softmax before top-k here", lambda f: (
        _all_undecided(f) and _decided_here(f) == ["softmax before top-k (no renorm.) is worse than sigma-moe"]
    )),
    Sentence(RESULTS, "it is the best of one seed, twice the rate that of the other and of the mean", _chosen_rate),
    Sentence(RESULTS, "from dense lies between -0.7% and +1.0%: neither the published gain nor a small loss", lambda f: (
        f.interval("control", "equal parameters") == (-0.7, 1.0)
    )),
    Sentence(RESULTS, "better than the dense block of its own FLOPs by 3.3% to 4.8%", lambda f: (
        f.interval("control", "equal FLOPs") == (-4.8, -3.3)
    )),
    Sentence(RESULTS, "in the middle, but for one layer of one run of each released form", _evening_out),
    Sentence(RESULTS, "end with dead experts, those of the paper with none", _dead_as_released),
    Sentence(RESULTS, "whose schedule ends when sigma-MoE's does by 6.1% to 11.8% (4 seeds)", lambda f: (
        f.interval("control", "equal time") == (-11.8, -6.1)
    )),
    Sentence(RESULTS, "sigma-MoE keeps at least half of what the width gains", lambda f: f.interval("control", "kept")[1] < 0),
    Sentence(RESULTS, "sigma-MoE keeps at least half of what the dense block gains by its width. Of single widths", lambda f: (
        f.interval("scaling", "kept")[1] < 0
    )),
    Sentence(RESULTS, "only the largest does so beyond its interval", _largest_keeps),
    Sentence(RESULTS, "sigma-MoE is worse than dense, by 2.3% to 2.8%", lambda f: _scaled(f, _gap(48)) == (2.3, 2.8)),
    Sentence(RESULTS, "At the other three the interval of its difference from dense includes 0", _open_gaps),
    Sentence(RESULTS, "falls by 0.4% to 0.9% with each doubling of the parameters", lambda f: (
        f.interval("scaling", "slope of the gap") == (-0.9, -0.4) == _scaled(f, _line(f, 48, 96, 128, 224))
    )),
    Sentence(RESULTS, "without which the interval is from -1.9% to +1.4%", lambda f: (
        _scaled(f, _line(f, 96, 128, 224)) == (-1.9, 1.4)
    )),
    Sentence(STATISTICS, "it is, by 2.7% to 6.8% in the mean of the widths, but at 0.60 million", _width_gains),
    Sentence(RESULTS, "by the two seeds of its own rows none of them would be decided", _open_by_own_seeds),
    Sentence(RESULTS, "a quarter of the exponent in figure 2 and 6% of it in figure 11, over G to within 0.4", _linear_times),
    Sentence(RESULTS, '"almost flat" is open at 2,048', _flat_is_open),
    Sentence(RESULTS, "linearly in d_model in figures 2 and 11 (figure 8 leaves it open) and in G", _sublinear_memory),
    Sentence(RESULTS, "in three layers of the released Switch, in one from 6% to 31%", _dying),
    Sentence(RESULTS, "lies outside the interval of -0.4% to +0.2%", lambda f: f.interval("experts", "slope") == (-0.4, 0.2)),
    Sentence(RESULTS, "dense is no better there than at 0.15 million", _no_better_at_96),
    Sentence(RESULTS, "one expert of 256 is worse by 0.6% to 3.2%, decided at the first look", lambda f: (
        f.interval("ablations", "27, K = 1") == (0.6, 3.2) and f.decided_at("ablations", "27, K = 1") == 6
    )),
    Sentence(RESULTS, "two of 128 by 0.1% to 1.7%", lambda f: f.interval("ablations", "27, K = 2") == (0.1, 1.7)),
    Sentence(RESULTS, "both published effects lie within", lambda f: (
        all(
            one.low_percent < one.published_percent < one.high_percent
            for one in f.experiment("ablations").contrasts if one.name.startswith("27")
        )
    )),
    Sentence(RESULTS, "worse by 0.8%, 0.4%, 0.4% and 0.4%, in the table's order, or better by up to 1.2%", _left_open),
    Sentence(RESULTS, "softmax after top-k and standard initialisation would be undecided, and the effect", _by_another_table),
    Sentence(RESULTS, "(busiest expert 1.82 times the mean with it, 2.46 times without)", _uneven_without),
    Sentence(RESULTS, "differences scatter by 0.4% to 0.8% between seeds", _scatter),
    Sentence(HF, "of Qwen3 and Granite reach theirs, all in float32; nothing else does", _reached_by_models),
    Sentence(HF, "Of OLMoE's layer in bfloat16, 5.2 ms a token", _layer_of_olmoe),
    Sentence(README, "to +1.0% of its loss; it is better than a dense block of the same FLOPs by 3.3% to 4.8%", lambda f: (
        f.interval("control", "equal parameters") == (-0.7, 1.0) and f.interval("control", "equal FLOPs") == (-4.8, -3.3)
    )),
    Sentence(README, "four small experts a token are better than one or two large ones; softmax after top-k", lambda f: (
        _left_open(f) and all(f.interval("ablations", f"27, K = {k}")[0] > 0 for k in (1, 2))
    )),
    Sentence(STATISTICS, "are -0.0095, +0.0123 and -0.0078 bits; paired and not pooled they decide nothing", lambda f: (
        _paired(f) == [-0.0095, 0.0123, -0.0078] and _includes_zero(_paired(f))
    )),
    Sentence(STATISTICS, "0.612 of them", lambda f: (
        round(read_json(f.folder / "step-times.json", fix="-")["over_dense"]["sigma-moe"], 3) == 0.612
    )),
)  # fmt: skip


def failing(root: Path) -> list[str]:
    """What is wrong, a line for each sentence that is not on its page or does not follow."""
    found, lines = Found(root / "results"), []
    for sentence in SENTENCES:
        text = " ".join((root / sentence.page).read_text(encoding="utf-8").split())
        if sentence.words not in text:
            lines.append(f"{sentence.page} no longer says {sentence.words!r}; change tools/sentences.py with it")
        elif not sentence.holds(found):
            lines.append(f"{sentence.page} says {sentence.words!r}, which does not follow from results/")
    return lines
