"""Contiguous streams for a model with memory: the corpus is cut in `batch` streams that all go on in step.

Training windows of a corpus on disk are a function of their number alone, so that a position in training is one integer;
those of a corpus that is streamed come one after the other, and their position is a few small tensors. Evaluation windows
predict every token but the first exactly once. Tokens on disk are read by the window's slices of the memory-mapped file.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch

from sparseffn.data.shards import ShuffledDocuments, check_positive
from sparseffn.errors import UserError


class TrainingStreams(ABC):
    """Training windows of `batch` streams that go on in step, with `context` inputs each."""

    def __init__(self, *, batch: int, context: int) -> None:
        check_positive(batch=batch, context=context)
        self.batch, self.context = batch, context

    @property
    @abstractmethod
    def n_windows(self) -> int:
        """Windows in one pass over the corpus; memory starts anew after the last."""

    @abstractmethod
    def window(self, i: int, streams: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Window `i`: inputs and targets, both int64 of shape `[batch, context]`; of some streams, in their order, or of all.

        Raises:
            IndexError: there is no such window, or it is not the next one of documents.
        """

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold, beside the number of steps, to go on with the same windows."""

    @abstractmethod
    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go to where `state` was taken."""


@final
class ContiguousStreams(TrainingStreams):
    """Training windows of tokens on disk, of shape `[n]`.

    The corpus is cut in `batch` streams of `n // batch` tokens; what remains at the end is dropped. Window `i` holds
    positions `i * context .. (i + 1) * context - 1` of every stream, with the next tokens as targets.

    Raises:
        UserError: there are fewer than `batch * (context + 1)` tokens.
    """

    def __init__(self, tokens: np.ndarray, *, batch: int, context: int) -> None:
        super().__init__(batch=batch, context=context)
        needed = batch * (context + 1)
        if len(tokens) < needed:
            raise UserError(
                f"the training split must have at least batch x (context + 1) = {batch} x {context + 1} = {needed} "
                f"tokens; got {len(tokens)}; fix: use a smaller batch or context, or a larger corpus"
            )
        self.tokens = tokens
        self._stream_length = len(tokens) // batch

    @property
    def n_windows(self) -> int:
        # The last input of a stream needs a target.
        return (self._stream_length - 1) // self.context

    def window(self, i: int, streams: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= i < self.n_windows:
            raise IndexError(f"window must be in 0 .. {self.n_windows - 1}; got {i}; fix: take it modulo n_windows")
        wanted = np.arange(self.batch) if streams is None else np.asarray(streams)
        starts = i * self.context + wanted * self._stream_length
        return _inputs_and_targets([self.tokens[start : start + self.context + 1] for start in starts])

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Nothing to do: the number of the window is all."""


@final
class DocumentStreams(TrainingStreams):
    """Training windows of documents that are streamed, in order.

    Every stream goes on with the next document of them all when its last one ends, so that no text is seen twice in an
    epoch and all streams are full.

    Args:
        documents: the texts, without end.
        encode: token numbers of a document, the separator that ends it included; at least one.
        batch: number of streams.
        context: inputs of a window in each stream.
    """

    def __init__(self, documents: ShuffledDocuments, encode: Callable[[str], np.ndarray], *, batch: int, context: int) -> None:
        super().__init__(batch=batch, context=context)
        self._documents, self._encode = documents, encode
        self._next = 0
        self._rests = [np.zeros(0, np.int64)] * batch

    @property
    def n_windows(self) -> int:
        """Without end: an epoch's end is no break."""
        return sys.maxsize

    def window(self, i: int, streams: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if i != self._next:
            raise IndexError(f"window must be {self._next}, the next one of a stream; got {i}; fix: ask in order, or restore")
        self._next += 1
        # All streams take from one sequence of documents: each must go on, whoever reads it.
        rows = [self._take(stream) for stream in range(self.batch)]
        return _inputs_and_targets(rows if streams is None else [rows[stream] for stream in streams])

    def _take(self, stream: int) -> np.ndarray:
        """The next `context + 1` tokens of a stream; the last one comes again as the next window's first input."""
        parts = [self._rests[stream]]
        n_tokens = len(parts[0])
        while n_tokens <= self.context:
            parts.append(self._encode(next(self._documents)))
            n_tokens += len(parts[-1])
        tokens = np.concatenate(parts) if len(parts) > 1 else parts[0]
        self._rests[stream] = tokens[self.context :]
        return tokens[: self.context + 1]

    def state(self) -> dict[str, torch.Tensor]:
        """The next window, the documents' position, and what is left of each stream's last document."""
        return {
            "position": torch.tensor([self._next, *self._documents.position()], dtype=torch.int64),
            "lengths": torch.tensor([len(rest) for rest in self._rests], dtype=torch.int64),
            "rests": torch.from_numpy(np.concatenate(self._rests).astype(np.int64)),
        }

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go to where `state` was taken.

        Raises:
            UserError: it is of other shards or another number of streams.
        """
        lengths = state["lengths"].tolist() if "lengths" in state else []
        if len(lengths) != self.batch:
            raise UserError(
                f"a checkpoint of streamed documents must hold {self.batch} streams; got {len(lengths)}; "
                "fix: go on with the batch and corpus that the run began with"
            )
        self._next, *position = state["position"].tolist()
        self._documents.restore(position)
        self._rests = np.split(state["rests"].numpy().copy(), np.cumsum(lengths)[:-1])


def _inputs_and_targets(rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.from_numpy(np.stack(rows).astype(np.int64, copy=False))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


@dataclass(frozen=True, slots=True)
class EvalWindow:
    """One step of an evaluation; all of shape `[batch, width]`, `width <= context`."""

    # int64 tokens; 0 where the mask is False.
    inputs: torch.Tensor
    # int64 next tokens; 0 where the mask is False.
    targets: torch.Tensor
    # bool, True where a prediction counts.
    mask: torch.Tensor


def evaluation_windows(tokens: np.ndarray, *, batch: int, context: int) -> Iterator[EvalWindow]:
    """Windows in which each of the `n - 1` predictions of tokens of shape `[n]` counts exactly once.

    The predictions are cut in `batch` contiguous chunks whose lengths differ by at most one (fewer chunks where there
    are fewer predictions than `batch`); the state of row `b` goes on from window to window. The last window may be
    narrower than `context`.

    Raises:
        UserError: there are fewer than 2 tokens, or `batch` or `context` is not positive.
    """
    check_positive(batch=batch, context=context)
    n_predictions = len(tokens) - 1
    if n_predictions < 1:
        raise UserError(f"a split to evaluate must have at least 2 tokens; got {len(tokens)}; fix: use a larger corpus")
    rows = min(batch, n_predictions)
    bounds = np.arange(rows + 1) * (n_predictions // rows) + np.minimum(np.arange(rows + 1), n_predictions % rows)
    # The arguments are checked at the call, not at the first step of the iteration.
    return _evaluation_windows(tokens, bounds, context)


def _evaluation_windows(tokens: np.ndarray, bounds: np.ndarray, context: int) -> Iterator[EvalWindow]:
    """`bounds[b] .. bounds[b + 1] - 1` are the inputs of row b."""
    longest = int(np.diff(bounds).max())
    for begin in range(0, longest, context):
        at = bounds[:-1, None] + np.arange(begin, min(begin + context, longest))
        mask = at < bounds[1:, None]
        inputs, targets = (np.where(mask, tokens[at * mask + shift], 0).astype(np.int64) for shift in (0, 1))
        yield EvalWindow(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(mask))


def unpadded(tokens: np.ndarray, *, batch: int) -> np.ndarray:
    """The tokens without the last few, fewer than `batch`, so that `evaluation_windows` cuts them in chunks of one length.

    Every row of every window then is a token of the text: what counts tokens needs no mask.
    """
    n_predictions = len(tokens) - 1
    rows = max(1, min(batch, n_predictions))
    return tokens[: n_predictions // rows * rows + 1]
