"""Small corpora of shards in the layout of the published ones."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

from sparseffn.data.corpora.c4 import C4
from sparseffn.data.corpora.pes2o import PES2O
from sparseffn.data.corpus import Corpus, open_corpus
from sparseffn.data.splits import Place
from sparseffn.data.streamed import StreamedCorpus

SMALL_C4 = dataclasses.replace(C4, n_train=4, eval_documents=20, buffer=16, fit_shards=2)
SMALL_PES2O = dataclasses.replace(PES2O, n_train=4, eval_documents=10, buffer=16, n_open=3)


def document(shard: str, number: int) -> str:
    """A document that names itself."""
    return f"{shard} {number} " + " ".join(str(i * 31 % 97) for i in range(number % 40)) + "\nends"


def write_shard(path: Path, texts: Sequence[str]) -> None:
    """Documents as the publishers write them: more fields than the text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"https://x/{i}"}) for i, text in enumerate(texts)
    )
    path.write_bytes(gzip.compress("".join(f"{row}\n" for row in rows).encode(), compresslevel=1))


def write_shards(folder: Path, spec: StreamedCorpus, *, n_documents: int = 60, flat: bool = False) -> Path:
    """All shards of a corpus."""
    paths = [spec.train.format(i) for i in range(spec.n_train)] + [spec.validation.format(i) for i in range(spec.eval_shards)]
    for path in paths:
        name = Path(path).name.partition("-of")[0]
        write_shard(folder / (Path(path).name if flat else path), [document(name, i) for i in range(n_documents)])
    return folder


def open_small(spec: StreamedCorpus, folder: Path, cache: Path, tokenizer: str = "bytes") -> Corpus:
    """The corpus of a folder of shards."""
    size = 288 if tokenizer == "bpe" else None
    return open_corpus(spec, Place(data_dir=folder, cache_dir=cache), tokenizer=tokenizer, vocab_size=size)
