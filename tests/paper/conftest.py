"""A scale of tiny models of a few steps, on a song."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from micro_tables import MakeTable

from sparseffn.ffn import BlockShape
from sparseffn.models.presets import get_preset
from sparseffn.paper.corpus_choice import Corpora, CorpusChoice
from sparseffn.paper.planned import PlannedTable, Request, plan_table
from sparseffn.paper.scales import Scale, make_scale
from sparseffn.paper.tables import get_table


@pytest.fixture(autouse=True, scope="module")
def _torch_backend() -> Iterator[None]:
    """Nothing here is about kernels, and compiling them takes longer than all runs together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEFFN_BACKEND", "torch")
        yield


@pytest.fixture(scope="session")
def song(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text."""
    path = tmp_path_factory.mktemp("song") / "song.txt"
    path.write_text("".join(f"{i} bottles of beer on the wall\n" for i in range(600)))
    return path


@pytest.fixture(scope="session")
def micro() -> Scale:
    """All columns at width 16, experts of 8."""
    shape = BlockShape(d_model=16, d_ff=1, n_experts=1, expert_size=1, k=1, n_layers=1)
    template = dataclasses.replace(
        get_preset("tiny"), name="micro", shape=shape, n_heads=2, d_head=8, context=16, batch=2, steps=4, eval_batch=4
    )
    return make_scale(template, expert_size=8)


@pytest.fixture(scope="session")
def corpora(micro: Scale, song: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    """The song for every column."""
    cache = str(tmp_path_factory.mktemp("cache"))
    return Corpora(scale=micro, choice=CorpusChoice(name="text", data_dir=str(song), cache_dir=cache))


@pytest.fixture
def table(micro: Scale, corpora: Corpora) -> MakeTable:
    """Plans a table at the micro scale."""

    def make(name: str, columns: list[str], rows: list[str] | None = None, seeds: tuple[int, ...] = (0,)) -> PlannedTable:
        request = Request(scale=micro, corpora=corpora, seeds=seeds)
        return plan_table(get_table(name).selected(columns=columns, rows=rows, settings="paper"), request)

    return make
