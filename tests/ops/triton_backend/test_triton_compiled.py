"""Ahead-of-time compilation of every Triton kernel for three GPUs that need not be there: nothing spills."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from sparseffn.errors import UserError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton has wheels for Linux on x86_64")

TARGETS = ("sm_80", "sm_90", "gfx942")

MATRIX_KERNELS = (
    "expert_up_fwd_kernel",
    "expert_up_bwd_x_kernel",
    "expert_up_bwd_weight_kernel",
    "expert_down_fwd_kernel",
    "expert_down_bwd_a_gates_kernel",
    "expert_down_bwd_weight_kernel",
)
SUM_KERNELS = (
    "token_sum_fwd_kernel",
    "weighted_rows_fwd_kernel",
    "weighted_rows_bwd_values_kernel",
    "weighted_rows_bwd_weights_kernel",
)
KERNELS = (*MATRIX_KERNELS, *SUM_KERNELS, "tile_map_kernel")


@pytest.fixture(autouse=True)
def _own_compilations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compile anew, and leave the user's cache alone."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_every_kernel_is_reported() -> None:
    """The lists of this file and of the report agree with the kernels that there are."""
    from sparseffn.ops.triton import outer, products, resources, sums

    written = {name for module in (outer, products, sums) for name in vars(module) if name.endswith("_kernel")}
    assert set(resources.KERNELS) == set(KERNELS) == written
    assert set(resources.TARGETS) == set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_widest_configuration_does_not_spill(kernel: str, target: str) -> None:
    """Tiles for many rows an expert and any size, the ones that need most registers, in the dtype that needs most."""
    from sparseffn.ops.triton import resources

    dtype = "float32" if kernel == "tile_map_kernel" else "bfloat16"
    *_, widest = resources.default_builds([kernel], [dtype], [False])
    row = resources.report_build(widest, target)
    assert row["spills"] == 0
    assert 0 < int(row["registers"]) <= 512 and 0 <= int(row["shared"]) <= 64 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_default_configuration_spills(kernel: str, target: str) -> None:
    """Every dtype, arithmetic, bucket and alignment."""
    from sparseffn.ops.triton import resources

    rows = resources.resource_report(targets=[target], kernels=[kernel])
    assert rows
    assert [row for row in rows if row["spills"] or int(row["shared"]) > 64 * 1024] == []


@pytest.mark.parametrize(
    ("choice", "words"),
    [({"kernels": ["expert_up"]}, "did you mean 'expert_up_fwd_kernel'"), ({"targets": ["sm_91"]}, "unknown target 'sm_91'")],
    ids=["kernel", "target"],
)
def test_unknown_name_is_refused(choice: dict[str, list[str]], words: str) -> None:
    """With the nearest names."""
    from sparseffn.ops.triton import resources

    with pytest.raises(UserError, match=words):
        resources.resource_report(**choice)
