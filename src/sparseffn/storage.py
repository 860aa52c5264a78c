"""Files of runs and results: written whole or not at all, read back typed and checked, digested, locked.

    write_json(path, plan)                                   a dict, a dataclass or a msgspec.Struct
    plan = read(path, Plan, fix="remove it and run the same command again")

JSON that parses may still be damaged, by hand or by a program; a message then names the file and the field, before anything is
used. A Struct ignores fields that it does not know, and a field with a default may be absent.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import msgspec
from filelock import FileLock, Timeout

from sparseffn import __version__
from sparseffn.errors import UserError

T = TypeVar("T")

Count = Annotated[int, msgspec.Meta(ge=0)]
PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
"""Fields of stored types. A `float` of a file is always finite, as JSON has no other."""


@contextlib.contextmanager
def writing(path: Path, *, fix: str = "") -> Iterator[None]:
    """Turn a failure of the file system while `path` is written into a `UserError`; `fix` is a further remedy."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, str(error.strerror or error), fix=fix) from error


_FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def cannot_write(path: Path, reason: str, *, fix: str = "") -> UserError:
    """The error for a file that the file system refuses, for a reason in its words; `fix` is a further remedy."""
    remedy = "make room on the disk" if any(full in reason for full in _FULL) else "check its rights and the disk"
    remedy += f", or {fix}" if fix else ""
    return UserError(f"cannot write {str(path)!r}: {reason}; fix: {remedy}")


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
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{16}")


def partial_of(path: Path) -> str | None:
    """The name of the file that `write_bytes` was at when its process was killed, where `path` is what it left of it."""
    found = _PARTIAL.fullmatch(path.name)
    return found[1] if found is not None and path.is_file() else None


_UNFINISHED = ".writing-"


@contextlib.contextmanager
def write_folder(path: Path, *, replace: bool = False, fix: str = "") -> Iterator[Path]:
    """A new folder to fill, which takes its place at `path`, whole and on the disk, at the end of the block.

    An exception removes it; what a killed process left is removed by `remove_unfinished`. Without `replace` a folder that is
    there stays, and the new one is dropped.

    Raises:
        UserError: the file system refuses; `fix` is a further remedy.
    """
    partial = path.with_name(f"{_UNFINISHED}{secrets.token_hex(8)}")
    with writing(path, fix=fix):
        try:
            partial.mkdir(parents=True)
            yield partial
            for file in [*partial.rglob("*"), partial]:
                sync(file)
            if replace and path.exists():
                shutil.rmtree(path)
            try:
                partial.rename(path)
            except OSError:
                # A folder with files in it cannot be replaced: another process was first.
                if not path.is_dir():
                    raise
            sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def remove_unfinished(parent: Path) -> None:
    """Remove what killed processes left of folders and files in `parent`; only where no other process writes there."""
    for leftover in parent.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in parent.glob(".*"):
        if partial_of(leftover) is not None:
            leftover.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file or a folder's entries on the disk."""
    # Windows cannot open folders; there a rename is all that can be done.
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = True, fix: str = "") -> Iterator[bool]:
    """Hold a lock file, which stays, against other processes; its folder is made where there is none.

    Yields:
        Whether it is held: False only without `wait`, while another process holds it.

    Raises:
        UserError: the file system refuses; `fix` is a further remedy.
    """
    with writing(path, fix=fix):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(path, blocking=wait)
        try:
            held.acquire()
        except Timeout:
            held = None
    try:
        yield held is not None
    finally:
        if held is not None:
            held.release()


