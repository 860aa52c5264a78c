"""Tables, pages and figures, made from result files alone: one table model, a renderer each, a module a kind of result.

    table = comparison_table(read_comparison("runs/first/comparison.json"))     # report.comparison_report
    print_table(table)                                                          # terminal
    text = markdown_table(table)                                                # Markdown
    write_comparison(result, "runs/first")                                      # table.md and page.html: no network

`page` writes HTML, `latex` LaTeX; `bench_report`, `analysis_report`, `study_report`, `paper_report` are of other results.
Nothing here needs torch or the models, and tables need no matplotlib: they can be remade on a machine that has neither.
"""

from sparseffn.report.markdown import markdown_table
from sparseffn.report.table import Cell, Column, Row, Table
from sparseffn.report.terminal import print_table, print_tables

__all__ = ["Cell", "Column", "Row", "Table", "markdown_table", "print_table", "print_tables"]
