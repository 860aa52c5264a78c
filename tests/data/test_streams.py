"""Training windows by hand, and every prediction of an evaluation exactly once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseffn.data import ContiguousStreams, EvalWindow, evaluation_windows
from sparseffn.errors import UserError

SIZES = {"n": st.integers(2, 200), "batch": st.integers(1, 12), "context": st.integers(1, 20)}


def counted(window: EvalWindow) -> list[int]:
    """The inputs whose predictions count."""
    return window.inputs[window.mask].tolist()


class TestTraining:
    def test_windows_are_what_one_writes_by_hand(self) -> None:
        """11 tokens, 2 streams of 5, windows of 2."""
        streams = ContiguousStreams(np.arange(11), batch=2, context=2)
        assert streams.n_windows == 2
        inputs, targets = streams.window(0)
        assert inputs.tolist() == [[0, 1], [5, 6]]
        assert targets.tolist() == [[1, 2], [6, 7]]
        inputs, targets = streams.window(1)
        assert inputs.tolist() == [[2, 3], [7, 8]]
        assert targets.tolist() == [[3, 4], [8, 9]]

    @given(n=st.integers(1, 300), batch=st.integers(1, 8), context=st.integers(1, 20))
    def test_windows_of_a_stream_join_without_gap(self, n: int, batch: int, context: int) -> None:
        """Row b of all windows is the beginning of stream b; at most `context` inputs of a stream are left over."""
        n += batch * (context + 1)
        streams = ContiguousStreams(np.arange(n), batch=batch, context=context)
        rows = torch.cat([streams.window(i)[0] for i in range(streams.n_windows)], dim=1)
        length = n // batch
        assert (rows == torch.arange(batch)[:, None] * length + torch.arange(rows.shape[1])).all()
        assert length - 1 - context < rows.shape[1] <= length - 1

    def test_a_window_depends_on_its_number_alone(self) -> None:
        """Going back gives the same window: a position is one integer."""
        streams = ContiguousStreams(np.arange(100, dtype=np.uint8), batch=3, context=4)
        first = streams.window(2)
        streams.window(5)
        again = streams.window(2)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        assert first[0].dtype == first[1].dtype == torch.int64

    def test_windows_are_copies(self) -> None:
        """Writing into a window leaves the corpus alone."""
        tokens = np.arange(100)
        ContiguousStreams(tokens, batch=2, context=4).window(0)[0].zero_()
        assert tokens.tolist() == list(range(100))

    def test_the_smallest_corpus_gives_one_window(self) -> None:
        """`batch * (context + 1)` tokens are enough."""
        assert ContiguousStreams(np.arange(12), batch=3, context=3).n_windows == 1

    def test_too_small_a_corpus_is_refused_with_the_numbers(self) -> None:
        """The message has needed and found."""
        with pytest.raises(UserError, match=r"3 x 4 = 12 tokens; got 11; fix: use a smaller batch"):
            ContiguousStreams(np.arange(11), batch=3, context=3)

    @pytest.mark.parametrize("sizes", [(0, 4), (2, 0), (-1, 4)], ids=["batch-0", "context-0", "batch-negative"])
    def test_sizes_must_be_positive(self, sizes: tuple[int, int]) -> None:
        """Zero streams or inputs are refused."""
        with pytest.raises(UserError, match="must be at least 1; got"):
            ContiguousStreams(np.arange(100), batch=sizes[0], context=sizes[1])

    @pytest.mark.parametrize("i", [-1, 2], ids=["before", "after"])
    def test_there_is_no_window_outside(self, i: int) -> None:
        """A negative number does not count from the end."""
        with pytest.raises(IndexError, match=r"window must be in 0 \.\. 1"):
            ContiguousStreams(np.arange(11), batch=2, context=2).window(i)


class TestEvaluation:
    def test_windows_are_what_one_writes_by_hand(self) -> None:
        """8 tokens, 7 predictions in chunks of 4 and 3."""
        first, last = evaluation_windows(np.arange(10, 18), batch=2, context=3)
        assert first.inputs.tolist() == [[10, 11, 12], [14, 15, 16]]
        assert first.targets.tolist() == [[11, 12, 13], [15, 16, 17]]
        assert first.mask.all()
        assert last.inputs.tolist() == [[13], [0]]
        assert last.targets.tolist() == [[14], [0]]
        assert last.mask.tolist() == [[True], [False]]

    @given(**SIZES)
    def test_every_prediction_counts_exactly_once(self, n: int, batch: int, context: int) -> None:
        """n tokens give the n - 1 pairs of neighbours, each once."""
        windows = list(evaluation_windows(np.arange(n, dtype=np.uint16), batch=batch, context=context))
        assert sorted(x for window in windows for x in counted(window)) == list(range(n - 1))
        assert all((w.targets[w.mask] == w.inputs[w.mask] + 1).all() for w in windows)

    @given(**SIZES)
    def test_the_state_of_a_row_goes_on(self, n: int, batch: int, context: int) -> None:
        """Row b reads consecutive tokens through all windows; padding is at its end only."""
        windows = list(evaluation_windows(np.arange(n), batch=batch, context=context))
        assert {len(w.inputs) for w in windows} == {min(batch, n - 1)}
        inputs, mask = torch.cat([w.inputs for w in windows], 1), torch.cat([w.mask for w in windows], 1)
        lengths = mask.sum(1)
        assert lengths.max() - lengths.min() <= 1
        for row, length in enumerate(lengths.tolist()):
            assert mask[row, :length].all()
            assert (inputs[row, :length].diff() == 1).all()

    @given(**SIZES)
    def test_all_windows_but_the_last_are_full(self, n: int, batch: int, context: int) -> None:
        """No computation is spent on columns that are padding throughout."""
        windows = list(evaluation_windows(np.arange(n), batch=batch, context=context))
        assert all(w.inputs.shape[1] == context for w in windows[:-1])
        assert all(w.mask.any(0).all() for w in windows)

    @pytest.mark.parametrize("n", [0, 1])
    def test_nothing_to_predict_is_refused_at_the_call(self, n: int) -> None:
        """The error does not wait for the first step."""
        with pytest.raises(UserError, match=f"at least 2 tokens; got {n}"):
            evaluation_windows(np.arange(n), batch=1, context=1)
