"""The model card of a converted model: what was replaced in which model, how it was filled, and what that cost and saved."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sparseffn.ffn import FFNConfig, config_from_json
from sparseffn.hf.model_card import front_matter, how_to_load, options_of, rows
from sparseffn.results.convert_result import ConvertResult, Loss


def converted_card(
    name: str,
    *,
    model_type: str,
    family: str,
    base_model: str | None,
    blocks: Mapping[str, Mapping[str, Any]],
    n_params: int,
    has_tokenizer: bool = False,
    result: ConvertResult | None = None,
) -> str:
    """The card of a model with replaced blocks.

    Args:
        name: the title; also what the example loads.
        model_type: of its config.
        family: model type of the model that the blocks are in.
        base_model: what that was loaded as, None where nobody knows.
        blocks: as `ConvertedConfig` has them.
        n_params: of the whole model.
        has_tokenizer: whether the folder holds a tokenizer.
        result: of the conversion that made it; None: no losses are claimed.
    """
    configs = [config_from_json(block["config"]) for block in blocks.values()]
    methods = {config.name: f"`{config.name}`: {config.summary} ({config.paper}.)" for config in configs}
    # A name without an owner is that of somebody's folder.
    on_hub = base_model if base_model is not None and "/" in base_model else None
    of = "a model" if base_model is None else f"[{on_hub}](https://huggingface.co/{on_hub})" if on_hub else base_model
    fills = dict.fromkeys(block.get("fill") or "unknown" for block in blocks.values())
    facts = {
        "base model": f"{base_model or 'unknown'}, of the family `{family}`",
        "replaced": "; ".join(_places(blocks)),
        "blocks": "; ".join(dict.fromkeys(f"{config.name}: {options_of(config)}" for config in configs)),
        "filled from the dense blocks by": ", ".join(f"`{fill}`" for fill in fills),
        "parameters": f"{n_params:,}" if result is None else f"{result.params_after:,} ({result.params_before:,} before)",
        "pairs that take part": _share(configs),
    }
    if result is not None:
        facts["FLOPs of the blocks"] = f"{result.flops_share:.1%} of the dense ones'"
    parts = [
        front_matter(*methods, base_model=on_hub),
        f"# {name}",
        f"This is {of}, in which {len(blocks)} dense feedforward block{'s'[: len(blocks) != 1]} became others:",
        "\n".join(f"- {what}" for what in methods.values()),
        "Everything else is the base model's, and so is the licence: see its card.",
        how_to_load(name, model_type, has_tokenizer=has_tokenizer),
        "## Model\n\n" + rows(facts),
    ]
    if result is not None:
        parts += [f"## Results\n\n{_losses(result)}\n\n{_speeds(result)}", "## Conversion\n\n" + rows(_conversion(result))]
    return "\n\n".join(parts) + "\n"


def _places(names: Iterable[str]) -> list[str]:
    """`model.layers.*.mlp` with the numbers that the star stands for, blocks of equal names together."""
    found: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"\d+", name)
        place = name if number is None else f"{name[: number.start()]}*{name[number.end() :]}"
        found.setdefault(place, []).extend([] if number is None else [int(number[0])])
    return [f"`{place}`" + (f", * = {_ranges(numbers)}" if numbers else "") for place, numbers in found.items()]


def _ranges(numbers: list[int]) -> str:
    """`0 to 3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def _share(configs: list[FFNConfig]) -> str:
    active, held = sum(config.active_channels for config in configs), sum(config.n_channels for config in configs)
    return f"{active:,} of {held:,} in all replaced blocks ({active / held:.1%})"


def _losses(result: ConvertResult) -> str:
    facts, losses = result.facts, {"dense": result.dense, "filled, not trained": result.filled}
    if facts.distill or facts.end_to_end:
        losses[f"distilled, {facts.distill:,} + {facts.end_to_end:,} steps"] = result.converted
    lines = ["| model | perplexity | against dense |", "| :-- | --: | --: |"]
    lines += [f"| {name} | {loss.perplexity:.2f} | {_change(loss)} |" for name, loss in losses.items()]
    about = (
        f"On {result.held_out.tokens:,} tokens of {result.held_out.name} in windows of {facts.context:,}, each by itself; in "
        "brackets a 95% interval over windows."
    )
    return "\n".join(lines) + f"\n\n{about}"


def _change(loss: Loss) -> str:
    if loss.difference is None or loss.change is None:
        return ""
    low, high = (math.expm1(nats) for nats in (loss.difference.low, loss.difference.high))
    return f"{loss.change:+.2%} [{low:+.2%}, {high:+.2%}]"


def _speeds(result: ConvertResult) -> str:
    lines = ["| tokens per second | dense | converted | times as fast |", "| :-- | --: | --: | --: |"]
    lines += [
        f"| {speed.what}, {speed.tokens} tokens | {speed.before:,.1f} | {speed.after:,.1f} | {speed.times_faster:.2f}\u00d7 |"
        for speed in result.speeds
    ]
    made = result.environment
    where = f"{made.get('gpu') or made.get('cpu')}, threads: {made.get('threads')}, {result.facts.dtype}"
    return "\n".join(lines) + f"\n\nOne sequence, both models in turns; {where}."


def _conversion(result: ConvertResult) -> dict[str, str]:
    facts, text = result.facts, result.calibration
    found = {"calibration text": f"{text.tokens:,} tokens of {text.name}"}
    if facts.distill:
        found["distillation of each block"] = (
            f"{facts.distill:,} steps of {facts.batch_tokens:,} tokens, learning rate {facts.lr:g}"
        )
    if facts.end_to_end:
        found["distillation of the whole model"] = f"{facts.end_to_end:,} steps, learning rate {facts.end_to_end_lr:g}"
    return {**found, "seed": str(facts.seed), "converted with": f"sparseffn {result.environment.get('sparseffn')}"}
