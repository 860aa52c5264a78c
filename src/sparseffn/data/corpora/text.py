"""`text`: any file or folder of the user's."""

from __future__ import annotations

from pathlib import Path

from sparseffn.data.registry import register_corpus
from sparseffn.data.splits import (
    SPLITS,
    Piece,
    Source,
    SourceFile,
    Split,
    files_under,
    is_within_tolerance,
    split_by_cutting,
    split_by_hash,
)
from sparseffn.errors import UserError

# From 20 files of equal size on, whole files can make 5%.
MIN_FILES_BY_HASH = 20
# First part of a file's name -> its split.
NAMED_SPLITS: dict[str, Split] = {"train": "train", "valid": "valid", "validation": "valid", "test": "test"}


@register_corpus(name="text", summary="any file or folder of yours (--data-dir PATH)", tokenizer="bytes", needs_data_dir=True)
def find_text(data_dir: Path | None) -> Source:
    """Find the files and split them.

    A folder with files train.*, valid.* (or validation.*) and test.* is split as they say. Otherwise, from 20 files on,
    whole files are split by the hash of their path; with fewer, or where that misses 90/5/5 by more than 1%, every
    file is cut. Hidden files and symbolic links in a folder are skipped.

    Raises:
        UserError: there is no such file or folder, the folder has no files, or only some of the three splits are named.
    """
    if data_dir is None or not data_dir.exists():
        got = "nothing" if data_dir is None else repr(str(data_dir))
        raise UserError(
            f"corpus 'text' must have a `data_dir` with your text: a file, or a folder of files; got {got}; "
            "fix: pass --data-dir PATH"
        )
    if not data_dir.is_dir():
        pieces = split_by_cutting([SourceFile.at(data_dir.resolve(), data_dir.name)])
        return Source(corpus="text", pieces=pieces, info={"split_rule": "file cut at 90% and 95%"})
    files = files_under(
        data_dir,
        enters=lambda name: not name.startswith("."),
        takes=lambda path: not path.name.startswith(".") and not path.is_symlink(),
    )
    if not files:
        raise UserError(
            f"corpus 'text' must have files in its `data_dir`; got {str(data_dir)!r}, which is empty (hidden files, links, "
            "pipes and devices do not count); fix: put your text there, or pass the --data-dir that has it"
        )
    if named := _named_splits(data_dir, files):
        return Source(corpus="text", pieces=named, info={"split_rule": "files named train, valid, test"})
    if len(files) >= MIN_FILES_BY_HASH:
        whole = split_by_hash([Piece.whole(file) for file in files])
        if is_within_tolerance(whole):
            return Source(corpus="text", pieces=whole, info={"split_rule": "whole files by hash of path"})
    return Source(corpus="text", pieces=split_by_cutting(files), info={"split_rule": "every file cut at 90% and 95%"})


def _named_splits(root: Path, files: list[SourceFile]) -> dict[Split, list[Piece]] | None:
    """The split by names directly in `root`, or None if there are no such names.

    A single one of them is not enough to mean a split: a folder of programs may well hold a train.py.
    """
    named: dict[Split, list[Piece]] = {split: [] for split in SPLITS}
    for file in files:
        stem, dot, _ = file.label.partition(".")
        if dot and stem in NAMED_SPLITS:
            named[NAMED_SPLITS[stem]].append(Piece.whole(file))
    missing = [split for split in SPLITS if not named[split]]
    if len(missing) == 1:
        raise UserError(
            f"a folder with named splits must have files train.*, valid.* and test.*; "
            f"got no {missing[0]}.* in {str(root)!r}; fix: add it, or rename the others to have the text split for you"
        )
    return None if missing else named
