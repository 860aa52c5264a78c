"""What the interpreter computes: shapes, routings, dtypes, and the mutants that must not pass. No Triton is imported here."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

OPERATIONS = ("expert_up", "expert_down", "weighted_rows")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Shape:
    """Sizes and a routing: `random`, `hot` (all tokens choose the same), `ragged` (0 to 2 rows a token) or `repeats` (a token
    may choose an expert twice)."""

    n_tokens: int
    n_experts: int
    k: int
    d_model: int
    expert_size: int
    routing: str = "random"
    strided: bool = False


SHAPES = {
    "one": Shape(1, 1, 1, 1, 1),
    "odd": Shape(63, 5, 2, 100, 63),
    "hundred": Shape(100, 3, 1, 63, 33),
    "all-experts": Shape(20, 4, 4, 40, 17),
    "hot": Shape(63, 6, 1, 33, 20, "hot"),
    "hot-pair": Shape(30, 7, 2, 20, 33, "hot"),
    "empty-experts": Shape(5, 40, 2, 20, 16),
    "ragged": Shape(30, 9, 1, 40, 20, "ragged"),
    "no-tokens": Shape(0, 3, 2, 16, 8),
    "strided": Shape(40, 4, 2, 36, 20, strided=True),
    "aligned": Shape(48, 4, 2, 64, 32),
    "uneven": Shape(33, 3, 2, 40, 35),
}


def draw(seed: int) -> Shape:
    """Any sizes and routing; which, follows from the seed."""
    chance = random.Random(seed)
    n_experts = chance.choice((1, 2, 3, 8, 33))
    sizes = chance.randint(0, 70), n_experts, chance.randint(1, min(n_experts, 4)), chance.randint(1, 90), chance.randint(1, 70)
    return Shape(*sizes, chance.choice(("random", "hot", "ragged", "repeats")), chance.random() < 0.3)


@dataclass(frozen=True)
class Case:
    """One operation, forward and every gradient."""

    operation: str
    shape: str
    dtype: str
    small_tiles: bool
    """Tiles of 16 or 32, so that few numbers make many tiles; else those of the shipped table."""

    @property
    def name(self) -> str:
        """What pytest calls it."""
        return f"{self.operation}-{self.shape}-{self.dtype}-{'small' if self.small_tiles else 'shipped'}"


FULL = [Case(*choice) for choice in itertools.product(OPERATIONS, SHAPES, DTYPES, (True, False))]

DRAWN = {f"drawn-{seed}": draw(seed) for seed in range(60)}
FULL += [
    Case(*choice)
    for choice in zip(itertools.cycle(OPERATIONS), DRAWN, itertools.cycle(DTYPES[:2]), itertools.cycle((True, False)))
]
SHAPES |= DRAWN

# Every shape in float32, the other dtypes where sums are long, the shipped tiles where sizes are odd.
QUICK = [
    case
    for case in FULL
    if (case.small_tiles and case.dtype == "float32" and case.shape not in DRAWN)
    or (case.small_tiles and case.shape in ("odd", "ragged", "one"))
    or (not case.small_tiles and case.shape == "odd" and case.dtype != "float16")
]


@dataclass(frozen=True)
class Mutant:
    """A mistake: `old`, which stands in `file`, is replaced by `new`, and the operation must fail the check."""

    name: str
    operation: str
    file: str
    old: str
    new: str
    shape: str = "uneven"


_ROW_EDGE = "m_r = o_r < tl.load(p_offsets + i_expert + 1, i_expert >= 0, 0)"

_ENTRIES = """for i_k in range(0, n_k, BLOCK_J):
        o_k = i_k + tl.arange(0, BLOCK_J)
        m_k = o_k < n_k
"""

MUTANTS = [
    Mutant("last-row-of-tile", "expert_up", "products", _ROW_EDGE, _ROW_EDGE.replace("o_r <", "o_r + 1 <")),
    Mutant(
        "partial-tile-forgotten",
        "expert_up",
        "products",
        "n_own = tl.where(m_expert, (i_stop - i_row + BLOCK_M - 1) // BLOCK_M",
        "n_own = tl.where(m_expert, (i_stop - i_row) // BLOCK_M",
    ),
    Mutant("inner-mask-missing", "expert_up", "products", "m_k = o_k < n_inner - i_k", "m_k = o_k < n_inner"),
    Mutant("inner-mask-missing-down", "expert_down", "products", "m_k = o_k < n_inner - i_k", "m_k = o_k >= 0"),
    Mutant("column-mask-short", "expert_down", "products", "o_n, o_n < n_outer", "o_n, o_n + 1 < n_outer"),
    Mutant(
        "tokens-not-read",
        "expert_up",
        "products",
        "p_x + o_t * stride_row",
        "p_x + o_r * stride_row",
    ),
    Mutant(
        "gates-twice",
        "expert_down",
        "products",
        "b_out = b_out * b_gates[:, None]",
        "b_out = b_out * b_gates[:, None] * b_gates[:, None]",
    ),
    Mutant(
        "gates-twice-in-gradient",
        "expert_down",
        "products",
        "b_out = b_s * b_gates[:, None]",
        "b_out = b_s * b_gates[:, None] * b_gates[:, None]",
    ),
    Mutant("row-mask-missing-in-weight", "expert_up", "outer", "m_r = o_r < i_stop\n", "m_r = o_r < i_stop + BLOCK_K\n"),
    Mutant("row-edge-in-weight", "expert_down", "outer", "m_r = o_r < i_stop\n", "m_r = o_r < i_stop - 1\n"),
    Mutant("index-swapped-in-weight", "expert_down", "outer", "p_grad + o_t[:, None]", "p_grad + o_r[:, None]"),
    Mutant(
        "gates-twice-in-weight",
        "expert_down",
        "outer",
        "b_left.to(tl.float32) * b_gates[None, :]",
        "b_left.to(tl.float32) * b_gates[None, :] * b_gates[None, :]",
    ),
    Mutant("order-not-read", "expert_down", "sums", "o_r = tl.load(p_order + o_j, m_j, 0)", "o_r = o_j"),
    Mutant("entry-mask-missing", "weighted_rows", "sums", _ENTRIES, _ENTRIES.replace("o_k < n_k", "o_k >= 0")),
    Mutant(
        "weights-twice",
        "weighted_rows",
        "sums",
        "b_sum += tl.sum(b_rows * b_weights[:, None], 0)",
        "b_sum += tl.sum(b_rows * b_weights[:, None] * b_weights[:, None], 0)",
    ),
    Mutant("pair-not-token", "weighted_rows", "sums", "o_pair // n_k", "o_pair"),
    Mutant("width-mask-missing", "weighted_rows", "sums", "m_d = o_d < n_width\n", "m_d = o_d >= 0\n"),
]

# Names of the functions of `interpreted_checks.py`.
CHECKS = (
    "float64_is_refused",
    "cpu_is_never_automatic",
    "missing_operation_is_refused",
    "bad_rows_are_refused",
    "refusal_of_waiting_sees_inside_operations",
    "layers_do_not_wait",
    "layers_agree_with_torch",
    "device_is_not_waited_for",
    "results_have_equal_bits",
    "whole_graph_compiles",
)
