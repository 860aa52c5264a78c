"""The file of one of the paper's tables: reading it, and refusing what is damaged or of another version."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from sparseffn.errors import UserError
from sparseffn.report.result import Result
from sparseffn.storage import Kind, read_json

KIND = "paper-table"
SETTINGS_KIND = "paper-settings"
"""Tables of hyperparameters, see `paper_settings`."""
VERSION = 1
"""The only layout so far; a file names its own under "version"."""

STATUSES = ("measured", "missing", "failed", "counted")
"""What a cell may be: trained and evaluated; not run, or run by another version; run without a result; never trained."""

_Check: TypeAlias = Callable[[object], bool]
# Kind of a field: whether a value is of it, and its name for the message.
_Kind: TypeAlias = tuple[_Check, str]


def _or_null(kind: _Kind) -> _Kind:
    check, words = kind
    return (lambda value: value is None or check(value), f"{words} or null")


_TEXT, _TEXTS, _COUNT, _NUMBER, _LIST, _OBJECT = (
    (kind.accepts, kind.value) for kind in (Kind.TEXT, Kind.TEXTS, Kind.COUNT, Kind.NUMBER, Kind.LIST, Kind.OBJECT)
)
_FLAG: _Kind = (lambda value: isinstance(value, bool), "true or false")
_OBJECTS: _Kind = (
    lambda value: isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value),
    "a list of objects, at least one",
)
_STATUS: _Kind = (lambda value: value in STATUSES, f"one of {', '.join(STATUSES)}")

_TABLE: dict[str, _Kind] = {
    **dict.fromkeys(("table", "title", "scale", "settings", "difference_unit"), _TEXT),
    **dict.fromkeys(("columns", "rows", "cells"), _OBJECTS),
    "notes": _TEXTS,
    "environment": _OBJECT,
}
_COLUMN: dict[str, _Kind] = {
    **dict.fromkeys(("name", "corpus", "metric"), _TEXT),
    **dict.fromkeys(("published_name", "published_metric", "digest", "sizes"), _or_null(_TEXT)),
    "steps": _or_null(_COUNT),
    "equal_time_s": _or_null(_NUMBER),
}
_ROW: dict[str, _Kind] = {"label": _TEXT, "published_label": _or_null(_TEXT), "settings": _or_null(_TEXT), "marks": _TEXTS}
_CELL: dict[str, _Kind] = {
    **dict.fromkeys(("row", "column"), _COUNT),
    "status": _STATUS,
    "reason": _or_null(_TEXT),
    **dict.fromkeys(("against_dense", "against_sigma_moe", "against_paper_form"), _or_null(_OBJECT)),
    **dict.fromkeys(("published", "spread", "valid_mean", "params", "residual_percent"), _or_null(_NUMBER)),
    **dict.fromkeys(("flops_percent", "counted_flops_percent", "equal_time"), _or_null(_NUMBER)),
}
_MEASURED: dict[str, _Kind] = {"n": _COUNT, "mean": _NUMBER, "seeds": _LIST}
_DIFFERENCE: dict[str, _Kind] = {
    **dict.fromkeys(("difference", "low", "high"), _NUMBER),
    **dict.fromkeys(("decided", "covers_seeds"), _FLAG),
    "n_seeds": _or_null(_COUNT),
}


def read_paper_table(path: str | Path) -> dict[str, Any]:
    """Read the JSON file of a table.

    Args:
        path: the file, as `sparseffn reproduce` wrote it.

    Raises:
        UserError: the file is absent, is not JSON, is no table of the paper, or a field is absent or damaged.
    """
    result = read_json(Path(path), fix="run `sparseffn reproduce` again")
    if not isinstance(result, dict) or result.get("kind") != SETTINGS_KIND:
        check_paper_table(result, str(path))
    return result


def is_paper_table(result: object) -> bool:
    """Whether parsed JSON says that it is one of the paper's tables, of whatever version."""
    return isinstance(result, Mapping) and result.get("kind") in (KIND, SETTINGS_KIND)


