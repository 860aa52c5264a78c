"""`bench layer`, `memory`, `roofline` and `step`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence

import msgspec

from sparseffn.bench.benchmark import check_blocks
from sparseffn.bench.candidates import DTYPES, Setting, Shape, backend_restored, check_backends, resolved, use_backend
from sparseffn.bench.layer import EXPERT_COUNT_TOKENS, bench_expert_counts, bench_layers
from sparseffn.bench.memory import bench_memory
from sparseffn.bench.roofline import bench_roofline
from sparseffn.bench.step import StepShape, bench_step
from sparseffn.cli.bench_output import check_out, deliver, say
from sparseffn.cli.compare import set_threads
from sparseffn.comparison import match_methods, parse_methods
from sparseffn.devices import find_device
from sparseffn.errors import UserError
from sparseffn.ffn import FFNConfig, field_infos, list_methods
from sparseffn.models.presets import Preset, get_preset
from sparseffn.ops import requested_backend
from sparseffn.results.bench_result import LayerSettings, StepSettings

# Decides the parameters outside the blocks, within which methods are matched; bytes.
_VOCABULARY = 256

PAPER = ("wt-s", "wt-b", "e8")
"""The presets whose blocks `--preset paper` times."""
_PAPER_METHODS = ("sigma-moe", "pkm")
_PAPER_TOKENS = (1, 8, 64, 1024, 4096)
_TOKENS = (1024,)


def layer_command(options: argparse.Namespace) -> int:
    """Time one layer of each method."""
    settings = _settings(options)
    result = bench_layers(_shapes(options), settings, progress=say)
    if options.preset == "paper" and EXPERT_COUNT_TOKENS in settings.tokens:
        result = msgspec.structs.replace(result, expert_counts=bench_expert_counts(settings, progress=say))
    return deliver(result, options)


def _settings(options: argparse.Namespace) -> LayerSettings:
    """What the command line says of tokens, backends and dtype."""
    set_threads(options)
    check_out(options.out)
    return LayerSettings(
        tokens=tuple(options.tokens or (_PAPER_TOKENS if options.preset == "paper" else _TOKENS)),
        rounds=options.rounds,
        backends=tuple(options.backends or (requested_backend(),)),
        dtype=options.dtype,
        device=options.device,
        peers=not options.no_peers,
    )


def _shapes(options: argparse.Namespace) -> list[Shape]:
    """The blocks of a preset, or of the paper's three."""
    is_paper = options.preset == "paper"
    words = options.methods or (_PAPER_METHODS if is_paper else list_methods())
    return [shape_of(get_preset(name), words) for name in (PAPER if is_paper else (options.preset,))]


def shape_of(preset: Preset, words: Sequence[str]) -> Shape:
    """The blocks of a preset at equal parameters, without dropout, which would slow one method and not another."""
    bare = dataclasses.replace(preset, shape=dataclasses.replace(preset.shape, dropout=0.0, expert_dropout=0.0))
    field = match_methods(parse_methods(words), bare, _VOCABULARY)
    dense = match_methods(parse_methods(["dense"]), bare, _VOCABULARY)[0]
    return Shape(name=preset.name, dense=dense.config, methods={c.label: c.config for c in field})


def memory_command(options: argparse.Namespace) -> int:
    """Bytes that one layer of each method keeps for backward."""
    return deliver(bench_memory(_shapes(options), _settings(options)), options)


def roofline_command(options: argparse.Namespace) -> int:
    """The machine's speeds, and the limits that follow."""
    return deliver(bench_roofline(_shapes(options), _settings(options), progress=say), options)


def step_command(options: argparse.Namespace) -> int:
    """Time a training step with relative and with plain attention, and one of each method against the dense block."""
    set_threads(options)
    check_out(options.out)
    if options.rounds < 1:
        raise UserError(f"`--rounds` must be at least 1; got {options.rounds}; fix: --rounds 5")
    preset = get_preset(options.preset)
    device = find_device(options.device)
    shape = StepShape(
        batch=options.batch, context=preset.context, memory=preset.memory, precision=options.precision, device=device
    )
    contender = match_methods(parse_methods(options.method), preset, options.vocab_size)[0]
    labels = ["dense", *(word for word in options.methods if word != "dense")]
    models = {c.label: c.model for c in match_methods(parse_methods(labels), preset, options.vocab_size)}
    backend = options.backend or requested_backend()
    _check_step({contender.label: contender.model.ffn} | {label: m.ffn for label, m in models.items()}, shape, backend)
    settings = StepSettings(
        preset=preset.name,
        method=contender.label,
        params=contender.model.num_params(),
        vocab_size=options.vocab_size,
        rounds=options.rounds,
        batch=shape.batch,
        context=shape.context,
        memory=shape.memory,
        backend=resolved(backend, device, DTYPES[shape.precision]),
        precision=shape.precision,
        device=device.type,
    )
    with backend_restored():
        use_backend(backend)
        say(f"timing {contender.label} with relative and with plain attention, then {', '.join(models)}")
        return deliver(bench_step(contender.model, models, shape, settings), options)


def _check_step(blocks: Mapping[str, FFNConfig], shape: StepShape, backend: str) -> None:
    """Check a step's blocks against float64 at its tokens, on a backend that must be able to run."""
    setting = Setting(n_tokens=shape.batch * shape.context, dtype=DTYPES[shape.precision], device=shape.device)
    check_backends((backend,), setting.device, setting.dtype)
    check_blocks({label: _bare(config) for label, config in blocks.items()}, setting, backend=backend, progress=say)


def _bare(config: FFNConfig) -> FFNConfig:
    """Without dropout, which draws at random and is off in the check anyway."""
    return config.replace(**{name: 0.0 for name in ("dropout", "expert_dropout") if name in field_infos(type(config))})
