"""Tables of the benchmark's results, made from their JSON alone; the terminal and the page show the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

from sparseffn.errors import UserError
from sparseffn.report.formats import NOT_MEASURED, integer
from sparseffn.report.result import Result
from sparseffn.report.sheet import Sheet

PASSES = {"forward": "Forward", "training": "Forward + backward"}
# Load beyond the processors that the measurement and the system's own chores may make.
_OWN_LOAD_MARGIN = 0.5
_BOUNDS = ("arithmetic", "reading", "limit")


def sheets(result: Result) -> list[Sheet]:
    """The tables of a result.

    Raises:
        UserError: the result is of a kind that this version does not know.
    """
    kind = result.get("kind")
    if kind not in _SHEETS:
        raise UserError(f"`kind` of the result must be one of {', '.join(_SHEETS)}; got {kind!r}; fix: measure again")
    return _SHEETS[kind](result)


def machine_line(result: Result, *, timed: bool = True) -> str:
    """Machine, threads, libraries and date in one line, and a warning where other work ran beside what was timed."""
    e = result["environment"]
    cache = f"last-level cache {e['last_level_cache_bytes'] / 2**20:.0f} MiB"
    return (
        f"{e['cpu']}, {e['device']}, {e['threads']} threads, {e['cpu_capability']}, {cache}; torch {e['torch']}, "
        f"BLAS {e['blas']}, {_software(e)}sparseffn {e['sparseffn']}; {e['date']}{_busy(e) if timed else ''}"
    )


def _software(environment: Mapping[str, Any]) -> str:
    """Other packages whose kernels may have been timed, and the compiler of ours; older files do not tell."""
    parts = [f"{name} {version}" for name, version in environment.get("packages", {}).items()]
    parts += [environment["compiler"]] if "compiler" in environment else []
    return "".join(f"{part}, " for part in parts)


def _busy(environment: Mapping[str, Any]) -> str:
    """The measurement itself keeps at most all processors at work; more load is somebody else's."""
    load, cpus = environment["load_average"], environment["cpus"]
    if load <= cpus + _OWN_LOAD_MARGIN:
        return ""
    return f". The machine was busy (load average {load:.1f} on {cpus} processors): measure again when it is quiet"


def reading(result: Result) -> str:
    """How the tables of a result are read, in a few sentences."""
    return _READING[result["kind"]]


