"""Experiments by rules: the bounds are those of a simulation, verdicts come at planned looks, records outlive the pool."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy.special import stdtrit

from sparseffn.errors import UserError
from sparseffn.paper.collapse import collapses, has_collapsed
from sparseffn.paper.corpus_choice import Corpora
from sparseffn.paper.execution import execute
from sparseffn.paper.experiments import awaited_seeds, experiment_result, experiment_runs, judged, losses_of
from sparseffn.paper.planned import Request
from sparseffn.paper.pool import Pool
from sparseffn.paper.rules import Rule, rules
from sparseffn.paper.scales import Scale, get_scale
from sparseffn.paper.sequential import error_rate, t_bounds
from sparseffn.results.experiment_result import DecidedContrast, ExperimentResult, ExperimentRun, LayerLoads
from sparseffn.storage import read, write_json

RESULTS = Path(__file__).parents[2] / "results"


def record(name: str) -> ExperimentResult:
    """As committed."""
    return read(RESULTS / "evidence" / f"{name}.json", ExperimentResult, fix="")


@pytest.mark.parametrize("name", list(rules()))
def test_bounds_in_the_file_are_those_of_the_simulation(name: str) -> None:
    """Within what a smaller simulation can tell; the first is a quantile of Student's t, which is known."""
    rule = rules()[name]
    simulated = t_bounds(rule.looks, rule.alpha, power=rule.power, n_draws=400_000, seed=1)
    assert rule.bounds == pytest.approx(simulated, rel=0.04)
    spent = rule.alpha * (rule.looks[0] / rule.looks[-1]) ** rule.power
    assert rule.bounds[0] == pytest.approx(float(stdtrit(rule.looks[0] - 1, 1 - spent / 2)), rel=0.005)
    n_draws = 400_000
    noise = 3 * (rule.alpha / n_draws) ** 0.5
    assert rule.alpha * 0.9 - noise < error_rate(rule.looks, rule.bounds, n_draws=n_draws, seed=2) < rule.alpha + noise


@pytest.mark.parametrize("name", list(rules()))
def test_committed_verdicts_are_those_of_the_committed_runs(name: str) -> None:
    """By the rule as it stands; whoever changes a loss or the rule decides again."""
    found, rule = record(name), rules()[name]
    assert found.contrasts == judged(rule, losses_of(found.runs, "test"), losses_of(found.runs, "valid"))
    assert found.collapses == collapses(rule, found.runs)
    assert (found.seeds, found.looks, found.bounds) == (list(rule.seeds), list(rule.looks), list(rule.bounds))
    assert {run.candidate for run in found.runs} <= {candidate.name for candidate in rule.candidates}


def test_seeds_are_fresh() -> None:
    """No run of the tables, of the studies or of the other experiments has them, but for an experiment that shares runs."""
    own = [seed for rule in rules().values() for seed in rule.seeds if rule.shares is None]
    assert len(set(own)) == len(own) and min(own) >= 100
    for rule in rules().values():
        assert rule.shares is None or set(rule.seeds) <= set(rules()[rule.shares].seeds)


def losses(rule: Rule, gains: dict[str, float], n: int, noise: float = 0.001) -> dict[str, dict[int, float]]:
    """Of every candidate 1.3 nats less its gain; seeds shift all alike, and each by a little of its own."""
    draws = np.random.default_rng(3).normal(0, 1, (len(rule.candidates) + 1, len(rule.seeds)))
    return {
        candidate.name: {
            seed: 1.3 - gains.get(candidate.name, 0.0) + 0.02 * draws[-1, i] + noise * draws[c, i]
            for i, seed in enumerate(rule.seeds[:n])
        }
        for c, candidate in enumerate(rule.candidates)
    }


def contrasts(gains: dict[str, float], n: int, noise: float = 0.001, name: str = "control") -> dict[str, DecidedContrast]:
    rule = rules()[name]
    return {found.name: found for found in judged(rule, losses(rule, gains, n, noise))}


EQUAL = {"sigma-MoE": 0.04, "dense": 0.04}


def test_control_is_confirmed_where_the_mixture_keeps_what_the_width_gains() -> None:
    """4 seeds suffice where the difference is large against the noise; the interval is the rule's, not Student's."""
    found = contrasts(EQUAL, 8)
    assert (found["width"].verdict, found["kept"].verdict) == ("confirmed", "confirmed")
    width = found["width"]
    values = np.array(width.values[:4])
    assert width.n_seeds == 4 and width.n_finished == 8 and width.bound == rules()["control"].bounds[0]
    assert width.low == pytest.approx(values.mean() - width.bound * values.std(ddof=1) / 2)
    assert width.percent == pytest.approx(-0.04 / 1.26 * 100, rel=0.1)
    assert found["equal parameters"].verdict is None and found["equal parameters"].n_seeds == 8


