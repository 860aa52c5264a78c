"""What the pages tell a reader to type works: python blocks run, commands and their options are understood."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sparseffn.cli import parse
from sparseffn.ffn import list_methods, unregister

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(sparseffn [^`]+)`")
# In code, in a block of commands, or in the mark of a generated block.
TARGET = re.compile(r"(?:`|^)make ([\w-]+)", re.MULTILINE)
# Without the place in the page; `#...` alone is a place in the same one.
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
MADE_WITH_THE_SITE = ("methods/", "reference/")
# Models of the hub that pages name, and the small random model that a test has in their place: one of tests/hf/tiny.py, or a
# Llama whose blocks are as wide as the page needs.
OF_THE_HUB = {"allenai/OLMoE-1B-7B-0924": "olmoe", "HuggingFaceTB/SmolLM2-135M-Instruct": "llama"}
NAME_OF_THE_HUB = re.compile(r'from_pretrained\(\s*"(\w[\w.-]*/[\w.-]+)"')


def blocks(page: Path, *languages: str) -> list[str]:
    """Fenced blocks of a page in these languages."""
    return [block for language, block in BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


def lines_typed(page: Path) -> list[list[str]]:
    """Words of each command in the blocks of a page, without variables before it and comments behind it."""
    typed = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in typed]
    return [_bare(line) for line in words if line]


def _bare(words: list[str]) -> list[str]:
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] == "torchrun":
        # What it starts in each process.
        words = words[words.index("-m") + 1 :]
    return words[2:] if words[:2] == ["python", "-m"] else words


def commands(page: Path) -> list[list[str]]:
    """Words of each `sparseffn ...` on a page, in blocks and in sentences, without those that stand for a value."""
    in_sentences = INLINE.findall(BLOCK.sub("", page.read_text(encoding="utf-8")))
    found = [*lines_typed(page), *(shlex.split(line, comments=True) for line in in_sentences)]
    words = [[word for word in line[1:] if word != "..."] for line in found if line[0] == "sparseffn"]
    # A group or a command alone, as `sparseffn bench` or `sparseffn convert`, is a name in a sentence.
    return [line for line in words if len(line) > 1 or line[0] not in {*parse.GROUPS, *parse.COMMANDS}]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_a_page_are_understood(page: Path) -> None:
    """Names of commands and options; nothing is run."""
    for words in commands(page):
        name, rest = parse._command(words)
        parse.parse(name, parse.COMMANDS[name][0], rest)


def test_pages_name_commands() -> None:
    """Otherwise the test above would hold of nothing."""
    assert len(commands(ROOT / "README.md")) >= 3 and len(commands(ROOT / "docs" / "reproduce.md")) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_other_commands_of_a_page_exist(page: Path) -> None:
    """Extras that pip is to install, scripts that python is to run; any other program must be known here first."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for program, *words in lines_typed(page):
        match program:
            case "pip":
                named = re.search(r"\[(.*)\]", " ".join(words))
                assert words[0] == "install" and set(named[1].split(",") if named else ()) <= set(extras), words
            case "python" if words[0] == "-c":
                compile(words[1], str(page), "exec")
            case "python":
                assert (ROOT / words[0]).is_file(), words
            case "accelerate":
                assert words[0] == "launch" and words[-1].endswith(".py"), words
            case _:
                assert program in ("sparseffn", "make"), f"a test must know how to check `{program}`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_say_their_language(page: Path) -> None:
    """One whose content a test here looks at; nothing stays unchecked for want of a name."""
    assert {language for language, _ in BLOCK.findall(page.read_text(encoding="utf-8"))} <= {"python", "sh"}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    """As somebody follows them who reads the repository; what is made with the site alone, tests/test_site.py looks at."""
    targets = LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8")))
    inside = [target for target in targets if not target.startswith(("http:", "https:", *MADE_WITH_THE_SITE))]
    assert [target for target in inside if not (page.parent / target).exists()] == []


def test_targets_named_on_pages_are_in_the_makefile() -> None:
    """Each `make X`; and the pages do name some."""
    named = {name for page in [*PAGES, ROOT / "CHANGELOG.md"] for name in TARGET.findall(page.read_text(encoding="utf-8"))}
    there = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test", "readme", "docs"} <= named <= there


@pytest.fixture
def _same_methods() -> Iterator[None]:
    """What a page registers is forgotten after it."""
    before = list_methods()
    yield
    for name in set(list_methods()) - set(before):
        unregister(name)


@pytest.mark.usefixtures("_same_methods")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block after the other in an empty folder, as a reader would paste them, but for models of the hub."""
    module = ModuleType(f"page_{page.stem.lower()}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        if "transformers" in block:
            pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")
        exec(_with_local_models(block, tmp_path), module.__dict__)


def _with_local_models(block: str, folder: Path) -> str:
    """The block with a small model of the family in place of each from the hub; it must say that it downloads.

    Files that a reader has made before are put into the folder.
    """
    if '"notes.txt"' in block:
        (folder / "notes.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 6)
    for name in NAME_OF_THE_HUB.findall(block):
        assert "# downloads " in block, f"a block that fetches {name} must say so"
        place = folder / name
        _small(OF_THE_HUB[name]).save_pretrained(place)
        from hf.tiny import save_byte_tokenizer

        save_byte_tokenizer(place)
        block = block.replace(f'"{name}"', repr(str(place)))
    if '"sigma-hf"' in block:
        from hf.tiny import export

        export(folder / "sigma-hf")
    if "load_released_model" in block:
        from models.released import arguments, weights

        of = weights("preln_moe")
        torch.save({"model": of, "run_invariants": {"args": arguments("preln_moe")}}, folder / "model-100000.pth")
        torch.save(of, folder / "weights.pth")
    return block


def _small(family: str) -> Any:
    if family != "llama":
        from hf.tiny import build

        return build(family)
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 256}
    return LlamaForCausalLM(LlamaConfig(**sizes))


def test_the_readme_names_every_method() -> None:
    """Of the package."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in list_methods() if f"`{name}`" not in text] == []


def test_the_example_of_the_readme_computes_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape in, shape out, and gradients of all parameters."""
    found: dict[str, object] = {}
    exec(blocks(ROOT / "README.md", "python")[0], found)
    assert tuple(found["y"].shape) == (8, 256, 512)  # pyright: ignore[reportAttributeAccessIssue]
    assert all(p.grad is not None for p in found["ffn"].parameters())  # pyright: ignore[reportAttributeAccessIssue]


def test_the_example_of_hugging_face_uses_our_kernels(tmp_path: Path) -> None:
    """The page's model runs, on the implementation that the page names."""
    pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")
    from hf.tiny import tokens

    found: dict[str, object] = {}
    exec(_with_local_models(blocks(ROOT / "docs" / "huggingface.md", "python")[0], tmp_path), found)
    model = found["model"]
    assert model.config._experts_implementation == "sparseffn"  # pyright: ignore[reportAttributeAccessIssue]
    assert model(tokens()).logits.isfinite().all()  # pyright: ignore[reportCallIssue]
