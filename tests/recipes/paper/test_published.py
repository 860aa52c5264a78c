"""What was published, and the sizes that make it."""

from __future__ import annotations

import pytest

from sparseffn.errors import UserError
from sparseffn.recipes.paper.corpora import Corpora
from sparseffn.recipes.paper.counted import settings_table, table7
from sparseffn.recipes.paper.plan import Request, plan_table, residual_percent
from sparseffn.recipes.paper.published import facts, published_values
from sparseffn.recipes.paper.scales import SCALES, get_scale
from sparseffn.recipes.paper.tables import TABLES, get_table


def request_at(scale: str, settings: str = "paper") -> Request:
    """Without a corpus."""
    found = get_scale(scale)
    return Request(scale=found, corpora=Corpora(scale=found, closed=True), settings=settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("column", "dense", "mixture"), [("E8", 41, 41), ("WT-S", 47, 47), ("WT-S*", 238, 237), ("WT-B", 262, 262)]
)
def test_published_sizes_have_the_published_parameters(column: str, dense: int, mixture: int) -> None:
    """In millions, rounded down where .5 is just passed, as the paper prints them."""
    table = get_table("table10").selected(columns=[column], rows=["dense", "sigma-moe"], settings="paper")
    counts = [cell.model.num_params() / 1e6 for cell in plan_table(table, request_at("paper")).cells]
    assert counts == pytest.approx([dense, mixture], abs=0.55)
    assert column == "WT-B" or [round(count) for count in counts] == [dense, mixture]


def test_table7_is_the_published_one_to_a_decimal() -> None:
    """Without training; the counted share lies above it by the selector."""
    cells = [cell for cell in table7(request_at("paper"))["cells"] if cell["published"] is not None]
    assert len(cells) == len(published_values("table7")) == 16
    for cell in cells:
        assert f"{cell['flops_percent']:.1f}" == f"{cell['published']:.1f}"
        assert cell["flops_percent"] < cell["counted_flops_percent"] < cell["flops_percent"] + 1


@pytest.mark.parametrize("name", ["table8", "table9"])
def test_presets_are_the_published_hyperparameters(name: str) -> None:
    """And a scale that is not shows where it differs."""
    assert all(row["differences"] == [] for row in settings_table(name, request_at("paper"))["rows"])
    assert all("d_model" in row["differences"] for row in settings_table(name, request_at("cpu"))["rows"])


@pytest.mark.parametrize("name", list(TABLES))
def test_every_published_value_has_its_cell(name: str) -> None:
    """No row or column of the paper is left out, and none is made up."""
    planned = plan_table(get_table(name).selected(columns=None, rows=None, settings="paper"), request_at("paper"))
    found = {
        (cell.sized.row.published, planned.columns[cell.column].column.name): cell.published
        for cell in planned.cells
        if cell.published is not None
    }
    assert found == dict(published_values(name))


@pytest.mark.parametrize("scale", ["base", "cpu"])
@pytest.mark.parametrize("column", ["WT-S", "WT-S*", "WT-B", "E8"])
def test_small_scales_keep_the_columns_shape(scale: str, column: str) -> None:
    """N_E, K and K G / d_ff are the published ones, and dense and mixture are parameter-equal."""
    small, paper = SCALES[scale].column(column).shape, SCALES["paper"].column(column).shape
    assert (small.n_experts, small.k) == (paper.n_experts, paper.k)
    share = small.active_channels / small.d_ff
    assert share == pytest.approx(paper.active_channels / paper.d_ff, rel=0.02)
    table = get_table("table10").selected(columns=[column], rows=["dense", "sigma-moe"], settings="paper")
    planned = plan_table(table, request_at(scale))
    assert abs(residual_percent(planned.cells[1], planned.columns[0])) < 0.1


def test_labels_show_the_real_numbers() -> None:
    """K=1, G=512 becomes K=1, G=256 at scale cpu, and says so."""
    table = get_table("table10").selected(columns=["WT-S"], rows=["switch, K=1, G=512"], settings="paper")
    sized = plan_table(table, request_at("cpu")).cells[0].sized
    assert sized.label == "switch, K=1, G=256" and "switch, K=1, G=256 stands for switch, K=1, G=512" in sized.marks
    assert (sized.ffn.active_channels, sized.ffn.n_channels) == (256, 1024)