def test_control_is_contradicted_where_it_keeps_less_than_half() -> None:
    assert contrasts({"sigma-MoE": 0.01, "dense": 0.04}, 8)["kept"].verdict == "contradicted"


def test_control_is_untestable_where_the_width_gains_nothing() -> None:
    """Not before the last look; the bound on the difference from dense is there all the same."""
    early, late = contrasts({}, 4, 0.01), contrasts({}, 8, 0.01)
    assert (early["width"].verdict, early["kept"].verdict, early["kept"].reason) == ("undecided", None, "needs 'width'")
    assert late["kept"].verdict == "bounded" and "untestable" in (late["kept"].reason or "")
    assert late["equal parameters"].low is not None and late["equal parameters"].n_seeds == 8


def test_no_verdict_between_looks() -> None:
    """3 seeds say nothing; 5 to 7 say what 4 said, to the digit; a hole ends the row of complete seeds."""
    assert contrasts(EQUAL, 3)["width"].verdict is None and contrasts(EQUAL, 3)["width"].low is None
    four, seven = contrasts({}, 4, 0.01)["width"], contrasts({}, 7, 0.01)["width"]
    assert (four.low, four.high, four.verdict) == (seven.low, seven.high, seven.verdict)
    assert seven.n_seeds == 4 and seven.n_finished == 7
    rule = rules()["control"]
    holed = losses(rule, EQUAL, 8)
    del holed["dense"][rule.seeds[1]]
    assert judged(rule, holed)[0].n_finished == 1


def test_a_later_look_does_not_take_back_what_an_earlier_one_decided() -> None:
    rule = rules()["control"]
    found = losses(rule, EQUAL, 8)
    for seed in rule.seeds[4:]:
        found["dense"][seed] += 1.0
    assert judged(rule, found)[0].verdict == "confirmed"


def test_seeds_beyond_the_look_that_decided_are_awaited_by_nobody() -> None:
    """The reference serves all contrasts; what is not tested has every seed; a candidate of no contrast too."""
    rule = rules()["ablations"]
    gains = {"K = 1, G 256": -0.05}
    assert set(awaited_seeds(rule, losses(rule, gains, 5)).values()) == {12}
    decided = awaited_seeds(rule, losses(rule, gains, 6))
    assert {name for name, n in decided.items() if n != 12} == {"K = 1, G 256"} and decided["K = 1, G 256"] == 6
    assert set(awaited_seeds(rule, losses(rule, {"sigma-MoE": 0.05}, 6)).values()) == {6}
    control, collapse = rules()["control"], rules()["collapse"]
    assert awaited_seeds(control, losses(control, EQUAL, 4))["dense, d_ff 32"] == 8
    assert set(awaited_seeds(collapse, losses(collapse, {}, 2)).values()) == {2}


def test_open_claims_are_bounded_where_the_published_effect_is_excluded() -> None:
    """At the last look alone: 0.7% for the initialisation is far outside an interval of 0.1%, inside one of 5%."""
    narrow, wide = (contrasts({}, 12, noise, "ablations")["11"] for noise in (0.001, 0.05))
    assert (narrow.verdict, wide.verdict) == ("bounded", "undecided")
    assert narrow.published_percent == pytest.approx(0.73, abs=0.01)
    assert contrasts({}, 9, 0.001, "ablations")["11"].verdict == "undecided"
    assert contrasts({"standard init": -0.05}, 12, name="ablations")["11"].verdict == "confirmed"
    assert contrasts({"standard init": 0.05}, 12, name="ablations")["11"].verdict == "contradicted"


def test_slope_is_the_change_of_the_gap_per_doubling() -> None:
    """64 experts 0.04 nats behind their dense block, 16 equal: 0.02 a doubling, 1.5% of the loss; published are 0.6%."""
    found = contrasts({"64 experts": 0.06, "dense for 64": 0.1}, 4, name="experts")["slope"]
    assert found.verdict == "confirmed" and found.percent == pytest.approx(100 * 0.02 / 1.3, rel=0.1)
    assert found.published_percent == pytest.approx((1.446 + 0.344) / 3, abs=0.01)
    narrow = contrasts({}, 4, 0.0001, name="experts")["slope"]
    assert narrow.verdict == "bounded" and narrow.high_percent is not None and narrow.high_percent < 0.1


