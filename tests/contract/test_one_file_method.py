"""One file is a method: the toy below appears everywhere without another edit, and an installed package joins by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, final

import pytest
import torch
from torch import Tensor, nn

import sparseffn
from sparseffn.cli import main
from sparseffn.contract import check_method, list_checks
from sparseffn.ffn import FeedForward, FFNConfig, Routed, list_methods, option, register, unregister
from sparseffn.results.bench_result import Roof


@dataclass(frozen=True, kw_only=True, slots=True)
class SquareConfig(FFNConfig):
    """Squared scores: y = W2 (W1 x)^2, with an activation on top."""

    name: ClassVar[str] = "toy-square"
    paper: ClassVar[str] = "So 2021, arXiv 2109.08668"
    size_fields: ClassVar[tuple[str, ...]] = ("d_ff",)

    d_ff: Annotated[int, option("Key-value pairs.", low=1)]

    def build(self) -> Square:
        return Square(self)

    def num_params(self) -> int:
        return 2 * self.d_model * self.d_ff

    def active_params(self) -> int:
        return self.num_params()

    def forward_flops(self, *, training: bool = False) -> int:
        return 4 * self.d_model * self.d_ff

    def saved_bytes(self, n_tokens: int, itemsize: int = 4) -> int:
        tensors = {"relu": 2, "identity": 2, "gelu": 3, "silu": 3}[self.activation]
        return n_tokens * self.d_ff * tensors * itemsize

    @property
    def n_channels(self) -> int:
        return self.d_ff

    @property
    def active_channels(self) -> int:
        return self.d_ff

    @classmethod
    def examples(cls) -> list[FFNConfig]:
        return [cls(d_model=8, d_ff=20, n_layers=2), cls(d_model=6, d_ff=10, activation="silu")]


@final
class Square(FeedForward):
    """`keys [d_ff, d_model]`, `values [d_ff, d_model]`."""

    def __init__(self, config: SquareConfig) -> None:
        super().__init__(config)
        self.keys = nn.Parameter(torch.empty(config.d_ff, config.d_model))
        self.values = nn.Parameter(torch.empty(config.d_ff, config.d_model))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0.0, (2 / (self.config.d_model * self.config.n_layers)) ** 0.5, generator)

    def coefficients_TF(self, x_TD: Tensor) -> Tensor:
        act = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "identity": lambda u: u}
        return act[self.config.activation](nn.functional.linear(x_TD, self.keys).square())

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        alpha_TF = self.coefficients_TF(x_TD)
        return alpha_TF @ self.values, Routed(alpha_TF)

    def reference_TD(self, x_TD: Tensor) -> Tensor:
        return self.coefficients_TF(x_TD) @ self.values

    def values_matrix(self) -> Tensor:
        return self.values


@pytest.fixture
def toy() -> Iterator[str]:
    """The toy, registered for one test."""
    register(SquareConfig)
    yield SquareConfig.name
    unregister(SquareConfig.name)


def test_toy_is_listed_and_documented(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`methods` and the documentation's table show it."""
    assert toy in list_methods()
    assert main(["methods", "--markdown"]) == 0
    assert "| `toy-square` | Squared scores" in capsys.readouterr().out
    assert main(["methods", toy]) == 0
    assert "d_ff" in capsys.readouterr().out
    assert sparseffn.Square is Square and sparseffn.SquareConfig is SquareConfig


def test_toy_is_matched(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`match` sizes it."""
    assert main(["match", "--method", toy, "--like", "dense", "--d-model", "64", "--d-ff", "256", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"]


def test_toy_keeps_the_contract(toy: str) -> None:
    """The whole suite runs on it by name."""
    assert set(check_method(toy)) == set(list_checks())


def test_toy_is_timed(toy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The benchmark takes it, on a machine that is quickly measured."""
    made_up = Roof(flops_per_s=1e11, bytes_per_s=1e10, scattered_bytes_per_s=5e9)
    monkeypatch.setattr("sparseffn.bench.layer.measure_roof", lambda dtype, device: made_up)
    monkeypatch.setattr("sparseffn.bench.benchmark.last_level_cache_bytes", lambda device: (2**14, "made up"))
    assert main(["bench", "layer", "--methods", toy, "--tokens", "4", "--rounds", "1", "--json"]) == 0
    assert [row["method"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["dense", toy]


def test_toy_is_compared(toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`compare` trains it beside the dense block."""
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 300)
    arguments = ["compare", "--methods", "dense", toy, "--corpus", "text", "--data-dir", str(tmp_path / "book.txt")]
    arguments += ["--steps", "2", "--batch", "2", "--context", "16", "--out", str(tmp_path / "out"), "--json"]
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)["methods"]
    assert [row["label"] for row in rows] == ["dense", toy]
    assert all(row["test"]["n"] == 1 for row in rows)


def test_installed_package_joins_by_entry_point(tmp_path: Path) -> None:
    """A distribution with an entry point is found without being imported by anybody."""
    source = (
        Path(__file__)
        .read_text()
        .split("@pytest.fixture")[0]
        .replace("from sparseffn.cli import main\n", "")
        .replace("import sparseffn\n", "")
    )
    (tmp_path / "third_party_ffn.py").write_text(source)
    info = tmp_path / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sparseffn.methods]\ntoy-square = third_party_ffn:SquareConfig\n")
    code = "from sparseffn.ffn import list_methods; print(list_methods())"
    package = Path(sparseffn.__file__).parents[1]
    path = {"PYTHONPATH": f"{tmp_path}:{package}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, check=True)
    assert "toy-square" in done.stdout
