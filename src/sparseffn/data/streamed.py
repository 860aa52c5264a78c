"""Corpora too large to keep: training documents are streamed from shards, a fixed part of validation is stored.

Shards are `.json.gz` files in the published layout: in the user's folder, read by the standard library, or on the Hugging
Face hub, streamed by the `datasets` library. Such a corpus has no test split: `test` is the part of the validation split
that published results are of, and `valid` the same number of documents after it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar, final

from sparseffn.data.bpe import BpeTokenizer
from sparseffn.data.cache import TokenCache
from sparseffn.data.download import OnProgress
from sparseffn.data.registry import CorpusEntry
from sparseffn.data.shards import ShuffledDocuments, read_local, read_remote, shard_digest
from sparseffn.data.splits import Block, Place, SourceFile, Split
from sparseffn.data.streams import DocumentStreams
from sparseffn.data.tokenizer_base import Tokenizer
from sparseffn.data.tokenizers import BytesTokenizer
from sparseffn.errors import UserError
from sparseffn.storage import digest_of


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class StreamedCorpus(CorpusEntry):
    """What is published of a corpus of shards."""

    # Folder of the shards: an address that `datasets` can read.
    url: str
    # Path of a training shard there, with `{}` for its number.
    train: str
    # How many there are.
    n_train: int
    # Path of a validation shard.
    validation: str
    # Validation shards that are used, and documents of each for `test`; as many follow for `valid`.
    eval_shards: int
    eval_documents: int
    # Training shards that are read in turn: one where every shard is a fair sample, more where shards differ.
    n_open: int = 1
    # Documents that are shuffled among themselves.
    buffer: int = 1000
    # First training shards, whose text the tokeniser is trained on.
    fit_shards: int = 10
    # What follows every document.
    separator: str = "\n\n"

    @property
    def contents(self) -> str:
        """What the user may put somewhere, in words."""
        return f"shards {self.train.format(0)} and so on (some are enough), and {', '.join(self.evaluated)}"

    @property
    def evaluated(self) -> list[str]:
        return [self.validation.format(i) for i in range(self.eval_shards)]

    @property
    def addresses(self) -> list[str]:
        return [self.url]

    def state(self, place: Place) -> str:
        """As of the stored splits, made from the hub with one tokeniser or another.

        Raises:
            UserError: the cache's note of it is damaged.
        """
        hub = self.find(Place(cache_dir=place.cache_dir))
        return "no" if TokenCache(place.cache_dir).known_content(hub.fingerprint()) is None else "prepared"

    def find(self, place: Place) -> StreamedSource:
        """The shards in the user's folder, or on the hub where none is given.

        Raises:
            UserError: the folder lacks shards.
        """
        trained = [self.train.format(i) for i in range(self.n_train)]
        if place.data_dir is None:
            return StreamedSource(spec=self, shards=trained, files={})
        folder = place.data_dir
        found = {path: _shard_in(folder, path) for path in (*trained, *self.evaluated)}
        files = {path: SourceFile.at(file, path) for path, file in found.items() if file is not None}
        shards = [path for path in trained if path in files]
        missing = [path for path in self.evaluated if path not in files] + ([] if shards else trained[:1])
        if missing:
            raise UserError(
                f"corpus {self.name!r} must have {self.contents} in `data_dir`; got {str(folder)!r} without "
                f"{', '.join(missing)}; fix: put them there, or pass the --data-dir that has them"
            )
        return StreamedSource(spec=self, shards=shards, files=files)


def _shard_in(folder: Path, path: str) -> Path | None:
    """A shard in a folder that is laid out as published, or holds the shards alone."""
    places = (folder / path, folder / Path(path).name)
    return next((place.resolve() for place in places if place.is_file()), None)


# Documents between two reports of progress.
_REPORT_EVERY = 1000


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class StreamedSource:
    # What is published.
    spec: StreamedCorpus
    # Training shards, by their published path.
    shards: Sequence[str]
    # The user's files by published path; none where the hub is read.
    files: Mapping[str, SourceFile]
    # Splits whose tokens are stored.
    stored: ClassVar[tuple[Split, ...]] = ("valid", "test")

    @property
    def corpus(self) -> str:
        return self.spec.name

    @property
    def info(self) -> dict[str, str]:
        spec = self.spec
        shards = "one validation shard" if spec.eval_shards == 1 else f"each of {spec.eval_shards} validation shards"
        return {
            "source": spec.url if self.is_remote else "shards in data_dir",
            "split_rule": f"training streamed; test: first {spec.eval_documents} documents of {shards}; valid: as many after",
            "train_shards": f"{len(self.shards)} of {spec.n_train}",
            "tokenizer_from": f"the first {min(spec.fit_shards, len(self.shards))} training shards here",
        }

    def fingerprint(self) -> str:
        """Digest of the corpus's description and of names, sizes and times of the user's files."""
        spec = self.spec
        rows = [(path, str(f.path), f.size, f.mtime_ns, f.ctime_ns) for path, f in sorted(self.files.items())]
        parts = (spec.url, spec.separator, spec.eval_documents, spec.fit_shards, list(self.shards), spec.evaluated, rows)
        # A cache of before counted shards by less than their bytes.
        return digest_of(spec.name, "by all bytes", json.dumps(parts))

    @property
    def is_remote(self) -> bool:
        return not self.files

    def n_files(self, split: Split) -> int:
        return len(self.shards if split == "train" else self.spec.evaluated)

    def blocks(self, split: Split) -> Iterator[Block]:
        """Read a stored split; nothing of `train`."""
        spec = self.spec
        if split == "train":
            return
        start = spec.eval_documents if split == "valid" else 0
        for path in spec.evaluated:
            texts = list(islice(self._read(path, start), spec.eval_documents))
            if len(texts) < spec.eval_documents:
                raise UserError(
                    f"{path} must have {2 * spec.eval_documents} documents, half for test and half for valid; "
                    f"got {start + len(texts)}; fix: get the shard again"
                )
            where = self.files[path].path if path in self.files else Path(path)
            yield Block("".join(text + spec.separator for text in texts).encode(), where, 0)

    @property
    def digested(self) -> tuple[str, ...]:
        """Which shards are streamed: what the content digest depends on beside the stored text.

        A shard on the disk counts by its bytes, which are read once for it, those on the hub by the revision in the address.
        """
        shards = [(path, shard_digest(self.files[path].path)) for path in self.shards] if self.files else [self.spec.url]
        return (json.dumps([shards, self.spec.separator, self.spec.fit_shards]),)

    def fit(self, tokenizer: str, vocab_size: int | None, on_progress: OnProgress | None = None) -> Tokenizer:
        """A tokeniser for text that was not read yet; `on_progress` is called with each shard and the bytes of its text.

        Raises:
            UserError: one of this name would not know every character.
        """
        if tokenizer == BytesTokenizer.name:
            return BytesTokenizer()
        if tokenizer != BpeTokenizer.name:
            raise UserError(
                f"`tokenizer` must be bpe or bytes for corpus {self.corpus!r}, whose training text is not read beforehand; "
                f"got {tokenizer!r}; fix: leave it out"
            )
        return BpeTokenizer.fit_counted(self._fitted_on(on_progress), vocab_size=vocab_size)

    def _fitted_on(self, on_progress: OnProgress | None) -> Iterator[str]:
        for path in self.shards[: self.spec.fit_shards]:
            n_bytes = 0
            for number, text in enumerate(self._read(path), start=1):
                yield text
                n_bytes += len(text)
                if on_progress is not None and number % _REPORT_EVERY == 0:
                    on_progress(path, n_bytes, None)

    def streams(self, tokenizer: Tokenizer, *, batch: int, context: int, seed: int) -> DocumentStreams:
        """Training windows in the order of a seed."""
        spec = self.spec
        documents = ShuffledDocuments(
            lambda shard, skip: self._read(self.shards[shard], skip),
            len(self.shards),
            seed=seed,
            buffer=spec.buffer,
            n_open=spec.n_open,
        )
        return DocumentStreams(
            documents, lambda text: tokenizer.encode((text + spec.separator).encode()), batch=batch, context=context
        )

    def _read(self, path: str, skip: int = 0) -> Iterator[str]:
        if path in self.files:
            return read_local(self.files[path].path, skip)
        return read_remote(f"{self.spec.url}/{path}", skip)
