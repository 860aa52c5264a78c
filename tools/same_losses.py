"""Do two checkouts train to the same bits? `tools/same_losses.py OLD NEW` runs short trainings in each and compares every loss.

A change that should not alter numbers is held to this. One comparison of all methods and one run of each row of
two of the paper's tables, a few steps each, with the interpreter and the libraries of this process; minutes on 2 cores. Exit
code 1: they differ.
"""

from __future__ import annotations

import argparse
import email
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

COMMANDS = {
    "compare": "compare --preset tiny --steps 24 --corpus text --data-dir {text} --out {out} "
    "--methods dense topk pkm sigma-moe switch base s-base noisy-moe softmax-moe softmax-renorm-moe "
    "sigma-moe inner_k=64 expert_dropout=0.1",
    "paper": "reproduce {table} table1 table10 --scale cpu --steps 12 --columns WT-S "
    "--corpus text --data-dir {text} --pool {out} --out {out}/tables",
}
TEXT_BYTES = 200_000
SAME = ("loss", "balance_loss", "grad_norm", "lr", "valid")


def losses(out: Path) -> dict[str, object]:
    """Every loss below a folder, by run and step, as the bits that JSON keeps of a double."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("metrics.jsonl")):
        run = path.parent.relative_to(out).as_posix()
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found |= {f"{run} step {record['step']} {key}": record[key] for key in SAME if key in record}
        result = json.loads((path.parent / "result.json").read_text())
        found |= {f"{run} {split}": result[split] for split in ("valid", "test")}
    return found


def run(tree: Path, command: str, **words: str) -> dict[str, object]:
    """The losses of a command in a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = command.format(out=folder, **words).split()
        environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
        subprocess.run([sys.executable, "-m", "sparseffn", *arguments], check=True, env=environment, stdout=subprocess.DEVNULL)
        return losses(Path(folder))


def main() -> int:
    """Compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args()
    sources = sorted(Path(email.__file__).parent.glob("*.py"))
    text = Path(tempfile.mkdtemp()) / "text.txt"
    text.write_bytes(b"".join(path.read_bytes() for path in sources)[:TEXT_BYTES])
    code = 0
    for name, command in COMMANDS.items():
        found = []
        for tree in (options.old, options.new):
            # Before version 0.2 the tables' names followed `reproduce` at once.
            word = "table" if (tree / "CHANGELOG.md").exists() else ""
            found.append(run(tree.resolve(), command, table=word, text=str(text)))
        old, new = found
        differ = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        sys.stdout.write(f"{name}: {len(old)} numbers, {len(differ)} differ {differ[:3]}\n")
        code |= bool(differ) or not old
    return code


if __name__ == "__main__":
    sys.exit(main())
