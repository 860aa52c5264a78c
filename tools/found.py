"""What the files of results say, read for the sentences of README.md and docs/ (`sentences.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from sparseffn.report.study_report import read_study
from sparseffn.results.evidence_result import ClaimsResult
from sparseffn.results.experiment_result import DecidedContrast, ExperimentResult, ExperimentRun
from sparseffn.results.study_result import StartRow, StudyResult, Variant
from sparseffn.results.table_result import Cell, TableResult
from sparseffn.stats import difference
from sparseffn.storage import read

STUDIES = ("init", "competition", "balance")


def rounded(one: DecidedContrast) -> tuple[float, float]:
    """Its interval in percent of the loss, as tables round it further."""
    assert one.n_seeds and one.low_percent is not None and one.high_percent is not None, one.name
    return round(one.low_percent, 1), round(one.high_percent, 1)


class Found:
    """What the files of results say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def studies(self) -> dict[str, StudyResult]:
        return {name: read_study(self.folder / f"study-{name}.json") for name in STUDIES}

    def load(self, source: str, rows: str, *, n_experts: int = 32, k: int = 4) -> StartRow:
        """At initialisation."""
        (found,) = [
            row
            for row in self.loads(source)
            if (row.selector, row.n_experts, row.k, row.expert_size) == (rows, n_experts, k, 64)
        ]
        return found

    def loads(self, source: str) -> list[StartRow]:
        start = self.studies["init"].start
        return [row for row in start if (row.input, row.init, row.n_layers) == (source, "shared", 4)]

    def variants(self) -> Iterator[tuple[Variant, Variant]]:
        """The first of each study, and every other."""
        for study in self.studies.values():
            for variant in study.variants[1:]:
                yield study.variants[0], variant

    def gap(self, name: str, step: int) -> float:
        """Of load entropy, to the baseline."""
        ((first, variant),) = [pair for pair in self.variants() if pair[1].name == name]
        at = [{run.seed: p.load_entropy for run in of.runs for p in run.probes if p.step == step} for of in (variant, first)]
        return difference(*at).difference

    def cell(self, table: str, label: str) -> Cell:
        found = read(self.folder / "evidence" / f"{table}.json", TableResult, fix="run `make evidence` again")
        return next(cell for cell in found.cells if found.rows[cell.row].label == label)

    def experiment(self, name: str) -> ExperimentResult:
        return read(self.folder / "evidence" / f"{name}.json", ExperimentResult, fix="run `make evidence` again")

    def of(self, experiment: str, candidate: str) -> list[ExperimentRun]:
        return [run for run in self.experiment(experiment).runs if run.candidate == candidate]

    def contrast(self, experiment: str, name: str) -> DecidedContrast:
        (found,) = [one for one in self.experiment(experiment).contrasts if one.name == name]
        return found

    def interval(self, experiment: str, contrast: str) -> tuple[float, float]:
        """In percent of the loss, as tables round it further; of a contrast that had a look."""
        return rounded(self.contrast(experiment, contrast))

    def claims(self) -> ClaimsResult:
        return read(self.folder / "evidence" / "claims.json", ClaimsResult, fix="run `make evidence` again")
