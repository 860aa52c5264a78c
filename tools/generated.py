"""Write the generated text of the README and of docs/, or check that it is there: `tools/generated.py [--check] [PAGE ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from evidence_tables import with_evidence
from readme_blocks import with_blocks
from study_tables import with_tables

ROOT = Path(__file__).resolve().parent.parent
PAGES: Mapping[str, Callable[[str], str]] = {
    "README.md": with_blocks,
    "docs/why-this-selector.md": with_tables,
    "docs/results.md": with_evidence,
}
"""By page: its text with every block made anew."""


def main() -> int:
    """Rewrite or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"of {', '.join(PAGES)}; default: all of them")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page would change")
    options = parser.parse_args()
    stale = []
    for name in options.pages or PAGES:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        wanted = PAGES[name](text)
        if wanted != text and options.check:
            stale.append(name)
        elif wanted != text:
            path.write_text(wanted, encoding="utf-8")
    if stale:
        sys.stderr.write(f"the generated text of {', '.join(stale)} is out of date; run `make readme`\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
