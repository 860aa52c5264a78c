"""What mkdocs calls while it builds the site (`hooks` in mkdocs.yml): generated pages, files of the repository, MathML.

mkdocs build --strict        # make docs: also serves it
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gallery import gallery_page, method_page
from mathml import with_mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from reference import reference_pages

from sparseffn.ffn import list_methods

ROOT = Path(__file__).resolve().parents[2]
# Where the site keeps files of the repository that pages lead to.
KEPT = "repository"
# A link of Markdown out of docs/, without what follows in the file.
_OUTSIDE = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")


def on_config(config: MkDocsConfig) -> None:
    """Put the page of each registered method into the navigation."""
    for entry in config.nav or []:
        if "Methods" in entry:
            entry["Methods"] = ["methods/index.md", *({name: f"methods/{name}.md"} for name in list_methods())]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the gallery, the API reference, and what pages of docs/ lead to elsewhere in the repository."""
    pages = {"methods/index.md": gallery_page()}
    pages |= {f"methods/{name}.md": method_page(name) for name in list_methods()}
    pages |= {f"reference/{name}.md": text for name, text in reference_pages().items()}
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    for path in sorted(set(_linked(Path(config.docs_dir)))):
        files.append(File.generated(config, f"{KEPT}/{_place(path)}", **_content(path)))
    return files


def _linked(docs: Path) -> Iterator[Path]:
    """Files and folders of the repository that pages of docs/ lead to; of a folder also what is in it."""
    for page in sorted(docs.glob("*.md")):
        for target in _OUTSIDE.findall(page.read_text(encoding="utf-8")):
            path = ROOT / target
            if path.is_dir():
                yield from (inner for inner in path.iterdir() if inner.is_file())
            if path.exists():
                yield path


def _place(path: Path) -> str:
    """The address of a file below `KEPT`; a folder is a page that lists it."""
    place = path.relative_to(ROOT).as_posix()
    return f"{place}/index.md" if path.is_dir() else place


def _content(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        return {"abs_src_path": str(path)}
    names = sorted(inner.name for inner in path.iterdir() if inner.is_file())
    listed = "\n".join(f"- [{name}]({name})" for name in names)
    return {"content": f"# {path.relative_to(ROOT).as_posix()}\n\n{listed}\n"}


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links out of docs/ to the copies; a link to what is not there stays, and fails the strict build."""
    if page.file.src_uri.startswith(f"{KEPT}/"):
        # Files elsewhere may lead anywhere; what they say is kept, their links are not.
        return re.sub(r"\[([^\]]*)\]\((?!https?:|#)[^)]*\.md[^)]*\)", _as_kept(page), markdown)
    depth = page.file.src_uri.count("/")

    def kept(found: re.Match[str]) -> str:
        path = ROOT / found[1]
        return "../" * depth + f"{KEPT}/{_place(path)}" if path.exists() else found[0]

    return _OUTSIDE.sub(kept, markdown)


def _as_kept(page: Page) -> Any:
    """Keeps links among the copies, and leaves only the words of others."""

    def kept(found: re.Match[str]) -> str:
        target = re.search(r"\]\(([^)#]*)", found[0])
        assert target is not None, "the pattern has a target"
        source = page.file.src_uri.removeprefix(f"{KEPT}/")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target[1]))
        return found[0] if path in {_place(linked) for linked in _linked(ROOT / "docs")} else found[1]

    return kept


def on_page_content(html: str, **_: Any) -> str:
    """Equations become MathML."""
    return with_mathml(html)
