"""Evaluation: every token once, losses of windows in the order of the text."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sparseffn.data import Corpus
from sparseffn.evaluation import evaluate
from sparseffn.models import TransformerXL, TransformerXLConfig


def test_evaluation_predicts_every_token_but_the_first_once(corpus: Corpus, model: TransformerXLConfig) -> None:
    """Whatever the windows; with one stream the loss is that of one long text."""
    net = TransformerXL(model).train()
    tokens = corpus.valid[:200]
    for batch, context in ((1, 7), (3, 16), (8, 50)):
        assert evaluate(net, tokens, batch=batch, context=context, memory=64).n_predictions == 199
    assert net.training
    text = torch.from_numpy(tokens.astype("int64"))[None]
    with torch.no_grad():
        logits = net.eval()(text[:, :-1]).logits
    whole = float(torch.nn.functional.cross_entropy(logits[0], text[0, 1:]))
    got = evaluate(net, tokens, batch=1, context=16, memory=256).nats_per_token
    assert got == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("n_tokens", [190, 191, 210], ids=["even", "narrow-last", "uneven"])
def test_window_losses_follow_the_text(corpus: Corpus, model: TransformerXLConfig, n_tokens: int) -> None:
    """Stream by stream, as if each were a text of its own; rows that end early have no window more."""
    net = TransformerXL(model)
    net.init_parameters(0)
    tokens = corpus.valid[:n_tokens]
    bounds = np.cumsum([0, *(len(part) for part in np.array_split(np.arange(n_tokens - 1), 3))])
    alone = [
        evaluate(net, tokens[start : stop + 1], batch=1, context=21, memory=32).window_nats
        for start, stop in itertools.pairwise(bounds)
    ]
    together = evaluate(net, tokens, batch=3, context=21, memory=32).window_nats
    assert together == pytest.approx(np.concatenate(alone), rel=1e-5)