def check_paper_table(result: object, name: str = "the table") -> None:
    """Refuse what this version cannot render as it is meant.

    Args:
        result: parsed JSON.
        name: where it is from, for the message.

    Raises:
        UserError: the kind or version is another, a field is absent or of another type, or cells contradict themselves.
    """
    if not isinstance(result, Mapping) or result.get("kind") != KIND:
        raise UserError(f"{name} must be of kind {KIND!r}; fix: name a table that `sparseffn reproduce` wrote")
    if result.get("version") != VERSION:
        raise UserError(
            f"`version` of {name} must be {VERSION}; got {result.get('version')!r}; fix: render it with the version of "
            "sparseffn that wrote it, or run `sparseffn reproduce` again"
        )
    _check(result, _TABLE, "", name)
    for key, fields in (("columns", _COLUMN), ("rows", _ROW), ("cells", _CELL)):
        for index, item in enumerate(result[key]):
            _check(item, fields, f"{key}[{index}].", name)
    names = [column["name"] for column in result["columns"]]
    if len(set(names)) != len(names):
        raise _damaged(name, f"columns` must have different names; got {_shown(names)}")
    seen: set[tuple[int, int]] = set()
    for index, cell in enumerate(result["cells"]):
        fault = _fault(cell, result, seen)
        if fault:
            raise _damaged(name, f"cells[{index}]{fault}")


def _check(item: Result, fields: Mapping[str, _Kind], prefix: str, name: str) -> None:
    """An absent field is null: only fields that may be null may be absent."""
    for key, (accepts, words) in fields.items():
        value = item.get(key)
        if not accepts(value):
            raise _damaged(name, f"{prefix}{key}` must be {words}; got {_shown(value)}")


def _fault(cell: Result, result: Result, seen: set[tuple[int, int]]) -> str | None:
    """What is wrong with a cell whose fields are of the right kinds, beginning with the end of its name."""
    place = (cell["row"], cell["column"])
    if place[0] >= len(result["rows"]) or place[1] >= len(result["columns"]):
        return f"` must be in the table; got row {place[0]}, column {place[1]}"
    if place in seen:
        return f"` must be the only cell of its place; got row {place[0]}, column {place[1]} again"
    seen.add(place)
    if cell["status"] in ("missing", "failed") and not cell.get("reason"):
        return f".reason` must say why the cell is {cell['status']}; got {_shown(cell.get('reason'))}"
    if cell["status"] == "measured":
        return _measured_fault(cell)
    return None


def _measured_fault(cell: Result) -> str | None:
    for key, (accepts, words) in _MEASURED.items():
        if not accepts(cell.get(key)):
            return f".{key}` must be {words}; got {_shown(cell.get(key))}"
    seeds = cell["seeds"]
    if cell["n"] < 1 or len(seeds) != cell["n"] or len({json.dumps(seed) for seed in seeds}) != len(seeds):
        return f".seeds` must be n = {cell['n']} different seeds; got {_shown(seeds)}"
    faults = (_difference_fault(key, cell.get(key)) for key in ("against_dense", "against_sigma_moe", "against_paper_form"))
    return next(filter(None, faults), None)


def _difference_fault(name: str, difference: Result | None) -> str | None:
    if difference is None:
        return None
    for key, (accepts, words) in _DIFFERENCE.items():
        if not accepts(difference.get(key)):
            return f".{name}.{key}` must be {words}; got {_shown(difference.get(key))}"
    low, high = difference["low"], difference["high"]
    if low > high or difference["decided"] != (difference["covers_seeds"] and (low > 0 or high < 0)):
        return f".{name}.decided` must say whether the interval covers the seeds and excludes 0; got {_shown(difference)}"
    return None


def _damaged(name: str, fault: str) -> UserError:
    return UserError(f"{name} is damaged: `{fault}; fix: run `sparseffn reproduce` again")


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
