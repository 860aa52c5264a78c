"""Stored files: whole or absent, and checked when they are read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sparseffn.errors import UserError
from sparseffn.storage import Kind, read_fields, write_json, write_text

ACCEPTED: dict[Kind, tuple[list[Any], list[Any]]] = {
    Kind.COUNT: ([0, 3], [-1, 1.0, True, "3", None]),
    Kind.NUMBER: ([-1, 0.5], [float("nan"), float("inf"), True, "3", None]),
    Kind.POSITIVE: ([1, 0.5], [0, -1, float("nan"), None]),
    Kind.POSITIVE_OR_NULL: ([1, None], [0, "x"]),
    Kind.TEXT: (["", "x"], [0, None]),
    Kind.TEXTS: ([[], ["x"]], ["x", [0]]),
    Kind.LIST: ([[], [0]], ["x", {}]),
    Kind.OBJECT: ([{}], [[], None]),
}


@pytest.mark.parametrize("kind", ACCEPTED, ids=lambda kind: kind.name)
def test_field_is_of_its_kind(kind: Kind, tmp_path: Path) -> None:
    """Accepted values are read; others are refused with file, field and value."""
    good, bad = ACCEPTED[kind]
    path = tmp_path / "file.json"
    for value in good:
        write_json(path, {"a": {"b": value}})
        assert read_fields(path, {"a": {"b": kind}}, fix="mend it") == {"a": {"b": value}}
    for value in bad:
        path.write_text(json.dumps({"a": {"b": value}}))
        with pytest.raises(UserError, match=re.escape(f"must hold `a.b`, {kind.value}; got {json.dumps(value)}; fix: mend it")):
            read_fields(path, {"a": {"b": kind}}, fix="mend it")


def test_absent_field_is_named_and_a_long_value_cut_short(tmp_path: Path) -> None:
    """The message stays a line."""
    write_json(tmp_path / "file.json", {"long": "x" * 1000})
    with pytest.raises(UserError, match="must hold `a`, any value; got nothing; fix: mend it"):
        read_fields(tmp_path / "file.json", {"a": Kind.ANY}, fix="mend it")
    with pytest.raises(UserError, match=r"got \"x{36}\.\.\.; fix"):
        read_fields(tmp_path / "file.json", {"long": Kind.COUNT}, fix="mend it")


def test_interrupted_write_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing beside it."""
    path = tmp_path / "file.txt"
    write_text(path, "before")

    def interrupted(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "after")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