LOCK = ".lock"
"""Held in a folder of results by the one process that writes into it; it says nothing of what else is there."""


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold a folder of results against a second process that would write into it; a new one that stays empty is removed.

    Raises:
        UserError: another process holds it.
    """
    is_new = not folder.exists()
    with lock(folder / LOCK, wait=False) as held:
        if not held:
            raise UserError(
                f"`out` must be a folder that no other process writes into; got {str(folder)!r}, where one is at work; "
                "fix: wait for it or choose another --out"
            )
        try:
            yield
        finally:
            # It may be gone by then.
            with contextlib.suppress(OSError):
                if is_new and list(folder.iterdir()) == [folder / LOCK]:
                    (folder / LOCK).unlink()
                    folder.rmdir()


_SEAL = "sealed"


def write_json(path: Path, data: object, *, seal: bool = False) -> None:
    """Write a dict, dataclass or Struct as JSON, so that the file is whole or is what it was before.

    With `seal` an object gets the digest of its fields as one more, so that `read` refuses it when any of them was changed.
    """
    text = json.dumps(data, indent=1, allow_nan=False, default=_builtins)
    if seal:
        fields = json.loads(text)
        text = json.dumps({**fields, _SEAL: json_digest(fields)}, indent=1)
    # A list of numbers is a line; no string holds a raw line end.
    text = re.sub(r"\[\n([^][{}\"]*)\n *\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    write_text(path, text + "\n")


def rounded(data: object) -> Any:
    """What JSON holds of measurements: floats to five significant digits, more than any timing has.

    Those of `settings`, `shapes` and `blocks` are kept: they were chosen, and are compared with what is asked for again.
    """

    def of(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: inner if key in ("settings", "shapes", "blocks") else of(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [of(inner) for inner in value]
        return float(f"{value:.5g}") if isinstance(value, float) else value

    return of(_builtins(data))


def _unsealed(text: str) -> tuple[str, bool]:
    """JSON without its seal, and whether the seal, if there is one, is its own."""
    try:
        fields = json.loads(text) if f'"{_SEAL}"' in text else None
    except ValueError:
        return text, True
    if not isinstance(fields, dict) or _SEAL not in fields:
        return text, True
    seal = fields.pop(_SEAL)
    return json.dumps(fields), seal == json_digest(fields)


def _builtins(data: object) -> Any:
    return msgspec.to_builtins(data, enc_hook=_plain)


def _plain(value: object) -> str | float:
    """Numbers of NumPy and texts of a kind of their own, as PyTorch's version."""
    if isinstance(value, str | float):
        return str(value) if isinstance(value, str) else float(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def read_json(path: Path, *, fix: str = "restore the file or remove its folder") -> Any:
    """What a JSON file holds, unchecked; see `read`."""
    return read(path, cast("type[Any]", Any), fix=fix)


def read(path: Path, kind: type[T], *, fix: str) -> T:
    """Read a JSON file of a type: a Struct, a dataclass, `dict[str, Positive]`, ...

    Args:
        path: the file.
        kind: what it must hold; nothing is converted, except an int where a float is due.
        fix: the remedy for a damaged file.

    Raises:
        UserError: the file is not there, is damaged, was changed since it was sealed, or is no regular file.
    """
    # Anything but a regular file, as a pipe, may block for ever.
    if path.exists() and not path.is_file():
        raise UserError(f"`{path}` must be a file; got something else; fix: {fix}")
    text = ""
    try:
        text, intact = _unsealed(path.read_text(encoding="utf-8"))
        found = msgspec.json.decode(text, type=kind)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"`{path}` must exist; got no such file; fix: check the path") from None
    except OSError as error:
        raise UserError(f"`{path}` must be readable; got {error.strerror or error}; fix: check its rights") from None
    except msgspec.ValidationError as error:
        raise UserError(f"`{path}` must hold {_needed(error, text)}; fix: {fix}") from None
    except RecursionError:
        raise UserError(f"`{path}` must hold JSON; got lists or objects nested too deeply; fix: {fix}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` must hold JSON; got {error}; fix: {fix}") from None
    if not intact:
        raise UserError(f"`{path}` must match its digest; got a changed file; fix: {fix}")
    return found


