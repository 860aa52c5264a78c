"""`bench layer`, `experts`, `hf`, `step`, `memory`, `roofline`, `figures`, `kernels` and `gpu`."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from sparseffn.bench.benchmark import check_blocks
from sparseffn.bench.candidates import DTYPES, Setting, Shape, backend_restored, check_backends, resolved, use_backend
from sparseffn.bench.expert_speed import bench_experts
from sparseffn.bench.gpu import run_gpu, went_well
from sparseffn.bench.layer import EXPERT_COUNT_TOKENS, bench_expert_counts, bench_layers
from sparseffn.bench.memory import bench_memory
from sparseffn.bench.roofline import bench_roofline
from sparseffn.bench.step import StepShape, bench_step
from sparseffn.bench.whole_models import find_shape
from sparseffn.cli.bench_settings import (
    Bench,
    BenchExperts,
    BenchFigures,
    BenchGpu,
    BenchHf,
    BenchKernels,
    BenchLayer,
    BenchMemory,
    BenchRoofline,
    BenchStep,
    Sized,
)
from sparseffn.cli.output import can_draw, check_out, log, parse_duration, print_json, print_records, show, use_machine
from sparseffn.cli.process import freed_memory
from sparseffn.comparison import match_methods, parse_methods
from sparseffn.devices import find_device
from sparseffn.errors import UserError
from sparseffn.ffn import FFNConfig, field_infos, list_methods
from sparseffn.models.presets import Preset, get_preset
from sparseffn.ops import requested_backend
from sparseffn.paper.figure_points import bench_figures
from sparseffn.report.bench_report import bench_tables, machine_line, read_bench, write_bench
from sparseffn.report.gpu_report import parts_table, write_gpu_page
from sparseffn.results.bench_result import (
    BenchResult,
    ExpertShape,
    ExpertsSettings,
    FiguresResult,
    LayerSettings,
    StepSettings,
    WholeSettings,
)
from sparseffn.storage import rounded, write_json

# Decides the parameters outside the blocks, within which methods are matched; bytes.
_VOCABULARY = 256

PAPER = ("wt-s", "wt-b", "e8")
"""The presets whose blocks `--preset paper` times."""
_PAPER_METHODS = ("sigma-moe", "topk", "k=512", "pkm")
_PAPER_TOKENS = (1, 8, 64, 1024, 4096)
_TOKENS = (1024,)

_KERNEL_COLUMNS = ("kernel", "target", "dtype", "arithmetic", "rows", "aligned", "registers", "spills", "shared")


def layer(settings: BenchLayer) -> int:
    """Time one layer of each method."""
    measured = _layer_settings(settings, rounds=settings.rounds, backends=settings.backends, peers=not settings.no_peers)
    result = bench_layers(_shapes(settings), measured, progress=log)
    if settings.preset == "paper" and EXPERT_COUNT_TOKENS in measured.tokens:
        result = msgspec.structs.replace(result, expert_counts=bench_expert_counts(measured, progress=log))
    return _deliver(result, settings)


def experts(settings: BenchExperts) -> int:
    """Time gated experts against transformers' implementations."""
    device = use_machine(settings)
    check_out(settings.out)
    measured = ExpertsSettings(
        shapes=tuple(map(_expert_shape, settings.shapes)),
        tokens=settings.tokens,
        dtypes=settings.dtype,
        rounds=settings.rounds,
        backend=settings.backend or requested_backend(),
        device=str(device),
    )
    return _deliver(bench_experts(measured, progress=log), settings)


def hf(settings: BenchHf) -> int:
    """Time whole models of transformers by its own implementations of the experts and by ours."""
    device = use_machine(settings)
    check_out(settings.out)
    for model in settings.models:
        find_shape(model)
    # Imports transformers, which takes seconds and may not be there.
    from sparseffn.bench.whole_speed import bench_whole_models

    measured = WholeSettings(
        models=settings.models,
        prompt=settings.prompt,
        decoded=settings.decoded,
        layers=settings.layers,
        dtypes=settings.dtype,
        rounds=settings.rounds,
        backend=settings.backend or requested_backend(),
        device=str(device),
    )
    return _deliver(bench_whole_models(measured, progress=log), settings)


