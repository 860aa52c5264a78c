"""The comparison file: reading it, and what is asked of it in more than one place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from sparseffn.errors import UserError
from sparseffn.storage import read_json

# What a report cannot do without; everything else may be absent.
_NEEDED: dict[str, type] = {"title": str, "metric": str, "corpus": dict, "seeds": list, "steps": int, "methods": list}

FORMAT = 1
"""The only layout of `comparison.json` so far; the file names its own under "format"."""

# Parsed JSON: the writer defines its fields, and readers here tolerate absent optional ones.
Result: TypeAlias = Mapping[str, Any]
Method: TypeAlias = Mapping[str, Any]


def read_result(path: str | Path) -> dict[str, Any]:
    """Read a `comparison.json`.

    Args:
        path: the file, as `sparseffn compare` wrote it.

    Returns:
        The parsed file, its format checked.

    Raises:
        UserError: the file is absent, is not JSON, or has another format.
    """
    result = read_json(Path(path), fix="run `sparseffn compare` again")
    check_format(result)
    return result


def check_format(result: Result) -> None:
    """Refuse a file that this version cannot read.

    Raises:
        UserError: "format" is absent or not the one known here, or a field that every comparison has is absent.
    """
    found = result.get("format") if isinstance(result, Mapping) else None
    if found != FORMAT:
        raise UserError(
            f"`format` of the comparison must be {FORMAT}; got {found!r}; fix: make the report with the version of "
            "sparseffn that wrote the file, or run `sparseffn compare` again"
        )
    for key, kind in _NEEDED.items():
        if not isinstance(result.get(key), kind):
            raise UserError(
                f"`{key}` of the comparison must be of type {kind.__name__}; got {result.get(key)!r}; "
                "fix: run `sparseffn compare` again"
            )


def missing_runs(result: Result) -> Iterator[tuple[str, str]]:
    """The runs that gave no number, as pairs of label and words: ("switch", "seed 1 missing: out of memory")."""
    for run in result.get("missing") or ():
        seed = run.get("seed")
        where = "" if seed is None else f"seed {seed} "
        yield run["label"], f"{where}missing: {run.get('reason') or 'no reason was recorded'}"


def incomplete_line(result: Result) -> str | None:
    """The sentence that says what a comparison lacks, or None when it is complete."""
    lacks = [f"{label} {words}" for label, words in missing_runs(result)]
    if not result.get("finished", True):
        lacks.append("the comparison had not finished when its file was written")
    return f"incomplete: {'; '.join(lacks)}" if lacks else None
