"""`train`, `eval`, `generate`: one run; `compare`: runs of several methods."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from sparseffn.cli.launched import launched, led
from sparseffn.cli.output import Progress, can_draw, check_seeds, parse_duration, print_json, print_rows, show, use_machine
from sparseffn.cli.process import printable
from sparseffn.cli.run_settings import Compare, Eval, Generate, Train, Trained
from sparseffn.comparison import CompareSettings, MethodChoice, compare, match_methods, parse_methods
from sparseffn.comparison.experiment import OVERRIDES
from sparseffn.data import Tokenizer, load_corpus, to_metric
from sparseffn.distribution import World
from sparseffn.errors import UserError
from sparseffn.evaluation import evaluate
from sparseffn.models.generation import generate_tokens
from sparseffn.models.presets import get_preset
from sparseffn.report.comparison_report import comparison_table, write_comparison
from sparseffn.training import RunSettings, from_preset, load_run_corpus, load_run_model, load_run_tokenizer, train
from sparseffn.training.restore import find_checkpoint


def overrides(settings: Trained) -> dict[str, Any]:
    """Sizes and rates that stand in place of the preset's."""
    return _given(settings, OVERRIDES)


def _given(settings: object, names: Iterable[str]) -> dict[str, Any]:
    values = {name: getattr(settings, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def one_method(words: tuple[str, ...], flag: str) -> MethodChoice:
    """The method that an option names.

    Raises:
        UserError: it names another number of them, or one that is not known.
    """
    choices = parse_methods(words)
    if len(choices) != 1:
        raise UserError(f"`{flag}` must name one method; got {', '.join(c.label for c in choices)}; fix: name one")
    return choices[0]


def train_run(settings: Train) -> int:
    """Train a model matched to the preset's dense one."""
    with launched(settings) as world:
        return _train_run(settings, world)


def _train_run(settings: Train, world: World) -> int:
    names = ("optimizer", "weight_decay", "accumulation", "precision", "eval_every", "checkpoint_every")
    with world.together():
        device = use_machine(settings)
        choice = one_method(settings.method, "--method")
        preset = dataclasses.replace(get_preset(settings.preset), backbone=settings.backbone, **overrides(settings))
        config = from_preset(preset, steps=settings.steps, seed=settings.seed, **_given(settings, names))
        corpus = load_corpus(settings.corpus, **settings.corpus_options())
        matched = match_methods([choice], preset, corpus.tokenizer.vocab_size)[0]
    with Progress(quiet=not world.leads) as progress:
        progress.log(f"{matched.label}: {matched.model.num_params():,} parameters, corpus {corpus.name} {corpus.digest[:12]}")
        result = train(
            matched.model,
            config,
            corpus,
            settings.out,
            device=device,
            non_finite=settings.non_finite,
            keep=settings.keep,
            strategy=settings.strategy,
            on_step=progress.run(matched.label, settings.seed, 0, 1),
            on_metrics=_tensorboard(settings.out) if settings.tensorboard and world.leads else None,
        )
    if not world.leads:
        return 0
    losses = {split: to_metric(nats, corpus.unit) for split, nats in (("valid", result.valid), ("test", result.test))}
    if settings.json:
        metrics = {f"{split}_metric": value for split, (_, value) in losses.items()}
        print_json({**dataclasses.asdict(result), "metric": losses["test"][0], **metrics})
    else:
        print_rows(("split", losses["test"][0]), [(split, f"{value:.4f}") for split, (_, value) in losses.items()])
    return 0


def _tensorboard(out: str) -> Callable[[dict[str, Any]], None]:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        raise UserError("`--tensorboard` needs the extra; got none; fix: pip install 'sparseffn[track]'") from None
    # The run folder must stay empty until the run has claimed it.
    writer: list[SummaryWriter] = []

    def write(record: dict[str, Any]) -> None:
        if not writer:
            writer.append(SummaryWriter(str(Path(out) / "tensorboard"), purge_step=record["step"]))
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                writer[0].add_scalar(key, value, record["step"])
        writer[0].flush()

    return write


@led
def compare_methods(settings: Compare) -> int:
    """Compare, write the table and the page, print the table."""
    device = use_machine(settings)
    check_seeds(settings.seeds)
    wanted = CompareSettings(
        methods=tuple(parse_methods(settings.methods)),
        corpus=settings.corpus,
        **settings.corpus_options(),
        preset=settings.preset,
        backbone=settings.backbone,
        seeds=tuple(range(settings.seed, settings.seed + settings.seeds)),
        steps=settings.steps,
        budget_s=None if settings.budget is None else parse_duration(settings.budget),
        overrides=overrides(settings),
        precision=settings.precision,
        device=str(device),
        strategy=settings.strategy,
    )
    draws = can_draw()
    with Progress() as progress:
        result = compare(wanted, settings.out, progress=progress)
    out = Path(settings.out)
    write_comparison(result, out, drawn=draws)
    return show(result, settings, [comparison_table(result)], files=[out / "page.html"])


def evaluate_run(settings: Eval) -> int:
    """Evaluate a checkpoint."""
    with launched(settings) as world:
        return _evaluate_run(settings, world)


def _evaluate_run(settings: Eval, world: World) -> int:
    with world.together():
        model, folder = load_run_model(settings.run, checkpoint=settings.checkpoint, device=use_machine(settings))
        run = RunSettings.read(folder)
        corpus = load_run_corpus(folder.path, data_dir=settings.data_dir, cache_dir=settings.cache_dir)
    world.agree("the checkpoint", find_checkpoint(folder, settings.checkpoint).name)
    chosen = run.train.evaluation
    chosen |= {"memory": settings.memory} if settings.memory is not None else {}
    chosen |= {"batch": settings.eval_batch} if settings.eval_batch is not None else {}
    outcome = evaluate(model, corpus.tokens(settings.split), world=world, **chosen)
    if not world.leads:
        return 0
    metric, value = to_metric(outcome.nats_per_token, corpus.unit)
    bits = outcome.nats_per_token * outcome.n_predictions / corpus.n_bytes(settings.split) / math.log(2)
    data = {
        "split": settings.split,
        "predictions": outcome.n_predictions,
        "memory": chosen["memory"],
        "eval_batch": chosen["batch"],
        "nats_per_token": outcome.nats_per_token,
        "metric": metric,
        "value": value,
        "bits_per_byte": bits,
        "digest": corpus.digest,
        "run_evaluated_tokens": run.evaluated,
    }
    if settings.json:
        print_json(data)
        return 0
    print_rows(
        ("split", "predictions", "memory", metric, "bits per byte of text"),
        [(settings.split, f"{outcome.n_predictions:,}", str(chosen["memory"]), f"{value:.4f}", f"{bits:.4f}")],
    )
    print(f"\ncorpus {corpus.name}, digest {corpus.digest}")
    if run.evaluated is not None:
        print(f"the whole split; the run's own results are of its first {run.evaluated:,} tokens")
    return 0


def generate(settings: Generate) -> int:
    """Print the prompt and what follows, token by token."""
    model, folder = load_run_model(settings.run, device=use_machine(settings))
    config = RunSettings.read(folder).train
    tokenizer = load_run_tokenizer(folder)
    prompt = [int(t) for t in tokenizer.encode(settings.prompt.encode())]
    tokens = generate_tokens(
        model,
        prompt,
        settings.n_tokens,
        memory_length=config.eval_memory + config.context if settings.memory is None else settings.memory,
        temperature=settings.temperature,
        top_k=settings.top_k,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    for text in _texts(prompt, tokens, tokenizer):
        sys.stdout.write(printable(text))
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _texts(prompt: list[int], tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The prompt's text, then what each token adds; a character that takes several tokens comes when it is whole."""
    written = list(prompt)
    shown = tokenizer.decode(written)
    yield shown
    for token in tokens:
        written.append(token)
        text = tokenizer.decode(written)
        if text.startswith(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(written)[len(shown) :]
