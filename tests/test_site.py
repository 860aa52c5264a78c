"""The site builds strictly, asks the network for nothing, leads nowhere that is not there, and has a page for each method."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

import pytest

import sparseffn
from sparseffn.ffn import list_methods, unregister

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools" / "site"
# What a browser fetches by itself; `a` is followed by readers alone.
FETCHED = {"src", "srcset", "poster", "data", "background"}
WIDTH_OF_A_TELEPHONE = 400


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, lacks: Callable[[str], NoReturn]) -> Path:
    """The site, built by the command of `make docs`: a warning, as of a link to nowhere, ends it."""
    if find_spec("mkdocs") is None:
        lacks("needs mkdocs, of the docs extra")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    known = {"PYTHONPATH": str(Path(sparseffn.__file__).parents[1]), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | known, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def fetched_by_sheet(sheet: str) -> list[str]:
    """Addresses that a style sheet, or a `style` attribute, makes a browser fetch; without quotes and spaces around them."""
    without_comments = re.sub(r"/\*.*?\*/", "", sheet, flags=re.DOTALL)
    found = re.finditer(r"""url\(\s*(["']?)(.*?)\1\s*\)|@import\s*(["'])(.*?)\3""", without_comments, re.IGNORECASE | re.DOTALL)
    return [one[2] if one[2] is not None else one[4] for one in found]


def from_elsewhere(address: str) -> bool:
    return re.match(r"(\w+:)?//", address.strip()) is not None


class Read(HTMLParser):
    """What a page fetches, what it leads to, which places it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.in_style = False
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_data(self, data: str) -> None:
        if self.in_style:
            self.fetched += fetched_by_sheet(data)

    def handle_endtag(self, tag: str) -> None:
        self.in_style = self.in_style and tag != "style"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.in_style = tag == "style"
        for name, value in attrs:
            if name == "id" and value:
                self.places.add(value)
            elif name in FETCHED or (name == "href" and tag == "link"):
                self.fetched.append(value or "")
            elif name == "style":
                self.fetched += fetched_by_sheet(value or "")
            elif name == "href" and tag == "a":
                self.links.append(value or "")


@cache
def read(path: Path) -> Read:
    return Read(path)


def pages(site: Path) -> list[Path]:
    """Every page but the one of a wrong address, whose links a server completes."""
    return [path for path in sorted(site.rglob("*.html")) if path.name != "404.html"]


def test_no_page_asks_the_network(site: Path) -> None:
    """No script, style sheet, font or picture from elsewhere, in pages and in style sheets."""
    fetched = {(page.name, address) for page in pages(site) for address in read(page).fetched}
    sheets = [sheet.read_text(encoding="utf-8") for sheet in site.rglob("*.css")]
    fetched |= {("css", address) for sheet in sheets for address in fetched_by_sheet(sheet)}
    assert len(fetched) > 20 and len(sheets) >= 3
    assert [found for found in fetched if from_elsewhere(found[1])] == []


def test_addresses_in_a_style_sheet_are_found(tmp_path: Path) -> None:
    """Every way to write one, in a sheet, in a page's own style and in an attribute."""
    sheet = """
        @import "https://a.example/1.css"; @import 'http://a.example/2.css' screen; @import url(//a.example/3.css);
        @import url( "https://a.example/4.css" ) print; @IMPORT"local/5.css"; /* @import "https://a.example/no.css"; */
        @font-face { src: url('https://a.example/6.woff2') format("woff2"), URL(local/7.woff) }
        p { background: url(data:image/png;base64,AA//BB) }
    """
    found = fetched_by_sheet(sheet)
    assert [address for address in found if from_elsewhere(address)] == [
        "https://a.example/1.css", "http://a.example/2.css", "//a.example/3.css", "https://a.example/4.css",
        "https://a.example/6.woff2",
    ]  # fmt: skip
    assert [address for address in found if not from_elsewhere(address)] == [
        "local/5.css", "local/7.woff", "data:image/png;base64,AA//BB",
    ]  # fmt: skip
    page = tmp_path / "page.html"
    page.write_text(f"<style>{sheet}</style><p style='background: url(//a.example/8.png)'>@import 'https://a.example/text'</p>")
    assert read(page).fetched == [*found, "//a.example/8.png"]


def test_links_lead_to_something(site: Path) -> None:
    """Pages and places in them, of the theme and of generated pages too."""
    wrong = []
    for page in pages(site):
        for link in read(page).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            known = read(target).places if target.suffix == ".html" and target.is_file() else set()
            if not target.is_file() or (known and parts.fragment and unquote(parts.fragment) not in known):
                wrong.append(f"{page.relative_to(site)}: {link}")
    assert wrong == []


def test_equations_are_mathml(site: Path) -> None:
    """Each method's page has some, and no page shows LaTeX or what a script would have to convert."""
    for name in list_methods():
        assert "<math " in (site / "methods" / f"{name}.html").read_text(encoding="utf-8")
    for page in pages(site):
        assert "arithmatex" not in page.read_text(encoding="utf-8"), page


def test_methods_pages_say_everything(site: Path) -> None:
    """Equation, picture, cost against dense, when and when not, example, options; the same parts for all."""
    wanted = {"what-it-selects", "what-it-costs", "when-to-use-it", "when-not", "in-code", "options"}
    for name in list_methods():
        page = site / "methods" / f"{name}.html"
        assert wanted <= read(page).places, name
        assert '<svg class="selection"' in page.read_text(encoding="utf-8")


def test_public_names_are_in_the_reference(site: Path) -> None:
    """All that `import sparseffn` offers; nothing with an underscore."""
    places = {place for page in (site / "reference").glob("*.html") for place in read(page).places}
    shown = {place.rsplit(".", 1)[1] for place in places if place.startswith("sparseffn.")}
    assert {name for name in dir(sparseffn) if not name.startswith("_")} <= shown
    assert [place for place in places if re.search(r"^sparseffn\.(.*\.)?_(?!_)", place)] == []


@pytest.fixture
def gallery(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module that makes the methods' pages."""
    monkeypatch.syspath_prepend(str(TOOLS))
    yield importlib.import_module("gallery")
    for name in ("gallery", "selection_picture"):
        sys.modules.pop(name, None)


def test_a_method_from_outside_has_a_page(gallery: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its file alone; the code on it runs, and its picture is the same every time."""
    spec = importlib.util.spec_from_file_location("own_method", ROOT / "examples" / "own_method.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "own_method", module)
    spec.loader.exec_module(module)
    try:
        page = gallery.method_page("relu-moe")
        assert page == gallery.method_page("relu-moe")
        assert "$$ s = " in page and "## When to use it" in page and "## When not" not in page
        run_code_of(page)
    finally:
        unregister("relu-moe")


def run_code_of(page: str) -> None:
    """The one block of a method's page."""
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block, {})


@pytest.mark.parametrize("name", list_methods())
def test_code_of_a_methods_page_runs(gallery: ModuleType, name: str) -> None:
    """At the size that the page counts."""
    run_code_of(gallery.method_page(name))


def test_what_cannot_be_converted_ends_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown command would be shown as letters."""
    monkeypatch.syspath_prepend(str(TOOLS))
    mathml = importlib.import_module("mathml")
    page = '<div class="arithmatex">\\[ {} \\]</div>'
    assert "<msub><mi>W</mi><mn>3</mn></msub>" in mathml.with_mathml(page.format("W_3 x &lt; 1"))
    for wrong in (r"\nosuchcommand{x}", r"a &amp;= b"):
        with pytest.raises(mathml.UnknownLatexError, match="must be LaTeX that latex2mathml knows"):
            mathml.with_mathml(page.format(wrong))


@pytest.mark.slow
def test_pages_fit_a_telephone(site: Path, browser: Any) -> None:
    """No page is wider than the window: tables, equations and code scroll by themselves. And nothing but files was loaded."""
    metrics = {"width": WIDTH_OF_A_TELEPHONE, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for page in pages(site):
        browser.get(page.as_uri())
        width, loaded = browser.execute_script(
            "return [document.documentElement.scrollWidth, performance.getEntriesByType('resource').map(entry => entry.name)]"
        )
        assert width <= WIDTH_OF_A_TELEPHONE, page.relative_to(site)
        assert [address for address in loaded if not address.startswith(("file:", "data:"))] == []
