"""Tables as LaTeX, to be read by `\\input`: a float each, on its side if wide."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sparseffn.report.table import Cell, Table

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


def latex_head(name: str) -> str:
    """The comment that a file begins with: where it is from and what it needs."""
    # One line of ASCII.
    shown = re.sub(r"[^ -~]", " ", name)
    return (
        f"% {shown}: made from its JSON file; edit neither.\n% Read it with \\input. The preamble needs\n"
        "%   \\usepackage[T1]{fontenc} \\usepackage{array} "
        "\\usepackage{booktabs} \\usepackage{rotating} \\usepackage{adjustbox}\n"
    )


def latex_table(table: Table, *, caption: str, label: str, footnotes: Mapping[str, str]) -> str:
    """A float.

    Args:
        table: its columns and rows; what else belongs to it stands in the caption or in the text.
        caption: text above it.
        label: what `\\ref` takes, after `tab:`; signs other than letters and digits become dashes.
        footnotes: letter to text.
    """
    width = len(table.columns) - 1
    place = "table" if width <= _UPRIGHT else "sidewaystable"
    lines = [
        rf"\begin{{{place}}}",
        r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{latex_text(caption)}}}",
        rf"\label{{tab:{re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')}}}",
        r"\begin{adjustbox}{max width=\linewidth}",
        rf"\begin{{tabular}}{{@{{}}>{{\raggedright\arraybackslash}}p{{0.2\linewidth}}*{{{width}}}{{r}}@{{}}}}",
        r"\toprule",
        *_head(table),
        r"\midrule",
        *(_row(list(row.cells), row.missing, width) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{adjustbox}",
        *_footnotes(footnotes),
        rf"\end{{{place}}}",
    ]
    return "\n".join(lines) + "\n"


def latex_paragraph(text: str) -> str:
    """A note below the floats."""
    return f"{{\\sloppy\\noindent {latex_text(text)}\\par}}\n"


def latex_text(text: str) -> str:
    """Text that LaTeX sets as it is; a letter that no usual font has is set as its number."""
    return "".join(_SIGNS.get(sign) or _letter(sign) for sign in text.translate(_SPACES))


# Other white space would end a paragraph, which a cell may not.
_SPACES = {ord(sign): " " for sign in "\t\n\r\v\f\u2028\u2029"}


def _letter(sign: str) -> str:
    if sign.isprintable() and (ord(sign) < 0x7F or (sign.isalpha() and ord(sign) <= _LAST_LATIN)):
        return sign
    return rf"\texttt{{U+{ord(sign):04X}}}"


def _head(table: Table) -> list[str]:
    """The groups with a rule below each, then the names, broken so that they are not much wider than their numbers."""
    names = " & ".join(_stacked(column.name) for column in table.columns) + r" \\"
    if not table.has_groups:
        return [names]
    groups, rules, start = ["" for _ in range(table.n_labels)], "", table.n_labels + 1
    for name, n in table.groups:
        groups.append(rf"\multicolumn{{{n}}}{{c}}{{{latex_text(name)}}}")
        rules += rf"\cmidrule(lr){{{start}-{start + n - 1}}}"
        start += n
    return [" & ".join(groups) + r" \\", rules, names]


def _stacked(name: str) -> str:
    """A heading with a line for each part between commas."""
    parts = [latex_text(part.strip()) for part in name.split(",")]
    if len(parts) == 1:
        return parts[0]
    return r"\begin{tabular}[b]{@{}r@{}}" + r" \\ ".join(parts) + r"\end{tabular}"


def _row(cells: list[Cell], missing: str, width: int) -> str:
    texts = [_cell(cell) for cell in cells]
    if missing:
        texts.append(rf"\multicolumn{{{width + 1 - len(cells)}}}{{l}}{{{latex_text(missing)}}}")
    return " & ".join(texts) + r" \\"


def _cell(cell: Cell) -> str:
    return latex_text(cell.text) + (rf"\textsuperscript{{{','.join(cell.marks)}}}" if cell.marks else "")


def _footnotes(footnotes: Mapping[str, str]) -> list[str]:
    if not footnotes:
        return []
    texts = [rf"\textsuperscript{{{letter}}}~{latex_text(text)}" for letter, text in footnotes.items()]
    return [r"\par\smallskip", r"\begin{minipage}{\linewidth}\raggedright", "\\par\n".join(texts), r"\end{minipage}"]
