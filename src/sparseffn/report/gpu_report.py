"""What `make gpu` found: its page, and the README's rows about GPUs; both from results/gpu/*.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sparseffn.report.bench_report import bench_tables
from sparseffn.report.formats import NOT_MEASURED, fixed, integer, milliseconds
from sparseffn.report.markdown import markdown_table
from sparseffn.report.page import Page, Section, page_html
from sparseffn.report.table import Table
from sparseffn.results.bench_result import FiguresResult, LayerResult, LayerRow, LayerTime, StepResult
from sparseffn.results.gpu_result import (
    GPU_PARTS,
    CasesResult,
    ComparedResult,
    GpuContent,
    GpuPart,
    LaunchesResult,
    TilesResult,
    read_gpu_parts,
)
from sparseffn.storage import write_text

_DENSE, _SIGMA = "dense", "sigma-moe"


def write_gpu_page(folder: Path) -> Path:
    """Write `gpu.html` beside the parts that a folder holds."""
    path = folder / "gpu.html"
    write_text(path, gpu_page(read_gpu_parts(folder)))
    return path


def gpu_page(parts: Sequence[GpuPart]) -> str:
    machines = list(dict.fromkeys(_machine(part) for part in parts))
    sections = [Section(name=p.part, title=p.title, text=_state(p), tables=tuple(_tables(p.result))) for p in parts]
    warnings = [f"{part.part}: {part.state}. {part.error}" for part in parts if part.state != "done"]
    if any(part.rehearsal for part in parts):
        warnings.append("A rehearsal: sizes are tiny, and no time here means anything.")
    return page_html(
        Page(
            title="Measured on a GPU",
            summary="; ".join(machines) or "Nothing is measured yet.",
            warnings=tuple(warnings),
            sections=tuple(sections),
            made_by="bench gpu",
            source="results/gpu/*.json",
            cites_paper=False,
        )
    )


def gpu_markdown(folder: Path) -> str:
    """The README's rows about GPUs: layers, training steps and comparisons; "unmeasured" is only what has no file."""
    parts = {part.part: part for part in read_gpu_parts(folder) if part.result is not None and not part.rehearsal}
    missing = [name for name in GPU_PARTS if name not in parts]
    if not parts:
        return "**GPU speed is unmeasured**: `results/gpu` has no result yet; `make gpu` writes them.\n"
    machines = "; ".join(dict.fromkeys(_machine(part) for part in parts.values()))
    found = [part.result for part in parts.values()]
    layers = [result for result in found if isinstance(result, LayerResult)]
    steps = [result for result in found if isinstance(result, StepResult)]
    compared = [result for result in found if isinstance(result, ComparedResult)]
    lines = [f"Measured on {machines}.", *(_cases_line(result) for result in found if isinstance(result, CasesResult))]
    tables = (
        layers_table(layers) if layers else None,
        steps_table(steps) if steps else None,
        compared_table(compared) if compared else None,
    )
    texts = [" ".join(lines) + "\n", *(markdown_table(table) for table in tables if table)]
    texts += [_figures_line(result) + "\n" for result in found if isinstance(result, FiguresResult)]
    if missing:
        texts.append(f"Unmeasured: {', '.join(missing)} (`make gpu PART=NAME`).\n")
    return "\n".join(texts)


def parts_table(parts: Sequence[GpuPart]) -> Table:
    """How each part ended."""
    ends = [part.error.splitlines()[-1] if part.error else "" for part in parts]
    rows = [(part.part, part.state, end, f"{part.seconds:.0f}") for part, end in zip(parts, ends, strict=True)]
    return Table.of(("part", "state", "error", "seconds"), rows, n_words=3, title="Measured on a GPU")


def layers_table(results: Sequence[LayerResult]) -> Table:
    """sigma-MoE's layers against the dense block and the fastest of Hugging Face's."""
    times = (f"{name} {what}" for name in ("forward", "both") for what in ("ms", "/ dense", "/ HF"))
    return Table.of(
        ("dtype", "shape", "tokens", *times),
        [
            (result.settings.dtype, row.shape, _tokens(row), *_time_cells(row.forward), *_time_cells(row.training))
            for result in results
            for row in result.rows
            if row.label == _SIGMA
        ],
        n_words=2,
        n_labels=3,
        title="One layer of sigma-MoE",
        notes=("HF: the fastest of Hugging Face's implementations; both: forward and backward; cold: weights from memory",),
    )


