"""Corpora, tokenisers and contiguous streams: text on disk to tensors.

    corpus = load_corpus("stdlib")
    streams = ContiguousStreams(corpus.train, batch=8, context=64)
    inputs, targets = streams.window(0)

A corpus has its text as tokens in three splits; a stream is what one row of a batch reads, window after window.
"""

import sparseffn.data.corpora  # noqa: F401  registers the corpora
from sparseffn.data.corpus import Corpus, CorpusOrigin, load_corpus, prepare_corpus, to_metric
from sparseffn.data.registry import CorpusEntry, corpus_entry, list_corpora, register_corpus
from sparseffn.data.splits import SPLITS, Place, Split
from sparseffn.data.streams import ContiguousStreams, DocumentStreams, EvalWindow, TrainingStreams, evaluation_windows, unpadded
from sparseffn.data.tokenizer_base import Tokenizer, Unit
from sparseffn.data.tokenizers import list_tokenizers, tokenizer_class, tokenizer_from_json

__all__ = [
    "SPLITS",
    "ContiguousStreams",
    "Corpus",
    "CorpusEntry",
    "CorpusOrigin",
    "DocumentStreams",
    "EvalWindow",
    "Place",
    "Split",
    "Tokenizer",
    "TrainingStreams",
    "Unit",
    "corpus_entry",
    "evaluation_windows",
    "list_corpora",
    "list_tokenizers",
    "load_corpus",
    "prepare_corpus",
    "register_corpus",
    "to_metric",
    "tokenizer_class",
    "tokenizer_from_json",
    "unpadded",
]
