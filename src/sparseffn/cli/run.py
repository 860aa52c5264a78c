"""`train`, `eval`, `generate`: one run folder."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparseffn.cli.compare import overrides, set_threads
from sparseffn.cli.output import Watch, print_json, print_rows
from sparseffn.comparison import match_methods, parse_methods
from sparseffn.data import Corpus, load_corpus, to_metric, tokenizer_from_json
from sparseffn.errors import UserError
from sparseffn.evaluation import evaluate
from sparseffn.models.generation import generate_tokens
from sparseffn.models.presets import get_preset
from sparseffn.training import RunFolder, RunSettings, TrainConfig, load_run_model, train
from sparseffn.training.config import CURVE_POINTS


def train_command(options: argparse.Namespace) -> int:
    """Train a model matched to the preset's dense one."""
    set_threads(options)
    choices = parse_methods(options.method)
    if len(choices) != 1:
        raise UserError(f"`--method` must name one method; got {len(choices)}; fix: `compare` trains several")
    preset = dataclasses.replace(get_preset(options.preset), **overrides(options))
    corpus = load_corpus(
        options.corpus,
        tokenizer=options.tokenizer,
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
        vocab_size=options.vocab_size,
    )
    contender = match_methods(choices, preset, corpus.tokenizer.vocab_size)[0]
    steps = preset.steps if options.steps is None else options.steps
    config = TrainConfig(
        steps=steps,
        batch=preset.batch,
        context=preset.context,
        memory=preset.memory,
        eval_memory=preset.eval_memory,
        eval_batch=preset.eval_batch,
        lr=preset.lr,
        warmup=min(preset.warmup, steps),
        clip=preset.clip,
        optimizer=options.optimizer,
        weight_decay=options.weight_decay,
        accumulation=options.accumulation,
        precision=options.precision,
        seed=options.seed,
        eval_every=max(1, steps // CURVE_POINTS) if options.eval_every is None else options.eval_every,
        checkpoint_every=max(1, steps // 10) if options.checkpoint_every is None else options.checkpoint_every,
    )
    watch = Watch(lambda nats: "{1:.3f} {0}".format(*to_metric(nats, corpus.unit)))
    watch.say(f"{contender.label}: {contender.model.num_params():,} parameters, corpus {corpus.name} {corpus.digest[:12]}")
    try:
        result = train(
            contender.model,
            config,
            corpus,
            options.out,
            on_step=watch.run(contender.label, options.seed, 0, 1),
            on_metrics=_tensorboard(options.out) if options.tensorboard else None,
        )
    finally:
        watch.close()
    losses = {split: to_metric(nats, corpus.unit) for split, nats in (("valid", result.valid), ("test", result.test))}
    if options.json:
        print_json({**result.to_json(), "metric": losses["test"][0], **{f"{k}_metric": v[1] for k, v in losses.items()}})
    else:
        print_rows(("split", losses["test"][0]), [(split, f"{value:.4f}") for split, (_, value) in losses.items()])
    return 0


def _tensorboard(out: str) -> Callable[[dict[str, Any]], None]:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        raise UserError("`--tensorboard` needs the extra; fix: pip install 'sparseffn[track]'") from None
    # The run folder must stay empty until the run has claimed it.
    writer: list[SummaryWriter] = []

    def write(record: dict[str, Any]) -> None:
        if not writer:
            writer.append(SummaryWriter(str(Path(out) / "tensorboard"), purge_step=record["step"]))
        for key, value in record.items():
            if key != "step":
                writer[0].add_scalar(key, value, record["step"])
        writer[0].flush()

    return write


def eval_command(options: argparse.Namespace) -> int:
    """Evaluate the last checkpoint."""
    set_threads(options)
    model, folder = load_run_model(options.folder)
    run = RunSettings.read(folder)
    settings, corpus = run.train, run_corpus(folder, run, options)
    memory = settings.eval_memory if options.memory is None else options.memory
    batch = settings.eval_batch if options.eval_batch is None else options.eval_batch
    outcome = evaluate(
        model,
        corpus.tokens(options.split),
        batch=batch,
        context=settings.context,
        memory=memory,
        precision=settings.precision,
    )
    metric, value = to_metric(outcome.nats_per_token, corpus.unit)
    bits = outcome.nats_per_token * outcome.n_predictions / corpus.n_bytes(options.split) / 0.6931471805599453
    data = {
        "split": options.split,
        "predictions": outcome.n_predictions,
        "memory": memory,
        "eval_batch": batch,
        "nats_per_token": outcome.nats_per_token,
        "metric": metric,
        "value": value,
        "bits_per_byte": bits,
        "digest": corpus.digest,
        "run_evaluated_tokens": run.evaluated,
    }
    if options.json:
        print_json(data)
    else:
        print_rows(
            ("split", "predictions", "memory", metric, "bits per byte of text"),
            [(options.split, f"{outcome.n_predictions:,}", str(memory), f"{value:.4f}", f"{bits:.4f}")],
        )
        print(f"\ncorpus {corpus.name}, digest {corpus.digest}")
        if run.evaluated is not None:
            print(f"the whole split; the run's own results are of its first {run.evaluated:,} tokens")
    return 0


def run_corpus(folder: RunFolder, run: RunSettings, options: argparse.Namespace) -> Corpus:
    """The corpus that a run was trained on, with the run's own tokeniser.

    Raises:
        UserError: the corpus here is another text than the run's.
    """
    corpus = load_corpus(run.corpus, tokenizer=_run_tokenizer(folder), data_dir=options.data_dir, cache_dir=options.cache_dir)
    if corpus.digest != run.digest:
        raise UserError(
            f"the corpus must be the run's, digest {run.digest}; got {corpus.digest}; "
            "fix: pass the same --data-dir, or evaluate with the Python version that trained the run"
        )
    return corpus


def _run_tokenizer(folder: RunFolder) -> Any:
    path = folder.path / "tokenizer.json"
    if not path.exists():
        raise UserError(f"`{path}` must exist; got no such file; fix: train the run again, or restore the file")
    try:
        return tokenizer_from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"`{path}` must hold the run's tokenizer; got a damaged file ({error}); fix: restore the file or train again"
        ) from None


def generate_command(options: argparse.Namespace) -> int:
    """Print the prompt and what follows, token by token."""
    set_threads(options)
    model, folder = load_run_model(options.folder)
    settings = RunSettings.read(folder).train
    tokenizer = _run_tokenizer(folder)
    prompt = [int(t) for t in tokenizer.encode(options.prompt.encode())]
    tokens = generate_tokens(
        model,
        prompt,
        options.n_tokens,
        memory_length=settings.eval_memory + settings.context if options.memory is None else options.memory,
        temperature=options.temperature,
        top_k=options.top_k,
        generator=torch.Generator().manual_seed(options.seed),
    )
    written = list(prompt)
    shown = tokenizer.decode(written)
    sys.stdout.write(shown)
    for token in tokens:
        written.append(token)
        text = tokenizer.decode(written)
        # A character may take several tokens; what is not whole yet waits.
        if text.startswith(shown) and not text.endswith("\ufffd"):
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    sys.stdout.write(tokenizer.decode(written)[len(shown) :] + "\n")
    return 0
