"""Pictures of docs/ from files of results, each marked with the digest of what it shows: one of other results is found."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from sparseffn.report.forest import claim_rows, experiment_rows, forest_plot, study_rows
from sparseffn.report.plotting import Plot, standalone_svg
from sparseffn.report.scaling_plots import flops_plot, over_flops, over_params, params_plot
from sparseffn.report.study_report import read_study
from sparseffn.report.training_plots import (
    collapse_courses,
    evenness_plot,
    load_courses,
    load_plot,
    loss_courses,
    loss_plot,
)
from sparseffn.results.evidence_result import ClaimsResult
from sparseffn.results.experiment_result import ExperimentResult
from sparseffn.storage import json_digest, read, write_text

_FIX = "run `make evidence` again"


@dataclass(frozen=True, kw_only=True)
class Picture:
    name: str
    mark: str
    """In the file."""
    draw: Callable[[], Plot]


def pictures(results: Path) -> list[Picture]:
    """Those that there are results for."""
    claims = read(results / "evidence" / "claims.json", ClaimsResult, fix=_FIX)
    control, scaling, collapse, experts, ablations = (
        read(results / "evidence" / f"{name}.json", ExperimentResult, fix=_FIX)
        for name in ("control", "scaling", "collapse", "experts", "ablations")
    )
    studies = [read_study(results / f"study-{name}.json") for name in ("init", "competition", "balance")]
    found: list[tuple[str, str, list[Any], Callable[..., Plot]]] = [
        ("forest-claims", "Losses of the tables", claim_rows(claims), forest_plot),
        ("forest-control", "The control", experiment_rows(control), forest_plot),
        ("forest-studies", "Losses of the short trainings", study_rows(studies), forest_plot),
        ("curves-control", "Learning curves of the control", loss_courses(control), loss_plot),
        ("forest-scaling", "Scaling", experiment_rows(scaling), forest_plot),
        ("forest-experts", "More experts", experiment_rows(experts), forest_plot),
        ("forest-ablations", "The ablations", experiment_rows(ablations), forest_plot),
        ("scaling-params", "Loss over parameters", over_params(scaling), params_plot),
        ("scaling-flops", "Loss over training FLOPs", over_flops(scaling), flops_plot),
        ("loads-collapse", "Evenness of the load over training", collapse_courses(collapse), evenness_plot),
        ("loads-studies", "Evenness of the load over training, less the baseline's", load_courses(studies), load_plot),
    ]
    made = []
    for name, title, data, draw in found:
        mark = f"data {json_digest(msgspec.to_builtins(data))}"
        if data:
            made.append(Picture(name=name, mark=mark, draw=functools.partial(draw, data, name=name, title=title, mark=mark)))
    return made


def write_pictures(results: Path, folder: Path) -> None:
    """Those that are not there or of other results."""
    for picture in _stale(results, folder):
        write_text(folder / f"{picture.name}.svg", standalone_svg(picture.draw()))


def stale_pictures(results: Path, folder: Path) -> list[str]:
    """Their names; how a version of matplotlib draws them does not matter."""
    return [picture.name for picture in _stale(results, folder)]


def _stale(results: Path, folder: Path) -> list[Picture]:
    def is_stale(picture: Picture) -> bool:
        path = folder / f"{picture.name}.svg"
        return not path.exists() or picture.mark not in path.read_text(encoding="utf-8")

    return [picture for picture in pictures(results) if is_stale(picture)]
