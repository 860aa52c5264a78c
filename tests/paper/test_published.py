"""What was published, and the sizes that make it."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest

from sparseffn.errors import UserError
from sparseffn.paper.corpus_choice import Corpora
from sparseffn.paper.counted import settings_table, table7
from sparseffn.paper.measured import table_result
from sparseffn.paper.planned import Request, plan_table, residual_percent
from sparseffn.paper.pool import Pool
from sparseffn.paper.published import dense_values, facts, published_values, rows_of
from sparseffn.paper.scales import SCALES, get_scale
from sparseffn.paper.tables import OWN_TABLES, TABLES, get_table
from sparseffn.storage import read_json

SWEEP = Path(__file__).parents[2] / "results" / "learning-rates.json"


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
    cells = [cell for cell in table7(request_at("paper")).cells if cell.published is not None]
    assert len(cells) == len(published_values("table7")) == 16
    for cell in cells:
        assert cell.flops_percent is not None and cell.counted_flops_percent is not None
        assert f"{cell.flops_percent:.1f}" == f"{cell.published:.1f}"
        assert cell.flops_percent < cell.counted_flops_percent < cell.flops_percent + 1


@pytest.mark.parametrize("name", ["table8", "table9"])
def test_presets_are_the_published_hyperparameters(name: str) -> None:
    """And a scale that is not shows where it differs."""
    assert all(row.differences == [] for row in settings_table(name, request_at("paper")).rows)
    assert all("d_model" in row.differences for row in settings_table(name, request_at("cpu")).rows)


@pytest.mark.parametrize("scale", ["base", "cpu"])
def test_no_rate_tried_is_better_with_every_seed(scale: str) -> None:
    """Than the one chosen, which is at neither end of those tried; the sizes are those of the scale."""
    tried = read_json(SWEEP)[scale]
    column = get_scale(scale).column("WT-S")
    valid = {rate["lr"]: rate["valid"] for rate in tried["rates"]}
    assert tried["sizes"] == column.sizes and len(valid) >= 4
    chosen = valid.pop(column.preset.lr)
    for losses in valid.values():
        assert not all(other < own for other, own in zip(losses, chosen, strict=True))
    assert min(valid) < column.preset.lr < max(valid)


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


def marks_of(name: str, columns: list[str], scale: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """By key and column."""
    planned = plan_table(get_table(name).selected(columns=columns, rows=None, settings="paper"), request_at(scale))
    return {(c.key, planned.columns[c.column].column.name): c.sized.marks for c in planned.cells}


def test_released_forms_mark_every_option_that_differs() -> None:
    """Also what the label does not name: delta of S-BASE where the column has one, Switch's start on big C4, its dropout."""
    marks = marks_of("table10", ["WT-S", "WT-S*"], "paper")
    sbase = "s-base, K=4, G=128 (Sinkhorn as released)"
    sinkhorn = "as released: sinkhorn released, in the paper's form correct"
    assert marks[sbase, "WT-S"] == (sinkhorn,)
    delta = "as released: expert_dropout 0.05, in the paper's form 0"
    assert set(marks[sbase, "WT-S*"]) == {sinkhorn, delta}
    switch = marks["switch, K=4, G=128 (balancing weight 0.01 / N_E^2, as released)", "WT-S"]
    assert "as released: dropout 0, in the paper's form 0.1" in switch
    big = marks_of("table5", ["C4-S", "C4-B"], "paper")
    start = {
        "as released: init standard, in the paper's form switch",
        "as released: selector_init equal-norm, in the paper's form free",
    }
    assert start <= set(big["switch (balancing weight 0.01 / N_E^2, as released)", "C4-B"])
    assert not start & set(big["switch (balancing weight 0.01 / N_E^2, as released)", "C4-S"])


def test_product_keys_say_their_k() -> None:
    """Which the paper does not give."""
    marks = marks_of("table2", ["WT-S"], "paper")
    assert "K = 128 a head (the paper gives none)" in marks["pkm, parameters, relu", "WT-S"]
    assert "every value is read, without top-K" in marks["pkm, parameters, relu (no top-K, as released)", "WT-S"]


