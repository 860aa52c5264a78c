"""Learning rates of the small scales: short trainings of column WT-S's dense model, compared on the validation split alone.

    python tools/learning_rates.py base
    python tools/learning_rates.py cpu --seeds 2 --lr 1e-3 2e-3 4e-3 8e-3
    python tools/learning_rates.py cpu --seeds 2 --lr 1e-3 2e-3 4e-3 8e-3 --d-model 48

made results/learning-rates.json, to which a test holds the settings of `paper.scales` and `paper/rules.toml`. The test split
takes no part: in its place stands the part of validation that the rates are compared on.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
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

RESULTS = Path(__file__).resolve().parent.parent / "results" / "learning-rates.json"
RUNS = Path("runs/learning-rates")
EVAL_TOKENS = 65_536
STEPS = 200


def try_learning_rates(
    scale_name: str, rates: list[float], n_seeds: int, data_dir: str | None, d_model: int | None = None
) -> None:
    """Train once for every rate and seed; rates that the file holds already stay, and it is written after every rate.

    Raises:
        UserError: the file holds rates of the scale with other settings; anything that `train` raises.
    """
    scale = get_scale(scale_name)
    column = scale.column("WT-S").resized(d_model=d_model)
    corpus = without_test(Corpora(scale=scale, choice=CorpusChoice(data_dir=data_dir)).of(column))
    vocab_size = corpus.tokenizer.vocab_size
    model = column.model(sized(DENSE, column, vocab_size).ffn, vocab_size)
    metric, _ = to_metric(0.0, corpus.unit)
    # Without a curve: its points would cost as much as the training.
    config = from_preset(column.preset, steps=STEPS, eval_every=STEPS)
    settings: dict[str, Any] = {
        "corpus": corpus.info,
        "sizes": column.sizes,
        "params": model.num_params(),
        "tokens_per_step": config.tokens_per_step,
        "steps": STEPS,
        "warmup": config.warmup,
        "valid_tokens": len(corpus.valid),
        "metric": metric,
    }
    scale_name += f", d_model {d_model}" if d_model else ""
    kept = read(RESULTS, dict[str, dict[str, Any]], fix="restore the file") if RESULTS.exists() else {}
    before = kept.get(scale_name, settings)
    if any(before[name] != value for name, value in settings.items()):
        raise UserError(f"`results` must hold rates of {scale_name} with these settings; got {RESULTS}; fix: another file")
    found = {rate["lr"]: rate for rate in before.get("rates", [])}
    for lr in rates:
        losses = []
        for seed in range(n_seeds):
            path = run_path(RUNS / scale_name, f"lr={lr:g}", seed)
            result = train(model, dataclasses.replace(config, lr=lr, seed=seed), corpus, path, device="cpu")
            losses.append(to_metric(result.valid, corpus.unit)[1])
        found[lr] = {"lr": lr, "valid": losses, "mean": statistics.fmean(losses)}
        print(f"{scale_name}, lr {lr:g}: {found[lr]['mean']:.4f} {metric} {losses}")  # noqa: T201
        tried = {**settings, "rates": [found[rate] for rate in sorted(found)], "environment": environment()}
        write_json(RESULTS, {**kept, scale_name: tried})


def without_test(corpus: Corpus) -> Corpus:
    """The corpus with the first tokens of validation in place of both splits that a training is evaluated on."""
    valid = corpus.valid[:EVAL_TOKENS]
    return dataclasses.replace(corpus, valid=valid, test=valid)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scale", choices=("base", "cpu"))
    parser.add_argument("data_dir", nargs="?", help="Penn Treebank, characters (default: where the corpus is looked for)")
    parser.add_argument("--lr", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, default=1, choices=range(1, 100), metavar="N")
    parser.add_argument("--d-model", type=int, help="another width, with heads and experts in proportion")
    given = parser.parse_args()
    try_learning_rates(given.scale, given.lr, given.seeds, given.data_dir, given.d_model)
