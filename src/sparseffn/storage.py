"""Files of runs and results: written whole or not at all; JSON read back with every field that is needed there and of its kind.

    read_fields(path, {"steps": Kind.COUNT, "valid": Kind.NUMBER}, fix="remove it and run the same command again")

JSON that parses may still be damaged, by hand or by a program; what is wrong is then said of the file, before it is used.
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
import os
import platform
import secrets
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sparseffn import __version__
from sparseffn.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes so that the file is whole or is what it was before; its folder is made where there is none.

    Raises:
        UserError: the file cannot be written.
    """
    # Beside its target, as only a move within a file system is whole or not at all.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror}; fix: check its rights and the disk") from error


def write_json(path: Path, data: object) -> None:
    """Write JSON so that the file is whole or is what it was before."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, *, fix: str = "restore the file or remove its folder") -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        fix: the remedy for a damaged file.

    Raises:
        UserError: the file is not there or is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"`{path}` must exist; got no such file; fix: check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` must hold JSON; got {error}; fix: {fix}") from None


def digest_of(*parts: str | bytes) -> str:
    """32 hexadecimal digits (BLAKE2b) of the parts, each preceded by its length so that they cannot run together."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


# Tells a field that is not there from one that holds null.
_ABSENT = object()


class Kind(enum.Enum):
    """What a stored field may hold; the value says it in words."""

    COUNT = "a whole number of at least 0"
    NUMBER = "a finite number"
    POSITIVE = "a positive number"
    POSITIVE_OR_NULL = "a positive number or null"
    TEXT = "a string"
    TEXTS = "a list of strings"
    LIST = "a list"
    OBJECT = "an object"
    ANY = "any value"

    def accepts(self, value: object) -> bool:
        """Whether a parsed value is of this kind."""
        number = isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf
        match self:
            case Kind.COUNT:
                return number and isinstance(value, int) and value >= 0
            case Kind.NUMBER:
                return number
            case Kind.POSITIVE:
                return isinstance(value, int | float) and number and value > 0
            case Kind.POSITIVE_OR_NULL:
                return value is None or Kind.POSITIVE.accepts(value)
            case Kind.TEXT:
                return isinstance(value, str)
            case Kind.TEXTS:
                return isinstance(value, list) and all(isinstance(item, str) for item in value)
            case Kind.LIST:
                return isinstance(value, list)
            case Kind.OBJECT:
                return isinstance(value, dict)
            case Kind.ANY:
                return value is not _ABSENT


Fields = Mapping[str, "Kind | Fields"]


def read_fields(path: Path, fields: Fields, *, fix: str) -> dict[str, Any]:
    """Read a JSON object and check the fields that are needed of it; it may hold more.

    Args:
        path: the file.
        fields: kind of each field; a mapping for an object with fields of its own.
        fix: the remedy for a damaged file.

    Raises:
        UserError: the file is not there, holds no JSON, or a field is absent or of another kind.
    """
    data = read_json(path, fix=fix)
    _check(path, "", data, fields, fix)
    return data


def _check(path: Path, name: str, value: object, expected: Kind | Fields, fix: str) -> None:
    kind = expected if isinstance(expected, Kind) else Kind.OBJECT
    if not kind.accepts(value):
        what = f"`{name}`, {kind.value}" if name else kind.value
        raise UserError(f"`{path}` must hold {what}; got {_shown(value)}; fix: {fix}")
    if not isinstance(expected, Kind):
        assert isinstance(value, dict), "objects are dicts"
        for key, wanted in expected.items():
            _check(path, f"{name}.{key}" if name else key, value.get(key, _ABSENT), wanted, fix)


def _shown(value: object) -> str:
    if value is _ABSENT:
        return "nothing"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def default_cache_dir() -> Path:
    """`$SPARSEFFN_CACHE`, else `$XDG_CACHE_HOME/sparseffn`, else `~/.cache/sparseffn`."""
    if chosen := os.environ.get("SPARSEFFN_CACHE"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "sparseffn"
    return Path.home() / ".cache" / "sparseffn"


CPU_INFO = Path("/proc/cpuinfo")
SOURCES = (".py", ".cpp", ".h")
"""Files of the package that a run's numbers follow from."""


def environment() -> dict[str, Any]:
    """What a result depends on beside its config."""
    # Here, so that reading a result does not wait for PyTorch.
    import numpy as np
    import torch

    return {
        "sparseffn": __version__,
        "sources": sources_digest(Path(__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(CPU_INFO),
        "platform": f"{platform.system()} {platform.machine()}",
    }


@cache
def sources_digest(package: Path) -> str:
    """32 hexadecimal digits of a package's Python and C++ files: two runs of one version may be of different code."""
    paths = sorted(path.relative_to(package).as_posix() for path in package.rglob("*") if path.suffix in SOURCES)
    return digest_of(*(part for path in paths for part in (path, (package / path).read_bytes())))


def cpu_name(info: Path) -> str:
    """The processor's name with its family and model, as virtual machines give one name to several generations."""
    if info.exists():
        first, *_ = info.read_text(encoding="utf-8").split("\n\n")
        pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
        said = {key.strip(): value.strip() for key, value in pairs}
        if "model name" in said:
            numbers = [f"{key} {said[name]}" for key, name in (("family", "cpu family"), ("model", "model")) if name in said]
            return f"{said['model name']} ({', '.join(numbers)})" if numbers else said["model name"]
    return platform.processor() or platform.machine()
