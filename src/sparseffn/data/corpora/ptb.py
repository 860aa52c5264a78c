"""`ptb`: Penn Treebank as prepared by Mikolov, on words (default; 10,000 types) or characters (`tokenizer=chars`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparseffn.data.registry import register_corpus, required_data_dir
from sparseffn.data.splits import SPLITS, Piece, Source, SourceFile, Split
from sparseffn.errors import UserError

FILE_NAMES: Mapping[Split, str] = {split: f"ptb.{split}.txt" for split in SPLITS}


@register_corpus(name="ptb", summary="Penn Treebank, words or characters (--data-dir PATH)", tokenizer="words")
def find_ptb(data_dir: Path | None) -> Source:
    """The three files in the user's folder.

    Raises:
        UserError: the folder is not given or lacks a file.
    """
    contents = f"the files {', '.join(FILE_NAMES.values())}"
    folder = required_data_dir(data_dir, corpus="ptb", contents=contents)
    missing = [name for name in FILE_NAMES.values() if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"corpus 'ptb' must have {contents} in `data_dir`; got {str(folder)!r} without {', '.join(missing)}; "
            f"fix: put Mikolov's Penn Treebank files there, or pass the --data-dir that has them"
        )
    files = {name: SourceFile.at((folder / name).resolve(), name) for name in FILE_NAMES.values()}
    pieces: dict[Split, list[Piece]] = {split: [Piece.whole(files[FILE_NAMES[split]])] for split in SPLITS}
    return Source(corpus="ptb", pieces=pieces, info={"split_rule": "the corpus's own"})
