"""Tables and the HTML page of a comparison, made from its `comparison.json` alone.

    sparseffn compare ... --out runs/first      # trains, then writes comparison.json, table.md and page.html
    result = read_result("runs/first/comparison.json")
    print_table(result)                         # terminal
    text = markdown_table(result)               # Markdown
    write_page(result, "runs/first/page.html")  # one file, no network, figures inside; needs sparseffn[plot]

The paper's tables are in `paper_table` (`render`, `print_paper_table`), a folder of them in `paper_index` (`write_index`).
Nothing here needs torch or the models: a table can be remade on a machine that has neither.
"""

from sparseffn.report.page import write_page
from sparseffn.report.result import read_result
from sparseffn.report.table import markdown_table, print_table

__all__ = ["markdown_table", "print_table", "read_result", "write_page"]
