"""Stored files: whole or absent, and checked when they are read."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
import torch

from sparseffn import storage
from sparseffn.errors import UserError
from sparseffn.results.bench_result import Spread
from sparseffn.storage import (
    Count,
    Positive,
    PositiveInt,
    environment,
    matrix_products,
    read,
    read_json,
    rounded,
    write_folder,
    write_json,
    write_text,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """A checked dataclass."""

    lr: float

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"`lr` must be positive; got {self.lr}; fix: --lr 0.001")


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """What the tests store."""

    steps: PositiveInt
    seconds: dict[str, Positive] = {}
    runs: list[Rate] = []
    seed: Count = 0
    mode: Literal["a", "b"] = "a"
    valid: float | None = None
    by_seed: dict[int, float] = {}
    rest: Any = None


def test_json_comes_back_typed(tmp_path: Path) -> None:
    """Structs and dataclasses in one another, a whole number for a float, a field of another version; the text is as ever."""
    path = tmp_path / "new" / "file.json"
    stored = Stored(steps=3, seconds={"a b": 0.5}, runs=[Rate(lr=0.1)], valid=2.0)
    write_json(path, stored)
    assert read(path, Stored, fix="-") == stored
    write_json(path, {"rate": Rate(lr=0.1), 1: [stored.runs[0]], "no": None})
    assert path.read_text() == '{\n "rate": {\n  "lr": 0.1\n },\n "1": [\n  {\n   "lr": 0.1\n  }\n ],\n "no": null\n}\n'
    write_json(path, {"pairs": [[1, 2.5], [3, None]], "names": ["a\n[\n 1\n ]", "b"], "none": []})
    assert path.read_text().count("\n") == 11 and "[1, 2.5],\n" in path.read_text()
    assert read_json(path, fix="-")["names"] == ["a\n[\n 1\n ]", "b"]
    write_json(path, {"unknown": 1, "steps": 3, "valid": 2})
    assert read(path, Stored, fix="-") == Stored(steps=3, valid=2.0)
    write_json(path, Stored(steps=3, valid=np.float64(0.5)))
    assert read(path, Stored, fix="-") == Stored(steps=3, valid=0.5)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, Stored(steps=1, valid=float("nan")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("{}", "must hold `steps`; got nothing", id="absent"),
        pytest.param("[]", "must hold an object; got array", id="list"),
        pytest.param('{"steps": 0}', "must hold `steps`, an int >= 1; got 0", id="too small"),
        pytest.param('{"steps": "3"}', 'must hold `steps`, an int; got "3"', id="text"),
        pytest.param('{"steps": true}', "must hold `steps`, an int; got true", id="bool"),
        pytest.param('{"steps": 1, "seed": -1}', "must hold `seed`, an int >= 0; got -1", id="negative"),
        pytest.param('{"steps": 1, "valid": "%s"}' % ("x" * 100), r'a float | null; got "x{36}\.\.\.; fix', id="long"),
        pytest.param('{"steps": 1, "seconds": {"a": 0}}', r"`seconds\[...\]`, a float > 0", id="in a dict"),
        pytest.param('{"steps": 1, "runs": [{"lr": 1}, {}]}', r"`runs\[1\]\.lr`; got nothing", id="in a list"),
        pytest.param('{"steps": 1, "runs": [{"lr": -1}]}', r"a valid `runs\[0\]`; got \(`lr` must be positive", id="checked"),
        pytest.param('{"steps": 1, "mode": "c"}', "a valid `mode`; got invalid enum value 'c'", id="unknown word"),
        pytest.param('{"steps": 1, "valid": NaN}', "must hold JSON; got JSON is malformed", id="NaN"),
        pytest.param('{"steps": 1, "valid": 1e999}', "a valid `valid`; got number out of range", id="infinite"),
        pytest.param('{"steps": %s}' % ("9" * 9999), "a valid `steps`; got integer value out of range", id="digits"),
        pytest.param('{"steps": 1, "rest": %s}' % ("[" * 100_000), "nested too deeply", id="deep"),
        pytest.param('{"steps": "x", "valid": NaN}', "`steps`, an int; got str", id="damaged further on"),
        pytest.param('{"steps": 1, "by_seed": {"x": 1}}', "`key` in .*by_seed`, an int; got str", id="key"),
        pytest.param('{"steps": 1', "must hold JSON; got Input data was truncated", id="cut short"),
        pytest.param(b'{"steps": 1, "other": "\xff"}', "must hold JSON; got 'utf-8' codec", id="not UTF-8"),
    ],
)
def test_damaged_file_is_refused_with_its_field(text: str | bytes, message: str, tmp_path: Path) -> None:
    """Path, field, what is due, what came, and the remedy."""
    path = tmp_path / "file.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"^`{re.escape(str(path))}` .*{message}.*; fix: remove it$"):
        read(path, Stored, fix="remove it")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """None there, a folder, a pipe, on which reading would wait for ever."""
    with pytest.raises(UserError, match="must exist; got no such file"):
        read(tmp_path / "none" / "file.json", Stored, fix="-")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError, match="must be a file; got something else"):
            read(path, Stored, fix="-")


def test_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    """An exception leaves what was; a second writer's folder is dropped unless it is to replace the first."""
    place = tmp_path / "a" / "folder"
    with pytest.raises(KeyboardInterrupt), write_folder(place) as folder:
        (folder / "x").write_text("half")
        raise KeyboardInterrupt
    assert list(place.parent.iterdir()) == []
    for text, replace, found in (("1", False, "1"), ("2", False, "1"), ("3", True, "3")):
        with write_folder(place, replace=replace) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "x").write_text(text)
        assert (place / "sub" / "x").read_text() == found and list(place.parent.iterdir()) == [place]


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    """And nothing else."""
    (tmp_path / "mine").mkdir()
    code = "import os, sys, pathlib; from sparseffn.storage import write_folder\n"
    code += "with write_folder(pathlib.Path(sys.argv[1])) as f: os._exit(1)"
    subprocess.run([sys.executable, "-c", code, tmp_path / "folder"], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    storage.remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "make room"), (errno.EACCES, "check its rights")], ids=str)
