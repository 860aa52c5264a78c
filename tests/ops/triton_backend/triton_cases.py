"""What the interpreter computes: shapes, routings, options, dtypes, and the mutants that must not pass. No Triton is imported.

Inputs of experts are those of `../cpu_backend/expert_cases.py`.
"""

from __future__ import annotations

import itertools
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "cpu_backend"))

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Shape:
    """Sizes and a routing of `expert_cases.Case`: random, hot, few (half are empty) or twice (one expert in all slots)."""

    n_tokens: int
    n_experts: int
    k: int
    d_model: int
    expert_size: int
    routing: str = "random"


SHAPES = {
    "one": Shape(1, 1, 1, 1, 1),
    "odd": Shape(63, 5, 2, 100, 63),
    "hundred": Shape(100, 3, 1, 63, 33),
    "all-experts": Shape(20, 4, 4, 40, 17),
    "hot": Shape(63, 6, 1, 33, 20, "hot"),
    "hot-pair": Shape(30, 7, 2, 20, 33, "hot"),
    "empty-experts": Shape(5, 40, 2, 20, 16),
    "twice": Shape(30, 9, 3, 40, 20, "twice"),
    "no-tokens": Shape(0, 3, 2, 16, 8),
    "aligned": Shape(48, 4, 2, 64, 32),
    "uneven": Shape(33, 3, 2, 40, 35),
    # Several stretches of rows, and blocks of the sort.
    "parts": Shape(1100, 2, 1, 20, 17),
}

# Options of `expert_cases`, by name.
EXPERTS: dict[str, dict[str, Any]] = {
    "relu": {},
    "relu2": {"activation": "relu2", "biased": True},
    "gelu": {"activation": "gelu", "dropout": True},
    "gelu-tanh": {"activation": "gelu_tanh", "layout": "out-in"},
    "silu": {"activation": "silu", "layout": "experts-last"},
    "identity": {"activation": "identity", "layout": "spread"},
    "inner": {"activation": "gelu", "biased": True, "inner_k": 12},
    "inner-relu-dropout": {"dropout": True, "inner_k": 9},
    "gated-relu": {"gated": True, "layout": "interleaved"},
    "gated-relu2": {"activation": "relu2", "gated": True, "layout": "out-in-halves"},
    "gated-gelu": {"activation": "gelu", "gated": True, "biased": True, "dropout": True},
    "gated-gelu-tanh": {"activation": "gelu_tanh", "gated": True, "layout": "spread"},
    "gated-silu": {"activation": "silu", "gated": True, "layout": "out-in"},
    "gated-identity": {"activation": "identity", "gated": True, "layout": "halves"},
    "gated-clamped": {"activation": "clamped_swiglu", "gated": True, "biased": True, "layout": "out-in-interleaved"},
    "gated-inner": {"activation": "silu", "gated": True, "biased": True, "dropout": True, "inner_k": 11},
}
GATES = ("sigmoid", "softmax", "renormalised")
ROUTES = (*GATES, *(f"{gate}-dropped" for gate in GATES))

CHOICES = (*(f"{gate}-ranked" for gate in GATES), *(f"{gate}-noisy" for gate in GATES))

# They take float32, or have no tiles.
_WITHOUT_TILES = ("choose", "sinkhorn", "capacity", "topk")

# Each operation, experts and routers with every option.
VARIANTS = (
    *(f"experts-{name}" for name in EXPERTS),
    *(f"route-{option}" for option in ROUTES),
    "weighted_rows",
    "cvmm",
    "topk",
    *(f"choose-{option}" for option in CHOICES),
    "sinkhorn-correct",
    "sinkhorn-released",
    "capacity",
)


def draw(seed: int) -> Shape:
    """Any sizes and routing; which, follows from the seed."""
    chance = random.Random(seed)
    n_experts = chance.choice((1, 2, 3, 8, 33))
    sizes = chance.randint(0, 70), n_experts, chance.randint(1, min(n_experts, 4)), chance.randint(1, 90), chance.randint(1, 70)
    return Shape(*sizes, chance.choice(("random", "hot", "few", "twice")))


@dataclass(frozen=True)
class Case:
    """One operation, forward and every gradient."""

    variant: str
    """Of `VARIANTS`."""
    shape: str
    dtype: str
    small_tiles: bool
    """Tiles of 16 or 32, so that few numbers make many tiles; else those of the shipped tables."""

    @property
    def name(self) -> str:
        """What pytest calls it."""
        return f"{self.variant}-{self.shape}-{self.dtype}-{'small' if self.small_tiles else 'shipped'}"


