"""`plan`: what a training run asks of each device, from a stated model."""

from __future__ import annotations

import dataclasses
import re

from sparseffn.cli.output import print_json, print_rows
from sparseffn.cli.run_settings import Plan as PlanSettings
from sparseffn.cli.runs import one_method
from sparseffn.comparison import MatchedMethod, match_methods
from sparseffn.errors import UserError
from sparseffn.models.presets import get_preset
from sparseffn.training import from_preset
from sparseffn.training.layout import Layout
from sparseffn.training.planned_memory import MemoryPlan
from sparseffn.training.planned_sends import CommunicationPlan
from sparseffn.training.planner import Plan, in_bytes, largest_batch, plan

_UNITS = {"": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

_MEMORY = {
    "parameters": "parameters",
    "gradients": "gradients",
    "moments": "Adam's two moments",
    "remembered": "Transformer-XL's memory",
    "attention": "kept by attention layers",
    "feedforward": "kept by feedforward blocks",
    "output": "kept by embedding, output and loss",
    "casts": "parameters in the precision of autocast",
    "buffers": "buffers of DDP or FSDP",
    "work": "work of one layer",
    "peak": "peak, as gradients come while activations go",
}
_COMMUNICATION = {
    "gradients": "gradients",
    "parameters": "parameters",
    "routers": "routers",
    "experts": "tokens to experts",
}


def plan_run(settings: PlanSettings) -> int:
    """Print memory and communication of a device; exit code 1 where it does not fit `--memory`."""
    sizes = {"batch": settings.batch, "context": settings.context}
    changes = {name: size for name, size in sizes.items() if size is not None}
    preset = dataclasses.replace(get_preset(settings.preset), backbone=settings.backbone, **changes)
    config = from_preset(preset, accumulation=settings.accumulation, precision=settings.precision)
    matched = match_methods([one_method(settings.method, "--method")], preset, settings.vocab_size)[0]
    layout = Layout(gpus=settings.gpus, strategy=settings.strategy, expert_parallel=settings.expert_parallel)
    found = plan(matched.model, config, layout)
    given = None if settings.memory is None else parse_bytes(settings.memory)
    largest = None if given is None else largest_batch(matched.model, config, layout, given)
    fits = None if given is None else found.memory.peak <= given
    if settings.json:
        facts = {"method": matched.label, "model": matched.model.to_json(), "train": config.to_json()}
        data = {**facts, "layout": dataclasses.asdict(layout), **dataclasses.asdict(found)}
        data["communication"]["total"] = found.communication.total
        print_json({**data, "device_memory": given, "fits": fits, "largest_batch": largest})
    else:
        print(_summary(matched, settings, config.batch, found))
        _print_memory(found.memory, given)
        _print_communication(found.communication, settings)
        if given is not None:
            print(f"\n{_verdict(config.batch, given, largest or 0, fits=bool(fits))}")
    return 1 if fits is False else 0


def _summary(matched: MatchedMethod, settings: PlanSettings, batch: int, found: Plan) -> str:
    sizes = ", ".join(f"{field}={getattr(matched.config, field)}" for field in matched.config.size_fields)
    devices = f"{settings.gpus} devices, {settings.strategy}" if settings.gpus > 1 else "one device"
    return "\n".join(
        [
            f"{matched.label}, preset {settings.preset}, {sizes}: {found.params:,} parameters, {settings.precision}, {devices}",
            *matched.marks,
            f"a step: {batch} streams, {found.streams_per_device} a device at a time; {found.tokens_per_step:,} tokens, "
            f"{found.flops_per_step:.3g} FLOPs, {found.flops_per_device:.3g} a device\n",
        ]
    )


def _print_memory(memory: MemoryPlan, given: float | None) -> None:
    rows = [(name, in_bytes(getattr(memory, key))) for key, name in _MEMORY.items() if getattr(memory, key)]
    rows += [] if given is None else [("of the device", in_bytes(given))]
    print_rows(("memory of a device", "size"), rows)


def _print_communication(sent: CommunicationPlan, settings: PlanSettings) -> None:
    if settings.gpus == 1:
        print("\none device sends nothing")
        return
    rows = [(name, in_bytes(getattr(sent, key))) for key, name in _COMMUNICATION.items() if getattr(sent, key)]
    print_rows(("sent by a device in a step", "size"), [*rows, ("all", in_bytes(sent.total))])


def _verdict(batch: int, given: float, largest: int, *, fits: bool) -> str:
    most = f"the largest batch that fits is {largest}" if largest else "no batch does"
    return f"batch {batch} {'fits' if fits else 'does not fit'} {in_bytes(given)} a device; {most}"


def parse_bytes(text: str) -> float:
    """Bytes of `80GB`, `24GiB` or a plain number.

    Raises:
        UserError: the text is none of these, or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b|)\s*", text.lower())
    size = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if size <= 0:
        raise UserError(f"`--memory` must be a size such as 80GB or 24GiB; got {text!r}; fix: --memory 80GB")
    return size
