"""Wrong kernels, made from the right ones by one change each, must fail the comparison with the truth."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from variants import QUICK, compile_variant, kernel_files, run_with, without

from sparseffn.ops.cpu import build

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason="no compiled kernels here")

TILED = [*without("-O3"), *QUICK]
FLAGS = [*TILED, "-DSPARSEFFN_NO_TILES"]
PAIRS, TILES = "AVX512-BF16", "AMX-BF16"
needs_tiles = pytest.mark.skipif(TILES not in (build.instruction_sets() or ""), reason="this processor has no tiles")
CHECKER = str(Path(__file__).with_name("check_kernels.py"))


@dataclass(frozen=True)
class Mutant:
    """One change, and what must see it."""

    file: str
    old: str
    new: str
    check: str
    """Of `check_kernels.py`."""
    compiled: str = "experts_float.cpp"
    """The file that includes the changed one, if the check needs no other."""
    says: str = "wrong"
    tiled: bool = False
    """Whether it is a change of the products on tiles, which only some processors have; all others are compiled without."""

    @property
    def flags(self) -> list[str]:
        """Of the compiler."""
        return TILED if self.tiled else FLAGS

    @property
    def lacks(self) -> str | None:
        """Instructions without which the changed code does not run, if this processor has none."""
        needed = TILES if self.tiled else PAIRS if self.check == "pairs" else ""
        return needed if needed not in (build.instruction_sets() or "") else None


# What has the blocks of single pairs and both selections.
_BLOCKS = "blocks_wide.cpp"

MUTANTS = {
    "off-by-one-tile-edge": Mutant("product.h", "i < rows; i += Rows)", "i + Rows < rows; i += Rows)", "experts"),
    "ragged-columns-forgotten": Mutant(
        "product.h", "for (int c = 0; c < left; ++c) at[c]", "for (int c = 0; c + 1 < left; ++c) at[c]", "experts"
    ),
    "missing-dropout-mask": Mutant("hidden.h", "keep[g] ? row[g] * scale : C(0)", "row[g] * scale", "dropout"),
    "missing-mask-in-backward": Mutant(
        "hidden_backward.h", "unit(g, keep[g] ? keep_scale : C(0))", "unit(g, keep_scale)", "dropout"
    ),
    "swapped-index": Mutant(
        "hidden.h", "p.routing.token(rows.begin + i) * p.width", "p.routing.token(rows.end - 1 - i) * p.width", "experts"
    ),
    "score-applied-twice": Mutant("hidden.h", "row[g] *= gate;", "row[g] *= gate * gate;", "experts"),
    "score-twice-in-backward": Mutant(
        "hidden_backward.h", "scaled[g] = gate * drop", "scaled[g] = gate * gate * drop", "experts"
    ),
    "part-of-a-sum-lost": Mutant(
        "product.h",
        "acc[i][j] += part[i][j];\n    }\n    next = ahead",
        "acc[i][j] = part[i][j];\n    }\n    next = ahead",
        "experts",
    ),
    "wrong-slope": Mutant("activations.h", "kept > C(0) ? C(1) : C(0)", "C(1)", "experts"),
    "open-unit-taken-for-closed": Mutant("experts.h", "any |= units[i * size + g]", "any = units[i * size + g]", "experts"),
    "column-taken-for-a-row": Mutant(
        "matrix.h",
        "transposed() const { return {data, column, row}; }",
        "transposed() const { return {data, row, column}; }",
        "experts",
    ),
    "stride-of-dots-forgotten": Mutant(
        "matrix.h", "(a, n, b.data, b.column, depth, columns", "(a, n, b.data, depth, depth, columns", "layouts"
    ),
    "first-panel-packed-again": Mutant("matrix.h", "from = b.from(0, first)", "from = b.from(0, 0)", "layouts"),
    "lines-copied-over-each-other": Mutant("product.h", "copy + k * N * kLanes<C>", "copy", "large"),
    "registers-but-the-first-not-streamed": Mutant(
        "outer.h", "stream(line + j * kLanes<C>, acc[q][j])", "stream(line, acc[q][j])", "large"
    ),
    "lines-of-the-first-block-of-a-gradient": Mutant("outer.h", "std::copy_n(a[r] + top", "std::copy_n(a[r]", "experts"),
    "columns-of-the-first-panel-of-a-gradient": Mutant(
        "outer.h", "copies.panels.data() + first * rows;", "copies.panels.data();", "experts"
    ),
    "ragged-dots-cut": Mutant(
        "dots.h", "if (const int64_t n = depth - k)", "if (const int64_t n = depth - k; n > 1)", "layouts"
    ),
    "sums-of-the-row-before": Mutant("dots.h", "folded[i + 1 < R ? i + 1 : i]", "folded[i]", "layouts"),
    "tile-of-rows-twice": Mutant("product.h", "first += n;", "first += n > 1 ? n - 1 : n;", "layouts"),
    "halves-swapped-where-interleaved": Mutant("hidden.h", "ws.joint[2 * i + 1]", "ws.joint[2 * i]", "layouts"),
    "interleaved-gradient-lost": Mutant(
        "experts_backward.h", "row[2 * g + 1] = ws.gate_rows[i][g]", "row[2 * g + 1] = ws.d_rows[i][g]", "layouts"
    ),
    "gradient-in-the-other-order": Mutant(
        "experts_backward.h", "g.gate_keys.by_rows(), g.gate_keys.of(e)", "!g.gate_keys.by_rows(), g.gate_keys.of(e)", "gated"
    ),
    "gate-keys-without-gradient-of-x": Mutant(
        "experts_backward.h",
        "    if (p.gate_keys)\n        multiply<To::kAdd",
        "    if (false)\n        multiply<To::kAdd",
        "gated",
    ),
    "bias-of-another-expert": Mutant("hidden.h", "p.gate_bias + expert * p.size", "p.gate_bias + 0 * p.size", "gated"),
    "value-bias-without-gate": Mutant("experts.h", "+= gate * upcast(p.value_bias", "+= upcast(p.value_bias", "gated"),
    "gate-gradient-without-value-bias": Mutant(
        "hidden_backward.h", "if (!p.value_bias) return 0;", "if (p.value_bias) return 0;", "gated"
    ),
    "bias-gradient-of-idle-expert": Mutant(
        "experts_backward.h",
        "for (S* bias : {g.key_bias, g.gate_bias})",
        "for (S* bias : {g.key_bias})",
        "gated",
        says="experts.gate_bias",
    ),
    "truncated-bfloat16": Mutant(
        "vectors.h", "x == x ? rounded : (bits >> 16) | 0x40u", "bits >> 16", "bfloat16", "experts_bf16.cpp"
    ),
    "rows-of-the-first-piece": Mutant("experts_panels.h", "some, piece.depth.begin", "some, 0", "pairs", "experts_bf16.cpp"),
    "columns-of-the-first-panel": Mutant(
        "experts_panels.h", "piece.from(own.begin)", "piece.from(0)", "pairs", "experts_bf16.cpp"
    ),
    "sums-of-the-first-panel": Mutant("experts_panels.h", "sums_of(r) + own.begin", "sums_of(r)", "pairs", "experts_bf16.cpp"),
    "last-of-odd-terms-lost": Mutant("product_pairs.h", "if (depth % 2)", "if (false)", "pairs", "experts_bf16.cpp"),
    "turn-as-if-never-short": Mutant(
        "product_pairs.h", "std::min(kPairsOfTurn, depth / 2 - begin)", "kPairsOfTurn", "pairs", "experts_bf16.cpp"
    ),
    "turns-all-of-the-first-columns": Mutant(
        "product_pairs.h", "panel + begin * N * kPairLanes", "panel", "pairs", "experts_bf16.cpp"
    ),
    "last-row-paired-with-itself": Mutant("product_pairs.h", "both ? mask : 0", "mask", "pairs", "experts_bf16.cpp"),
    "every-first-for-every-second": Mutant(
        "product_pairs.h", "2 * (columns - c) - 1", "columns - c", "pairs", "experts_bf16.cpp"
    ),
    "pairs-of-columns-turned": Mutant("product_pairs.h", "one | two << 16", "two | one << 16", "pairs", "experts_bf16.cpp"),
    "rows-behind-the-depth-lost": Mutant(
        "experts_panels_backward.h", "_mm512_loadu_ps(sum + j * kPairLanes) + acc[j]", "acc[j]", "pairs", "experts_bf16.cpp"
    ),
    "gate-gradient-of-one-panel": Mutant(
        "experts_panels_backward.h",
        "for (int64_t i = 0; i < panels.n; ++i) sum",
        "for (int64_t i = 0; i < 1; ++i) sum",
        "pairs",
        "experts_bf16.cpp",
    ),
    "sums-of-the-tokens-before": Mutant(
        "experts_panels.h",
        "std::fill_n(ws.sums.data(), (tokens.end",
        "std::fill_n(ws.sums.data(), 0 * (tokens.end",
        "pairs",
        "experts_bf16.cpp",
        says="not finite",
    ),
    "tile-of-the-first-rows-twice": Mutant(
        "product_tiles.h", "a + apart + k * kTileNumbers", "a + k * kTileNumbers", "pairs", "experts_bf16.cpp", tiled=True
    ),
    "tile-of-the-first-columns-twice": Mutant(
        "product_tiles.h", "b + kPairLanes, ld", "b, ld", "pairs", "experts_bf16.cpp", tiled=True
    ),
    "panel-without-its-end": Mutant(
        "product_tiles.h",
        "std::fill(panel + pairs_in(depth) * ld",
        "std::fill(panel + pairs * ld",
        "pairs",
        "experts_bf16.cpp",
        says="not finite",
        tiled=True,
    ),
    "squares-of-sums-in-the-other-order": Mutant(
        "product_tiles.h", "sums[2 * i + j]", "sums[2 * j + i]", "pairs", "experts_bf16.cpp", tiled=True
    ),
    "pairs-of-a-block-over-each-other": Mutant(
        "sorted_rows.h", "(at + q) * kTileRows", "at * kTileRows", "pairs", "experts_bf16.cpp", tiled=True
    ),
    "row-without-its-end": Mutant(
        "sorted_rows.h", "if (column + n == columns_)", "if (false)", "pairs", "experts_bf16.cpp", says="not finite", tiled=True
    ),
    "rows-of-a-run-but-the-last-lost": Mutant(
        "rows.h",
        "sum += w[q] * load(row[q] + c);\n        store",
        "sum = w[q] * load(row[q] + c);\n        store",
        "blocks",
        _BLOCKS,
    ),
    "outer-product-of-the-last-pair": Mutant("rows.h", "load(row[q] + c) + w[q] * v", "w[q] * v", "blocks", _BLOCKS),
    "stretches-but-the-last-lost": Mutant(
        "rows.h", "c < width_; ++c) to[c] += row[c];", "c < width_; ++c) to[c] = row[c];", "rows", _BLOCKS
    ),
    "rank-by-squared-norm": Mutant("topk_forward.h", "norms[i] = std::sqrt(sum)", "norms[i] = sum * sum", "blocks", _BLOCKS),
    "gate-bias-gets-the-keys": Mutant(
        "topk_backward.h", "d_gate.data(), gate_bias.data()", "d.data(), gate_bias.data()", "blocks", _BLOCKS
    ),
    "last-of-equal-sub-keys-first": Mutant(
        "product_keys.h", "before += keys[j] >= own", "before += keys[j] > own", "sub-keys", _BLOCKS
    ),
    "many-sub-keys-in-no-order": Mutant(
        "product_keys.h", "best(keys, n, most, true,", "best(keys, n, most, false,", "sub-keys", _BLOCKS
    ),
    "sums-of-unranked-sub-keys": Mutant(
        "product_keys.h", "best_a_[i] = a[top_a_[i]]", "best_a_[i] = a[i]", "sub-keys", _BLOCKS
    ),
    "token-that-is-dear-to-move": Mutant(
        "assignment.cpp",
        "loss < cost || (loss == cost && t < mover)",
        "loss > cost || cost == kInfinity",
        "balanced",
        "assignment.cpp",
    ),
    "softmax-over-the-chosen": Mutant(
        "route.cpp", "if (kind == kSoftmax)\n        for", "if (false)\n        for", "routes", "route.cpp"
    ),
    "dropped-is-chosen": Mutant("route.cpp", "-std::numeric_limits<C>::infinity()", "scores[e]", "routes", "route.cpp"),
    "gate-of-dropped": Mutant(
        "route.cpp", "std::exp(-logits[chosen[j]])) : C(0)", "std::exp(-logits[chosen[j]])) : C(1)", "routes", "route.cpp"
    ),
    "share-of-dropped": Mutant("route.cpp", "if (is_kept(chosen[j])) sum", "sum", "routes", "route.cpp"),
    "gradient-of-dropped": Mutant("route.cpp", "if (gates[j] != C(0)) add(j)", "add(j)", "routes", "route.cpp"),
    "gates-as-if-independent": Mutant("route.cpp", "grad[j] - static_cast<C>(common)", "grad[j]", "routes", "route.cpp"),
    "selector-without-the-last-token": Mutant(
        "route.cpp",
        "std::min(kRowsAtOnce, r.tokens - first)",
        "std::min(kRowsAtOnce, r.tokens - first - 1)",
        "routes",
        "route.cpp",
    ),
    "scores-of-one-row": Mutant("route.cpp", "(first + i) * r.experts + e)", "first * r.experts + e)", "routes", "route.cpp"),
    "first-column-for-all": Mutant("transpose.h", "= a[i * lda + c];", "= a[i * lda];", "routes", "route.cpp"),
}
# Fresh memory is often zero, so that the numbers of this one may be right: only the poison tells.
UNWRITTEN = Mutant(
    "experts_inner.h",
    "std::fill(sums.data() + tokens.begin * p.width,",
    "std::fill(sums.data() + tokens.begin * p.width + (tokens.begin < tokens.end),",
    "inner",
    says="not finite",
)
# The quick run has one of each kind; each costs five seconds.
QUICKLY = (
    "last-row-paired-with-itself",
    "off-by-one-tile-edge",
    "stride-of-dots-forgotten",
    "bias-of-another-expert",
    "gates-as-if-independent",
)


def said_of(mutant: Mutant, folder: Path) -> str:
    """What the comparison says, in a process that runs the mutant."""
    library = compile_variant(folder, [mutant.compiled], mutant.flags, (mutant.file, mutant.old, mutant.new))
    done = run_with(library, CHECKER, mutant.check)
    assert done.returncode == 0 or done.stderr.startswith("wrong"), done.stderr
    return done.stderr


def test_mutants_are_caught(tmp_path: Path) -> None:
    """Some, side by side."""
    names = [name for name in QUICKLY if not MUTANTS[name].lacks]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        said = pool.map(lambda name: said_of(MUTANTS[name], tmp_path / name), names)
        missed = [name for name, text in zip(names, said, strict=True) if MUTANTS[name].says not in text]
    assert not missed, f"the comparison passes {missed}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.skipif(bool(m.lacks), reason=f"this processor has no {m.lacks}"))
        for n, m in MUTANTS.items()
        if n not in QUICKLY
    ],
)
def test_mutant_is_caught(name: str, tmp_path: Path) -> None:
    """Each of the others."""
    assert MUTANTS[name].says in said_of(MUTANTS[name], tmp_path / "mutant")


@pytest.mark.slow
def test_unwritten_scratch_shows(tmp_path: Path) -> None:
    """One element of a thread's sums that nobody set to zero comes out as NaN."""
    assert UNWRITTEN.says in said_of(UNWRITTEN, tmp_path / "mutant")


