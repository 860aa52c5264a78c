"""The page: self-contained, escaped, the same bytes for the same result, with every figure it owes."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sparseffn.errors import UserError
from sparseffn.report.comparison_report import comparison_page, write_comparison
from sparseffn.report.plotting import places_apart

from .synthetic import comparison, typed

HOSTILE = """<script>alert("x")</script> & 'q' $y$"""


class Elements(HTMLParser):
    """Every element with its attributes, and the text of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(page: str) -> Elements:
    """The elements of a page."""
    elements = Elements()
    elements.feed(page)
    return elements


def figure_names(page: str) -> list[str]:
    """The ids of the page's figures, in their order."""
    return [str(attrs["id"]) for tag, attrs in parsed(page).found if tag == "figure"]


@pytest.fixture(scope="module")
def page() -> str:
    """Of five methods and one seed."""
    return comparison_page(typed(comparison()))


def test_page_has_every_figure(page: str) -> None:
    """Curves twice, usage of each sparse method, active channels of the dense one, co-occurrence of mixtures."""
    assert figure_names(page) == [
        "figure-curves-steps",
        "figure-curves-time",
        *(f"figure-usage-{index}" for index in (1, 2, 3, 4)),
        "figure-active-0",
        "figure-cooccurrence-3",
        "figure-cooccurrence-4",
    ]


def test_every_drawing_has_a_role_a_label_and_a_title(page: str) -> None:
    """A figure that cannot be seen can be heard."""
    drawings = re.findall(r'<svg [^>]*role="img" aria-label="[^"]{20,}">\s*<title>[^<]+</title>', page)
    assert len(drawings) == page.count("<svg ") == len(figure_names(page))


def test_ids_are_unique_and_references_lead_to_one(seeded: dict[str, Any]) -> None:
    """Figures in one page do not take each other's markers and clips."""
    page = comparison_page(typed(seeded))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#', page)) - {""} <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_page_loads_nothing(page: str) -> None:
    """The one outside address is a plain link; pictures are data inside the page."""
    for tag, attrs in parsed(page).found:
        addresses = [attrs[name] or "" for name in ("src", "href", "xlink:href", "data", "action") if name in attrs]
        allowed = ("#", "https://arxiv.org/abs/2310.10837") if tag == "a" else ("#", "data:image/png;base64,")
        assert all(address.startswith(allowed) for address in addresses), (tag, addresses)
        assert tag not in ("script", "link", "iframe", "base")


def test_styles_load_nothing(page: str) -> None:
    """No style imports a sheet or a font."""
    assert "@import" not in page
    assert "@font-face" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_same_result_gives_same_bytes(seeded: dict[str, Any], tmp_path: Path) -> None:
    """Neither the time nor the drawing order leaves a trace."""
    first, second = (write_comparison(typed(seeded), tmp_path / name) for name in ("first", "second"))
    assert [path.name for path in first] == ["table.md", "page.html"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_labels_reasons_and_settings_are_escaped(result: dict[str, Any]) -> None:
    """Text of the result stays text everywhere: table, figures, captions, details."""
    result["title"] = result["methods"][3]["label"] = HOSTILE
    result["settings"][HOSTILE] = HOSTILE
    result["corpus"]["name"] = HOSTILE
    result["missing"] = [{"label": HOSTILE + "2", "seed": 0, "reason": HOSTILE}]
    elements = parsed(comparison_page(typed(result)))
    assert "script" not in {tag for tag, _ in elements.found}
    assert elements.text.count(HOSTILE) >= 8


def test_label_with_letters_beyond_the_layout_font_is_drawn(result: dict[str, Any]) -> None:
    """A missing glyph in the font that measures text is no warning: the browser has it."""
    result["methods"][1]["label"] = "\u6df7\u5408"
    assert comparison_page(typed(result)).count("\u6df7\u5408") >= 4


def test_incomplete_comparison_says_so_on_the_page(result: dict[str, Any]) -> None:
    """The sentence stands in its own frame, and the missing method in the table."""
    result["missing"] = [{"label": "s-base", "seed": 0, "reason": "out of memory"}]
    page = comparison_page(typed(result))
    assert '<p class="incomplete" role="note">incomplete: s-base seed 0 missing: out of memory</p>' in page
    assert re.search(r"<td class=\"missing start\" colspan=\"13\">seed 0 missing: out of memory</td>", page)


def test_what_was_not_measured_is_said_instead_of_drawn(result: dict[str, Any]) -> None:
    """No empty frame: a sentence names the methods."""
    for method in result["methods"]:
        for key in ("curves", "usage", "active", "cooccurrence", "step_time_s", "ffn_flops_convention"):
            del method[key]
    for key in ("settings", "model", "environment", "equal_time_s", "curve_tokens"):
        del result[key]
    page = comparison_page(typed(result))
    text = parsed(page).text
    assert figure_names(page) == []
    assert "Learning curves not measured for dense, topk k=256, pkm, sigma-moe, switch" in text
    assert "Use per layer not measured for topk k=256, pkm, sigma-moe, switch" in text
    assert "Active channels not measured for dense;" in text


@pytest.mark.parametrize("points", [[], [{"step": 0, "time_s": 0.0, "valid": 8.0}]], ids=["no point", "one point"])
def test_short_curves_are_drawn(result: dict[str, Any], points: list[dict[str, float]]) -> None:
    """A comparison stopped at its start still gives a page."""
    result["methods"] = result["methods"][:3]
    result["methods"][0]["curves"][0]["points"] = points
    result["methods"][1]["curves"][0]["points"] = [{"step": 0, "time_s": 0.0, "valid": None}]
    assert "figure-curves-steps" in figure_names(comparison_page(typed(result)))


def test_single_point_of_a_single_method_is_drawn(result: dict[str, Any]) -> None:
    """Axes without extent get one."""
    result["methods"] = result["methods"][:1]
    result["methods"][0]["curves"][0]["points"] = [{"step": 0, "time_s": 0.0, "valid": 8.0}]
    assert "figure-curves-time" in figure_names(comparison_page(typed(result)))


def test_labels_keep_apart_and_near_their_lines() -> None:
    """Touching labels spread around their mean, distant ones stay, all within the frame."""
    assert places_apart([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert places_apart([0.9, 0.1], 0.1) == pytest.approx([0.9, 0.1])
    assert places_apart([0.0, 0.0, 0.0], 0.1) == pytest.approx([0.0, 0.1, 0.2])
    assert places_apart([1.0, 1.0], 0.1) == pytest.approx([0.9, 1.0])
    assert places_apart([], 0.1) == []


def test_drawing_leaves_the_settings_of_matplotlib(result: dict[str, Any]) -> None:
    """The figures of the caller keep their look."""
    import matplotlib

    before = dict(matplotlib.rcParams)
    # Between them they have a drawing of each kind.
    result["methods"] = [result["methods"][i] for i in (0, 3)]
    comparison_page(typed(result))
    assert dict(matplotlib.rcParams) == before


def test_missing_matplotlib_names_the_extra(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy stands in the error."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'sparseffn\[plot\]'"):
        comparison_page(typed(result))


def test_page_under_a_file_is_refused(result: dict[str, Any], tmp_path: Path) -> None:
    """The error names the file."""
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=r"cannot write '.*table\.md'"):
        write_comparison(typed(result), tmp_path / "taken")


def test_report_imports_neither_torch_nor_matplotlib() -> None:
    """A table can be printed where neither is installed."""
    code = "import sys, sparseffn.report; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
