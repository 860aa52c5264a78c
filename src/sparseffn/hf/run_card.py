"""The model card of a run: its settings, its losses or the table of the comparison that it was part of."""

from __future__ import annotations

from sparseffn.data import Tokenizer, to_metric
from sparseffn.hf.sparse_model import SparseFFNForCausalLM
from sparseffn.hf.xl_model import TransformerXLForCausalLM
from sparseffn.storage import read_json
from sparseffn.training import RunFolder, RunSettings, TrainResult


def run_card(
    folder: RunFolder,
    model: TransformerXLForCausalLM | SparseFFNForCausalLM,
    tokenizer: Tokenizer | None,
    *,
    name: str,
    step: int,
    results: str = "",
) -> str:
    """The card of a run's model after `step` steps.

    `name` is the new folder's; `results` is a table in Markdown of the finished run; "" stands for the run's own losses.
    """
    settings = RunSettings.read(folder)
    train = settings.train
    remembers = isinstance(model, TransformerXLForCausalLM)
    memory = f", memory {train.memory} in training, {train.eval_memory} in evaluation" if remembers else ""
    training = {
        "corpus": f"{settings.corpus}, digest {settings.digest}",
        "steps": f"{step:,} of {train.steps:,}, {train.tokens_per_step:,} tokens each",
        "context": f"{train.context} tokens{memory}",
        "optimiser": f"{train.optimizer}, learning rate {train.lr:g}, gradients clipped at {train.clip:g}, seed {train.seed}",
        "precision": train.precision,
        "trained with": f"sparseffn {made_by(folder) or 'of an unknown version'}",
    }
    if tokenizer is not None:
        training["tokeniser"] = f"{tokenizer.name}, one token a {tokenizer.unit}, {tokenizer.vocab_size:,} of them"
    return model.card(
        name,
        results=_results(folder, settings, tokenizer, step=step, table=results),
        training=training,
        has_tokenizer=tokenizer is not None,
        notes=_notes(tokenizer),
    )


def made_by(folder: RunFolder) -> str | None:
    """The version that began the run; None where the folder does not say."""
    if not folder.environment_path.exists():
        return None
    version = read_json(folder.environment_path).get("sparseffn")
    return version if isinstance(version, str) else None


def _results(folder: RunFolder, settings: RunSettings, tokenizer: Tokenizer | None, *, step: int, table: str) -> str:
    """The table, or the run's losses; of a checkpoint on the way, that there are none."""
    if not folder.result_path.exists():
        return "The run had not finished when its checkpoint was exported: there are no final losses."
    result = TrainResult.read(folder.result_path)
    if step != result.steps:
        return f"None: the checkpoint is that of step {step:,}, and final losses are those of step {result.steps:,}."
    return table or _own_losses(result, settings, tokenizer)


def _own_losses(result: TrainResult, settings: RunSettings, tokenizer: Tokenizer | None) -> str:
    metric = None if tokenizer is None else to_metric(result.test, tokenizer.unit)[0]
    lines = ["| split | nats a token |" + (f" {metric} |" if metric else ""), "| :-- | --: |" + (" --: |" if metric else "")]
    for split, nats in (("valid", result.valid), ("test", result.test)):
        value = "" if tokenizer is None else f" {to_metric(nats, tokenizer.unit)[1]:.4f} |"
        lines.append(f"| {split} | {nats:.4f} |{value}")
    memory, evaluated = settings.train.eval_memory, settings.evaluated
    text = "Whole splits" if evaluated is None else f"The first {evaluated:,} tokens of each split"
    how = f"with a memory of {memory:,} positions" if memory else "every window without the text before it"
    return "\n".join(lines) + f"\n\n{text}, {how}; one run, one seed."


def _notes(tokenizer: Tokenizer | None) -> list[str]:
    """What one must know of the tokeniser."""
    if tokenizer is None:
        return ["The folder has no tokeniser: the model takes and gives the token numbers of its run."]
    if tokenizer.name == "words":
        return [
            "A text is split at white space, and every line ends in `<eos>`, the last one too: to go on within a line, leave "
            "out the last token of the prompt."
        ]
    if tokenizer.name in ("chars", "seen-bytes"):
        return [f"A {tokenizer.unit} that the training text does not have is an error."]
    return []
