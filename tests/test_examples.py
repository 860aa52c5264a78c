"""The scripts of examples/ run, at sizes of a test."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch.distributed as dist

from sparseffn.contract import check_method, run_check
from sparseffn.ffn import list_methods, method_class, unregister

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _same_methods() -> Iterator[None]:
    """What a script registers is forgotten after its test."""
    before = list_methods()
    yield
    for name in set(list_methods()) - set(before):
        unregister(name)


def load(name: str) -> ModuleType:
    """What a script defines; its `main` is not run."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda script: script.stem)
def test_an_example_is_short_and_tested(script: Path) -> None:
    """Under 60 lines, and a test below loads it."""
    assert len(script.read_text(encoding="utf-8").splitlines()) < 60
    assert f'load("{script.stem}")' in Path(__file__).read_text(encoding="utf-8")


def test_layer_in_a_model_learns(capsys: pytest.CaptureFixture[str]) -> None:
    """Twenty steps halve the loss of a text that repeats itself."""
    load("layer_in_a_model").main(steps=21)
    first, last = (
        float(line.split("loss ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines() if "step" in line
    )
    assert last < first / 2


def test_expert_parallel_learns(capsys: pytest.CaptureFixture[str]) -> None:
    """As one process of one: the experts are sharded over it all the same."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        load("expert_parallel").main(steps=31)
    finally:
        dist.destroy_process_group()
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 4 and losses[-1] < losses[0] / 2


def test_faster_experts_agree(capsys: pytest.CaptureFixture[str]) -> None:
    """A narrow layer: both implementations decode, and their logits differ by rounding."""
    pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")
    load("faster_experts").main(n_layers=1, hidden_size=64, n_new=2)
    shown = capsys.readouterr().out
    assert "sparseffn: " in shown and float(shown.rsplit(" ", 1)[1]) < 1e-5


def test_swap_in_llama_keeps_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Perplexities of a small random model stay near the dense one's, and those of the loaded model are the saved one's."""
    pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")
    script = load("swap_in_llama")
    model, tokens = script.small_model()
    monkeypatch.setattr(script, "small_model", lambda: (model, tokens))
    script.main(out=str(tmp_path / "cheaper"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "perplexity" in line]
    dense, half, split, loaded = (float(line.rsplit(" ", 1)[1]) for line in lines)
    assert loaded == half != dense and abs(half / dense - 1) < 0.05 and abs(split / dense - 1) < 0.25
    # What is allowed is little of what the blocks contribute.
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    assert script.perplexity(model, tokens.chunk(2)[1]) > 2 * dense


def test_own_method_is_one_of_them() -> None:
    """Registered by the script alone, it keeps what a mistake in a method breaks first."""
    load("own_method")
    assert "relu-moe" in list_methods()
    for check in ("reference", "sum_of_values", "saved_bytes", "no_dead_option", "gradients"):
        run_check(check, method_class("relu-moe"))


@pytest.mark.slow
def test_own_method_keeps_the_contract() -> None:
    """All of it, as the script says when it is run."""
    load("own_method")
    check_method("relu-moe")