def test_experts_are_matched_to_their_dense_blocks(corpora: Corpora) -> None:
    """In parameters of the whole model within 0.1%, at the scale that the rule is for."""
    request = Request(scale=get_scale("cpu"), corpora=dataclasses.replace(corpora, scale=get_scale("cpu")))
    runs = experiment_runs(rules()["experts"], request)
    sizes = {run.label: run.spec.model.num_params() for run in runs}
    assert [run.label for run in runs[:4]] == ["16 experts", "dense for 16", "64 experts", "dense for 64"]
    for n in (16, 64):
        assert sizes[f"{n} experts"] == pytest.approx(sizes[f"dense for {n}"], rel=1e-3)


def test_scaling_is_matched_at_every_width_and_its_slopes_are_of_least_squares(corpora: Corpora) -> None:
    """Dense and mixture within 0.1%; the slopes' weights follow from the parameters; rates are the best of the sweep."""
    rule = rules()["scaling"]
    request = Request(scale=get_scale("cpu"), corpora=dataclasses.replace(corpora, scale=get_scale("cpu")))
    specs = {run.label: run.spec for run in experiment_runs(rule, request)}
    widths = (48, 96, 128, 224)
    # Parameters on the rule's own corpus, whose vocabulary is not the test's.
    planned = {one.name: one.params for one in record("scaling").candidates}
    x = np.log2([planned[f"dense, {width}"] for width in widths])
    slopes = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    by_name = {contrast.name: contrast.weights for contrast in rule.contrasts}
    sweep = read(RESULTS / "learning-rates.json", dict[str, dict[str, Any]], fix="")
    for width, slope in zip(widths, slopes, strict=True):
        sigma, dense, narrow = (f"{name}, {width}" for name in ("sigma-MoE", "dense", "dense of K G"))
        assert specs[sigma].model.num_params() == pytest.approx(specs[dense].model.num_params(), rel=1e-3)
        assert specs[narrow].model.ffn.to_json()["d_ff"] == round(specs[dense].model.ffn.to_json()["d_ff"] / 4)
        assert by_name["slope of the gap"][sigma] == pytest.approx(slope, abs=1e-6) == -by_name["slope of the gap"][dense]
        assert by_name["slope of the width"][dense] == pytest.approx(slope, abs=1e-6)
        rates = sweep["cpu" if width == 128 else f"cpu, d_model {width}"]["rates"]
        tried = {rate["lr"]: rate["mean"] for rate in rates}
        best = min(tried, key=lambda lr: tried[lr])
        assert min(tried) < best < max(tried)
        assert {specs[name].train.lr for name in (sigma, dense, narrow)} == {best}


def loads(entropy: list[float], dead: list[float]) -> LayerLoads:
    """At the start, in the middle and at the end."""
    return LayerLoads(steps=[0, 500, 1000], entropy=entropy, dead=dead)


@pytest.mark.parametrize(
    ("entropy", "dead", "fallen"),
    [
        ([0.9, 0.6, 0.4], [0.0, 0.1, 0.2], True),
        ([0.9, 0.6, 0.51], [0.0, 0.4, 0.55], True),
        ([0.9, 0.6, 0.51], [0.0, 0.4, 0.5], False),
        # Uneven from the start, or in the middle, and on the mend.
        ([0.2, 0.3, 0.45], [0.9, 0.8, 0.6], False),
        ([0.9, 0.45, 0.45], [0.0, 0.55, 0.55], False),
    ],
)
def test_layer_has_collapsed_where_its_load_is_uneven_and_grows_more_so(
    entropy: list[float], dead: list[float], fallen: bool
) -> None:
    assert has_collapsed(loads(entropy, dead)) == fallen


def test_collapse_is_confirmed_where_every_seed_has_a_layer_that_fell() -> None:
    rule, even, fallen = rules()["collapse"], loads([1.0] * 3, [0.0] * 3), loads([0.9, 0.5, 0.2], [0.0, 0.5, 0.8])
    layers = {
        "sigma-MoE": ([even], [even]),
        "softmax after top-k": ([even, fallen], [fallen, fallen]),
        "softmax after top-k, released": ([even], [fallen]),
        "Switch": ([even], [even]),
        "Switch, released": ([fallen],),
    }
    runs = [
        ExperimentRun(
            candidate=name, seed=seed, test=1.0, valid=1.0, train_s=1, wall_s=1, loads=of, digest="", version="", sources=""
        )
        for name, seeds in layers.items()
        for seed, of in enumerate(seeds)
    ]
    found = {one.candidate: (one.n_collapsed, one.n_finished, one.verdict) for one in collapses(rule, runs)}
    assert found == {
        "sigma-MoE": (0, 2, None),
        "softmax after top-k": (2, 2, "confirmed"),
        "softmax after top-k, released": (1, 2, "undecided"),
        "Switch": (0, 2, "contradicted"),
        "Switch, released": (1, 1, None),
    }


