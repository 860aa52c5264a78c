"""The check of kernels itself: it passes what is right and names what is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseffn.ops.spec import RMS_BOUNDS, check_against_truth

F32 = torch.float32


def results() -> tuple[Tensor, Tensor, Tensor]:
    """Right, plain and true values."""
    truth = torch.randn(40, 30, dtype=torch.float64)
    return truth.float(), truth.float(), truth


@pytest.mark.parametrize("name", RMS_BOUNDS)
def test_rounded_truth_passes(name: str) -> None:
    """In every operation and dtype."""
    _, _, truth = results()
    for dtype in (F32, torch.bfloat16, torch.float16):
        check_against_truth(name, truth.to(dtype), truth.to(dtype), truth, dtype)


def test_empty_results_pass() -> None:
    """No tokens, nothing to compare."""
    check_against_truth("experts", torch.ones(0, 3), torch.ones(0, 3), torch.ones(0, 3).double(), F32)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x: x.index_put_((torch.tensor(3), torch.tensor(4)), x[3, 4] + 1e-5), r"experts: error 1e-05 at \[3, 4\]"),
        (lambda x: x.mul_(1 + 8e-7), "relative RMS error"),
        (lambda x: x.index_fill_(0, torch.tensor(1), torch.nan), "30 of 1200 entries are not finite"),
        (lambda x: x[1:], r"got \(39, 30\)"),
        (lambda x: x.double(), "float64, expected"),
    ],
    ids=["one-entry", "all-entries", "nan", "shape", "dtype"],
)
def test_wrong_result_is_named(spoil: object, words: str) -> None:
    """One wrong entry, an error spread over all, entries never written, another shape or dtype."""
    got, plain, truth = results()
    # A generous plain error, which only the second criterion then catches.
    plain = plain + 1e-5 * (words == "relative RMS error")
    with pytest.raises(AssertionError, match=words):
        check_against_truth("experts", spoil(got), plain, truth, F32)  # type: ignore[operator]
