"""Runs that one process of several decides on, as a comparison does: the others wait for the next one and train it with it.

    with leading(world):                the first process
        compare(...)
    follow(world)                       the others

What is to be trained goes through the store of the rendezvous as JSON: config, corpus, folder. Each process opens the corpus
itself, where it must find the same tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

from sparseffn.data import Corpus, CorpusOrigin, tokenizer_from_json
from sparseffn.distribution import World
from sparseffn.errors import UserError
from sparseffn.models import model_config_from_json
from sparseffn.training.config import TrainConfig

POLL_EVERY = 0.05
"""Seconds between looks for the next run: small beside the seconds that a run takes to begin."""


@contextlib.contextmanager
def leading(world: World) -> Iterator[None]:
    """In the first process: each run that is trained inside is announced to the others, and its end at the end."""
    world.announces = True
    try:
        yield
    finally:
        world.announces = False
        world.say(None)


def announce(world: World, run: dict[str, Any], corpus: Corpus) -> None:
    """Have the others call `train` with the same arguments; `run` are those that are JSON values."""
    world.say(
        {
            **run,
            "corpus": dataclasses.asdict(corpus.origin),
            "tokenizer": corpus.tokenizer.to_json(),
            "digest": corpus.digest,
            # A study, or a comparison with a budget, evaluates on the first tokens of a split.
            "evaluated": [len(corpus.valid), len(corpus.test)],
        }
    )


def follow(world: World) -> int:
    """In another process: train what is announced, until nothing more comes; returns 0.

    What a run is refused, or diverges by, is the first process's to deal with.

    Raises:
        LostProcessError: the first process is gone.
    """
    from sparseffn.training.loop import train

    while (said := _next(world)) is not None:
        run = dict(said)
        model, config = model_config_from_json(run.pop("model")), TrainConfig.from_json(run.pop("config"))
        corpus = _open(run.pop("corpus"), run.pop("tokenizer"), run.pop("digest"), run.pop("evaluated"))
        try:
            train(model, config, corpus, run.pop("out"), world=world, **run)
        except UserError as error:
            if not world.is_agreed(error):
                raise
    return 0


def _next(world: World) -> dict[str, Any] | None:
    while (said := world.heard()) is None:
        time.sleep(POLL_EVERY)
    return json.loads(said)


def _open(origin: dict[str, Any], tokenizer: str, digest: str, evaluated: list[int]) -> Corpus:
    corpus = CorpusOrigin(**origin).load(tokenizer=tokenizer_from_json(tokenizer))
    n_valid, n_test = evaluated
    if not digest.startswith(corpus.digest):
        # The first process hears of it where all of them compare what they train.
        return corpus
    return dataclasses.replace(corpus, valid=corpus.valid[:n_valid], test=corpus.test[:n_test], digest=digest)