def _expert_shape(word: str) -> ExpertShape:
    """`1024x512x32x8` as sizes."""
    if not re.fullmatch(r"\d+(x\d+){3}", word):
        raise UserError(f"`--shapes` must be width x units x experts x experts of a token; got {word!r}; fix: 1024x512x32x8")
    return ExpertShape(**dict(zip(ExpertShape.__struct_fields__, map(int, word.split("x")), strict=True)))


def memory(settings: BenchMemory) -> int:
    """Bytes that one layer of each method keeps for backward."""
    measured = _layer_settings(settings, rounds=1, backends=settings.backends, peers=not settings.no_peers)
    return _deliver(bench_memory(_shapes(settings), measured), settings)


def roofline(settings: BenchRoofline) -> int:
    """The machine's speeds, and the limits that follow."""
    measured = _layer_settings(settings, rounds=1, backends=(), peers=False)
    return _deliver(bench_roofline(_shapes(settings), measured, progress=log), settings)


def _layer_settings(settings: Sized, *, rounds: int, backends: Sequence[str], peers: bool) -> LayerSettings:
    """How layers are measured: tokens, backends, dtype and device."""
    device = use_machine(settings)
    check_out(settings.out)
    return LayerSettings(
        tokens=settings.tokens or (_PAPER_TOKENS if settings.preset == "paper" else _TOKENS),
        rounds=rounds,
        backends=tuple(backends) or (requested_backend(),),
        dtype=settings.dtype,
        device=str(device),
        peers=peers,
    )


def _shapes(settings: Sized) -> list[Shape]:
    """The blocks of a preset, or of the paper's three."""
    is_paper = settings.preset == "paper"
    words = settings.methods or (_PAPER_METHODS if is_paper else list_methods())
    return [shape_of(get_preset(name), words) for name in (PAPER if is_paper else (settings.preset,))]


def shape_of(preset: Preset, words: Sequence[str]) -> Shape:
    """The blocks of a preset at equal parameters, without dropout, which would slow one method and not another."""
    bare = dataclasses.replace(preset, shape=dataclasses.replace(preset.shape, dropout=0.0, expert_dropout=0.0))
    matched = match_methods(parse_methods(words), bare, _VOCABULARY)
    dense = match_methods(parse_methods(["dense"]), bare, _VOCABULARY)[0]
    return Shape(name=preset.name, dense=dense.config, methods={c.label: c.config for c in matched})


def step(settings: BenchStep) -> int:
    """Time a training step with relative and with plain attention, and one of each method against the dense block."""
    device = use_machine(settings)
    check_out(settings.out)
    if settings.rounds < 1:
        raise UserError(f"`--rounds` must be at least 1; got {settings.rounds}; fix: --rounds 5")
    preset = get_preset(settings.preset)
    shape = StepShape(
        batch=settings.batch, context=preset.context, memory=preset.memory, precision=settings.precision, device=device
    )
    candidate = match_methods(parse_methods(settings.method), preset, settings.vocab_size)[0]
    labels = ["dense", *(word for word in settings.methods if word != "dense")]
    matched = match_methods(parse_methods(labels), preset, settings.vocab_size)
    models = {c.label: preset.transformer_xl(c.config, settings.vocab_size) for c in matched}
    backend = settings.backend or requested_backend()
    _check_step({candidate.label: candidate.model.ffn} | {label: m.ffn for label, m in models.items()}, shape, backend)
    shown = StepSettings(
        preset=preset.name,
        method=candidate.label,
        params=candidate.model.num_params(),
        vocab_size=settings.vocab_size,
        rounds=settings.rounds,
        batch=shape.batch,
        context=shape.context,
        memory=shape.memory,
        backend=resolved(backend, device, DTYPES[shape.precision]),
        precision=shape.precision,
        device=device.type,
    )
    with backend_restored():
        use_backend(backend)
        log(f"timing {candidate.label} with relative and with plain attention, then {', '.join(models)}")
        return _deliver(
            bench_step(preset.transformer_xl(candidate.config, settings.vocab_size), models, shape, shown), settings
        )


