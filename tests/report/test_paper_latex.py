"""LaTeX of the paper's tables, checked without LaTeX: escapes, braces, environments, columns of each row, known commands.

Where there is a LaTeX, it sets them too.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sparseffn.report.latex import latex_text
from sparseffn.report.paper_report import paper_latex
from sparseffn.report.paper_view import paper_report

from .synthetic_paper import counted_table, paper_table, typed

HOSTILE = 'a_b & 50% of $x$ #1 {y} ~ ^ \\input{/etc/passwd} <b> [t] * "q" `z` | é \u4e2d \U0001f600\n\nnew \\\\ line\x00'
COMMANDS = {
    *("arraybackslash", "begin", "bottomrule", "caption", "centering", "cmidrule", "end", "footnotesize", "label"),
    *("linewidth", "midrule", "multicolumn", "noindent", "par", "pm", "raggedright", "setlength", "sloppy", "smallskip"),
    *("tabcolsep", "textsuperscript", "toprule", "textbackslash", "textasciicircum", "textasciitilde", "textless"),
    *("textgreater", "textbar", "textasciigrave", "textquotedbl", "texttt"),
}


def latex(result: dict[str, Any]) -> str:
    """The text without its comments; `\\%` stays."""
    return re.sub(r"(?m)(?<!\\)%.*$", "", paper_latex(paper_report(typed(result))))


def hostile() -> dict[str, Any]:
    """Every text that a file may hold, set to something that means much to LaTeX."""
    result = paper_table(n_columns=3)
    result |= {"table": HOSTILE, "title": HOSTILE, "notes": [HOSTILE], "difference_unit": HOSTILE, "scale": HOSTILE}
    result["environment"]["cpu"] = HOSTILE
    result["columns"][0] |= dict.fromkeys(("name", "corpus", "metric", "published_metric", "sizes"), HOSTILE)
    result["rows"][0] |= {"label": f"[{HOSTILE}", "published_label": HOSTILE, "marks": [HOSTILE]}
    result["cells"][3]["reason"] = HOSTILE
    return result


CASES = {
    "plain": paper_table,
    "one seed": lambda: paper_table(seeds=(0,)),
    "many columns": lambda: paper_table(n_columns=8),
    "counted": counted_table,
    "hostile": hostile,
}


@pytest.mark.parametrize("case", CASES)
def test_braces_environments_and_mathematics_are_closed(case: str) -> None:
    """In the order in which they were opened, and mathematics within a line."""
    text = re.sub(r"\\[\\&%$#_{}]", "", latex(CASES[case]()))
    depth = 0
    for sign in text:
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0, "a brace is closed that was not opened"
    assert depth == 0
    opened: list[str] = []
    for word, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if word == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert opened == []
    assert all(line.count("$") % 2 == 0 for line in text.splitlines())


@pytest.mark.parametrize("case", CASES)
def test_every_row_has_a_cell_for_each_column(case: str) -> None:
    """Counting what a heading spans."""
    tables = re.findall(
        r"\\begin\{tabular\}\{@.*?\*\{(\d+)\}\{r\}@\{\}\}\n(.*?)\n\\end\{tabular\}\n", latex(CASES[case]()), re.S
    )
    assert len(tables) == len(CASES[case]()["columns"]) + 1
    for number, body in tables:
        body = re.sub(r"\\begin\{tabular\}\[b\].*?\\end\{tabular\}", "stacked", body)
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(rows) == 7
        for row in rows:
            spans = sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", row))
            assert len(re.findall(r"(?<!\\)&", row.replace(r"\\", ""))) + spans == int(number), row


@pytest.mark.parametrize("case", CASES)
def test_only_known_commands_and_ascii(case: str) -> None:
    """No text becomes a command, and no letter needs a font that may not be there."""
    text = latex(CASES[case]())
    assert set(re.findall(r"\\([a-zA-Z]+)", text)) <= COMMANDS
    assert {sign for sign in text if ord(sign) > 0x7E} <= {"é"}
    assert not re.search(r"[_^#]", re.sub(r"\\[&%$#_{}]", "", text)), "these signs mean something when bare"
    assert all(sign.isprintable() or sign == "\n" for sign in text)


def test_packages_are_named_in_a_comment() -> None:
    """A reader learns what the preamble needs, and each of it is used."""
    text = paper_latex(paper_report(typed(paper_table(n_columns=4))))
    packages = re.findall(r"^%.*$", text, re.M)
    assert all(any(name in line for line in packages) for name in ("fontenc", "array", "booktabs", "rotating", "adjustbox"))
    assert all(word in text for word in (r"\toprule", "sidewaystable", "adjustbox", "arraybackslash"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a_b & 50%", r"a\_b \& 50\%"),
        ("\\x {y}", r"\textbackslash{}x \{y\}"),
        ("2.3 ± 0.1", r"2.3 $\pm$ 0.1"),
        ("[0, 1] *", "{[}0, 1{]} {*}"),
        ("\u03b3\u2013é", r"$\gamma$--é"),
        ("中", r"\texttt{U+4E2D}"),
        ("a\n\nb", "a  b"),
    ],
    ids=["signs", "commands", "spread", "brackets", "letters", "no font", "paragraph"],
)
def test_text_is_escaped(text: str, expected: str) -> None:
    """As LaTeX shows it unchanged."""
    assert latex_text(text) == expected


def test_float_has_the_footnotes_that_it_refers_to() -> None:
    """And no others."""
    floats = re.findall(r"\\begin\{(?:sideways)?table\}.*?\\end\{(?:sideways)?table\}", latex(paper_table()), re.S)
    overview, wt_s, e8 = floats
    assert "diverged at step 40" in wt_s and "diverged at step 40" not in e8
    assert "made by version 0.0.9" in e8 and "made by version 0.0.9" not in wt_s
    assert "diverged" in overview and "incomplete" in overview
    assert len(set(re.findall(r"\\label\{(.*?)\}", "".join(floats)))) == 3


PREAMBLE = r"""\documentclass{article}
\usepackage[T1]{fontenc} \usepackage{array} \usepackage{booktabs} \usepackage{rotating} \usepackage{adjustbox}
\begin{document}
"""


def lacking() -> str | None:
    """What LaTeX lacks to set the tables."""
    if shutil.which("pdflatex") is None or shutil.which("kpsewhich") is None:
        return "no LaTeX here"
    for name in re.findall(r"\\usepackage(?:\[\w+\])?\{(\w+)\}", PREAMBLE):
        if subprocess.run(["kpsewhich", f"{name}.sty"], capture_output=True, check=False).returncode:
            return f"this LaTeX has no package {name}"
    return None


@pytest.mark.skipif(lacking() is not None, reason=str(lacking()))
@pytest.mark.parametrize("case", CASES)
def test_latex_sets_the_table(case: str, tmp_path: Path) -> None:
    """With the packages that the file asks for, without an error, and with no line of text wider than the page."""
    text = paper_latex(paper_report(typed(CASES[case]())))
    (tmp_path / "table.tex").write_text(f"{PREAMBLE}{text}\n\\end{{document}}\n", encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout
