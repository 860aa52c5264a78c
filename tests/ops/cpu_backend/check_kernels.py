"""Compare the kernels in use with the truth, as far as a group of checks goes: `python check_kernels.py experts gated ...`.

Exits with 1 and the difference where they are wrong. Run by tests, with variants of the kernels in their place.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import torch
from block_draws import product_key_block, topk_block
from expert_cases import APART, CASES, LARGE, Options, verify

from sparseffn import ops

F32, BF16 = torch.float32, torch.bfloat16
GATED = {"activation": "silu", "gated": True}


def experts(**options: bool | str) -> None:
    """Odd sizes, empty experts, few tokens and many."""
    for name in ("odd", "wide", "decoding", "empty-experts"):
        verify(CASES[name], F32, Options(**options))  # type: ignore[arg-type]


def layouts() -> None:
    """Lines of rows and of columns, few rows of an expert and many, one panel of columns and several."""
    for layout in ("out-in", "interleaved", "out-in-interleaved", "spread"):
        for name in ("decoding", "odd", "few-odd", "wide"):
            verify(CASES[name], F32, Options(layout, **GATED))  # type: ignore[arg-type]
    verify(LARGE["hot-chunks"], F32, Options("out-in", **GATED))  # type: ignore[arg-type]
    for layout in ("out-in", "spread"):
        verify(LARGE["many-rows"], F32, Options(layout, **GATED))  # type: ignore[arg-type]


def large() -> None:
    """Lines of weights that push each other out of the cache, gradients that are written past the caches."""
    for layout in APART:
        verify(LARGE["apart"], F32, Options(layout, **GATED, apart=True))  # type: ignore[arg-type]
    verify(LARGE["streamed"], F32, Options(**GATED))  # type: ignore[arg-type]


def bfloat16() -> None:
    """Both orders of the weights, few rows of an expert, many of one and many of all."""
    for layout in ("in-out", "out-in"):
        for name in ("decoding", "few-but-of-one", "wide"):
            verify(CASES[name], BF16, Options(layout, **GATED))  # type: ignore[arg-type]


def pairs() -> None:
    """Many bfloat16 rows: odd rows and columns, several panels of units, more rows than are packed at once, every order."""
    for layout in ("in-out", "out-in", "interleaved", "spread"):
        verify(CASES["wide"], BF16, Options(layout, "silu", gated=True, biased=True, dropout=True))
    for case in (CASES["one-expert"], CASES["all-experts"], LARGE["hot-chunks"], LARGE["many-rows"], LARGE["deep"]):
        verify(case, BF16, Options("out-in"))


def inner() -> None:
    """The best of a token's units, plain and gated."""
    verify(CASES["one-token"], F32, Options(inner_k=3))
    verify(CASES["decoding"], F32, Options("out-in", "silu", gated=True, biased=True, inner_k=20))


def differ(compute: Callable[[str], list[torch.Tensor]]) -> None:
    """Raise unless kernels give what PyTorch gives."""
    for got, wanted in zip(*(compute(backend) for backend in ("auto", "torch")), strict=True):
        torch.testing.assert_close(got, wanted)


def routes() -> None:
    """Outputs and gradients, few tokens and many."""
    for n_tokens in (4, 130):
        for gate in ("sigmoid", "softmax", "renormalised"):

            def compute(backend: str, n_tokens: int = n_tokens, gate: ops.GateName = gate) -> list[torch.Tensor]:
                torch.manual_seed(0)
                leaves, found = [torch.randn(n_tokens, 7).requires_grad_(), torch.randn(5, 7).requires_grad_()], []
                for keep in (None, torch.rand(n_tokens, 5) >= 0.7):
                    logits, indices, gates = ops.route(*leaves, k=2, gate=gate, keep=keep, backend=backend)
                    direction = torch.arange(gates.numel()).sin().view(gates.shape)
                    if keep is not None:
                        # What arrives at a dropped expert's gate goes nowhere.
                        direction = direction.masked_fill(~keep.gather(1, indices), torch.nan)
                    found += [logits, indices, gates, *torch.autograd.grad(gates, leaves, direction)]
                return found

            differ(compute)


def rows() -> None:
    """Rows of a ragged width, more than are added up at once; gradients over more tokens than are taken at once."""
    for n_tokens in (5, 900):

        def compute(backend: str, n_tokens: int = n_tokens) -> list[torch.Tensor]:
            torch.manual_seed(0)
            leaves = [torch.randn(n, m, dtype=torch.float64).requires_grad_() for n, m in ((20, 37), (n_tokens, 11))]
            y = ops.weighted_rows(leaves[0], torch.randint(20, (n_tokens, 11)), leaves[1], backend=backend)
            return [y, *torch.autograd.grad(y, leaves, torch.randn_like(y))]

        differ(compute)


def ties() -> None:
    """The two best of equals."""
    differ(lambda backend: [ops.topk(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]), 2, backend=backend)])


def blocks() -> None:
    """Drawn blocks of single pairs, in every type."""
    for seed in range(30):
        for draw in (topk_block, product_key_block):
            torch.manual_seed(seed)
            draw(random.Random(seed))


def sub_keys() -> None:
    """Reads among equal sums, of few sub-keys and of many."""
    for n in (9, 300):
        torch.manual_seed(0)
        a, b = torch.randn(20, n).round(), torch.randn(20, n).round()
        differ(lambda backend, a=a, b=b: list(ops.product_key_topk(a, b, 40, backend=backend)))


def balanced() -> None:
    """As good a total as the composition finds, loads that differ by one at most."""
    for n_tokens, n_experts in ((60, 5), (61, 7), (200, 16)):
        torch.manual_seed(0)
        scores = torch.randn(n_tokens, n_experts, dtype=torch.float64)
        found = [ops.balanced_assignment(scores, backend=backend) for backend in ("cpu", "torch")]
        loads = found[0].bincount(minlength=n_experts)
        assert int(loads.max() - loads.min()) <= 1, f"loads {loads.tolist()}"
        torch.testing.assert_close(*(scores.gather(1, which[:, None]).sum() for which in found))


def other_processors() -> None:
    """Experts in every type: sums of fewer lanes are longer than PyTorch's here, whose error is no bound for them."""
    for dtype, near in ((torch.float64, 1e-12), (F32, 1e-5), (torch.float16, 0.01), (BF16, 0.08)):
        for layout in ("in-out", "out-in", "out-in-interleaved"):
            for name in ("odd", "wide", "decoding", "one-token"):
                problem = CASES[name].draw(Options(layout, "silu", gated=True, biased=True), dtype)
                got, truth = problem.results("cpu"), problem.results("reference", torch.float64)
                for key, wanted in truth.items():
                    torch.testing.assert_close(got[key].double(), wanted, atol=near * float(wanted.abs().max()), rtol=near)


CHECKS: dict[str, Callable[[], None]] = {
    "experts": experts,
    "gated": lambda: experts(**GATED, biased=True),  # type: ignore[arg-type]
    "dropout": lambda: experts(dropout=True),
    "layouts": layouts,
    "large": large,
    "bfloat16": bfloat16,
    "pairs": pairs,
    "inner": inner,
    "routes": routes,
    "rows": rows,
    "ties": ties,
    "blocks": blocks,
    "sub-keys": sub_keys,
    "balanced": balanced,
    "other-processors": other_processors,
}

if __name__ == "__main__":
    try:
        for check in sys.argv[1:]:
            # Each has its own numbers, whichever come before it.
            torch.manual_seed(0)
            CHECKS[check]()
    except AssertionError as error:
        sys.exit(f"wrong: {error}")
    sys.stdout.write("right\n")
