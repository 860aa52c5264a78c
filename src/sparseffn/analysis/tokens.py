"""Which tokens an expert serves.

For expert e and token t, over all selections: lift = P(t | e) / P(t), above 1 where the expert serves the token more often than
the text has it. Tokens are ranked by P(t | e) log lift, each one's part of the divergence between what the expert sees and the
text, so that a rare token which met the expert by chance does not lead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from sparseffn.data import Tokenizer
from sparseffn.devices import to_device
from sparseffn.ffn import RoutingStats
from sparseffn.results.analysis_result import ServedByExpert, ServedToken
from sparseffn.training.snapshots import by_layer

# Tokens that are counted apart, the most frequent ones; the rest of a larger vocabulary is one column. Bounds the memory:
# 128 experts x 16384 tokens x 8 bytes = 16 MiB a layer. The paper's vocabularies (205 and 8000) fit whole.
MAX_TOKENS = 16384
# Tokens listed for an expert.
N_LISTED = 8


@final
class ServedTokens:
    """Counts of tokens by expert, of every layer of a model."""

    def __init__(self, texts: Sequence[np.ndarray], vocab_size: int) -> None:
        """`texts` are what will be read: their most frequent tokens get a column of their own."""
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for text in texts:
            # In pieces, as the tokens may be a memory-mapped file larger than the memory.
            for start in range(0, len(text), 2**20):
                counts += torch.from_numpy(np.bincount(text[start : start + 2**20], minlength=vocab_size))
        kept = counts.argsort(descending=True, stable=True)[:MAX_TOKENS]
        self.ids = kept[counts[kept] > 0]
        self._column = torch.full((vocab_size,), len(self.ids), dtype=torch.int64)
        self._column[self.ids] = torch.arange(len(self.ids))
        self.totals = torch.zeros(len(self.ids) + 1, dtype=torch.int64)
        self.layers: dict[str, Tensor] = {}

    def observe(self, stats: Mapping[str, Sequence[RoutingStats]], inputs: Tensor) -> None:
        """Add one window: what was selected, and the tokens `[batch, length]` on the CPU that it was selected for."""
        columns_T = self._column[inputs.flatten()]
        n_columns = len(self.totals)
        self.totals += torch.bincount(columns_T, minlength=n_columns)
        for name, layer in by_layer(stats).items():
            chosen = layer.selection
            assert chosen is not None, "a mixture has a selection"
            device = chosen.indices.device
            if name not in self.layers:
                self.layers[name] = torch.zeros(chosen.n_units, n_columns, dtype=torch.int64, device=device)
            counts, columns_T = self.layers[name], to_device(columns_T, device)
            cells = chosen.indices * n_columns + columns_T[chosen.tokens()]
            counts.view(-1).scatter_add_(0, cells, (chosen.weights != 0).long())

    def result(self, tokenizer: Tokenizer) -> list[list[ServedByExpert]]:
        """For every layer and expert: its share of the selections, and its tokens, the most telling first."""
        layers = [counts.cpu() for counts in self.layers.values()]
        return [[self._expert(counts, expert, tokenizer) for expert in range(len(counts))] for counts in layers]

    def _expert(self, counts: Tensor, expert: int, tokenizer: Tokenizer) -> ServedByExpert:
        own = counts[expert].double()
        of_expert = own / own.sum().clamp_min(1.0)
        of_text = self.totals.double() / self.totals.sum().clamp_min(1)
        lift = torch.where(of_text > 0, of_expert / of_text.clamp_min(1e-300), 0.0)
        # The last column holds many tokens and names none.
        telling = (of_expert * lift.clamp_min(1e-300).log())[:-1]
        best = telling.argsort(descending=True, stable=True)[:N_LISTED].tolist()
        return ServedByExpert(
            expert=expert,
            load=round(float(own.sum() / counts.sum().clamp_min(1)), 6),
            tokens=[
                ServedToken(
                    token=int(self.ids[i]),
                    text=token_text(tokenizer, int(self.ids[i])),
                    share=round(float(of_expert[i]), 6),
                    lift=round(float(lift[i]), 4),
                )
                for i in best
                if float(telling[i]) > 0
            ],
        )


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as one can print it: spaces as ␣, control characters and bytes that are no text by their escape."""
    text = tokenizer.decode([token])
    if tokenizer.unit == "sub-word":
        # A piece at the beginning of a text loses its space; the second of two keeps it.
        text = tokenizer.decode([token, token]).removeprefix(text) or text
    if tokenizer.unit == "byte" and token >= 0x80:
        return f"\\x{token:02x}"
    if "\ufffd" in text:
        return f"<{token}>"
    return "".join(c if c.isprintable() and c != " " else "␣" if c == " " else ascii(c)[1:-1] for c in text)
