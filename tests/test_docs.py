"""What the pages tell a reader to type is taken by the command, and the README's example runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sparseffn.cli import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
INLINE = re.compile(r"`(sparseffn [^`]+)`")
# In code, in a block of commands, or in the mark of a generated block.
TARGET = re.compile(r"(?:`|^)make ([\w-]+)", re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Words of each `sparseffn ...` on a page, without those that stand for a value."""
    text = page.read_text(encoding="utf-8")
    lines = [line for language, block in BLOCK.findall(text) if language == "sh" for line in block.splitlines()]
    found = [line for line in lines if line.startswith("sparseffn ")] + INLINE.findall(BLOCK.sub("", text))
    words = [shlex.split(line, comments=True)[1:] for line in found]
    # A group alone, as `sparseffn bench`, is a name in a sentence.
    return [[word for word in line if word != "..."] for line in words if line[0] not in parse.GROUPS or len(line) > 1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_a_page_are_understood(page: Path) -> None:
    """Names of commands and options; nothing is run."""
    for words in commands(page):
        name, rest = parse._command(words)
        parse.parse(name, parse.COMMANDS[name][0], rest)


def test_pages_name_commands() -> None:
    """Otherwise the test above would hold of nothing."""
    assert len(commands(ROOT / "README.md")) > 10 and len(commands(ROOT / "docs" / "reproduce.md")) > 10


def test_targets_named_on_pages_are_in_the_makefile() -> None:
    """Each `make X`; and the pages do name some."""
    named = {name for page in [*PAGES, ROOT / "CHANGELOG.md"] for name in TARGET.findall(page.read_text(encoding="utf-8"))}
    there = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test", "readme"} <= named <= there


def test_readme_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands there; the plain PyTorch backend, as kernels need not be compiled for that."""
    monkeypatch.setenv("SPARSEFFN_BACKEND", "torch")
    blocks = [block for language, block in BLOCK.findall((ROOT / "README.md").read_text()) if language == "python"]
    # The other one needs transformers; tests/hf runs it.
    (example,) = [block for block in blocks if "sparseffn.hf" not in block]
    found: dict[str, object] = {}
    exec(example, found)
    assert tuple(found["y"].shape) == (8, 256, 512)