@pytest.mark.slow
@pytest.mark.parametrize("spoilt", [False, True], ids=["as-it-is", "spoilt"])
def test_no_thread_takes_memory(spoilt: bool, tmp_path: Path) -> None:
    """Nor could one lose it, which would end the process; with scratch memory of its own for a row it is seen."""
    change = ("select.h", "cutter_.cut(keys, n, k)", "Cutter<K>(n).cut(keys, n, k)") if spoilt else None
    guard = Path(__file__).with_name("guarded_new.cpp")
    library = compile_variant(tmp_path, kernel_files(), FLAGS, change, [guard])
    done = run_with(library, str(Path(__file__).with_name("scarce_memory.py")), "once")
    assert ("wrong: a thread takes" in done.stderr) == spoilt and (done.returncode == 0) != spoilt, done.stderr


@pytest.mark.parametrize(
    ("file", "tiled"),
    [
        ("experts_float.cpp", False),
        *(pytest.param(f, False, marks=pytest.mark.slow) for f in ("experts_bf16.cpp", "route.cpp", _BLOCKS, "assignment.cpp")),
        pytest.param("experts_bf16.cpp", True, marks=[pytest.mark.slow, needs_tiles]),
    ],
)
def test_right_kernels_pass_where_mutants_fail(file: str, tiled: bool, tmp_path: Path) -> None:
    """Compiled alike, so that a mutant is not caught by a test that always fails."""
    library = compile_variant(tmp_path / "right", [file], TILED if tiled else FLAGS)
    mutants = [m for m in (*MUTANTS.values(), UNWRITTEN) if m.compiled == file and m.tiled == tiled]
    checks = sorted({mutant.check for mutant in mutants})
    done = run_with(library, CHECKER, *checks)
    assert done.returncode == 0, done.stderr
