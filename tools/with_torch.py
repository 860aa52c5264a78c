"""Run the tests from the source tree under a given release of PyTorch.

    python tools/with_torch.py 2.9.1                         # the quick suite
    python tools/with_torch.py 2.14.1 tests/ops -k opcheck    # pytest's arguments
    python tools/with_torch.py 2.9.1 --folder /tmp/torch-2.9

Makes a virtual environment of the running Python with that release and what the tests need, and keeps it for the next call in
the user's cache, or in FOLDER. pip's own settings choose the index, so that PIP_EXTRA_INDEX_URL can name one of CPU builds.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# The release is given, PyTorch brings its own Triton, and linters test nothing.
LEFT_OUT = {"torch", "triton", "ruff", "basedpyright", "codespell"}


def requirements(group: list[str]) -> list[str]:
    """A list of requirements, extras of the project itself unfolded."""
    found: list[str] = []
    for requirement in group:
        if extras := re.fullmatch(rf"{PROJECT['name']}\[(.*)\]", requirement):
            for extra in extras[1].split(","):
                found += requirements(PROJECT["optional-dependencies"][extra])
        elif re.split(r"[^\w.-]", requirement)[0] not in LEFT_OUT:
            found.append(requirement)
    return found


def environment(version: str, folder: Path) -> Path:
    """The Python of an environment with that release; made, or brought up to the requirements, where it is not."""
    wanted = [f"torch=={version}", *requirements(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])]
    python, done = folder / "bin" / "python", folder / "requirements.txt"
    if not done.exists() or done.read_text().split("\n") != wanted:
        if not python.exists():
            venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        done.write_text("\n".join(wanted))
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="a release of PyTorch, such as 2.9.1")
    parser.add_argument("--folder", type=Path, help="where the environment is kept")
    options, pytest_arguments = parser.parse_known_args()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = environment(options.version, options.folder or cache / "sparseffn" / f"torch-{options.version}")
    command = [python, "-m", "pytest", *(pytest_arguments or ["-m", "not slow"])]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
