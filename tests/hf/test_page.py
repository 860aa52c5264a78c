"""What the page on faster experts says of transformers' families holds; tests/test_docs.py runs its blocks."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "huggingface.md"


def test_the_table_of_families_is_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every class, computed by whom, and why."""
    text = PAGE.read_text(encoding="utf-8")
    (of_page,) = re.findall(r"^transformers ([\d.]+): ", text, flags=re.MULTILINE)
    if of_page != version("transformers"):
        pytest.skip(f"the page is about transformers {of_page}; `make readme` writes it for {version('transformers')}")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("generated", ROOT / "tools" / "generated.py")
    assert spec is not None and spec.loader is not None
    generated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generated)
    assert generated.with_families(text) == text, "run `make readme`"
