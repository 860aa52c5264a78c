"""The built package holds every file of the source tree, and runs where nothing else of the repository is."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest

import sparseffn

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "sparseffn"
LAYER = """
import torch
import sparseffn

layer = sparseffn.SigmaMoE(d_model=16, n_experts=4, expert_size=8, k=2)
layer(torch.randn(3, 16)).sum().backward()
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, lacks: Callable[[str], NoReturn]) -> Path:
    """A folder with the sdist, the wheel of the source tree and, in `again`, the wheel of the sdist."""
    if find_spec("hatchling") is None:
        lacks("needs hatchling, of the dev extra")
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, folder)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as sdist:
        sdist.extractall(folder, filter="data")
    build(next(folder.glob("sparseffn-*/")), folder / "again")
    return folder


def build(tree: Path, folder: Path) -> None:
    """What a build front end does with `pyproject.toml`, without its isolated environment and so without the network."""
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=tree, check=True, capture_output=True)


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All packages of this environment but our own, so that torch need not be installed again."""
    folder = tmp_path_factory.mktemp("dependencies")
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(place).iterdir():
            if "sparseffn" not in path.name and path.suffix != ".pth":
                (folder / path.name).symlink_to(path)
    return folder


def environment(folder: Path, dependencies: Path) -> Path:
    """Python of a virtual environment in which only the dependencies can be imported."""
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    return folder / "bin" / "python"


def run(*command: Path | str, cwd: Path, path: Path | None = None) -> str:
    """What a command prints that must succeed; the plain PyTorch backend spares compiling the kernels."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    added = {"SPARSEFFN_BACKEND": "torch"} | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run(command, cwd=cwd, env=kept | added, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_wheel(folder: Path) -> set[str]:
    """Files of the package in the folder's wheel."""
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return {name.removeprefix("sparseffn/") for name in wheel.namelist() if name.startswith("sparseffn/")}


def test_wheel_and_sdist_hold_every_file(built: Path) -> None:
    """Templates, tables and C++ sources too; the wheel of the sdist is the same."""
    tree = {path.relative_to(SOURCES).as_posix() for path in SOURCES.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {Path(name).suffix for name in tree} >= {".py", ".cpp", ".h", ".toml", ".j2", ".css", ".typed"}
    assert in_wheel(built) == in_wheel(built / "again") == tree


def test_wheel_runs_in_an_empty_environment(built: Path, dependencies: Path, tmp_path: Path) -> None:
    """Installed by pip: the command, its help, a layer, and metadata of this version."""
    python = environment(tmp_path / "venv", dependencies)
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", next(built.glob("*.whl")), cwd=tmp_path)
    shown = run(python, "-c", f"{LAYER}print(sparseffn.__file__)", cwd=tmp_path)
    assert Path(shown.strip()).is_relative_to(tmp_path)
    shown = run(python, "-c", "from importlib.metadata import version; print(version('sparseffn'))", cwd=tmp_path)
    assert shown.strip() == sparseffn.__version__
    assert "compare" in run(tmp_path / "venv" / "bin" / "sparseffn", "--help", cwd=tmp_path)


def test_source_tree_runs_without_metadata(dependencies: Path, tmp_path: Path) -> None:
    """`PYTHONPATH=src` on a machine where nothing can be installed."""
    python = environment(tmp_path / "venv", dependencies)
    absent = "from importlib import metadata; print([d.name for d in metadata.distributions() if d.name == 'sparseffn'])"
    assert run(python, "-c", absent, cwd=tmp_path, path=SOURCES.parent).strip() == "[]"
    noted = f"{LAYER}from sparseffn.storage import environment; print(environment()['sparseffn'])"
    assert run(python, "-c", noted, cwd=tmp_path, path=SOURCES.parent).strip() == sparseffn.__version__
    assert "sigma-moe" in run(python, "-m", "sparseffn", "methods", cwd=tmp_path, path=SOURCES.parent)
