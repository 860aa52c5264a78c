"""`bench layer` and `bench step`."""

from __future__ import annotations

import argparse

from sparseffn.bench.layer import time_layers
from sparseffn.bench.step import attention_ratio
from sparseffn.cli.compare import set_threads
from sparseffn.cli.output import print_json, print_rows
from sparseffn.errors import UserError
from sparseffn.ffn import list_methods
from sparseffn.models.presets import get_preset
from sparseffn.recipes import contenders, parse_methods
from sparseffn.train.folder import environment

# Decides the parameters outside the blocks, within which methods are matched; bytes.
_VOCABULARY = 256


def layer_command(options: argparse.Namespace) -> int:
    """Time one layer of each method."""
    set_threads(options)
    if min(options.tokens) < 1 or options.rounds < 1:
        raise UserError(f"`--tokens` and `--rounds` must be at least 1; got {options.tokens}, {options.rounds}")
    preset = get_preset(options.preset)
    choices = parse_methods(["dense"] if options.methods is None else options.methods)
    if options.methods is None:
        choices = parse_methods(list_methods())
    field = contenders(choices, preset, _VOCABULARY)
    dense = contenders(parse_methods(["dense"]), preset, _VOCABULARY)[0]
    configs = {"(dense)": dense.config} | {c.label: c.config for c in field}
    rows = []
    for n_tokens in options.tokens:
        times = time_layers(configs, n_tokens=n_tokens, rounds=options.rounds)
        base = times.pop("(dense)")
        for label, t in times.items():
            rows.append(
                {
                    "method": label,
                    "tokens": n_tokens,
                    "forward_ms": 1e3 * t.forward_s,
                    "training_ms": 1e3 * t.training_s,
                    "forward_vs_dense": t.forward_s / base.forward_s,
                    "training_vs_dense": t.training_s / base.training_s,
                }
            )
    if options.json:
        print_json({"environment": environment(), "preset": preset.name, "rows": rows})
        return 0
    print_rows(
        ("method", "tokens", "forward ms", "forward + backward ms", "forward / dense", "forward + backward / dense"),
        [
            (
                r["method"],
                str(r["tokens"]),
                f"{r['forward_ms']:.2f}",
                f"{r['training_ms']:.2f}",
                f"{r['forward_vs_dense']:.2f}",
                f"{r['training_vs_dense']:.2f}",
            )
            for r in rows
        ],
        title=f"One layer, preset {preset.name}, float32, medians of {options.rounds} interleaved calls",
    )
    return 0


def step_command(options: argparse.Namespace) -> int:
    """Time a training step with relative and with plain attention."""
    set_threads(options)
    preset = get_preset(options.preset)
    contender = contenders(parse_methods(options.method), preset, options.vocab_size)[0]
    found = attention_ratio(
        contender.model, batch=options.batch, context=preset.context, memory=preset.memory, rounds=options.rounds
    )
    if options.json:
        print_json({"environment": environment(), **found})
        return 0
    shape = f"{options.batch} x {preset.context} tokens, memory {preset.memory}, float32"
    print_rows(
        ("attention", "step s", "against plain"),
        [(name, f"{s:.3f}", f"{s / found['seconds']['plain']:.3f}") for name, s in found["seconds"].items()],
        title=f"Training step, {contender.label} {contender.model.num_params():,} parameters, {shape}",
    )
    return 0
