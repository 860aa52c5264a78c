"""Tables and page of a result of `sparseffn bench`, made from its JSON alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from msgspec import to_builtins

from sparseffn.report.bench_plots import bench_plots
from sparseffn.report.formats import NOT_MEASURED, fixed, integer, mebibytes, milliseconds, times
from sparseffn.report.page import Page, Section, page_html
from sparseffn.report.plotting import Plot, write_plots
from sparseffn.report.table import Table
from sparseffn.results import bench_result as found
from sparseffn.results.bench_result import BenchResult
from sparseffn.results.study_result import StudyResult
from sparseffn.storage import read, write_text

PASSES = {"forward": "Forward", "training": "Forward + backward"}
# Load beyond the processors that the measurement and the system's own chores may make.
_OWN_LOAD_MARGIN = 0.5
TITLES = {
    "layer": "Time of one layer",
    "experts": "Time of gated experts",
    "hf": "Tokens per second of whole models",
    "step": "Time of a training step",
    "memory": "Bytes kept for backward",
    "roofline": "What this machine allows",
    "figures": "Time and memory over sizes",
}


def read_bench(path: str | Path) -> BenchResult:
    """Read a result of `sparseffn bench`.

    Raises:
        UserError: the file is absent, is not JSON, or is not of a kind and format known here.
    """
    return read(Path(path), BenchResult, fix="measure again")  # pyright: ignore[reportArgumentType]


def write_bench(result: BenchResult, folder: str | Path, *, drawn: bool = True) -> list[Path]:
    """Write the page and, of the paper's figures, each drawing as PNG and SVG; returns the files.

    Raises:
        UserError: something is to be `drawn` and matplotlib is not installed, or a file cannot be written.
    """
    page = Path(folder) / f"{result.kind}.html"
    plots = bench_plots(result) if drawn else []
    write_text(page, bench_page(result, plots))
    return [page, *(write_plots(plots, Path(folder)) if result.kind == "figures" else [])]


def bench_page(result: BenchResult, plots: Sequence[Plot] = ()) -> str:
    """The page as text, with these drawings."""
    title, reading = TITLES[result.kind], _READING[result.kind]
    return measured_page(result, title, f"bench {result.kind}", reading, bench_tables(result), plots)


def measured_page(
    result: BenchResult | StudyResult, title: str, command: str, text: str, tables: Sequence[Table], plots: Sequence[Plot]
) -> str:
    """The page of a result with a machine and settings; `command` made it, `text` says how the tables are read."""
    sections = [Section(name="reading", title="How to read this", text=text)]
    if plots:
        sections.append(Section(name="figures", title="Figures", plots=tuple(plots)))
    sections.append(Section(name="tables", title="Tables", tables=tuple(tables)))
    facts = {"Settings": to_builtins(result.settings), "Machine and software": to_builtins(result.environment)}
    sections.append(Section(name="details", title="Settings and machine", facts=facts, folds=True))
    return page_html(
        Page(
            title=title,
            # A study holds no times, which a busy machine would spoil.
            summary=machine_line(result.environment, timed=result.kind in TITLES),
            sections=tuple(sections),
            made_by=command,
            source=f"{result.kind}.json",
            cites_paper=False,
        )
    )


def bench_tables(result: BenchResult) -> list[Table]:
    match result:
        case found.LayerResult():
            return _layer_tables(result)
        case found.ExpertsResult():
            return _experts_tables(result)
        case found.WholeResult():
            return _whole_tables(result)
        case found.MemoryResult():
            return _memory_tables(result)
        case found.RooflineResult():
            return _roofline_tables(result)
        case found.StepResult():
            return _step_tables(result)
        case found.FiguresResult():
            return _figures_tables(result)


def machine_line(environment: found.Environment, *, timed: bool = True) -> str:
    """Machine, threads, libraries and date in one line, and a warning where other work ran beside what was timed."""
    e = environment
    cache = f"last-level cache {e.last_level_cache_bytes / 2**20:.0f} MiB"
    packages = [f"{name} {version}" for name, version in e.packages.items()]
    software = "".join(f"{part}, " for part in (*packages, e.compiler) if part)
    busy = ""
    # The measurement itself keeps at most all processors at work; more load is somebody else's.
    if timed and e.load_average > e.cpus + _OWN_LOAD_MARGIN:
        load = f"load average {e.load_average:.1f} on {e.cpus} processors"
        busy = f". The machine was busy ({load}): measure again when it is quiet"
    compiled = f", kernels for {e.instruction_sets}" if e.instruction_sets else ""
    return (
        f"{e.cpu}, {e.device}, {e.threads} threads, {e.cpu_capability}{compiled}, {cache}; torch {e.torch}, "
        f"BLAS {e.blas}, {software}sparseffn {e.sparseffn}; {e.date}{busy}"
    )


_READING = {
    "hf": (
        "Models of transformers with random weights, of the layer shapes of published ones, cut to the layers that fit into "
        "half of the memory. Every implementation of the experts computes on the same weights; calls were taken in turn; a "
        "ratio is the median of the ratios within a round. Decoding is one sequence, a token at a time with a cache; the "
        "prompt is one pass, whose last logits alone are computed. The layers are timed within the same calls: a model that "
        "is cut has the whole output matrix. The first layer's experts were held against float64 before."
    ),
    "layer": (
        "Every layer was first held against float64 at its very size, output and all gradients; what disagreed was refused."
        " Candidates were then called in turn, the order rotating from round to round; a ratio is the median of the ratios "
        "within a round, all of one run. Weights are cold where the calls went round as many layers as fill four times the "
        "last-level cache, with fresh tokens each call; warm is one layer called again and again. K / N is the share of the"
        " channels that a token uses, which is its share of the dense block's arithmetic. The limit is the larger of the "
        "FLOPs, selector included, at the measured speed of matrix products, and one reading of the weights that the batch "
        "touches at the measured bandwidth. Forward is timed in inference mode, gradients are freed between calls, dropout "
        "is off."
    ),
    "experts": (
        "Experts with silu(G x) * U x as hidden units, stored as transformers stores them, over the same weights by every "
        "candidate; each was first held against float64 at its very size. Calls were taken in turn; a ratio is the median of"
        " the ratios within a round. Up to 64 tokens nothing is in the caches: every call draws its tokens and experts, and "
        "goes to another copy of the layer. The limit is the larger of the FLOPs at the measured speed of matrix products, "
        "and one reading of the experts that the tokens choose at the measured bandwidth. Forward is timed in inference "
        "mode, gradients are freed between calls; the router is not part of it."
    ),
    "step": (
        "Each row is the median of whole training steps, the models in turn: forward, loss, backward, clipping, optimiser. "
        "The split into parts comes from steps of their own, with hooks on the modules. Every block was first held against "
        "float64 at the step's tokens. A whole step has no limit beside it."
    ),
    "memory": (
        "Bytes of the tensors that autograd keeps in a training call. The block's input and the selection (indices, and a "
        "mixture's scores) are counted apart; totals count everything, output included."
    ),
    "roofline": (
        "Speeds are those of the best of several calls. A block can take no less than its FLOPs, selector included, at the "
        "speed of matrix products, nor less than one reading of the weights that its tokens touch."
    ),
    "figures": (
        "Time is the median of forward and backward of one layer, dense block and mixture in turn; memory is what is saved "
        "for backward plus the output. Every point passed the comparison with float64 before it was timed. "
        "Points that did not fit the time limit or half of the memory are listed under the figure."
    ),
}


def _layer_tables(result: found.LayerResult) -> list[Table]:
    tables = []
    for shape, group in groupby(result.rows, key=lambda row: row.shape):
        rows = list(group)
        tables += [_layer_table(result, shape, rows, key) for key in PASSES]
    return [*tables, _expert_counts_table(result.expert_counts)] if result.expert_counts else tables


def _experts_tables(result: found.ExpertsResult) -> list[Table]:
    tables = []
    for (shape, dtype), group in groupby(result.rows, key=attrgetter("shape", "dtype")):
        rows = list(group)
        tables += [_experts_table(result, shape, dtype, rows, key) for key in PASSES if any(getattr(r, key) for r in rows)]
    return tables


def _experts_table(result: found.ExpertsResult, shape: str, dtype: str, rows: list[found.ExpertsRow], key: str) -> Table:
    roof, time = result.roofs[dtype], attrgetter(key)
    left = [f"not timed: {x.label} at {x.tokens} tokens: {x.reason}" for x in result.left_out if x.shape == f"{shape}, {dtype}"]
    return Table.by_column(
        [
            ("experts", lambda row: row.label),
            ("backend", lambda row: row.backend or "its own"),
            ("tokens", lambda row: integer(row.tokens)),
            ("weights", lambda row: row.cache),
            ("ms", lambda row: milliseconds(time(row).median_s)),
            ("quartiles", lambda row: _quartiles(time(row))),
            ("x fastest HF", lambda row: _over_peer(time(row).over_fastest_hf)),
            ("limit ms", lambda row: milliseconds(time(row).limit_s)),
            ("/ limit", lambda row: fixed(time(row).over_limit)),
        ],
        [row for row in rows if time(row) is not None],
        n_words=2,
        n_labels=3,
        title=f"{PASSES[key]}, gated experts {shape} (D x I x E x K), {dtype}, {result.settings.device}",
        notes=(
            _limits_note(roof),
            *dict.fromkeys(left),
        ),
    )


def _whole_tables(result: found.WholeResult) -> list[Table]:
    tables = []
    for (model, dtype), group in groupby(result.rows, key=attrgetter("model", "dtype")):
        rows = list(group)
        for key, what in (("decoding", "Decoding"), ("prompt", f"Prompt of {integer(result.settings.prompt)} tokens")):
            timed = [row for row in rows if getattr(row, key) is not None]
            size = f"{rows[0].n_layers} of {rows[0].n_published} layers, {rows[0].num_params / 1e9:.2f}e9 parameters"
            title = f"{what}, {model}, {dtype}, {size}, {result.settings.device}"
            decodes = key == "decoding"
            left = [x for x in result.left_out if x.shape == f"{model}, {dtype}" and (x.tokens == 1) == decodes]
            notes = dict.fromkeys(f"not timed: {x.label}: {x.reason}" for x in left)
            notes |= dict.fromkeys(_rest_note(getattr(row, key).limit) for row in timed if not row.peer)
            tables.append(_whole_table(title, timed, attrgetter(key), tuple(notes)))
    return tables


def _rest_note(limit: found.WholeLimit | None) -> str:
    assert limit is not None, "of our own rows"
    by_products = limit.arithmetic_s > limit.bytes_s
    experts, what = (limit.arithmetic_s, "their products") if by_products else (limit.bytes_s, "reading what they need")
    return (
        f"with experts that return zeros {milliseconds(limit.rest_s)} ms, layers {milliseconds(limit.layers_rest_s)} ms; "
        f"experts take at least {milliseconds(experts)} ms, {what}: at most {times(limit.most_times_faster)} as fast as the "
        f"fastest of HF's, layers {times(limit.layers_most_times_faster)}"
    )


def _whole_table(
    title: str, rows: list[found.WholeRow], time: Callable[[found.WholeRow], found.WholeTime], notes: tuple[str, ...]
) -> Table:
    return Table.by_column(
        [
            ("experts", lambda row: row.label),
            ("backend", lambda row: row.backend or "its own"),
            ("tokens / s", lambda row: fixed(time(row).tokens_per_s, 1)),
            ("ms", lambda row: milliseconds(time(row).median_s)),
            ("quartiles", lambda row: _quartiles(time(row))),
            ("x fastest HF", lambda row: _over_peer(time(row).over_fastest_hf)),
            ("layers ms", lambda row: milliseconds(time(row).layers.median_s)),
            ("layers x fastest HF", lambda row: _over_peer(time(row).layers_over_fastest_hf)),
        ],
        rows,
        n_words=2,
        title=title,
        notes=notes,
    )


def _layer_table(result: found.LayerResult, shape: str, rows: list[found.LayerRow], key: str) -> Table:
    settings, roof, time = result.settings, result.roof, attrgetter(key)
    # The limit is then not one.
    beaten = [
        f"{row.label} at {integer(row.tokens)} tokens is faster than its limit ({fixed(time(row).over_limit)}): the speed of "
        "products or of memory was measured too low; measure again when the machine is quiet"
        for row in rows
        if time(row).over_limit < 1
    ]
    left = [f"not timed: {x.label} at {x.tokens} tokens: {x.reason}" for x in result.left_out if x.shape == shape]
    return Table.by_column(
        [
            ("layer", lambda row: row.label),
            ("backend", lambda row: row.backend or "its own"),
            ("tokens", lambda row: integer(row.tokens)),
            ("weights", lambda row: row.cache),
            ("ms", lambda row: milliseconds(time(row).median_s)),
            ("quartiles", lambda row: _quartiles(time(row))),
            ("/ dense", lambda row: fixed(time(row).over_dense)),
            ("/ dense / (K/N)", lambda row: _over_share(row, time(row).over_dense_over_share)),
            ("limit ms", lambda row: milliseconds(time(row).limit_s)),
            ("/ limit", lambda row: fixed(time(row).over_limit)),
            ("warm ms", lambda row: milliseconds(time(row.warm).median_s) if row.warm else NOT_MEASURED),
            ("x fastest HF", lambda row: _over_peer(time(row).over_fastest_hf)),
        ],
        rows,
        n_words=2,
        n_labels=3,
        title=f"{PASSES[key]}, {shape}, {settings.dtype}, {settings.device}",
        notes=(_limits_note(roof), *beaten, *dict.fromkeys(left)),
    )


def _limits_note(roof: found.Roof) -> str:
    return (
        f"limits: {roof.flops_per_s / 1e9:,.0f} GFLOP/s, reading {roof.bytes_per_s / 1e9:,.0f} GB/s in one long pass; a few "
        f"blocks of an expert's size, as one token reads, come at {roof.scattered_bytes_per_s / 1e9:,.0f} GB/s"
    )


def _quartiles(timing: found.Spread) -> str:
    return f"{milliseconds(timing.q1_s)} to {milliseconds(timing.q3_s)}"


def _over_share(row: found.LayerRow | found.MemoryRow, ratio: float) -> str:
    """A ratio over the share of channels that a token uses says nothing where it uses all."""
    return fixed(ratio) if row.share < 1 else NOT_MEASURED


def _over_peer(peer: found.OverPeer | None) -> str:
    return f"{peer.times_faster:.2f} ({peer.fastest.removeprefix('hf ')})" if peer else NOT_MEASURED


def _expert_counts_table(counts: found.ExpertCounts) -> Table:
    over = ((1.0, 1.0), (counts.forward_over_few, counts.training_over_few))
    rows = zip(counts.layers.items(), over, strict=True)
    return Table.of(
        ("experts", "backend", "forward ms", "/ few", "/ limit", "forward + backward ms", "/ few", "/ limit", "gradients MiB"),
        [
            (
                label,
                counts.backend,
                *(milliseconds(layer.forward.median_s), fixed(forward), fixed(layer.forward.over_limit)),
                *(milliseconds(layer.training.median_s), fixed(training), fixed(layer.training.over_limit)),
                mebibytes(layer.gradient_bytes),
            )
            for (label, layer), (forward, training) in rows
        ],
        n_words=2,
        title=f"Idle experts: {counts.fixed}; {counts.tokens:,} tokens",
    )


def _memory_tables(result: found.MemoryResult) -> list[Table]:
    columns: list[tuple[str, Callable[[found.MemoryRow], str]]] = [
        ("layer", lambda row: row.label),
        ("backend", lambda row: row.backend or "its own"),
        ("tokens", lambda row: integer(row.tokens)),
        ("kept", lambda row: mebibytes(row.saved_bytes)),
        ("/ dense", lambda row: fixed(row.over_dense)),
        ("/ dense / (K/N)", lambda row: _over_share(row, row.over_dense_over_share)),
        ("selection", lambda row: mebibytes(row.selection_bytes)),
        ("input", lambda row: mebibytes(row.input_bytes)),
        ("output", lambda row: mebibytes(row.output_bytes)),
        ("total", lambda row: mebibytes(row.total_bytes)),
        ("/ dense", lambda row: fixed(row.total_over_dense)),
    ]
    return [
        Table.by_column(
            columns,
            rows,
            n_words=2,
            n_labels=3,
            title=f"MiB for forward + backward, {shape}, {result.settings.dtype}",
            notes=("kept: saved for backward, without the block's input and without the selection",),
        )
        for shape, rows in groupby(result.rows, key=lambda row: row.shape)
    ]


def _roofline_tables(result: found.RooflineResult) -> list[Table]:
    speeds = Table.by_column(
        [
            ("dtype", lambda speed: speed.dtype),
            ("threads", lambda speed: integer(speed.threads)),
            ("GFLOP/s", lambda speed: fixed(speed.product.flops_per_s / 1e9, 1)),
            ("product", lambda speed: speed.product.shape),
            ("by", lambda speed: speed.product.how),
            ("GB/s", lambda speed: fixed(speed.reading.bytes_per_s / 1e9, 1)),
            ("read", lambda speed: f"{speed.reading.bytes / 2**20:,.0f} MiB"),
            ("by", lambda speed: speed.reading.how),
            ("scattered GB/s", lambda speed: fixed(speed.reading.scattered.bytes_per_s / 1e9, 1)),
        ],
        result.speeds,
        n_labels=2,
        title="Measured speeds",
        notes=(
            "matrix products, square or (tokens x width x units) the two of one expert; one reading of a working set of four "
            "times the last-level cache or more; best calls",
            "scattered: a few blocks of an expert's size a call, at random places; about what one token can get, and no limit",
        ),
    )
    columns: list[tuple[str, Callable[[found.RooflineRow], str]]] = [
        ("layer", lambda row: row.label),
        ("tokens", lambda row: integer(row.tokens)),
        ("weights MiB", lambda row: mebibytes(row.touched_bytes)),
    ]
    for key, name in (("forward", "fwd"), ("training", "fwd+bwd")):
        for part, bound in (("arithmetic", "arithmetic_s"), ("reading", "bytes_s"), ("limit", "limit_s")):
            value = attrgetter(f"{key}.{bound}")
            columns.append((f"{name} {part}", lambda row, value=value: milliseconds(value(row))))
    title = f"Limits in ms, {{}}, {result.settings.dtype}, tokens that choose evenly"
    shapes = groupby(result.rows, key=lambda row: row.shape)
    return [speeds, *(Table.by_column(columns, rows, n_labels=2, title=title.format(shape)) for shape, rows in shapes)]


def _step_tables(result: found.StepResult) -> list[Table]:
    s, methods = result.settings, result.methods
    shape = f"{s.batch} x {s.context} tokens, memory {s.memory}, {s.precision}, backend {s.backend}"
    ratios = {"relative": result.ratio}
    attention = Table.of(
        ("attention", "step s", "against plain"),
        [(name, f"{seconds:.3f}", f"{ratios.get(name, 1):.3f}") for name, seconds in result.seconds.items()],
        title=f"Training step, {s.method} {s.params:,} parameters, {shape}",
    )
    base = next(iter(methods))
    columns: list[tuple[str, Callable[[str], str]]] = [
        ("method", lambda label: label),
        ("step", lambda label: f"{methods[label].seconds:.3f}"),
        (f"/ {base}", lambda label: f"{methods[label].over_base:.3f}"),
        ("in parts", lambda label: f"{methods[label].parts_whole_s:.3f}"),
    ]
    columns += [(part, lambda label, part=part: _part(methods[label], part)) for part in methods[base].parts]
    split = Table.by_column(
        columns,
        methods,
        title=f"Training step, preset {s.preset}, {shape}, seconds",
        notes=("in parts: steps of their own, with hooks; output layer with the loss, optimiser with clipping",),
    )
    return [attention, split]


def _part(method: found.MethodStep, part: str) -> str:
    return f"{method.parts[part]:.3f} ({method.parts[part] / method.parts_whole_s:.0%})"


def _figures_tables(result: found.FiguresResult) -> list[Table]:
    tables = []
    for number, group in groupby(result.points, key=lambda point: point.figure):
        sweep, points = result.sweeps[str(number)], list(group)
        how = f"{result.settings.tokens:,} tokens, {result.settings.dtype}, forward + backward"
        left = [entry for entry in result.left_out if entry.figure == number]
        rows = [(p.value, label, layer, p.layers["dense"]) for p in points for label, layer in p.layers.items()]
        tables.append(
            Table.by_column(
                [
                    (sweep.variable, lambda row: f"{row[0]:,}"),
                    ("layer", lambda row: row[1]),
                    ("ms", lambda row: milliseconds(row[2].training.median_s)),
                    ("quartiles", lambda row: _quartiles(row[2].training)),
                    ("/ limit", lambda row: fixed(row[2].training.over_limit)),
                    ("forward ms", lambda row: milliseconds(row[2].forward.median_s)),
                    ("/ limit", lambda row: fixed(row[2].forward.over_limit)),
                    ("memory MiB", lambda row: mebibytes(row[2].memory_bytes)),
                    ("selection", lambda row: mebibytes(row[2].selection_bytes)),
                    ("gradients", lambda row: mebibytes(row[2].gradient_bytes)),
                    ("ms / dense", lambda row: fixed(row[2].training.over_dense or 1.0)),
                    ("memory / dense", lambda row: fixed(row[2].memory_bytes / row[3].memory_bytes)),
                ],
                rows,
                n_words=2,
                n_labels=2,
                title=f"Figure {number}: {sweep.fixed}; {how}",
                notes=tuple(f"not measured: {e.variable} {e.value:,}: {e.limit}, {e.reason}" for e in left),
            )
        )
    return tables
