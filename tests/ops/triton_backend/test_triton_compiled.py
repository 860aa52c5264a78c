"""Ahead-of-time compilation of every Triton kernel for three GPUs that need not be there: nothing spills."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from sparseffn.errors import UserError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton has wheels for Linux on x86_64")

TARGETS = ("sm_80", "sm_90", "gfx942")

KERNELS = (
    "route_logits_kernel",
    "route_fwd_kernel",
    "route_bwd_logits_kernel",
    "route_bwd_x_kernel",
    "route_bwd_selector_kernel",
    "sinkhorn_round_kernel",
    "sinkhorn_fwd_kernel",
    "over_capacity_kernel",
    "topk_kernel",
    "ordered_topk_kernel",
    "survivors_kernel",
    "spread_kernel",
    "count_kernel",
    "scan_kernel",
    "place_kernel",
    "experts_up_fwd_kernel",
    "experts_down_fwd_kernel",
    "experts_bwd_hidden_kernel",
    "experts_bwd_x_kernel",
    "experts_bwd_keys_kernel",
    "experts_bwd_values_kernel",
    "experts_bwd_bias_kernel",
    "sum_parts_kernel",
    "selection_counts_kernel",
    "selection_totals_kernel",
    "entropy_shares_kernel",
    "entropy_fwd_kernel",
    "switch_shares_kernel",
    "switch_fwd_kernel",
    "shares_bwd_kernel",
    "load_sums_kernel",
    "load_fwd_kernel",
    "load_bwd_kernel",
    "token_sum_kernel",
    "weighted_rows_fwd_kernel",
    "weighted_rows_bwd_values_kernel",
    "weighted_rows_bwd_weights_kernel",
)
PRODUCTS = tuple(name for name in KERNELS if name.startswith("experts_") and "bias" not in name)


@pytest.fixture(autouse=True)
def _own_compilations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compile anew, and leave the user's cache alone."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_every_kernel_is_reported() -> None:
    """The lists of this file and of the report agree with the kernels that there are."""
    from sparseffn.ops.triton import balancing, choice, outer, products, resources, router, sorting, statistics_kernels, sums

    modules = (balancing, choice, outer, products, router, sorting, statistics_kernels, sums)
    written = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert set(resources.KERNELS) == set(KERNELS) == written
    assert set(resources.TARGETS) == set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_widest_configuration_does_not_spill(kernel: str, target: str) -> None:
    """Tiles for many rows an expert and any size, the ones that need most registers, in the dtype that needs most; gated."""
    from sparseffn.ops.triton import resources

    fixed = resources.family_of(kernel) in resources.FLOAT32_ALONE
    dtype, aligned = ("float32", True) if fixed else ("bfloat16", False)
    *_, widest = resources.default_builds([kernel], [dtype], [aligned], resources.vendor_of(target))
    row = resources.report_build(widest, target)
    assert row["spills"] == 0
    assert 0 < int(row["registers"]) <= 512 and 0 <= int(row["shared"]) <= resources.SHARED_BYTES[target]


def test_ranks_are_not_fused_with_a_sum() -> None:
    """Fused with a sum, a product that underflows would keep its sign, and no longer tie with zero."""
    from sparseffn.ops.triton import resources

    for build in resources.default_builds(["survivors_kernel"], ["float32"], [True]):
        ptx = resources.compile_build(build, "sm_90").asm["ptx"]
        assert "mul.f32" in ptx and "fma" not in ptx


@pytest.mark.parametrize("kernel", PRODUCTS)
def test_width_of_the_paper_is_copied_asynchronously(kernel: str) -> None:
    """412 bfloat16 numbers a row, gathered by token: all factors go into shared memory ahead of their product."""
    from sparseffn.ops.triton import resources

    *_, widest = resources.default_builds([kernel], ["bfloat16"], [True])
    row = resources.report_build(widest, "sm_90")
    assert int(row["copies"]) >= 2 * int(row["stages"]) - 2 and row["spills"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_default_configuration_spills(kernel: str, target: str) -> None:
    """Every dtype, arithmetic, bucket, alignment, plain and gated."""
    from sparseffn.ops.triton import resources

    rows = resources.resource_report(targets=[target], kernels=[kernel])
    limit = resources.SHARED_BYTES[target]
    assert rows
    assert [row for row in rows if row["spills"] or int(row["shared"]) > limit] == []


@pytest.mark.parametrize(
    ("choice", "words"),
    [({"kernels": ["experts_up"]}, "did you mean 'experts_up_fwd_kernel'"), ({"targets": ["sm_91"]}, "unknown target 'sm_91'")],
    ids=["kernel", "target"],
)
def test_unknown_name_is_refused(choice: dict[str, list[str]], words: str) -> None:
    """With the nearest names."""
    from sparseffn.ops.triton import resources

    with pytest.raises(UserError, match=words):
        resources.resource_report(**choice)
