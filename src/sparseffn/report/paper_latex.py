"""A paper's table as LaTeX, to be read by `\\input`: a float for the overview and for each block, on its side if wide."""

from __future__ import annotations

import re

from sparseffn.report import formats
from sparseffn.report.paper_cells import Cell
from sparseffn.report.paper_view import Block, PaperTable

# What the text may hold beside letters and digits. Brackets and stars are braced: at a row's start LaTeX takes them for
# arguments of the row before.
_SIGNS = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    '"': r"\textquotedbl{}",
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "\u00a0": "~",
    "\u00b1": r"$\pm$",
    "\u00b7": r"$\cdot$",
    "\u00d7": r"$\times$",
    "\u2013": "--",
    "\u2014": "---",
    "\u2019": "'",
    "\u2026": r"\ldots{}",
    "\u2212": "$-$",
    "\u2264": r"$\leq$",
    "\u2265": r"$\geq$",
    "\u03b3": r"$\gamma$",
    "\u03b4": r"$\delta$",
    "\u03bb": r"$\lambda$",
    "\u03c3": r"$\sigma$",
}
# Letters beyond these are in no font that LaTeX loads by default.
_LAST_LATIN = 0x17F

# More columns than these need the length of the page.
_UPRIGHT = 6

_HEAD = r"""% {name}: made from its JSON file; edit neither.
% Read it with \input. The preamble needs
%   \usepackage[T1]{{fontenc}} \usepackage{{array}} \usepackage{{booktabs}} \usepackage{{rotating}} \usepackage{{adjustbox}}
"""


def latex_tables(table: PaperTable) -> str:
    """A table as LaTeX: a float for each block, with the footnotes that it refers to, and the notes as text after them."""
    texts = [_HEAD.format(name=_comment(table.name))]
    texts += [_float(table, block) for block in (table.overview, *table.blocks) if block]
    notes = (*table.notes, f"Made with: {formats.setting(table.environment)}")
    return "\n".join([*texts, "".join(f"{{\\sloppy\\noindent {latex_text(note)}\\par}}\n" for note in notes)])


def latex_text(text: str) -> str:
    """Text that LaTeX sets as it is; a letter that no usual font has is set as its number."""
    return "".join(_SIGNS.get(sign) or _letter(sign) for sign in text.translate(_SPACES))


# Other white space would end a paragraph, which a cell may not.
_SPACES = {ord(sign): " " for sign in "\t\n\r\v\f\u2028\u2029"}


def _letter(sign: str) -> str:
    if sign.isprintable() and (ord(sign) < 0x7F or (sign.isalpha() and ord(sign) <= _LAST_LATIN)):
        return sign
    return rf"\texttt{{U+{ord(sign):04X}}}"


def _comment(text: str) -> str:
    """What may stand in a comment: one line of ASCII."""
    return re.sub(r"[^ -~]", " ", text)


def _float(table: PaperTable, block: Block) -> str:
    facts = f" {block.facts}." if block.facts else ""
    incomplete = f" This table is {table.incomplete}." if table.incomplete else ""
    # Beside the number that LaTeX gives the float.
    title = re.sub(r"^Table \d+", r"\g<0> of arXiv 2310.10837", table.title)
    caption = f"{title}. {block.title}.{facts} {table.summary}{incomplete}"
    label = re.sub(r"[^a-z0-9]+", "-", f"{table.name}-{block.name}".lower()).strip("-")
    width = len(block.headings)
    place = "table" if width <= _UPRIGHT else "sidewaystable"
    lines = [
        rf"\begin{{{place}}}",
        r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{latex_text(caption)}}}",
        rf"\label{{tab:{label}}}",
        r"\begin{adjustbox}{max width=\linewidth}",
        rf"\begin{{tabular}}{{@{{}}>{{\raggedright\arraybackslash}}p{{0.2\linewidth}}*{{{width}}}{{r}}@{{}}}}",
        r"\toprule",
        *_head(block),
        r"\midrule",
        *(_row([label, *cells]) for label, cells in block.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{adjustbox}",
        *_footnotes(table, block),
        rf"\end{{{place}}}",
    ]
    return "\n".join(lines) + "\n"


def _head(block: Block) -> list[str]:
    """The groups with a rule below each, then the names, broken so that they are not much wider than their numbers."""
    groups, rules, start = [""], "", 2
    for name, n in block.groups:
        groups.append(rf"\multicolumn{{{n}}}{{c}}{{{latex_text(name)}}}")
        rules += rf"\cmidrule(lr){{{start}-{start + n - 1}}}"
        start += n
    return [" & ".join(groups) + r" \\", rules, " & ".join(["", *(_stacked(name) for _, name, _ in block.headings)]) + r" \\"]


def _stacked(name: str) -> str:
    """A heading with a line for each part between commas."""
    parts = [latex_text(part.strip()) for part in name.split(",")]
    if len(parts) == 1:
        return parts[0]
    return r"\begin{tabular}[b]{@{}r@{}}" + r" \\ ".join(parts) + r"\end{tabular}"


def _row(cells: list[Cell]) -> str:
    return " & ".join(map(_cell, cells)) + r" \\"


def _cell(cell: Cell) -> str:
    marks = rf"\textsuperscript{{{','.join(cell.marks)}}}" if cell.marks else ""
    return latex_text(cell.text) + marks


def _footnotes(table: PaperTable, block: Block) -> list[str]:
    used = block.marks
    texts = [rf"\textsuperscript{{{letter}}}~{latex_text(text)}" for letter, text in table.footnotes.items() if letter in used]
    if not texts:
        return []
    return [r"\par\smallskip", r"\begin{minipage}{\linewidth}\raggedright", "\\par\n".join(texts), r"\end{minipage}"]
