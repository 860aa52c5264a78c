"""Learning rates of the small scales: short trainings of column WT-S's dense model, compared on the validation split alone.

Figures of each scale are kept in results/learning-rates.json, to which the settings of `scales` are held by a test: made with
`base`, and with `cpu`, two seeds and the rates 1e-3, 2e-3, 4e-3 and 8e-3. The test split takes no part: in its place stands the
part of validation that the rates are compared on.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparseffn.comparison.experiment import run_path
from sparseffn.data import Corpus, to_metric
from sparseffn.errors import UserError
from sparseffn.paper.corpus_choice import Corpora, CorpusChoice
from sparseffn.paper.scales import get_scale
from sparseffn.paper.table_rows import sized
from sparseffn.paper.tables import DENSE
from sparseffn.storage import environment, read, write_json
from sparseffn.training import from_preset, train

COLUMN = "WT-S"
EVAL_TOKENS = 65_536


def try_learning_rates(
    scale_name: str,
    rates: Sequence[float],
    *,
    results: Path,
    out: Path,
    data_dir: str | None = None,
    steps: int = 200,
    n_seeds: int = 1,
    log: Callable[[str], None] = print,
) -> None:
    """Train once for every rate and seed; rates that `results` holds already stay.

    Args:
        scale_name: base or cpu.
        rates: peak learning rates.
        results: the file that keeps the figures of all scales, written after every rate.
        out: folder of the runs, which go on where they stopped.
        data_dir: Penn Treebank; None: where the corpus is looked for.
        steps: of each training, with warm-up and decay.
        n_seeds: trainings with each rate.
        log: receives a line a rate.

    Raises:
        UserError: `results` holds rates of the scale with other settings; anything that `train` raises.
    """
    scale = get_scale(scale_name)
    column = scale.column(COLUMN)
    corpus = without_test(Corpora(scale=scale, choice=CorpusChoice(data_dir=data_dir)).of(column))
    vocab_size = corpus.tokenizer.vocab_size
    model = column.model(sized(DENSE, column, vocab_size).ffn, vocab_size)
    metric, _ = to_metric(0.0, corpus.unit)
    # Without a curve: its points would cost as much as the training.
    config = from_preset(column.preset, steps=steps, eval_every=steps)
    settings: dict[str, Any] = {
        "corpus": corpus.info,
        "sizes": column.sizes,
        "params": model.num_params(),
        "tokens_per_step": config.tokens_per_step,
        "steps": steps,
        "warmup": config.warmup,
        "valid_tokens": len(corpus.valid),
        "metric": metric,
    }
    kept = read(results, dict[str, dict[str, Any]], fix="restore the file") if results.exists() else {}
    before = kept.get(scale_name, settings)
    if any(before[name] != value for name, value in settings.items()):
        raise UserError(f"`results` must hold rates of {scale_name} with these settings; got {results}; fix: another file")
    found = {rate["lr"]: rate for rate in before.get("rates", [])}
    for lr in rates:
        losses = []
        for seed in range(n_seeds):
            path = run_path(out / scale_name, f"lr={lr:g}", seed)
            result = train(model, dataclasses.replace(config, lr=lr, seed=seed), corpus, path, device="cpu")
            losses.append(to_metric(result.valid, corpus.unit)[1])
        found[lr] = {"lr": lr, "valid": losses, "mean": statistics.fmean(losses)}
        log(f"{scale_name}, lr {lr:g}: {found[lr]['mean']:.4f} {metric} {losses}")
        tried = {**settings, "rates": [found[rate] for rate in sorted(found)], "environment": environment()}
        write_json(results, {**kept, scale_name: tried})


def without_test(corpus: Corpus) -> Corpus:
    """The corpus with the first tokens of validation in place of both splits that a training is evaluated on."""
    valid = corpus.valid[:EVAL_TOKENS]
    return dataclasses.replace(corpus, valid=valid, test=valid)
