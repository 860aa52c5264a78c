"""Tables as LaTeX, to be read by `\\input`: a float each, on its side if wide."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sparseffn.report.table import Row, Table

_SYMBOLS = {
    "\u00b1": "pm",
    "\u00b7": "cdot",
    "\u00d7": "times",
    "\u2264": "leq",
    "\u2265": "geq",
    "\u03b3": "gamma",
    "\u03b4": "delta",
    "\u03bb": "lambda",
    "\u03c3": "sigma",
}
# What the text may hold beside letters and digits. Brackets and stars are braced: at a row's start LaTeX takes them for
# arguments of the row before.
_SIGNS = {
    **{sign: f"\\{sign}" for sign in "{}$&#%_"},
    **{sign: f"{{{sign}}}" for sign in "[]*"},
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    '"': r"\textquotedbl{}",
    "\u00a0": "~",
    "\u2013": "--",
    "\u2014": "---",
    "\u2019": "'",
    "\u2026": r"\ldots{}",
    "\u2212": "$-$",
    **{sign: rf"$\{name}$" for sign, name in _SYMBOLS.items()},
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
    """A float of columns, rows and these footnotes; what else belongs to the table stands in the caption or in the text.

    `\\ref` takes the label after `tab:`, where signs other than letters and digits are dashes.
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
        *(_row(row, width) for row in table.rows),
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


def _row(row: Row, width: int) -> str:
    texts = [latex_text(cell.text) + (_raised(",".join(cell.marks)) if cell.marks else "") for cell in row.cells]
    if row.missing:
        texts.append(rf"\multicolumn{{{width + 1 - len(texts)}}}{{l}}{{{latex_text(row.missing)}}}")
    return " & ".join(texts) + r" \\"


def _raised(letters: str) -> str:
    return rf"\textsuperscript{{{letters}}}"


def _footnotes(footnotes: Mapping[str, str]) -> list[str]:
    if not footnotes:
        return []
    texts = [f"{_raised(letter)}~{latex_text(text)}" for letter, text in footnotes.items()]
    return [r"\par\smallskip", r"\begin{minipage}{\linewidth}\raggedright", "\\par\n".join(texts), r"\end{minipage}"]
