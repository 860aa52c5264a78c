"""Learning rates of the small scales: short trainings of column WT-S's dense model, compared on the validation split alone.

`tools/learning_rates.py SCALE --data-dir DIR` trains once for every rate and seed, and keeps the figures of that scale in
results/learning-rates.json, to which the settings of `recipes/paper/scales.py` are held by a test: made with `base`, and with
`cpu --seeds 2 --lr 1e-3 2e-3 4e-3 8e-3`. Rates already there stay. The test split takes no part: in its place stands the
part of validation that the rates are compared on.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path

import torch

from sparseffn.comparison.runs import run_path
from sparseffn.data import Corpus, to_metric
from sparseffn.paper.corpus_choice import Corpora, CorpusChoice
from sparseffn.paper.scales import get_scale
from sparseffn.paper.table_rows import sized
from sparseffn.paper.tables import DENSE
from sparseffn.storage import environment, read_json, write_json
from sparseffn.training import train
from sparseffn.training.config import from_preset

RESULTS = Path(__file__).resolve().parent.parent / "results" / "learning-rates.json"
COLUMN = "WT-S"
EVAL_TOKENS = 65_536


def main() -> int:
    """Train with every rate; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scale", choices=("base", "cpu"))
    parser.add_argument("--data-dir", help="Penn Treebank, characters (default: where the corpus is looked for)")
    parser.add_argument("--lr", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3], help="peak learning rates")
    parser.add_argument("--steps", type=int, default=200, help="steps of each training, with warm-up and decay (default: 200)")
    parser.add_argument(
        "--seeds", type=int, choices=range(1, 100), metavar="N", default=1, help="trainings with each rate (default: 1)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--out", type=Path, default=Path("runs/learning-rates"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that keeps the figures of all scales")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    scale = get_scale(options.scale)
    column = scale.column(COLUMN)
    corpus = without_test(Corpora(scale=scale, choice=CorpusChoice(data_dir=options.data_dir)).of(column))
    vocab_size = corpus.tokenizer.vocab_size
    model = column.model(sized(DENSE, column, vocab_size).ffn, vocab_size)
    metric, _ = to_metric(0.0, corpus.unit)
    # Without a curve: its points would cost as much as the training.
    config = from_preset(column.preset, steps=options.steps, eval_every=options.steps)
    settings = {
        "corpus": corpus.info,
        "sizes": column.sizes,
        "params": model.num_params(),
        "tokens_per_step": config.tokens_per_step,
        "steps": options.steps,
        "warmup": config.warmup,
        "valid_tokens": len(corpus.valid),
        "metric": metric,
    }
    kept = read_json(options.results) if options.results.exists() else {}
    before = kept.get(options.scale, settings)
    if any(before[name] != value for name, value in settings.items()):
        parser.error(f"{options.results} holds rates of {options.scale} with other settings; fix: another --results")
    rates = {rate["lr"]: rate for rate in before.get("rates", [])}
    for lr in options.lr:
        losses = []
        for seed in range(options.seeds):
            path = run_path(options.out / options.scale, f"lr={lr:g}", seed)
            result = train(model, dataclasses.replace(config, lr=lr, seed=seed), corpus, path)
            losses.append(to_metric(result.valid, corpus.unit)[1])
        rates[lr] = {"lr": lr, "valid": losses, "mean": statistics.fmean(losses)}
        sys.stdout.write(f"{options.scale}, lr {lr:g}: {rates[lr]['mean']:.4f} {metric} {losses}\n")
        sys.stdout.flush()
        found = {**settings, "rates": [rates[rate] for rate in sorted(rates)], "environment": environment()}
        write_json(options.results, {**kept, options.scale: found})
    return 0


def without_test(corpus: Corpus) -> Corpus:
    """The corpus with the first tokens of validation in place of both splits that a training is evaluated on."""
    valid = corpus.valid[:EVAL_TOKENS]
    return dataclasses.replace(corpus, valid=valid, test=valid)


if __name__ == "__main__":
    sys.exit(main())