def test_loads_are_read_from_a_run(micro: Scale, corpora: Corpora, tmp_path: Path) -> None:
    """One entry for each snapshot and layer; a record keeps them."""
    rule = msgspec.structs.replace(rules()["collapse"], **SHORT)
    run, *others = experiment_runs(rule, Request(scale=micro, corpora=corpora))
    pool = Pool(tmp_path / "pool")
    assert execute(pool, run.spec).finished
    (found,) = experiment_result("collapse", rule, [run, *others], pool).runs
    assert len(found.loads) == run.spec.model.n_layers
    for layer in found.loads:
        assert layer.steps[0] == 0 and layer.steps[-1] == run.spec.train.steps
        assert all(0.5 < entropy <= 1 for entropy in layer.entropy) and len(layer.dead) == len(layer.steps)
    # Another experiment that shares the run has it from that record, under its own name; the reverse lacks the loads.
    other = msgspec.structs.replace(rules()["experts"], **SHORT)
    shared, empty = experiment_runs(other, Request(scale=micro, corpora=corpora)), Pool(tmp_path / "none")
    (known,) = experiment_result("experts", other, shared, empty, {found.digest: found}).runs
    assert known == msgspec.structs.replace(found, candidate="64 experts", loads=[])
    old = msgspec.structs.replace(found, version="0.0.9")
    assert experiment_result("experts", other, shared, empty, {found.digest: old}).runs == []
    assert experiment_result("collapse", rule, [run, *others], empty, {known.digest: known}).runs == []


SHORT = {"seeds": [7, 8], "looks": [2], "bounds": [12.8]}


def test_runs_are_planned_and_a_record_outlives_the_pool(micro: Scale, corpora: Corpora, tmp_path: Path) -> None:
    """A seed after the other, later candidates last; widths, schedules, seeds are the rule's; other settings do not count."""
    rule = msgspec.structs.replace(rules()["control"], **SHORT)
    runs = experiment_runs(rule, Request(scale=micro, corpora=corpora))
    assert [run.seed for run in runs] == [7] * 3 + [8] * 3 + [7, 7, 8, 8]
    assert [run.label for run in (*runs[:3], *runs[6:8])] == [candidate.name for candidate in rule.candidates]
    widths = [run.spec.model.ffn.to_json().get("d_ff") for run in runs]
    assert widths[2] == 257 and widths[7] == 32 and runs[6].spec.train.steps == 2 and runs[0].spec.train.steps == 4
    pool = Pool(tmp_path / "pool")
    for run in runs[:3]:
        assert execute(pool, run.spec).finished
    first = experiment_result("control", rule, runs, pool)
    assert len(first.runs) == 3 and first.contrasts[0].n_finished == 1 and first.contrasts[0].verdict is None
    path = tmp_path / "control.json"
    write_json(path, first)
    empty = Pool(tmp_path / "none")
    recorded = {run.digest: run for run in read(path, ExperimentResult, fix="-").runs}
    again = experiment_result("control", rule, runs, empty, recorded)
    assert again == first
    longer = experiment_runs(rule, Request(scale=micro, corpora=corpora, steps=5))
    assert experiment_result("control", rule, longer, empty, recorded).runs == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reference": "nobody"}, "candidates"),
        ({"looks": [4, 6]}, "seeds"),
        ({"bounds": [4.0]}, "bound each"),
        ({"contrasts": [{"name": "a", "words": "", "weights": {"dense": 1.0}}]}, "sum to 0"),
        ({"contrasts": [{"name": "a", "words": "", "weights": {}, "needs": "b"}]}, "before"),
    ],
)
def test_rules_that_do_not_hold_together_are_refused(change: dict[str, object], words: str) -> None:
    plain = msgspec.to_builtins(rules()["control"])
    with pytest.raises((UserError, msgspec.ValidationError), match=words):
        msgspec.convert({**plain, **change}, Rule)


def test_looks_and_errors_are_checked() -> None:
    with pytest.raises(UserError, match="looks"):
        t_bounds([8, 4], 0.05)
    with pytest.raises(UserError, match="alpha"):
        t_bounds([4, 8], 5.0)
