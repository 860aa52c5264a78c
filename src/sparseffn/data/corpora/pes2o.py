"""`pes2o`: papers of Semantic Scholar (version 2), abstracts and full texts, streamed; sub-words by default."""

from __future__ import annotations

from sparseffn.data.registry import register
from sparseffn.data.streamed import StreamedCorpus

PES2O = register(
    StreamedCorpus(
        name="pes2o",
        summary="peS2o (v2), scientific papers, streamed",
        tokenizer="bpe",
        # Paths and numbers of shards: the loading script peS2o.py of the dataset on the hub; the revision is the one that
        # other projects pin for these files.
        url="hf://datasets/allenai/peS2o@636a503e44a3ca1b58e01fb61eab0825cd574de0",
        train="data/v2/train-{:05d}-of-00020.json.gz",
        n_train=20,
        validation="data/v2/validation-{:05d}-of-00002.json.gz",
        # One shard has abstracts, the other full texts. How much of them the released runs use is not known; this is ours.
        eval_shards=2,
        eval_documents=400,
        # Half of the shards hold abstracts, half full texts, and one shard outlasts a run: only together are they the corpus.
        n_open=20,
    )
)