_READING = {
    "layer": (
        "Every layer was first held against float64 at its very size, output and all gradients; what disagreed was refused. "
        "Candidates then took turns, the order rotating from round to round; a ratio is the median of the ratios within a "
        "round, all of one run. Weights are cold where the calls went round as many layers as fill four times the last-level "
        "cache, with fresh tokens each call; warm is one layer called again and again. K / N is the share of the channels "
        "that a token uses, which is its share of the dense block's arithmetic. The limit is the larger of the FLOPs, "
        "selector included, at the measured speed of matrix products, and one reading of the weights that the batch touches "
        "at the measured bandwidth. Forward is timed in inference mode, gradients are freed between calls, dropout is off."
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


def milliseconds(seconds: float | None) -> str:
    """Three significant digits: `0.00713`, `0.0713`, `12.4`, `1,250`."""
    if seconds is None:
        return NOT_MEASURED
    value = 1e3 * seconds
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{digits}f}"


def mebibytes(size: float) -> str:
    """A size in MiB."""
    return f"{size / 2**20:,.2f}"


def number(value: float | None, digits: int = 2) -> str:
    """A plain number."""
    return NOT_MEASURED if value is None else f"{value:,.{digits}f}"


def _layer_sheets(result: Result) -> list[Sheet]:
    tables = [
        _layer_sheet(result, shape, list(rows), key)
        for shape, group in groupby(result["rows"], key=lambda row: row["shape"])
        for rows in [list(group)]
        for key in PASSES
    ]
    return [*tables, _expert_counts_sheet(result["expert_counts"])] if "expert_counts" in result else tables


def _expert_counts_sheet(found: Mapping[str, Any]) -> Sheet:
    few, many = found["layers"]
    over = {few: dict.fromkeys(PASSES, 1.0), many: {key: found[f"{key}_over_few"] for key in PASSES}}
    return Sheet(
        title=f"Idle experts: {found['fixed']}; {found['tokens']:,} tokens",
        head=(
            "experts",
            "backend",
            "forward ms",
            "/ few",
            "/ limit",
            "forward + backward ms",
            "/ few",
            "/ limit",
            "gradients MiB",
        ),
        n_words=2,
        rows=[
            (
                label,
                found["backend"],
                milliseconds(layer["forward"]["median_s"]),
                number(over[label]["forward"]),
                number(layer["forward"].get("over_limit")),
                milliseconds(layer["training"]["median_s"]),
                number(over[label]["training"]),
                number(layer["training"].get("over_limit")),
                mebibytes(layer["gradient_bytes"]),
            )
            for label, layer in found["layers"].items()
        ],
    )


def _layer_sheet(result: Result, shape: str, rows: list[Mapping[str, Any]], key: str) -> Sheet:
    settings = result["settings"]
    left = [
        f"not timed: {x['label']} at {x['tokens']} tokens: {x['reason']}" for x in result["left_out"] if x["shape"] == shape
    ]
    return Sheet(
        title=f"{PASSES[key]}, {shape}, {settings['dtype']}, {settings['device']}",
        head=(
            "layer",
            "backend",
            "tokens",
            "weights",
            "ms",
            "quartiles",
            "/ dense",
            "/ dense / (K/N)",
            "limit ms",
            "/ limit",
            "warm ms",
            "x fastest HF",
        ),
        n_words=2,
        rows=[_layer_cells(row, key) for row in rows],
        notes=(*_roof_notes(result), *_beaten_notes(rows, key), *dict.fromkeys(left)),
    )


def _roof_notes(result: Result) -> list[str]:
    """The speeds that limits were computed from; older files do not have the last one."""
    roof = result["roof"]
    speeds = f"limits: {roof['flops_per_s'] / 1e9:,.0f} GFLOP/s, reading {roof['bytes_per_s'] / 1e9:,.0f} GB/s in one long pass"
    if "scattered_bytes_per_s" not in roof:
        return [speeds]
    scattered = f"{roof['scattered_bytes_per_s'] / 1e9:,.0f} GB/s"
    return [f"{speeds}; a few blocks of an expert's size, as one token reads, come at {scattered}"]


def _beaten_notes(rows: list[Mapping[str, Any]], key: str) -> list[str]:
    """Rows below their limit: the limit is then not one."""
    return [
        f"{row['label']} at {integer(row['tokens'])} tokens is faster than its limit ({number(row[key]['over_limit'])}): the "
        "speed of products or of memory was measured too low; measure again when the machine is quiet"
        for row in rows
        if row[key]["over_limit"] < 1
    ]


def _layer_cells(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    timing, warm, hf = row[key], row.get("warm"), row[key]["over_fastest_hf"]
    return (
        row["label"],
        row["backend"] or "its own",
        integer(row["tokens"]),
        row["cache"],
        milliseconds(timing["median_s"]),
        f"{milliseconds(timing['q1_s'])} to {milliseconds(timing['q3_s'])}",
        number(timing["over_dense"]),
        number(timing["over_dense_over_share"]) if row["share"] < 1 else NOT_MEASURED,
        milliseconds(timing["limit_s"]),
        number(timing["over_limit"]),
        milliseconds(warm[key]["median_s"]) if warm else NOT_MEASURED,
        f"{hf['times_faster']:.2f} ({hf['fastest'].removeprefix('hf ')})" if hf else NOT_MEASURED,
    )


def _memory_sheets(result: Result) -> list[Sheet]:
    settings = result["settings"]
    head = (
        "layer",
        "backend",
        "tokens",
        "kept",
        "/ dense",
        "/ dense / (K/N)",
        "selection",
        "input",
        "output",
        "total",
        "/ dense",
    )
    return [
        Sheet(
            title=f"MiB for forward + backward, {shape}, {settings['dtype']}",
            head=head,
            n_words=2,
            rows=[_memory_cells(row) for row in group],
            notes=("kept: saved for backward, without the block's input and without the selection",),
        )
        for shape, group in groupby(result["rows"], key=lambda row: row["shape"])
    ]


def _memory_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["label"],
        row["backend"] or "its own",
        integer(row["tokens"]),
        mebibytes(row["saved_bytes"]),
        number(row["over_dense"]),
        number(row["over_dense_over_share"]) if row["share"] < 1 else NOT_MEASURED,
        *(mebibytes(row[f"{name}_bytes"]) for name in ("selection", "input", "output", "total")),
        number(row["total_over_dense"]),
    )


def _roofline_sheets(result: Result) -> list[Sheet]:
    speeds = Sheet(
        title="Measured speeds",
        head=("dtype", "threads", "GFLOP/s", "product", "by", "GB/s", "read", "by", "scattered GB/s"),
        n_words=1,
        rows=[_speed_cells(speed) for speed in result["speeds"]],
        notes=(
            "matrix products, square or (tokens x width x units) the two of one expert; one reading of a working set of four "
            "times the last-level cache or more; best calls",
            "scattered: a few blocks of an expert's size a call, at random places; about what one token can get, and no limit",
        ),
    )
    limits = [
        Sheet(
            title=f"Limits in ms, {shape}, {result['settings']['dtype']}, tokens that choose evenly",
            head=(
                "layer",
                "tokens",
                "weights MiB",
                *(f"{p} {part}" for p in ("fwd", "fwd+bwd") for part in _BOUNDS),
            ),
            n_words=1,
            rows=[_limit_cells(row) for row in group],
        )
        for shape, group in groupby(result["rows"], key=lambda row: row["shape"])
    ]
    return [speeds, *limits]


def _speed_cells(speed: Mapping[str, Any]) -> tuple[str, ...]:
    product, reading = speed["product"], speed["reading"]
    return (
        speed["dtype"],
        integer(speed["threads"]),
        number(product["flops_per_s"] / 1e9, 1),
        # Older files have squares alone.
        product.get("shape") or f"{product['size']:,} x {product['size']:,}",
        product["how"],
        number(reading["bytes_per_s"] / 1e9, 1),
        f"{reading['bytes'] / 2**20:,.0f} MiB",
        reading["how"],
        number(reading["scattered"]["bytes_per_s"] / 1e9, 1) if "scattered" in reading else NOT_MEASURED,
    )


def _limit_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    bounds = [row[key][part] for key in PASSES for part in ("arithmetic_s", "bytes_s", "limit_s")]
    return (row["label"], integer(row["tokens"]), mebibytes(row["touched_bytes"]), *(milliseconds(bound) for bound in bounds))


def _step_sheets(result: Result) -> list[Sheet]:
    s = result["settings"]
    shape = f"{s['batch']} x {s['context']} tokens, memory {s['memory']}, float32"
    # Older files do not tell.
    shape += f", backend {s['backend']}" if "backend" in s else ""
    attention = Sheet(
        title=f"Training step, {s['method']} {s['params']:,} parameters, {shape}",
        head=("attention", "step s", "against plain"),
        n_words=1,
        rows=[
            (name, f"{seconds:.3f}", f"{result['ratio'] if name == 'relative' else 1:.3f}")
            for name, seconds in result["seconds"].items()
        ],
    )
    methods = result["methods"]
    base = next(iter(methods))
    parts = list(methods[base]["parts"])
    rows = [
        (
            label,
            f"{m['seconds']:.3f}",
            f"{m['over_base']:.3f}",
            f"{m['parts_whole_s']:.3f}",
            *(f"{m['parts'][part]:.3f} ({m['parts'][part] / m['parts_whole_s']:.0%})" for part in parts),
        )
        for label, m in methods.items()
    ]
    split = Sheet(
        title=f"Training step, preset {s['preset']}, {shape}, seconds",
        head=("method", "step", f"/ {base}", "in parts", *parts),
        n_words=1,
        rows=rows,
        notes=("in parts: steps of their own, with hooks; output layer with the loss, optimiser with clipping",),
    )
    return [attention, split]


def _figures_sheets(result: Result) -> list[Sheet]:
    settings = result["settings"]
    head = (
        "layer",
        "ms",
        "quartiles",
        "/ limit",
        "forward ms",
        "/ limit",
        "memory MiB",
        "selection",
        "gradients",
        "ms / dense",
        "memory / dense",
    )
    tables = []
    for number, group in groupby(result["points"], key=lambda point: point["figure"]):
        sweep = result["sweeps"][str(number)]
        how = f"{settings['tokens']:,} tokens, {settings['dtype']}, forward + backward"
        left = [entry for entry in result["left_out"] if entry["figure"] == number]
        tables.append(
            Sheet(
                title=f"Figure {number}: {sweep['fixed']}; {how}",
                head=(sweep["variable"], *head),
                n_words=2,
                rows=[_figure_cells(point, label) for point in group for label in point["layers"]],
                notes=tuple(f"not measured: {e['variable']} {e['value']:,}: {e['limit']}, {e['reason']}" for e in left),
            )
        )
    return tables


def _figure_cells(point: Mapping[str, Any], label: str) -> tuple[str, ...]:
    layer, dense = point["layers"][label], point["layers"]["dense"]
    timing = layer["training"]
    return (
        f"{point['value']:,}",
        label,
        milliseconds(timing["median_s"]),
        f"{milliseconds(timing['q1_s'])} to {milliseconds(timing['q3_s'])}",
        # Points of older files have no limit.
        number(timing.get("over_limit")),
        milliseconds(layer["forward"]["median_s"]),
        number(layer["forward"].get("over_limit")),
        mebibytes(layer["memory_bytes"]),
        mebibytes(layer["selection_bytes"]),
        mebibytes(layer["gradient_bytes"]),
        number(timing.get("over_dense", 1.0)),
        number(layer["memory_bytes"] / dense["memory_bytes"]),
    )


_SHEETS: dict[str, Callable[[Result], list[Sheet]]] = {
    "layer": _layer_sheets,
    "memory": _memory_sheets,
    "roofline": _roofline_sheets,
    "step": _step_sheets,
    "figures": _figures_sheets,
}