def _fits(case: Case) -> bool:
    """An inner top-K needs as many units, and in half precision another one may be the last: rounding decides."""
    if case.variant.startswith(_WITHOUT_TILES):
        of_logits = case.variant.startswith(("choose", "sinkhorn"))
        return case.small_tiles and (case.dtype == "float32" or not of_logits)
    if "inner" not in case.variant:
        return case.shape != "parts" or case.variant in ("experts-relu", "experts-gated-silu", "route-softmax", "cvmm")
    shape = SHAPES[case.shape]
    return shape.k * shape.expert_size >= 12 and case.dtype == "float32" and case.shape != "parts"


DRAWN = {f"drawn-{seed}": draw(seed) for seed in range(60)}
SHAPES |= DRAWN

_GIVEN = [shape for shape in SHAPES if shape not in DRAWN]
FULL = [Case(*choice) for choice in itertools.product(VARIANTS, _GIVEN, DTYPES, (True, False))]
_FLOATING = [variant for variant in VARIANTS if not variant.startswith(_WITHOUT_TILES)]
FULL += [
    Case(*choice)
    for choice in zip(itertools.cycle(_FLOATING), DRAWN, itertools.cycle(DTYPES[:2]), itertools.cycle((True, False)))
]
FULL = [case for case in FULL if _fits(case)]
# A run that is stopped early has then seen some of everything.
random.Random(0).shuffle(FULL)

# Plain experts and routers in every shape, every option at odd sizes, an inner top-K of one expert a token and of no tokens,
# the other dtypes and the shipped tiles for a sample.
_EVERY_SHAPE = ("experts-relu", "experts-gated-silu", "route-softmax", "weighted_rows", "cvmm")
QUICK = [
    case
    for case in FULL
    if case.shape not in DRAWN
    and (
        (case.small_tiles and case.dtype == "float32" and case.variant in _EVERY_SHAPE)
        or (case.small_tiles and case.dtype == "float32" and case.shape == "uneven")
        or (case.small_tiles and case.variant == "experts-inner-relu-dropout" and case.shape in ("hundred", "no-tokens"))
        or (case.small_tiles and case.dtype != "float32" and case.shape == "odd" and case.variant in _EVERY_SHAPE)
        or (case.small_tiles and case.dtype == "bfloat16" and case.shape == "uneven")
        or (
            not case.small_tiles
            and case.shape in ("odd", "uneven")
            and case.variant in _EVERY_SHAPE
            and case.dtype != "float16"
        )
    )
]


@dataclass(frozen=True)
class Mutant:
    """A mistake: `old`, which stands in `file`, is replaced by `new`, and the variant must fail the check."""

    name: str
    variant: str
    file: str
    old: str
    new: str
    shape: str = "uneven"
    dtype: str = field(default="float32")


_ENTRIES = """for i_k in range(0, n_k, BLOCK_J):
        o_k = i_k + tl.arange(0, BLOCK_J)
        m_k = o_k < n_k
"""

