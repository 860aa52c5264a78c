"""A finished run analysed: counts that agree with each other, bounded state, refusals, files."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from msgspec import to_builtins

from sparseffn.analysis import analyze_run
from sparseffn.analysis.run import RunCounts
from sparseffn.cli import main, output
from sparseffn.data import Corpus, unpadded
from sparseffn.errors import UserError
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.models import TransformerXL, TransformerXLConfig
from sparseffn.results.analysis_result import AnalysisResult
from sparseffn.storage import read, write_json
from sparseffn.training import RunSettings, TrainConfig, load_run_model
from sparseffn.training.snapshots import snapshot


def test_everything_counts_the_same_tokens(runs: dict[str, Path], corpus: Corpus) -> None:
    """K selections a token; tokens by expert add up to the load; over experts, load times lift is 1."""
    model, folder = load_run_model(runs["sigma-moe"])
    text = unpadded(corpus.valid, batch=3)
    counts = RunCounts(model, [text])
    counts.read(model, text, RunSettings.read(folder).train, None)
    assert counts.served is not None and counts.channels is not None
    for name, layer in counts.usage.layers.items():
        assert layer.active_units.n == counts.channels.layers[name][1].n == len(text) - 1
        assert int(layer.counts.sum()) == 2 * (len(text) - 1)
        assert counts.served.layers[name].sum(1).tolist() == layer.counts.tolist()
        assert (counts.served.layers[name].sum(0) == 2 * counts.served.totals).all()


def test_a_block_shared_by_layers_is_counted_as_its_copies_would_be(corpus: Corpus) -> None:
    """Layer by layer, each token once; snapshots of routing too."""
    ffn = SigmaMoEConfig(d_model=16, n_experts=4, expert_size=8, k=2)
    plain = TransformerXL(TransformerXLConfig(vocab_size=256, d_model=16, n_layers=3, n_heads=2, d_head=8, ffn=ffn))
    shared = TransformerXL(dataclasses.replace(plain.config, shared_layers=True))
    shared.init_parameters(0)
    plain.load_state_dict(shared.state_dict())
    config, text = TrainConfig(steps=1, batch=3, context=16), unpadded(corpus.valid, batch=8)
    counts = [RunCounts(model, [text]) for model in (shared, plain)]
    for model, own in zip((shared, plain), counts, strict=True):
        own.read(model, text, config, None)
    usage = [own.usage.result() for own in counts]
    assert usage[0] == usage[1] and len(usage[0].usage) == 3
    served = [own.served.result(corpus.tokenizer) for own in counts if own.served is not None]
    assert len(served) == 2 and served[0] == served[1]
    channels = [own.channels.result() for own in counts if own.channels is not None]
    assert len(channels) == 2 and channels[0] == channels[1]
    snapshots = [snapshot(model, corpus, config) for model in (shared, plain)]
    assert len(snapshots[0]) == 3 and all(map(torch.equal, *snapshots))


def test_state_does_not_grow_with_the_text(runs: dict[str, Path], corpus: Corpus) -> None:
    """Ten times the tokens, the same bytes but for digits of counts."""
    model, folder = load_run_model(runs["sigma-moe"])
    config, sizes = RunSettings.read(folder).train, []
    for n_tokens in (301, 3001):
        text = unpadded(corpus.train[:n_tokens], batch=3)
        counts = RunCounts(model, [corpus.train[:3001]])
        counts.read(model, text, config, None)
        sizes.append(len(pickle.dumps(counts)))
    assert abs(sizes[1] - sizes[0]) < 64 < sizes[0]


def test_analysis_of_a_mixture_is_whole(runs: dict[str, Path], corpus: Corpus, tmp_path: Path) -> None:
    """Channels are those of the selected experts that ReLU leaves; the file that holds it is read back as it was."""
    made = analyze_run(runs["sigma-moe"], corpus, splits=("valid", "test"))
    write_json(tmp_path / "analysis.json", made)
    found = read(tmp_path / "analysis.json", AnalysisResult, fix="")
    assert found == made
    write_json(tmp_path / "analysis.json", {**to_builtins(made), "format": 2})
    with pytest.raises(UserError, match=r"`format` of the analysis must be 1; got 2"):
        read(tmp_path / "analysis.json", AnalysisResult, fix="")
    n_tokens = sum(len(unpadded(corpus.tokens(split), batch=3)) - 1 for split in ("valid", "test"))
    assert found.n_tokens == n_tokens and found.unit == "experts" and found.run.name == "sigma-moe"
    assert all(0 < layer.mean < 16 and layer.total == 32 for layer in found.active)
    assert found.tokens is not None and [len(layer) for layer in found.tokens] == [4, 4] and len(found.cooccurrence) == 2
    assert found.training is not None and found.training.source == "snapshots"
    assert [point.step for point in found.training.points] == [0, 4, 8, 12]


def test_run_without_snapshots_is_analysed_from_its_checkpoints(runs: dict[str, Path], corpus: Corpus, tmp_path: Path) -> None:
    """The two that are kept, and the analysis says so; the last of them gives what its snapshot gave."""
    shutil.copytree(runs["sigma-moe"], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "routing")
    found = analyze_run(tmp_path / "run", corpus, max_tokens=100).training
    whole = analyze_run(runs["sigma-moe"], corpus, max_tokens=100).training
    assert found is not None and whole is not None
    assert found.source == "checkpoints" and [point.step for point in found.points] == [10, 12]
    assert found.points[-1] == whole.points[-1]


def test_analysis_of_the_dense_block_has_channels_alone(runs: dict[str, Path], corpus: Corpus) -> None:
    """No experts, so no tokens, pairs or routing."""
    found = analyze_run(runs["dense"], corpus, max_tokens=200)
    assert found.tokens is None and found.training is None and found.cooccurrence == [None, None]
    assert all(0 < layer.mean < 32 and layer.std for layer in found.active)


def test_what_is_no_finished_run_is_refused(runs: dict[str, Path], corpus: Corpus, tmp_path: Path) -> None:
    """No run; no result yet; the last checkpoint gone; too few tokens."""
    with pytest.raises(UserError, match=r"config.json` must exist"):
        analyze_run(tmp_path, corpus)
    shutil.copytree(runs["dense"], tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match=r"must hold a finished run; got one without its result.*fix: run the command"):
        analyze_run(tmp_path / "run", corpus)
    shutil.copy(runs["dense"] / "result.json", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000012")
    with pytest.raises(UserError, match=r"without its checkpoint of step 12 \(last checkpoint: step 10\)"):
        analyze_run(tmp_path / "run", corpus)
    with pytest.raises(UserError, match=r"`max_tokens` must be at least 2; got 1"):
        analyze_run(runs["dense"], corpus, max_tokens=1)


def test_command_writes_json_and_figures(
    runs: dict[str, Path], song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PNG and SVG of each figure; tables in the terminal."""
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed here")
    words = ["analyze", str(runs["sigma-moe"]), "--data-dir", str(song), "--cache-dir", str(song.parent / "cache")]
    assert main([*words, "--max-tokens", "300", "--out", str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    assert "entropy" in text and "Tokens by expert, layer 1" in text
    drawn = {path.stem for path in (tmp_path / "a").glob("*.png")}
    assert drawn == {path.stem for path in (tmp_path / "a").glob("*.svg")}
    assert drawn >= {"active", "usage", "cooccurrence", "tokens-0", "tokens-1", "load-entropy", "largest-load", "stability"}
    assert json.loads((tmp_path / "a" / "analysis.json").read_text())["n_tokens"] == 297


def test_command_without_matplotlib_writes_the_numbers_and_says_so(
    runs: dict[str, Path], song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the command that mends it."""
    monkeypatch.setattr(output.importlib.util, "find_spec", lambda name: None)
    words = ["analyze", str(runs["dense"]), "--data-dir", str(song), "--cache-dir", str(song.parent / "cache")]
    assert main([*words, "--max-tokens", "300", "--out", str(tmp_path / "a"), "--json"]) == 0
    done = capsys.readouterr()
    assert json.loads(done.out)["kind"] == "analysis" and "pip install 'sparseffn[plot]'" in done.err
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["analysis.json"]
