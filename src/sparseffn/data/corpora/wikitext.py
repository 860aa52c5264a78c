"""`wikitext2` and `wikitext103`: word-tokenised Wikipedia articles; `-raw`: the same before rare words became `<unk>`.

The paper uses `wikitext103` with sub-words (`tokenizer=bpe`, the default). It is by Merity et al., arXiv 1609.07843.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparseffn.data.download import PublishedFile, RemoteFile
from sparseffn.data.published_corpus import PublishedCorpus, Route, one_file_a_split
from sparseffn.data.registry import register
from sparseffn.data.splits import SPLITS, Split

# The author's own site, since the first address, research.metamind.io on Amazon S3, is dead.
_AUTHOR = "https://wikitext.smerity.com/"


def _wikitext(
    name: str,
    summary: str,
    *,
    tokenizer: str = "bpe",
    stem: str,
    zip_digest: str,
    mirrors: Sequence[str],
    files: Mapping[Split, str],
    size: int | None = None,
    plain: str | None = None,
) -> PublishedCorpus:
    """A corpus of three files in one zip, `STEM-v1.zip`, where they are in a folder `STEM`.

    `mirrors` are addresses of the zip beside the author's, `size` its bytes, `files` SHA-1 of the plain files, `plain` the
    address of a folder with them as train.txt, valid.txt, test.txt.
    """
    kind = "raw" if stem.endswith("raw") else "tokens"
    names: dict[Split, str] = {split: f"wiki.{split}.{kind}" for split in SPLITS}
    # SHA-1: gluonnlp/data/corpora/wikitext.py.
    texts = {split: PublishedFile(name=names[split], digest=f"sha1:{files[split]}", source="gluon-nlp") for split in SPLITS}
    archive = RemoteFile(
        # SHA-256: mlx.data/datasets/wikitext.py and the WikiText registrations of CorpusLoaders.jl agree.
        file=PublishedFile(name=f"{stem}-v1.zip", digest=f"sha256:{zip_digest}", size=size, source="mlx-data"),
        urls=(f"{_AUTHOR}{stem}-v1.zip", *mirrors),
        members={f"{stem}/{file}": file for file in names.values()},
    )
    routes: list[Route] = [(archive,)]
    if plain is not None:
        routes.append(tuple(RemoteFile(file=texts[split], urls=(f"{plain}{split}.txt",)) for split in SPLITS))
    return register(
        PublishedCorpus(
            name=name,
            summary=summary,
            tokenizer=tokenizer,
            files=tuple(texts.values()),
            routes=tuple(routes),
            cut=one_file_a_split(names),
        )
    )


WIKITEXT103 = _wikitext(
    "wikitext103",
    "WikiText-103, 103 million words of Wikipedia, word-tokenised",
    stem="wikitext-103",
    zip_digest="242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
    # The fallback of several projects' download scripts.
    mirrors=("https://data.deepai.org/wikitext-103.zip",),
    files={
        "train": "b7497e2dfe77e72cfef5e3dbc61b7b53712ac211",
        "valid": "c326ac59dc587676d58c422eb8a03e119582f92b",
        "test": "8a5befc548865cec54ed4273cf87dbbad60d1e47",
    },
)

WIKITEXT103_RAW = _wikitext(
    "wikitext103-raw",
    "WikiText-103 with its rare words",
    stem="wikitext-103-raw",
    zip_digest="91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
    # A copy on the Hugging Face hub; revision and size as other projects' download scripts pin them.
    mirrors=(
        "https://huggingface.co/datasets/mattdangerw/wikitext-103-raw/resolve/"
        "3555105b17ae31cc619a136fac72dbe2865c3738/wikitext-103-raw-v1.zip",
    ),
    size=191_984_949,
    files={
        "train": "3d06627c15e834408cfee91293f862c11c1cc9ef",
        "valid": "db78d4db83700cba1b1bf4a9381087043db2876d",
        "test": "6f1fe2054a940eebfc76b284b09680763b37f5ea",
    },
)

WIKITEXT2 = _wikitext(
    "wikitext2",
    "WikiText-2, 2 million words of Wikipedia, word-tokenised",
    tokenizer="words",
    stem="wikitext-2",
    zip_digest="92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
    mirrors=(),
    files={
        "train": "863f29c46ef9d167fff4940ec821195882fe29d1",
        "valid": "0418625c8b4da6e4b5c7a0b9e78d4ae8f7ee5422",
        "test": "c7b8ce0aa086fb34dab808c5c49224211eb2b172",
    },
    # The plain files in PyTorch's examples.
    plain="https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/",
)

WIKITEXT2_RAW = _wikitext(
    "wikitext2-raw",
    "WikiText-2 with its rare words",
    stem="wikitext-2-raw",
    zip_digest="ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
    # What scripts/get-wikitext-2.sh of llama.cpp fetches; revision and size as other projects pin them.
    mirrors=(
        "https://huggingface.co/datasets/ggml-org/ci/resolve/927b3642933080f1b0e811e2f916e14c292992f9/wikitext-2-raw-v1.zip",
    ),
    size=4_721_645,
    files={
        "train": "d33faf256327882db0edc7c67cd098d1051a2112",
        "valid": "db78d4db83700cba1b1bf4a9381087043db2876d",
        "test": "6f1fe2054a940eebfc76b284b09680763b37f5ea",
    },
)
