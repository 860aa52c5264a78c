"""Comparisons within a decoder as Llama's: gated blocks, the same matching, table and page; runs that all commands read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseffn.cli import main
from sparseffn.comparison import CompareSettings, match_methods, parse_methods
from sparseffn.comparison.experiment import Comparison, run_path
from sparseffn.errors import UserError
from sparseffn.ffn import field_infos, list_methods
from sparseffn.models import Decoder, DecoderConfig
from sparseffn.models.presets import PRESETS, get_preset
from sparseffn.results.comparison_result import read_comparison
from sparseffn.training import load_run_model


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("method", list_methods())
def test_every_method_is_equal_at_every_preset(method: str, preset: str) -> None:
    """Within 0.5% of the whole decoder, K x G within 10% of the preset's, gated where it can be."""
    llama = get_preset(preset).within("llama")
    found = match_methods(parse_methods([method]), llama, 8000)[0]
    assert found.match.equal and found.marks == ()
    assert isinstance(found.model, DecoderConfig) and found.model.num_params() == found.match.model_params
    assert getattr(found.config, "gated", None) is (True if "gated" in field_infos(type(found.config)) else None)


def test_a_method_may_be_compared_without_a_gate() -> None:
    """At the gated model's parameters, which are more pairs."""
    words = ["dense", "dense", "gated=false", "activation=relu"]
    gated, plain = match_methods(parse_methods(words), get_preset("tiny").within("llama"), 256)
    assert plain.match.equal and (plain.config.gated, plain.config.activation) == (False, "relu")
    assert gated.config.n_channels == 2048 and plain.config.n_channels == pytest.approx(3072, rel=0.01)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A comparison of a few steps, and the words of its command."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "song.txt").write_text("".join(f"{i} bottles of beer on the wall\n" for i in range(600)))
    words = ["compare", "--corpus", "text", "--data-dir", str(folder / "song.txt"), "--out", str(folder / "out")]
    words += ["--steps", "4", "--batch", "2", "--context", "16", "--methods", "dense", "sigma-moe"]
    assert main([*words, "--backbone", "llama"]) == 0
    return words, folder / "out"


def test_table_and_page_name_the_backbone(compared: tuple[list[str], Path]) -> None:
    """And every number of the table is there."""
    out = compared[1]
    result = read_comparison(out / "comparison.json")
    assert result.finished and result.backbone == "llama" and result.model["n_kv_heads"] == 2
    assert (result.settings["memory"], result.settings["eval_memory"]) == (0, 0)
    for row in result.methods:
        assert row.config["gated"] and row.test and row.valid_at_equal_time and row.curves
        assert row.residual_percent is not None and abs(row.residual_percent) <= 0.5
    assert result.methods[1].ffn_flops_vs_dense == pytest.approx(0.128, abs=0.01)
    page, table = (out / "page.html").read_text(), (out / "table.md").read_text()
    assert "Decoders as Llama&#39;s with 2 layers" in page and "gated by SiLU" in page and "backbone llama" in table
    # SiLU is never zero: nothing is to be seen in how many channels are active.
    assert "Active channels" not in page and result.methods[0].active


def test_its_runs_are_read_like_any_other(compared: tuple[list[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    """By the functions and the commands for runs."""
    run = run_path(compared[1], "sigma-moe", 0)
    model, _ = load_run_model(run)
    assert isinstance(model, Decoder) and model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 256)
    capfd.readouterr()
    assert main(["generate", str(run), "--prompt", "12 bott", "--n-tokens", "5"]) == 0
    assert capfd.readouterr().out.startswith("12 bott")
    assert main(["eval", str(run), "--memory", "4"]) == 2
    assert "`memory_length` must be 0: a decoder has no memory; got 4" in capfd.readouterr().err


def test_its_runs_are_exported_and_pushed(
    compared: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a decoder of transformers, whose card has the comparison's table; what the hub gets is loaded again as it was."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")
    from hf.folder_hub import FolderHub

    run, to = run_path(compared[1], "sigma-moe", 0), tmp_path / "exported"
    assert main(["export", str(run), "--to", str(to)]) == 0
    exported = transformers.AutoModelForCausalLM.from_pretrained(to)
    hub = FolderHub(tmp_path, monkeypatch)
    exported.push_to_hub("me/sigma", max_shard_size="2MB")
    transformers.AutoTokenizer.from_pretrained(to).push_to_hub("me/sigma")
    assert "model.safetensors.index.json" in hub.commits[0]
    assert sum(name.endswith(".safetensors") for name in hub.commits[0]) > 2
    (model, _), pushed = load_run_model(run), tmp_path / "me" / "sigma"
    tokens = transformers.AutoTokenizer.from_pretrained(pushed)("12 bottles", return_tensors="pt").input_ids
    for folder in (to, pushed):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert type(loaded).__name__ == "SparseFFNForCausalLM" and loaded.config.max_position_embeddings == 16
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        card = (folder / "README.md").read_text()
        assert "A decoder language model" in card and "2 of keys and values" in card and "| dense | 1.75 M |" in card


def test_another_backbone_is_another_comparison(compared: tuple[list[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    """Its folder is refused; the folder of a Transformer-XL stays what it was."""
    words, out = compared
    assert main(words) == 2
    assert "overrides.backbone is 'llama', not None" in capfd.readouterr().err
    settings = CompareSettings(
        methods=tuple(parse_methods(["dense"])), corpus="text", data_dir=str(out.parent / "song.txt"), steps=4
    )
    assert Comparison.open(settings, out.parent / "other").identity["overrides"] == {}
    with pytest.raises(UserError, match="unknown backbone 'lamma'; fix: did you mean 'llama'"):
        CompareSettings(methods=settings.methods, backbone="lamma")  # pyright: ignore[reportArgumentType]
