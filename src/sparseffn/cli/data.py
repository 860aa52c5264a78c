"""`data list`, `data prepare`, `data check`."""

from __future__ import annotations

import functools
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from sparseffn.cli.output import console, print_json, print_records
from sparseffn.cli.process import printable
from sparseffn.cli.settings import DataCheck, DataList, DataPrepare, Printed
from sparseffn.data import SPLITS, Corpus, CorpusEntry, Place, Split, corpus_entry, list_corpora, load_corpus, prepare_corpus
from sparseffn.data.published_corpus import PublishedCorpus
from sparseffn.data.streamed import StreamedCorpus
from sparseffn.errors import UserError
from sparseffn.storage import default_cache_dir, expanded

# Tokens of each split that are shown.
_SHOWN_TOKENS = 200


def list_all(settings: DataList) -> int:
    rows = [_listed(corpus_entry(name), _place(settings)) for name in list_corpora()]
    if settings.json:
        print_json(rows)
        return 0
    shown = [
        {
            **{name: row[name] for name in ("corpus", "here", "digest")},
            "text": _size(row["bytes"]),
            "tokenizer": row["tokenizer"],
            "from": _origin(row["addresses"]),
            "what it is": row["summary"],
        }
        for row in rows
    ]
    print_records(shown, n_words=7)
    print("\nverified: the digests of the plain files were compared with a copy here; archives and addresses were not")
    print("unverified: never fetched here, so that published digests and addresses were not compared with anything")
    print("streamed corpora: no digest is published; the revision of the repository in the address stands for it")
    print("text: of a streamed corpus, what is stored of it once it is prepared; +n: so many other places, see --json")
    return 0


def _listed(entry: CorpusEntry, place: Place) -> dict[str, Any]:
    files = entry.files if isinstance(entry, PublishedCorpus) else ()
    sizes = [file.size for file in files]
    return {
        "corpus": entry.name,
        "summary": entry.summary,
        "tokenizer": entry.tokenizer,
        "here": entry.state(place),
        "digest": _status(entry),
        "bytes": sum(size or 0 for size in sizes) if sizes and None not in sizes else _stored_bytes(entry, place),
        "digests": {file.name: file.digest for file in files},
        "addresses": entry.addresses,
    }


def _stored_bytes(entry: CorpusEntry, place: Place) -> int | None:
    """Bytes of the text that is stored of a streamed corpus with its own tokeniser; None where there is none."""
    if not isinstance(entry, StreamedCorpus) or entry.state(place) != "prepared":
        return None
    try:
        return sum(load_corpus(entry.name, cache_dir=place.cache_dir).split_bytes.values())
    except UserError:
        # Prepared with another tokeniser, or damaged, of which `data check` tells.
        return None


def _origin(addresses: list[str]) -> str:
    """The place that is asked first, and how many others there are."""
    hosts = list(dict.fromkeys(url if url.startswith("hf:") else str(urlsplit(url).hostname) for url in addresses))
    first = hosts[0].partition("@")[0] if hosts else "-"
    return first + (f" +{len(hosts) - 1}" if len(hosts) > 1 else "")


def _status(entry: CorpusEntry) -> str:
    if not entry.addresses:
        return "-"
    return "verified" if isinstance(entry, PublishedCorpus) and entry.verified else "unverified"


def _size(n_bytes: int | None) -> str:
    return "-" if n_bytes is None else f"{n_bytes / 1e6:,.1f} MB"


def prepare(settings: DataPrepare) -> int:
    shown_on = console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=shown_on, disable=not shown_on.is_terminal) as transfers:
        task_of = functools.cache(transfers.add_task)
        corpus = prepare_corpus(
            settings.corpus,
            **settings.corpus_options(),
            offline=settings.offline,
            accept_digests=settings.accept_digest,
            on_progress=lambda file, done, total: transfers.update(task_of(file), completed=done, total=total),
        )
    _print_corpus(corpus, settings)
    return 0


def check(settings: DataCheck) -> int:
    if settings.corpus is not None:
        _print_corpus(load_corpus(settings.corpus, **settings.corpus_options()), settings)
        return 0
    if settings.data_dir is not None:
        raise UserError(f"`--corpus` must be given with --data-dir; got {settings.data_dir!r} alone; fix: name the corpus")
    here = [name for name in list_corpora() if corpus_entry(name).state(_place(settings)) in ("always", "prepared")]
    found, failed = [], {}
    for name in here:
        try:
            found.append(load_corpus(name, **settings.corpus_options()))
        except UserError as error:
            failed[name] = str(error)
    if settings.json:
        print_json({"corpora": [corpus.info for corpus in found], "failed": failed})
    else:
        print_records([_row(corpus) for corpus in found], n_words=4)
        for name, message in failed.items():
            print(f"\n{name}: {message}")
    return 1 if failed else 0


def _row(corpus: Corpus) -> dict[str, str]:
    row = {
        "corpus": corpus.name,
        "digest": corpus.digest,
        "tokenizer": corpus.tokenizer.name,
        "from": _origin(corpus_entry(corpus.name).addresses),
        "vocabulary": f"{corpus.tokenizer.vocab_size:,}",
        "text": _size(sum(corpus.split_bytes.values())),
    }
    for split in SPLITS:
        streamed = split == "train" and corpus.streamed is not None
        row[f"{split} tokens"] = "streamed" if streamed else f"{len(corpus.tokens(split)):,}"
    return row


def _print_corpus(corpus: Corpus, settings: Printed) -> None:
    first = {split: corpus.tokenizer.decode(_first_tokens(corpus, split)) for split in SPLITS}
    if settings.json:
        print_json({**corpus.info, "first": first})
        return
    for key, value in corpus.info.items():
        print(f"{key}: {value}")
    for split, text in first.items():
        print(f"\n{split} begins:\n{printable(text)}")


def _first_tokens(corpus: Corpus, split: Split) -> np.ndarray:
    streamed = corpus.streamed
    # What is on the hub is not fetched only to be shown.
    if split == "train" and streamed is not None and not streamed.is_remote:
        return corpus.training_streams(batch=1, context=_SHOWN_TOKENS).window(0)[0][0].numpy()
    return corpus.tokens(split)[:_SHOWN_TOKENS]


def _place(settings: DataList | DataCheck) -> Place:
    return Place(cache_dir=expanded(settings.cache_dir) if settings.cache_dir else default_cache_dir())