def test_released_form_differs_from_the_papers_where_spec_says() -> None:
    """One row, two forms: Sinkhorn, slots, weight, top-K."""
    rows = get_table("table10").selected(columns=["WT-S*"], rows=None, settings="paper").rows
    planned = plan_table(get_table("table10").selected(columns=["WT-S*"], rows=None, settings="paper"), request_at("paper"))
    blocks = {cell.key: cell.sized.ffn.to_json() for cell in planned.cells}
    assert len(blocks) == len(rows) == 29
    assert blocks["s-base, K=4, G=128"]["sinkhorn"] == "correct" and blocks["s-base, K=4, G=128"]["expert_dropout"] == 0
    released = blocks["s-base, K=4, G=128 (Sinkhorn as released)"]
    assert (released["sinkhorn"], released["expert_dropout"]) == ("released", 0.05)
    renorm = blocks["softmax after top-k (renorm.) (balanced over the K slots, as released)"]
    assert (renorm["entropy_weight"], renorm["slot_entropy_weight"]) == (0.0, 1e-3)
    switch = blocks["switch, K=1, G=512 (balancing weight 0.01 / N_E^2, as released)"]
    assert switch["switch_weight"] == pytest.approx(0.01 / 32**2)
    assert blocks["switch, K=1, G=512"]["switch_weight"] == 0.01


def test_released_settings_change_clipping_gamma_and_delta() -> None:
    """Where `spec` says, and nowhere else."""
    table = get_table("table3").selected(columns=None, rows=None, settings="released")
    planned = plan_table(table, request_at("paper", "released"))
    cells = {(cell.key, planned.columns[cell.column].column.name): cell for cell in planned.cells}
    assert cells["dense", "WT-S"].train.clip == cells["dense", "C4-S"].train.clip == 0.1
    assert {cells[key].train.clip for key in cells if key[0] == "sigma-moe"} == {0.25}
    gammas = {column: cells["sigma-moe", column].sized.ffn.balancing()["entropy"] for column in ("WT-S", "C4-S", "WT-B")}
    assert gammas == {"WT-S": 1e-4, "C4-S": 0.0, "WT-B": 1e-3}
    assert cells["sigma-moe", "WT-B"].sized.ffn.to_json()["expert_dropout"] == 0.1


def test_parameter_matched_product_keys_are_equal_and_value_matched_are_marked() -> None:
    """At scale cpu the sub-keys are solved for; rows with as many values are smaller."""
    table = get_table("table6").selected(columns=["WT-S"], rows=None, settings="paper")
    planned = plan_table(table, request_at("cpu"))
    for cell in planned.cells:
        percent = residual_percent(cell, planned.columns[0])
        assert (percent < -5) if "value-count" in cell.key else abs(percent) < 0.5
        if "no top-K" in cell.key:
            assert cell.sized.ffn.to_json()["k"] is None


def test_unknown_names_are_refused_with_the_nearest() -> None:
    """Rows, columns, scales; and what is named twice."""
    table = get_table("table10")
    with pytest.raises(UserError, match="unknown row 'sigma-mo'; fix: did you mean 'sigma-moe'"):
        table.selected(columns=None, rows=["sigma-mo"], settings="paper")
    with pytest.raises(UserError, match="unknown column 'WTS'; fix: did you mean"):
        table.selected(columns=["WTS"], rows=None, settings="paper")
    with pytest.raises(UserError, match="each column must be named once; got 'WT-S' twice"):
        table.selected(columns=["WT-S", "wt-s"], rows=None, settings="paper")
    with pytest.raises(UserError, match="unknown scale 'cpus'"):
        get_scale("cpus")
    with pytest.raises(UserError, match=r"`seeds` must be different from one another; got \[1, 1\]"):
        Request(scale=get_scale("cpu"), corpora=Corpora(scale=get_scale("cpu")), seeds=(1, 1))


def test_facts_name_their_source() -> None:
    """Tables of the published file are all there."""
    assert {f"table{n}" for n in range(1, 11)} <= set(facts())
