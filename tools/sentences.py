"""Sentences of README.md and docs/ that conclude from results: each must stand on its page, and follow from the files.

`tools/generated.py --check` asks both, so that neither a figure nor the words about it change alone. Blocks need no entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from findings import (
    all_undecided,
    beyond_reach,
    by_another_table,
    change_of_topk,
    chosen_rate,
    cosines,
    dead_as_released,
    decided_here,
    dying,
    equal_halves,
    evening_out,
    explained,
    flat_is_open,
    gains_of_copies,
    gap,
    includes_zero,
    largest_keeps,
    layers_of_olmoe,
    left_open,
    line,
    linear_times,
    lowest_baseline,
    median,
    missed,
    no_better_at_96,
    open_by_own_seeds,
    open_gaps,
    paired,
    rates_of_gated,
    ratio,
    reached_by_models,
    released_sbase,
    scaled,
    scatter,
    scattered_over_long_pass,
    shrinking,
    speeds_of_memory,
    sublinear_memory,
    uneven_without,
    unevenness,
    weak_by_that_scatter,
    width_gains,
    within,
)
from found import Found

from sparseffn.storage import read_json

README, HF, CONVERT = "README.md", "docs/huggingface.md", "docs/convert.md"
WHY, RESULTS, STATISTICS, KERNELS = (f"docs/{name}.md" for name in ("why-this-selector", "results", "statistics", "kernels"))


@dataclass(frozen=True)
class Sentence:
    page: str
    words: str
    """As they stand on the page; where lines break does not matter."""
    holds: Callable[[Found], bool]


SENTENCES = (
    Sentence(WHY, "every median of 5 seeds is within 5% of the prediction", lambda f: (
        f.studies["init"].settings.start_seeds == 5 and within(f, "gaussian", ("output",), 0.05)
    )),
    Sentence(WHY, "On text the medians are within 18%", lambda f: within(f, "text", ("output",), 0.18)),
    Sentence(WHY, "**Gradients (3): hold on isotropic tokens**, the medians within 5%", lambda f: (
        within(f, "gaussian", ("keys", "values", "input"), 0.05)
    )),
    Sentence(WHY, "the median of 100 seeds within 7% of the prediction at every size", lambda f: (
        all(abs(ratio(row) - 1) < 0.07 and row.load_seeds == 100 for row in f.loads("gaussian"))
    )),
    Sentence(WHY, "the norm explains 78% (16 experts) to 91% (64) of it", lambda f: (
        [round(100 * explained(f, n)) for n in (16, 64)] == [78, 91]
    )),
    Sentence(WHY, "have the same load to 1%", equal_halves),
    Sentence(WHY, "the load of 32 experts is 13 (free rows) to 38 times (equal norms) as uneven", lambda f: (
        unevenness(f) == [13, 38]
    )),
    Sentence(WHY, "predict the unevenness to within 5% for K of 4 and more", cosines),
    Sentence(WHY, "6.5 measured against 4.5 predicted for 32 experts, 40 against 13 for 256", lambda f: (
        all(
            (round(median(row, "largest_over_mean"), d), round(row.predicted["largest_over_mean"] or 0, d)) == wanted
            for n, d, wanted in ((32, 1, (6.5, 4.5)), (256, None, (40, 13)))
            for row in [f.load("text", "equal-norm", n_experts=n)]
        )
    )),
    Sentence(WHY, "Corrected for their number none is decided", all_undecided),
    Sentence(WHY, "which happens to be the lowest of the nine means", lowest_baseline),
    Sentence(WHY, "are wider after 50 steps than at the end, only that of the missing entropy loss grows", shrinking),
    Sentence(RESULTS, "its own three pairs leave it undecided", lambda f: includes_zero(paired(f))),
    Sentence(RESULTS, "none of these differences is decided on either page but for softmax before top-k here", lambda f: (
        all_undecided(f) and decided_here(f) == ["softmax before top-k (no renorm.) is worse than sigma-moe"]
    )),
    Sentence(RESULTS, "it is the best of one seed, twice the rate that of the other and of the mean", chosen_rate),
    Sentence(RESULTS, "from dense lies between -0.7% and +1.0%: neither the published gain nor a small loss", lambda f: (
        f.interval("control", "equal parameters") == (-0.7, 1.0)
    )),
    Sentence(RESULTS, "better than the dense block of its own FLOPs by 3.3% to 4.8%", lambda f: (
        f.interval("control", "equal FLOPs") == (-4.8, -3.3)
    )),
    Sentence(RESULTS, "in the middle, but for one layer of one run of each released form", evening_out),
    Sentence(RESULTS, "end with dead experts, those of the paper with none", dead_as_released),
    Sentence(RESULTS, "whose schedule ends when sigma-MoE's does by 6.1% to 11.8% (4 seeds)", lambda f: (
        f.interval("control", "equal time") == (-11.8, -6.1)
    )),
    Sentence(RESULTS, "sigma-MoE keeps at least half of what the width gains", lambda f: f.interval("control", "kept")[1] < 0),
    Sentence(RESULTS, "sigma-MoE keeps at least half of what the dense block gains by its width. Of single widths", lambda f: (
        f.interval("scaling", "kept")[1] < 0
    )),
    Sentence(RESULTS, "only the largest does so beyond its interval", largest_keeps),
    Sentence(RESULTS, "sigma-MoE is worse than dense, by 2.3% to 2.8%", lambda f: scaled(f, gap(48)) == (2.3, 2.8)),
    Sentence(RESULTS, "At the other three the interval of its difference from dense includes 0", open_gaps),
    Sentence(RESULTS, "falls by 0.4% to 0.9% with each doubling of the parameters", lambda f: (
        f.interval("scaling", "slope of the gap") == (-0.9, -0.4) == scaled(f, line(f, 48, 96, 128, 224))
    )),
    Sentence(RESULTS, "without which the interval is from -1.9% to +1.4%", lambda f: (
        scaled(f, line(f, 96, 128, 224)) == (-1.9, 1.4)
    )),
    Sentence(STATISTICS, "it is, by 2.7% to 6.8% in the mean of the widths, but at 0.60 million", width_gains),
    Sentence(RESULTS, "by the two seeds of its own rows none of them would be decided", open_by_own_seeds),
    Sentence(RESULTS, "a quarter of the exponent in figure 2 and 6% of it in figure 11, over G to within 0.4", linear_times),
    Sentence(RESULTS, '"almost flat" is open at 2,048', flat_is_open),
    Sentence(RESULTS, "linearly in d_model in figures 2 and 11 (figure 8 leaves it open) and in G", sublinear_memory),
    Sentence(RESULTS, "in three layers of the released Switch, in one from 6% to 31%", dying),
    Sentence(RESULTS, "lies outside the interval of -0.4% to +0.2%", lambda f: f.interval("experts", "slope") == (-0.4, 0.2)),
    Sentence(RESULTS, "dense is no better there than at 0.15 million", no_better_at_96),
    Sentence(RESULTS, "one expert of 256 is worse by 0.6% to 3.2%, decided at the first look", lambda f: (
        f.interval("ablations", "27, K = 1") == (0.6, 3.2) and f.contrast("ablations", "27, K = 1").n_seeds == 6
    )),
    Sentence(RESULTS, "two of 128 by 0.1% to 1.7%", lambda f: f.interval("ablations", "27, K = 2") == (0.1, 1.7)),
    Sentence(RESULTS, "both published effects lie within", lambda f: (
        all(
            one.low_percent < one.published_percent < one.high_percent
            for one in f.experiment("ablations").contrasts if one.name.startswith("27")
        )
    )),
    Sentence(RESULTS, "worse by 0.8%, 0.4%, 0.4% and 0.4%, in the table's order, or better by up to 1.2%", left_open),
    Sentence(RESULTS, "softmax after top-k and standard initialisation would be undecided, and the effect", by_another_table),
    Sentence(RESULTS, "(busiest expert 1.82 times the mean with it, 2.46 times without)", uneven_without),
    Sentence(RESULTS, "differences scatter by 0.4% to 0.8% between seeds", scatter),
    Sentence(RESULTS, "the released S-BASE is worse than the form tested here by 1.0% to 2.7%", lambda f: (
        released_sbase(f) == (1.0, 2.7)
    )),
    Sentence(RESULTS, "over 12 seeds its difference would not be decided", weak_by_that_scatter),
    Sentence(KERNELS, "is at 57% of this processor's rate already, ours at 74% forward and 58% with gradients", lambda f: (
        rates_of_gated(f) == [57, 74, 58]
    )),
    Sentence(KERNELS, "of 2.5 and 2.2 times the limit of bytes 1.4 and 1.5 are gone", lambda f: (
        scattered_over_long_pass(f) == [1.4, 1.5]
    )),
    Sentence(KERNELS, "its memory came at 52 to 83 GB/s", lambda f: speeds_of_memory(f) == [52, 83]),
    Sentence(KERNELS, "4,096 tokens, which share each packed panel, meet both aims", lambda f: (
        not missed(f, "wt-b", "bfloat16", 4096)
    )),
    Sentence(HF, "Qwen3 in float32 and Granite in bfloat16 that of the prompt; nothing else does", reached_by_models),
    Sentence(HF, "For Qwen3 in float32 the model's is beyond reach", lambda f: (
        beyond_reach(f) == {("qwen3-moe", "float32", "model")}
    )),
    Sentence(HF, "in OLMoE's layers in bfloat16, 25 are not the experts'", lambda f: layers_of_olmoe(f) == [69, 25]),
    Sentence(README, "+2.9% perplexity", lambda f: change_of_topk(f, 1024) == 2.9),
    Sentence(CONVERT, "in windows of 1,024 tokens, but not in windows of 256", lambda f: (
        change_of_topk(f, 1024) < 3 < change_of_topk(f, 256)
    )),
    Sentence(CONVERT, "they end 0.7% to 9.3% below its perplexity", lambda f: gains_of_copies(f) == (0.7, 9.3)),
    Sentence(README, "to +1.0% of its loss; it is better than a dense block of the same FLOPs by 3.3% to 4.8%", lambda f: (
        f.interval("control", "equal parameters") == (-0.7, 1.0) and f.interval("control", "equal FLOPs") == (-4.8, -3.3)
    )),
    Sentence(README, "four small experts a token are better than one or two large ones; softmax after top-k", lambda f: (
        left_open(f) and all(f.interval("ablations", f"27, K = {k}")[0] > 0 for k in (1, 2))
    )),
    Sentence(STATISTICS, "are -0.0095, +0.0123 and -0.0078 bits; paired and not pooled they decide nothing", lambda f: (
        paired(f) == [-0.0095, 0.0123, -0.0078] and includes_zero(paired(f))
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
