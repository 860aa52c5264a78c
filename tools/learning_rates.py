"""Train with several learning rates: `tools/learning_rates.py base|cpu [DATA_DIR] [--lr RATE ...] [--seeds N]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparseffn.paper.learning_rates import try_learning_rates

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("scale", choices=("base", "cpu"))
parser.add_argument("data_dir", nargs="?", help="Penn Treebank, characters (default: where the corpus is looked for)")
parser.add_argument("--lr", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3])
parser.add_argument("--seeds", type=int, default=1, choices=range(1, 100), metavar="N")
given = parser.parse_args()
results = Path(__file__).resolve().parent.parent / "results" / "learning-rates.json"
out = Path("runs/learning-rates")
try_learning_rates(given.scale, given.lr, results=results, out=out, data_dir=given.data_dir, n_seeds=given.seeds)