MUTANTS = [
    Mutant("last-row-of-tile", "experts-relu", "products", "o_r, o_r < i_stop, o_n", "o_r, o_r + 1 < i_stop, o_n"),
    Mutant("partial-tile-forgotten", "experts-relu", "products", "(b_stop - b_start + BLOCK_M - 1)", "(b_stop - b_start)"),
    Mutant("inner-mask-missing", "experts-relu", "products", "m_k = o_k < N_IN - i_k", "m_k = o_k < N_IN"),
    Mutant("column-mask-short", "experts-relu", "products", "(o_n < N_OUT) & (i", "(o_n + 1 < N_OUT) & (i"),
    Mutant("tokens-not-read", "experts-relu", "products", "p_x + o_s // K * X_ROW", "p_x + o_r // K * X_ROW"),
    Mutant("selection-not-read", "experts-relu", "products", "p_o = p_out + o_s[:, None]", "p_o = p_out + o_r[:, None]"),
    Mutant(
        "gates-twice",
        "experts-relu",
        "products",
        "b_out * tl.load(p_gates + o_s, m_r, 0.0)[:, None]",
        "b_out * tl.load(p_gates + o_s, m_r, 0.0)[:, None] * tl.load(p_gates + o_s, m_r, 0.0)[:, None]",
    ),
    Mutant("gates-missing-in-gradient", "experts-relu", "products", "b_grad_a = b_s * b_gates", "b_grad_a = b_s"),
    Mutant("alpha-without-gate", "experts-relu", "products", "(b_a * b_gates).to(", "b_a.to("),
    Mutant(
        "keep-scale-missing", "experts-gelu", "products", "tl.where(m_keep, b_grad_a * KEEP_SCALE", "tl.where(m_keep, b_grad_a"
    ),
    Mutant("second-half-not-read", "experts-gated-silu", "products", "b_out, p_rows + N_IN, m_r", "b_out, p_rows, m_r"),
    Mutant("value-bias-without-gradient", "experts-relu2", "products", "if i_block == 0:", "if i_block < 0:"),
    Mutant(
        "strides-of-keys",
        "experts-gated-gelu-tanh",
        "products",
        "o_k[:, None] * GATES_IN",
        "o_k[:, None] * KEYS_IN + 0 * GATES_IN + o_k[:, None]",
    ),
    Mutant(
        "unsorted-not-read", "experts-gated-inner", "products", "o_kept = o_s[:, None] * ROW", "o_kept = o_r[:, None] * ROW"
    ),
    Mutant("one-survivor-less", "experts-inner", "choice", "m_equal & (b_rank <= b_equal", "m_equal & (b_rank < b_equal"),
    Mutant("ranked-without-gate", "experts-inner", "choice", "b_score * tl.load", "b_score + 0 * tl.load"),
    Mutant(
        "removed-survivor-has-gradient",
        "experts-inner-relu-dropout",
        "choice",
        "!= 0, b_position, -1 - b_position)",
        "!= 2, b_position, -1 - b_position)",
        "hundred",
    ),
    Mutant("part-of-survivor", "experts-gated-inner", "choice", "o_hidden + i_part * SIZE, b_hidden", "o_hidden, b_hidden"),
    Mutant("survivor-before", "experts-inner", "choice", "b_position < o_n[None, :], b", "b_position <= o_n[None, :], b"),
    Mutant("slope-of-gelu", "experts-gelu", "units", "tl.exp(-0.5 * b_h * b_h)", "tl.exp(-b_h * b_h)"),
    Mutant(
        "clamp-forgotten",
        "experts-gated-clamped",
        "units",
        "b_slope = tl.where(b_h > LIMIT, 0.0, b_s",
        "b_slope = tl.where(b_h > 9.0, 0.0, b_s",
    ),
    Mutant("square-forgotten", "experts-relu2", "units", "tl.where(b_h <= 0, 0.0, 2 * b_h)", "tl.where(b_h <= 0, 0.0, b_h)"),
    Mutant(
        "row-edge-in-weight", "experts-relu", "outer", "m_r = o_r < i_stop\n        o_t", "m_r = o_r < i_stop - 1\n        o_t"
    ),
    Mutant("index-swapped-in-weight", "experts-relu", "outer", "p_grad + o_t[:, None]", "p_grad + o_r[:, None]"),
    Mutant(
        "gate-keys-read-first-half",
        "experts-gated-silu",
        "outer",
        "p_grad_hidden + i_factor * N",
        "p_grad_hidden + 0 * i_factor * N",
    ),
    Mutant(
        "part-twice",
        "experts-relu",
        "outer",
        "i_begin + i_part * n_steps * BLOCK_K",
        "i_begin + 0 * i_part * n_steps * BLOCK_K",
        "parts",
    ),
    Mutant("bias-without-gate", "experts-relu2", "outer", "b_rows.to(tl.float32) * b_gates[:, None]", "b_rows.to(tl.float32)"),
    Mutant("ties-to-the-last", "route-sigmoid", "router", "(BLOCK_E - 1 - o_e)[None, :]", "o_e[None, :]", "empty-experts"),
    Mutant(
        "softmax-over-padding",
        "route-softmax",
        "router",
        "b_exp = tl.where(m_all, tl.exp",
        "b_exp = tl.where(m_all | True, tl.exp",
    ),
    Mutant("dropped-is-chosen", "route-sigmoid-dropped", "router", 'tl.where(m_keep, b_score, -float("inf"))', "b_score"),
    Mutant(
        "gate-of-dropped", "route-sigmoid-dropped", "router", "b_gates = tl.where(b_alive != 0, b_gates, 0.0)", "b_gates += 0.0"
    ),
    Mutant(
        "share-of-dropped",
        "route-renormalised-dropped",
        "router",
        "m_k[None, :] & (b_alive != 0)",
        "m_k[None, :] & (b_alive >= 0)",
    ),
    Mutant("gradient-of-dropped", "route-sigmoid-dropped", "router", "& (b_w != 0)[:, None]", "& (b_w == b_w)[:, None]"),
    Mutant("sum-of-gates", "route-renormalised", "router", "b_one = b_w * (b_g - b_dot)", "b_one = b_w * b_g"),
    Mutant(
        "ranks-not-read",
        "choose-sigmoid-ranked",
        "router",
        "b_score = tl.load(p_ranks + o_logits",
        "b_logits = 0 * tl.load(p_ranks + o_logits",
    ),
    Mutant("noise-not-scaled", "choose-softmax-noisy", "router", "m_logits, 0.0) * softplus(b_spread)", "m_logits, 0.0)"),
    Mutant("slope-of-spread", "choose-sigmoid-noisy", "router", "b_noise * tl.sigmoid(b_spread)", "b_noise"),
    Mutant(
        "row-of-halves",
        "choose-renormalised-noisy",
        "router",
        "p_spread + o_t[:, None] * LOGITS_ROW",
        "p_spread + o_t[:, None] * N_EXPERTS",
    ),
    Mutant(
        "one-part-of-many",
        "sinkhorn-correct",
        "balancing",
        "b_sum * tl.exp(b_most - b_higher) + tl.sum(b_scaled, 0)",
        "b_sum * tl.exp(b_most - b_higher)",
        "parts",
    ),
    Mutant("sign-forgotten", "sinkhorn-released", "balancing", "b_x - SIGN * b_lse[:, None]", "b_x - b_lse[:, None]"),
    Mutant(
        "rounds-of-the-first",
        "sinkhorn-correct",
        "balancing",
        "[None, :], i_sequence * n_tokens",
        "[None, :], i_sequence * 0",
    ),
    Mutant(
        "terms-of-the-first",
        "sinkhorn-correct",
        "balancing",
        "p_terms + i_sequence * n_parts * (2 * N_EXPERTS + 1)",
        "p_terms + i_sequence * 0",
    ),
    Mutant("nan-takes-part", "sinkhorn-correct", "balancing", 'tl.abs(b_x) < float("inf")', "b_x != 7.0"),
    Mutant(
        "padding-takes-part",
        "sinkhorn-correct",
        "balancing",
        "(tl.load(p_mask + o_t, m_t, 0) != 0)",
        "(tl.load(p_mask + o_t, m_t, 0) >= 0)",
    ),
    Mutant(
        "queue-begins-anew", "capacity", "balancing", "n_waiting += tl.sum(m_waits.to(tl.int64), 0)", "n_waiting += 0", "parts"
    ),
    Mutant("missing-waits", "capacity", "balancing", "0.0) <= 0)", "0.0) < 0)"),
    Mutant(
        "one-place-more",
        "capacity",
        "balancing",
        "(b_place.to(tl.float64) > capacity)",
        "(b_place.to(tl.float64) > capacity + 1)",
    ),
    Mutant("padding-has-places", "capacity", "balancing", "i_t + o_r < n_tokens, 0) != 0)", "i_t + o_r < n_tokens, 0) >= 0)"),
    Mutant("slot-forgotten", "experts-relu", "sums", "(o_t * K + i_k)[:, None] * D", "(o_t * K)[:, None] * D + 0 * i_k"),
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

# Names of the functions of `interpreted_checks.py` and `launch_checks.py`.
CHECKS = (
    "float64_is_refused",
    "cpu_is_refused",
    "sort_is_stable",
    "bad_experts_add_nothing",
    "bad_matrices_add_nothing",
    "bad_rows_add_nothing",
    "nan_stays_in_its_row",
    "nan_is_chosen_first",
    "largest_are_those_of_a_stable_sort",
    "survivors_are_found_in_stretches",
    "launches_are_few",
    "layers_launch_as_documented",
    "unneeded_gradients_launch_nothing",
    "statistics_are_right",
    "balancing_losses_are_right",
    "statistics_launch_four",
    "counting_sees_launches",
    "device_is_not_waited_for",
    "results_have_equal_bits",
    "logits_are_never_tf32",
    "float32_precision_is_passed_on",
)