def test_rows_named_without_sizes_have_the_real_numbers() -> None:
    """Of tables 5 and 7 at a small scale; at the published one there is nothing to say."""
    marks = marks_of("table5", ["C4-S"], "cpu")
    assert "K=1, G=256 stands for K=1, G=512" in marks["switch", "C4-S"]
    assert "K=4, G=64 stands for K=4, G=128" in marks["s-base", "C4-S"]
    assert marks_of("table5", ["C4-S"], "paper")["switch", "C4-S"] == ()
    labels = [row.label for row in table7(request_at("cpu")).rows]
    assert labels[:2] == ["sigma-moe and every variant with G*K = 256", "2 N_E, G=32"]
    assert [row.label for row in table7(request_at("paper")).rows] == list(rows_of("table7"))


def test_convention_stands_only_where_the_block_has_the_columns_pairs() -> None:
    """Not for Top-K and product keys, nor for a mixture of more or fewer pairs; counted FLOPs are there for all."""
    tables = [get_table("table1"), get_table("table6"), OWN_TABLES["sweep-experts"]]
    result = [
        table_result(plan_table(table.selected(columns=["WT-S"], rows=None, settings="paper"), request_at("cpu")), Pool("."))
        for table in tables
    ]
    shown = {
        row.label: cell.flops_percent
        for table in result
        for row, cell in zip(table.rows, table.cells, strict=True)
        if cell.flops_percent is not None
    }
    assert shown == {"dense": 100.0, "N_E=16": 25.0}
    assert all((cell.counted_flops_percent or 0) > 0 for table in result for cell in table.cells)


@pytest.mark.parametrize(
    ("name", "scale", "settings", "words"),
    [
        ("table3", "paper", "paper", ["11.71", "end-of-line", "separates documents", "two clippings"]),
        ("table6", "paper", "paper", ["no top-K, as released", "same published", "end-of-line", "two clippings", "both forms"]),
        (
            "table6",
            "base",
            "released",
            ["no top-K, as released", "only the learning rate was chosen", "delta of", "two clippings"],
        ),
        ("table1", "cpu", "paper", ["two clippings"]),
    ],
    ids=["table3", "table6", "released", "cpu"],
)
def test_notes_say_what_the_comparison_hides(name: str, scale: str, settings: str, words: list[str]) -> None:
    """Each where it holds, and not elsewhere."""
    table = get_table(name).selected(columns=None, rows=None, settings=settings)  # type: ignore[arg-type]
    notes = " ".join(table_result(plan_table(table, request_at(scale, settings)), Pool(".")).notes)
    every = {
        "11.71",
        "end-of-line",
        "separates documents",
        "same published",
        "only the learning rate was chosen",
        "delta of",
        "two clippings",
    }
    every |= {"no top-K, as released", "both forms"}
    assert {word for word in every if word in notes} == set(words)


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
    """The version of the paper before the first table, and what each table is on its line."""
    text = resources.files("sparseffn.paper").joinpath("published.toml").read_text(encoding="utf-8")
    head, *sections = re.split(r"^\[", text, flags=re.MULTILINE)
    assert "https://arxiv.org/abs/2310.10837v" in head
    lines = {section.partition("]")[0]: section.partition("\n")[0] for section in sections}
    assert all(re.search(r"\]  # \w", lines[f"table{n}"]) for n in range(1, 11))


@pytest.mark.parametrize("name", list(TABLES))
def test_tables_agree_on_the_dense_models(name: str) -> None:
    """A dense model has one value, in whichever of the paper's tables it stands."""
    dense = {key: value for key, value in published_values(name).items() if key[0] == "dense"}
    assert dense and dense.items() <= dense_values().items()


def test_parts_of_tables_hold_rows_of_the_whole() -> None:
    """Table 4 is a part of table 10, table 2 one of table 6, with the labels that those have."""
    whole = {row[0] for row in facts()["table10"]["rows"]}
    assert set(facts()["table4"]["rows_of_table10"]) < whole
    assert set(rows_of("table2")) < set(rows_of("table6"))
    assert {label.replace(",", "") for label in rows_of("table2")} == set(facts()["table2"]["rows_of_table6"])
