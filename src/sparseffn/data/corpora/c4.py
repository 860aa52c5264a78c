"""`c4`: Colossal Clean Crawled Corpus, English (`en`), streamed; sub-words by default. Raffel et al., arXiv 1910.10683."""

from __future__ import annotations

from sparseffn.data.registry import register
from sparseffn.data.streamed import StreamedCorpus

C4 = register(
    StreamedCorpus(
        name="c4",
        summary="C4 (en), web pages, streamed",
        tokenizer="bpe",
        # Revision, paths and numbers of shards: the loading script c4.py of the dataset on the hub.
        url="hf://datasets/allenai/c4@1ddc917116b730e1859edef32896ec5c16be51d0",
        train="en/c4-train.{:05d}-of-01024.json.gz",
        n_train=1024,
        validation="en/c4-validation.{:05d}-of-00008.json.gz",
        # The released runs evaluate on about 0.5% of the validation split, which has 364,608 documents (dataset card).
        # Shards are fair samples, so that one is enough.
        eval_shards=1,
        eval_documents=364_608 // 200,
    )
)
