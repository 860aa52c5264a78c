"""LaTeX of a page's HTML becomes MathML, which browsers show by themselves: no script, no font, no network."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves of `$...$` and of `$$...$$`.
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_DISPLAYED = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
# The converter passes over what it does not know: a command, `&` outside of an array.
_NOT_UNDERSTOOD = re.compile(r"<m[io]>(?:\\.*?|&|)</m[io]>|<m[io] ?/>")


class UnknownLatexError(ValueError):
    """An equation has something that the converter does not know, and would be shown wrongly."""


def with_mathml(page: str) -> str:
    """A page's HTML with its equations in MathML.

    Raises:
        UnknownLatexError: an equation cannot be converted as a whole.
    """
    page = _DISPLAYED.sub(lambda found: f'<div class="equation">{mathml(found[1], display="block")}</div>', page)
    return _INLINE.sub(lambda found: mathml(found[1], display="inline"), page)


def mathml(latex: str, *, display: str) -> str:
    """One equation; `latex` is as it stands in HTML, `display` is block or inline."""
    latex = html.unescape(latex).strip()
    converted = convert(latex, display=display)
    if _NOT_UNDERSTOOD.search(converted):
        raise UnknownLatexError(f"the equation must be LaTeX that latex2mathml knows; got {latex!r}; fix: write it more simply")
    return converted
