"""Damage to a file or a folder, drawn at random: as disks, copies and enemies do it."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[Path, random.Random, list[Path]], object]

HOSTILE: list[Any] = [
    None,
    [],
    {},
    "",
    "x",
    "\ud800",
    "[/b]",
    -1,
    0,
    1,
    0.5,
    1e308,
    10**30,
    10**400,
    True,
    [[]] * 3,
    {"a": 1},
    "../../etc/passwd",
]


def flip(path: Path, draw: random.Random, _: list[Path]) -> None:
    """One bit."""
    data = bytearray(path.read_bytes() or b"\0")
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, draw: random.Random, _: list[Path]) -> None:
    """The end is gone."""
    os.truncate(path, draw.randrange(max(1, path.stat().st_size)))


def append(path: Path, draw: random.Random, _: list[Path]) -> None:
    """More behind the end."""
    with path.open("ab") as file:
        file.write(draw.randbytes(draw.randrange(1, 100)))


def scramble(path: Path, draw: random.Random, _: list[Path]) -> None:
    """Other bytes."""
    path.write_bytes(draw.randbytes(draw.randrange(200)))


def remove(path: Path, draw: random.Random, _: list[Path]) -> None:
    """No file."""
    path.unlink()


def swap(path: Path, draw: random.Random, others: list[Path]) -> None:
    """Another file of the folder, or that of another run."""
    data = draw.choice(others).read_bytes()
    path.write_bytes(data)


def folder(path: Path, draw: random.Random, _: list[Path]) -> None:
    """A folder in its place."""
    path.unlink()
    path.mkdir()


def pipe(path: Path, draw: random.Random, _: list[Path]) -> None:
    """A pipe that nobody writes into."""
    path.unlink()
    os.mkfifo(path)


def loop(path: Path, draw: random.Random, _: list[Path]) -> None:
    """A link to itself."""
    path.unlink()
    path.symlink_to(path.name)


def header(path: Path, draw: random.Random, _: list[Path]) -> None:
    """A safetensors header of a huge size, or with huge tensors."""
    if draw.random() < 0.5:
        path.write_bytes(draw.choice([2**63, 2**40, 99_000_000]).to_bytes(8, "little") + b"{" * 50)
        return
    text = json.dumps({"model.x": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**62]}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def deep(path: Path, draw: random.Random, _: list[Path]) -> None:
    """JSON without end, or a number of many digits."""
    path.write_text(draw.choice(["[" * 100_000, '{"a":' * 100_000, '{"steps": ' + "9" * 10_000 + "}"]))


def confuse(path: Path, draw: random.Random, _: list[Path]) -> None:
    """A value of another type or size somewhere in JSON, or a field that is gone or new."""
    try:
        text = path.read_text()
        lines = text.splitlines() or [""] if path.suffix == ".jsonl" else [text]
        at = draw.randrange(len(lines))
        data = json.loads(lines[at])
        if not isinstance(data, dict | list):
            raise ValueError("nothing in it")
    except (ValueError, RecursionError):
        return scramble(path, draw, [])
    place = data
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = draw.choice(keys)
        if isinstance(place[key], dict | list) and draw.random() < 0.8:
            place = place[key]
            continue
        if isinstance(place, dict) and draw.random() < 0.2:
            place[draw.choice(["more", "format", str(key)])] = place.pop(key)
        else:
            place[key] = draw.choice(HOSTILE)
        break
    lines[at] = json.dumps(data)
    path.write_text("\n".join(lines) + "\n")


ANY: list[Mutation] = [flip, flip, truncate, append, scramble, remove, swap, folder, pipe, loop, deep]


def damage(root: Path, draw: random.Random, strangers: list[Path]) -> str:
    """Damage one file below `root`; returns what was done. `strangers` are files of other runs."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
    path = draw.choice(files)
    mutations = [
        *ANY,
        *([confuse] * 6 if path.suffix in (".json", ".jsonl") else []),
        *([header] * 3 if path.suffix == ".safetensors" else []),
    ]
    mutation = draw.choice(mutations)
    # The other snapshots still serve then, by design.
    if mutation is remove and path.parent.name == "routing":
        mutation = flip
    mutation(path, draw, [*files, *strangers])
    return f"{mutation.__name__} {path.relative_to(root)}"


def fresh(source: Path, place: Path) -> Path:
    """A copy at `place`, whatever was left there."""
    if place.exists() or place.is_symlink():
        shutil.rmtree(place)
    shutil.copytree(source, place)
    return place