def _needed(error: msgspec.ValidationError, text: str) -> str:
    """What msgspec misses, as "`steps`, an int >= 1; got 0"."""
    message, _, at = str(error).partition(" - at `")
    at = at.removesuffix("`").removeprefix("$").removeprefix(".")
    if isinstance(error.__cause__, ValueError | TypeError):
        return f"a valid {f'`{at}`' if at else 'content'}; got ({error.__cause__})"
    if absent := re.fullmatch(r"Object missing required field `(.*)`", message):
        return f"`{at}{'.' if at else ''}{absent[1]}`; got nothing"
    expected = re.fullmatch(r"Expected (.+?)(?:, got `(.+)`)?", message)
    if expected is None:
        return f"a valid {f'`{at}`' if at else 'content'}; got {message[:1].lower()}{message[1:]}"
    what = expected[1].replace("`", "")
    what = f"{'an' if what[0] in 'aeio' else 'a'} {what}"
    return f"`{at}`, {what}; got {_shown(at, text, expected[2])}" if at else f"{what}; got {expected[2]}"


def _shown(at: str, text: str, kind: str | None) -> str:
    """A refused value, cut short; its kind where it cannot be found, as among the values of a dict or before other damage."""
    try:
        value = msgspec.json.decode(text)
        for name, index in re.findall(r"([^.\[\]]+)|\[(\d+|\.\.\.)\]", at):
            value = value[int(index)] if index else value[name]
    except (ValueError, LookupError, TypeError, RecursionError):
        return kind or "another value"
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def digest_of(*parts: str | bytes) -> str:
    """32 hexadecimal digits (BLAKE2b) of the parts, each preceded by its length so that they cannot run together."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def json_digest(data: object) -> str:
    """32 hexadecimal digits (BLAKE2b) of JSON-able data, whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """32 hexadecimal digits (BLAKE2b) of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def default_cache_dir() -> Path:
    """`$SPARSEFFN_CACHE`, else `$XDG_CACHE_HOME/sparseffn`, else `~/.cache/sparseffn`.

    Raises:
        UserError: the user has no home folder.
    """
    if chosen := os.environ.get("SPARSEFFN_CACHE"):
        return expanded(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "sparseffn"
    return expanded("~/.cache/sparseffn")


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with `~` and `~user` replaced.

    Raises:
        UserError: there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"a path must begin with a home folder that exists; got {str(path)!r}; fix: write it out, or set SPARSEFFN_CACHE"
        ) from None


CPU_INFO = Path("/proc/cpuinfo")
SOURCES = (".py", ".cpp", ".h")
"""Files of the package that a run's numbers follow from."""


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a result depends on beside its config; `device` is where tensors are ("cpu", "cuda:0")."""
    # Here, so that reading a result does not wait for PyTorch.
    import numpy as np
    import torch

    found = {
        "sparseffn": __version__,
        "sources": sources_digest(Path(__file__).parent),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(CPU_INFO),
        **matrix_products(torch.__config__.show(), torch.__config__.parallel_info()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(device),
    }
    if found["device"].startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def matrix_products(built: str, parallel: str) -> dict[str, str]:
    """What multiplies matrices on the CPU, from PyTorch's own words: the last bits of a result depend on it."""
    name, onednn = re.search(r"BLAS_INFO=(\w+)", built), re.search(r"USE_MKLDNN=(ON|1)\b", built)
    versions = {
        "MKL": r"Math Kernel Library Version ([\w.]+)",
        "oneDNN": r"MKL-DNN v([\w.]+)",
        "OpenBLAS": r"OpenBLAS ([\d.]+)",
    }
    found = [f"{library} {said[1]}" for library, words in versions.items() if (said := re.search(words, built))]
    threads = re.findall(r"(\w+)_get_max_threads\(\) : (\d+)", parallel)
    return {
        "blas": f"{name[1] if name else 'unknown'}, oneDNN {'on' if onednn else 'off'}",
        "blas_version": ", ".join(found) or "unknown",
        "blas_threads": ", ".join(f"{library} {n}" for library, n in threads) or "unknown",
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