def _check_step(blocks: Mapping[str, FFNConfig], shape: StepShape, backend: str) -> None:
    """Check a step's blocks against float64 at its tokens, on a backend that must be able to run."""
    setting = Setting(n_tokens=shape.batch * shape.context, dtype=DTYPES[shape.precision], device=shape.device)
    check_backends((backend,), setting.device, setting.dtype)
    check_blocks({label: _bare(config) for label, config in blocks.items()}, setting, backend=backend, progress=log)


def _bare(config: FFNConfig) -> FFNConfig:
    """Without dropout, which draws at random and is off where the check looks anyway."""
    return config.replace(**{name: 0.0 for name in ("dropout", "expert_dropout") if name in field_infos(type(config))})


def _deliver(measured: BenchResult, settings: Bench) -> int:
    """Write a result where `--out` says, and print it."""
    # The command's own choice for its process, hence the same for all candidates.
    environment = msgspec.structs.replace(measured.environment, freed_memory=freed_memory())
    result = msgspec.structs.replace(measured, environment=environment)
    written = _write(result, settings.out) if settings.out else []
    return show(result, settings, bench_tables(result), machine_line(result.environment), written)


def _write(result: BenchResult, out: str) -> list[Path]:
    """The result as JSON and, from that, as a page and, of the paper's figures, as drawings."""
    data = Path(out) / f"{result.kind}.json"
    write_json(data, rounded(result))
    return [data, *write_bench(read_bench(data), out, drawn=can_draw())]


def figures(settings: BenchFigures) -> int:
    """Measure what is not there yet, then draw."""
    device = use_machine(settings)
    check_out(settings.out)
    path = Path(settings.out) / "figures.json"
    if settings.redraw and not path.exists():
        raise UserError(f"`--redraw` must have a result to draw; got no {str(path)!r}; fix: measure first, without --redraw")
    measured = LayerSettings(
        tokens=(settings.tokens,),
        rounds=settings.rounds,
        backends=(settings.backend or requested_backend(),),
        dtype=settings.dtype,
        device=str(device),
    )
    result = read_bench(path) if settings.redraw else measure_figures(settings.figures, measured, path, settings.time_limit)
    written = _write(result, settings.out)
    return show(result, settings, bench_tables(result), machine_line(result.environment), written)


def measure_figures(numbers: Sequence[int], settings: LayerSettings, path: Path, time_limit: str) -> FiguresResult:
    """What the file of these figures of the paper holds, once what it lacks and what fits is measured; reports its progress.

    Raises:
        UserError: a backend is not there, or the time limit, as typed (`20m`), is none.
    """
    check_backends(settings.backends, find_device(settings.device), DTYPES[settings.dtype])
    limit_s = parse_duration(time_limit, "time-limit")
    return bench_figures(numbers, settings, path, time_limit_s=limit_s, progress=log)


def kernels(settings: BenchKernels) -> int:
    """Compile the Triton kernels ahead of time and list what they need of a GPU."""
    if importlib.util.find_spec("triton") is None:
        raise UserError("the Triton kernels need triton; got none; fix: pip install triton")
    from sparseffn.ops.triton.resources import resource_report

    chosen = {name: getattr(settings, name) for name in ("targets", "kernels", "dtypes") if getattr(settings, name)}
    rows = resource_report(**chosen)
    if settings.json:
        print_json(rows)
        return 0
    title = "Registers and spilled bytes of a thread, shared bytes of a block, in the default configurations"
    print_records([{column: str(row[column]) for column in _KERNEL_COLUMNS} for row in rows], title=title)
    return 0


def gpu(settings: BenchGpu) -> int:
    """Run the parts that are not done; 1 where one did not end well."""
    out = Path(settings.out)
    check_out(settings.out)
    chosen = {name: getattr(settings, name) for name in ("parts", "device", "rehearse")}
    parts = run_gpu(out, work=Path(settings.work), progress=log, **chosen)
    show(parts, settings, [parts_table(parts)], files=[write_gpu_page(out)])
    return 0 if all(map(went_well, parts)) else 1
