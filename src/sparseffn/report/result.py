"""The comparison file: reading it, and what is asked of it in more than one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from sparseffn.errors import UserError

# What a report cannot do without; everything else may be absent.
_NEEDED: dict[str, type] = {"title": str, "metric": str, "corpus": dict, "seeds": list, "steps": int, "methods": list}

FORMAT = 1
"""The only layout of `comparison.json` so far; the file names its own under "format"."""

# Parsed JSON: the writer defines its fields, and readers here tolerate absent optional ones.
Result: TypeAlias = Mapping[str, Any]
Method: TypeAlias = Mapping[str, Any]


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
