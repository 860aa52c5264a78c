"""`stdlib`: the source text of the running Python's standard library. Always there, without a network.

It differs between Python versions, so that every result names the version, the digest and the counts.
"""

from __future__ import annotations

import platform
import sysconfig
from pathlib import Path

from sparseffn.data.registry import register_corpus
from sparseffn.data.splits import Piece, Source, files_under, split_by_hash
from sparseffn.errors import UserError

# Installed packages are not the standard library; tests hold data tables and files that are broken on purpose.
EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


@register_corpus(name="stdlib", summary="source text of the running Python's standard library (offline)", tokenizer="bytes")
def find_stdlib(data_dir: Path | None) -> Source:
    """Whole files by the hash of their path, each after a comment line with its path.

    Raises:
        UserError: a data folder is given, or this Python has no standard library on disk.
    """
    if data_dir is not None:
        raise UserError(
            f"`data_dir` must be left out for corpus 'stdlib', which is part of Python; got {str(data_dir)!r}; "
            f"fix: leave it out, or use corpus 'text' for files of your own"
        )
    root = Path(sysconfig.get_path("stdlib"))
    files = files_under(root, enters=lambda name: name not in EXCLUDED_FOLDERS, takes=lambda path: path.suffix == ".py")
    if not files:
        raise UserError(
            f"corpus 'stdlib' must have the standard library's .py files; got none in {str(root)!r}; "
            f"fix: use a Python that has them on disk, or corpus 'text' with --data-dir PATH"
        )
    pieces = [Piece.whole(file, header=f"# {file.label}\n".encode()) for file in files]
    info = {"python_version": platform.python_version(), "split_rule": "whole files by hash of path"}
    return Source(corpus="stdlib", pieces=split_by_hash(pieces), info=info)
