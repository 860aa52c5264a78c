"""`sparseffn compare`."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import msgspec
import torch

from sparseffn.cli.output import Watch, console, parse_duration, print_json
from sparseffn.comparison import CompareSettings, compare, parse_methods
from sparseffn.errors import UserError
from sparseffn.report import print_table
from sparseffn.report.comparison_report import comparison_table, write_comparison


def overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Training settings that were given on the command line."""
    values = {key: getattr(options, key) for key in ("lr", "batch", "context", "warmup", "clip")}
    return {key: value for key, value in values.items() if value is not None}


def set_threads(options: argparse.Namespace) -> None:
    """Apply `--threads`."""
    if options.threads is not None:
        if options.threads < 1:
            raise UserError(f"`--threads` must be at least 1; got {options.threads}; fix: leave it out to use all cores")
        torch.set_num_threads(options.threads)


def compare_command(options: argparse.Namespace) -> int:
    """Compare, print the table, write the page."""
    set_threads(options)
    if options.seeds < 1:
        raise UserError(f"`--seeds` must be at least 1; got {options.seeds}; fix: --seeds 1")
    settings = CompareSettings(
        methods=tuple(parse_methods(options.methods)),
        corpus=options.corpus,
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
        preset=options.preset,
        seeds=tuple(range(options.seed, options.seed + options.seeds)),
        steps=options.steps,
        budget_s=None if options.budget is None else parse_duration(options.budget),
        overrides=overrides(options),
    )
    watch = Watch(lambda nats: f"loss {nats:.3f} nats")
    has_plots = importlib.util.find_spec("matplotlib") is not None
    if not has_plots:
        watch.say("the page will have no figures: pip install 'sparseffn[plot]', then run the same command again")
    try:
        result = msgspec.to_builtins(compare(settings, options.out, progress=watch))
    finally:
        watch.close()
    out = Path(options.out)
    write_comparison(result, out, drawn=has_plots)
    if options.json:
        print_json(result)
    else:
        print_table(comparison_table(result), console())
        print(f"\npage: {(out / 'page.html').resolve().as_uri()}")
    return 0
