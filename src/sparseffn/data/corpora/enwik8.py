"""`enwik8`: the first 100,000,000 bytes of the English Wikipedia of 3 March 2006, cut at 90 and 95 million bytes."""

from __future__ import annotations

from collections.abc import Mapping

from sparseffn.data.download import PublishedFile, RemoteFile
from sparseffn.data.published_corpus import PublishedCorpus
from sparseffn.data.registry import register
from sparseffn.data.splits import Piece, SourceFile, Split

# Shares of the split that every published result uses, in twentieths: 90, 5 and 5 million bytes.
TRAIN_SHARE, VALID_SHARE = 18, 19


def cut_at_twentieths(files: Mapping[str, SourceFile]) -> dict[Split, list[Piece]]:
    """The first 90%, the next 5% and the last 5% of the bytes, wherever that falls."""
    (file,) = files.values()
    first, second = file.size * TRAIN_SHARE // 20, file.size * VALID_SHARE // 20
    return {
        "train": [Piece(file, 0, first)],
        "valid": [Piece(file, first, second)],
        "test": [Piece(file, second, file.size)],
    }


ENWIK8 = register(
    PublishedCorpus(
        name="enwik8",
        summary="first 100 million bytes of Wikipedia, 90/5/5 million",
        # Of the 256 bytes 205 occur, and published parameter counts are with these.
        tokenizer="seen-bytes",
        files=(
            PublishedFile(
                name="enwik8",
                # Size and MD5: the benchmark's own list of checksums, repeated in "Data compression explained".
                digest="md5:a1fa5ffddb56f4953e226637dabbb36a",
                size=100_000_000,
                source="mattmahoney.net/dc/textdata.html",
            ),
        ),
        routes=(
            (
                RemoteFile(
                    file=PublishedFile(
                        name="enwik8.zip",
                        # SHA-256: the data dependency "enwiki8" of Julia's text data sets; the same in a dozen projects.
                        digest="sha256:547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
                        size=36_445_475,
                        source="a DataDeps.jl registration",
                    ),
                    urls=(
                        # The publisher, with and without TLS; then the copy that RWKV's instructions name.
                        "https://mattmahoney.net/dc/enwik8.zip",
                        "http://mattmahoney.net/dc/enwik8.zip",
                        "https://data.deepai.org/enwik8.zip",
                    ),
                    members={"enwik8": "enwik8"},
                ),
            ),
        ),
        cut=cut_at_twentieths,
        split_rule="bytes cut at 90% and 95%",
    )
)
