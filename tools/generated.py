"""Write the generated text of the README and of docs/, or check that it is there: `tools/generated.py [--check] [PAGE ...]`."""

from __future__ import annotations

import sys
from pathlib import Path

import readme_blocks

from sparseffn.report.generated_blocks import with_blocks

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/why-this-selector.md", "docs/results.md")


def main(words: list[str]) -> int:
    """Rewrite or check; returns the exit code."""
    stale = []
    for name in [word for word in words if word != "--check"] or PAGES:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        wanted = readme_blocks.with_blocks(text) if name == "README.md" else with_blocks(text, ROOT / "results")
        if wanted != text:
            stale.append(name)
            if "--check" not in words:
                path.write_text(wanted, encoding="utf-8")
    if stale and "--check" in words:
        sys.stderr.write(f"the generated text of {', '.join(stale)} is out of date; run `make readme`\n")
    return int(bool(stale) and "--check" in words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