def test_failure_of_the_disk_has_a_remedy(number: int, remedy: str, tmp_path: Path) -> None:
    """Whether it is full or refuses."""
    with pytest.raises(UserError, match=f"cannot write '{tmp_path}.*; fix: {remedy}"), write_folder(tmp_path / "folder"):
        raise OSError(number, os.strerror(number))


def test_folder_has_one_writer(tmp_path: Path) -> None:
    """A second process is refused; it may write once the first is done."""
    code = "import sys, pathlib; from sparseffn.storage import sole_writer\n"
    code += "with sole_writer(pathlib.Path(sys.argv[1])): pass"
    with storage.sole_writer(tmp_path):
        second = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
        assert "no other process writes into" in second.stderr
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


def test_home_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of a traceback."""
    monkeypatch.setenv("SPARSEFFN_CACHE", "~nosuchuser/cache")
    with pytest.raises(UserError, match="home folder that exists; got '~nosuchuser/cache'"):
        storage.default_cache_dir()


def test_digests_keep_parts_apart_and_ignore_the_order_of_keys(tmp_path: Path) -> None:
    """A file has the digest of its bytes."""
    assert storage.digest_of("ab", "c") != storage.digest_of("a", "bc")
    assert storage.json_digest({"a": 1, "b": 2}) == storage.json_digest({"b": 2, "a": 1}) != storage.json_digest({"a": 1})
    (tmp_path / "file").write_bytes(b"")
    assert storage.file_digest(tmp_path / "file") == storage.digest_of() != storage.digest_of("")


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


@pytest.mark.parametrize("data", [{"a": 0.5, "b": 2.0}, Stored(steps=3, rest=[1, None])], ids=["dict", "struct"])
def test_a_sealed_file_is_refused_when_it_was_changed(data: Any, tmp_path: Path) -> None:
    """Another number of the right type; without a seal, as another version writes it, it is read as it is."""
    path, kind = tmp_path / "file.json", type(data) if isinstance(data, Stored) else dict[str, float]
    write_json(path, data, seal=True)
    assert read(path, kind, fix="-") == data
    text = path.read_text()
    path.write_text(text.replace("0.5", "0.75").replace('"steps": 3', '"steps": 4'))
    with pytest.raises(UserError, match=r"must match its digest; got a changed file; fix: remove it"):
        read(path, kind, fix="remove it")
    path.write_text(text.replace('"sealed": "', '"sealed": 5, "x": "'))
    with pytest.raises(UserError, match=r"must "):
        read(path, kind, fix="remove it")
    write_json(path, data)
    assert read(path, kind, fix="-") == data


@pytest.mark.parametrize(
    ("built", "parallel", "found"),
    [
        (
            "  - Intel(R) oneAPI Math Kernel Library Version 2024.2-Product Build 20240605 for Intel(R) 64\n"
            "  - Intel(R) MKL-DNN v3.12.0 (Git Hash 80afa7)\n  - Build settings: BLAS_INFO=mkl, USE_MKLDNN=ON, USE_MPI=OFF",
            "OpenMP 201511\n\tomp_get_max_threads() : 2\nIntel(R)\n\tmkl_get_max_threads() : 1\n",
            ("mkl, oneDNN on", "MKL 2024.2, oneDNN 3.12.0", "omp 2, mkl 1"),
        ),
        ("  - Build settings: BLAS_INFO=accelerate, USE_MKLDNN=OFF", "", ("accelerate, oneDNN off", "unknown", "unknown")),
        ("", "", ("unknown, oneDNN off", "unknown", "unknown")),
    ],
    ids=["linux", "macos", "nothing"],
)
def test_library_of_matrix_products_is_known(built: str, parallel: str, found: tuple[str, ...]) -> None:
    """From what PyTorch prints of itself, whatever that lacks."""
    assert tuple(matrix_products(built, parallel).values()) == found


def test_environment_has_the_library_of_matrix_products_and_its_threads() -> None:
    """Those of this process: bits depend on them."""
    here = environment()
    assert {"blas", "blas_version", "blas_threads", "cpu_capability"} <= set(here)
    assert here["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert here["blas_threads"] == "unknown" or str(torch.get_num_threads()) in here["blas_threads"]


def test_measurements_are_rounded_to_five_digits() -> None:
    """Files stay small; whole numbers and what was chosen are kept, and types of a result are as JSON has them."""
    spread = Spread(median_s=0.0123456, q1_s=2.0, q3_s=123456.7, n=7)
    assert rounded({"a": [1.23456789e-5, 7], "b": (True, "x", None)}) == {"a": [1.2346e-05, 7], "b": [True, "x", None]}
    assert rounded(spread) == {"median_s": 0.012346, "q1_s": 2.0, "q3_s": 123460.0, "n": 7}
    assert rounded({"settings": {"lr": 0.001234567}}) == {"settings": {"lr": 0.001234567}}