def steps_table(results: Sequence[StepResult]) -> Table:
    """Training steps of sigma-MoE against the dense block."""
    return Table.of(
        ("precision", "preset", "tokens", "dense ms", f"{_SIGMA} ms", "/ dense"),
        [
            (
                result.settings.precision,
                result.settings.preset,
                f"{result.settings.batch} x {result.settings.context}",
                milliseconds(result.methods[_DENSE].seconds),
                milliseconds(method.seconds),
                fixed(method.over_base),
            )
            for result in results
            for label, method in result.methods.items()
            if label == _SIGMA
        ],
        n_words=3,
        title="A training step",
    )


def compared_table(results: Sequence[ComparedResult]) -> Table:
    """Losses of short comparisons."""
    return Table.of(
        ("preset", "corpus", "steps", "method", "parameters", "test", "step ms"),
        [
            (
                result.preset,
                result.corpus,
                integer(result.steps),
                method.label,
                integer(method.params),
                fixed(method.test, 3),
                milliseconds(method.step_s),
            )
            for result in results
            for method in result.methods
        ],
        n_words=2,
        title=f"Trained for a few minutes, {', '.join(dict.fromkeys(result.metric for result in results))}",
    )


def _tokens(row: LayerRow) -> str:
    return f"{integer(row.tokens)}{', cold' if row.cache == 'cold' else ''}"


def _time_cells(time: LayerTime) -> tuple[str, str, str]:
    peer = time.over_fastest_hf
    return milliseconds(time.median_s), fixed(time.over_dense), fixed(peer.over) if peer else NOT_MEASURED


def _machine(part: GpuPart) -> str:
    e = part.environment
    driver = f"driver {e.driver}, " if e.driver else ""
    packages = "".join(f", {name} {version}" for name, version in sorted(e.packages.items()))
    return f"{e.device}, {driver}torch {e.torch}{packages}"


def _state(part: GpuPart) -> str:
    command = " ".join(part.command)
    return f"{part.state.capitalize()} after {part.seconds:.0f} s of at most {part.limit_s:.0f}: {command}"


def _cases_line(result: CasesResult) -> str:
    right = result.n_run - len(result.wrong)
    return f"{right} of {result.n_cases} cases of the Triton tests pass there."


def _figures_line(result: FiguresResult) -> str:
    found = (point.layers[_SIGMA].training.over_dense for point in result.points)
    ratios = [over for over in found if over is not None]
    if not ratios:
        return "No point of figures 2 and 8 to 11 was measured."
    numbers = ", ".join(map(str, result.figures))
    return (
        f"Over the {len(ratios)} points of figures {numbers} at {result.settings.tokens:,} tokens in {result.settings.dtype}, "
        f"forward and backward of sigma-MoE take {fixed(min(ratios))} to {fixed(max(ratios))} of the dense block's time."
    )


def _tables(result: GpuContent | None) -> list[Table]:
    match result:
        case None:
            return []
        case LayerResult() | StepResult() | FiguresResult():
            return bench_tables(result)
        case ComparedResult():
            return [compared_table([result])]
        case CasesResult():
            rows = [(case.name, case.message) for case in result.wrong]
            return [Table.of(("case", "what is wrong"), rows, n_words=2, title=_cases_line(result))]
        case LaunchesResult():
            return [_launches_table(result)]
        case TilesResult():
            return [_tiles_table(result)]


def _launches_table(result: LaunchesResult) -> Table:
    times = (f"{name} {what}" for name in ("forward", "both") for what in ("host", "issued", "graph"))
    us = partial(fixed, digits=1)
    return Table.of(
        ("layer", "width", "experts", "tokens", *times, "kernels", "waits"),
        [
            (
                row.label,
                integer(row.d_model),
                integer(row.n_experts),
                integer(row.tokens),
                *map(us, (row.forward_us, row.forward_issued_us, row.forward_graph_us)),
                *map(us, (row.training_us, row.training_issued_us, row.training_graph_us)),
                integer(row.n_kernels),
                NOT_MEASURED if row.waits is None else "yes" if row.waits else "no",
            )
            for row in result.rows
        ],
        title=f"Microseconds, {result.dtype}; graph: the same call replayed without the host",
        notes=tuple(f"{row.label} at {row.tokens} tokens: {note}" for row in result.rows for note in row.notes),
    )


def _tiles_table(result: TilesResult) -> Table:
    rows = []
    for kernel in result.kernels:
        timed = {tile: us for tile, us in kernel.us.items() if us is not None}
        shipped = next(iter(kernel.us), "")
        best = min(timed, key=lambda tile: timed[tile], default="")
        cells = (cell for tile in (shipped, best) for cell in (tile, fixed(timed.get(tile), 1)))
        rows.append((kernel.shape, kernel.kernel, *cells))
    head = ("width, units, experts, K, tokens", "kernel", "shipped tile", "us", "fastest tile", "us")
    return Table.of(head, rows, n_words=2, title=f"Tiles, {result.dtype}")
