"""What the pages say about Hugging Face holds."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")

from hf.tiny import build, tokens

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "huggingface.md"
EXAMPLE = re.compile(r"```python\n(import sparseffn\.hf\n.*?)```", re.DOTALL)
HUB_NAME = "allenai/OLMoE-1B-7B-0924"


@pytest.mark.parametrize("page", [PAGE, ROOT / "README.md"], ids=lambda page: page.name)
def test_the_example_runs(page: Path, tmp_path: Path) -> None:
    """With a small model of the family in place of the one on the hub."""
    (example,) = EXAMPLE.findall(page.read_text(encoding="utf-8"))
    build("olmoe").save_pretrained(tmp_path)
    found: dict[str, object] = {}
    assert HUB_NAME in example
    exec(example.replace(HUB_NAME, str(tmp_path)), found)
    model = found["model"]
    assert model.config._experts_implementation == "sparseffn"  # pyright: ignore[reportAttributeAccessIssue]
    assert model(tokens()).logits.isfinite().all()  # pyright: ignore[reportCallIssue]


def test_the_table_of_families_is_what_is_found() -> None:
    """Every class, computed by whom, and why."""
    text = PAGE.read_text(encoding="utf-8")
    (of_page,) = re.findall(r"^transformers ([\d.]+): ", text, flags=re.MULTILINE)
    if of_page != version("transformers"):
        pytest.skip(f"the page is about transformers {of_page}; `make readme` writes it for {version('transformers')}")
    spec = importlib.util.spec_from_file_location("generated", ROOT / "tools" / "generated.py")
    assert spec is not None and spec.loader is not None
    generated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generated)
    assert generated.with_families(text) == text, "run `make readme`"
