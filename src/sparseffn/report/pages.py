"""How a page is made from a template, and how a text becomes a file."""

from __future__ import annotations

import os
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from sparseffn.errors import UserError


def fill_template(name: str, **values: object) -> str:
    """A template of this package with its values, which are escaped."""
    environment = Environment(
        loader=PackageLoader("sparseffn.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(**values)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with plain line ends, so that the file is whole or is what it was before.

    Raises:
        UserError: the file cannot be written.
    """
    # Beside its target, as only a move within a file system is whole or not at all.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            partial.write_text(text, encoding="utf-8", newline="\n")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror}; fix: name a file in an existing folder") from error
