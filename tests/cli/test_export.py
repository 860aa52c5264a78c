"""`export`: from a run to a Hugging Face folder and back to the same model."""

from __future__ import annotations

import errno
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import sparseffn.hf
from hf.folder_hub import FolderHub
from sparseffn.cli import main
from sparseffn.data import evaluation_windows
from sparseffn.evaluation import evaluate
from sparseffn.hf import TransformerXLForCausalLM
from sparseffn.training import RunSettings, load_run_corpus, load_run_model, load_run_tokenizer

SONG = "".join(f"{i} bottles of beer on the wall\n" for i in range(400))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trained runs, and their table."""
    folder = tmp_path_factory.mktemp("comparison")
    (folder / "song.txt").write_text(SONG)
    words = ["compare", "--methods", "sigma-moe", "--corpus", "text", "--data-dir", str(folder / "song.txt"), "--steps", "4"]
    out = folder / "out"
    assert main([*words, "--batch", "2", "--context", "16", "--tokenizer", "chars", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def run(comparison: Path) -> Path:
    """A run of the comparison by itself, outside of its folder."""
    alone = comparison.parent / "sigma"
    shutil.copytree(comparison / "runs" / "sigma-moe" / "seed-0", alone)
    return alone


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    folder = run.parent / "sigma-hf"
    assert main(["export", str(run), "--to", str(folder)]) == 0
    return folder


def test_it_is_the_runs_model(run: Path, exported: Path) -> None:
    """Bit-identical logits, and the perplexity of `sparseffn eval`, the memory carried from window to window."""
    trained, folder = load_run_model(run)
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    assert isinstance(loaded, TransformerXLForCausalLM)
    settings = RunSettings.read(folder)
    tokens = load_run_corpus(run).valid[:200]
    ids = torch.as_tensor(tokens[:40].astype("int64"))[None]
    assert torch.equal(loaded(ids).logits, trained(ids).logits)
    expected = evaluate(trained, tokens, batch=1, context=16, memory=settings.train.eval_memory)
    memory, nats = loaded.new_memory(), 0.0
    with torch.no_grad():
        for window in evaluation_windows(tokens, batch=1, context=16):
            logits = loaded(window.inputs, past_key_values=memory).logits
            losses = F.cross_entropy(logits.flatten(0, 1), window.targets.flatten(), reduction="none")
            nats += float(losses[window.mask.flatten()].sum())
    assert nats / expected.n_predictions == pytest.approx(expected.nats_per_token, rel=1e-6)


def test_it_has_the_runs_tokenizer(run: Path, exported: Path) -> None:
    ours, theirs = load_run_tokenizer(sparseffn.training.RunFolder(run)), AutoTokenizer.from_pretrained(exported)
    assert theirs(SONG)["input_ids"] == ours.encode(SONG.encode()).tolist()


def test_a_fresh_process_loads_it_and_generates(exported: Path) -> None:
    """With the lines of the card."""
    lines = (
        (exported / "README.md").read_text().split("```python\n")[1].split("```")[0].replace('"sigma-hf"', repr(str(exported)))
    )
    code = lines + '\nprompt = tokenizer("9 bottles", return_tensors="pt")\n'
    code += "print(repr(tokenizer.decode(model.generate(**prompt, max_new_tokens=5, do_sample=False)[0])))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("'9 bottles")


def test_the_card_has_the_runs_table(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    result = json.loads((exported.parent / "sigma" / "result.json").read_text())
    assert f"| test | {result['test']:.4f} | {result['test'] / math.log(2):.4f} |" in card
    assert "pip install 'sparseffn[hf]'" in card
    assert "`sparseffn-transformer-xl`" in card


def test_the_card_of_a_comparisons_run_has_its_table(comparison: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = comparison.parent / "of-comparison"
    assert main(["export", str(comparison / "runs" / "sigma-moe" / "seed-0"), "--to", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 4
    card = (folder / "README.md").read_text()
    assert (comparison / "table.md").read_text().strip() in card
    assert "This model is `sigma-moe`, seed 0, of this comparison:" in card


def test_an_earlier_checkpoint_claims_no_results(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights are those of its step."""
    steps = sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())
    assert main(["export", str(run), "--to", str(tmp_path / "first"), "--checkpoint", str(steps[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == steps[0] < 4
    assert "None: the checkpoint is that of step" in (tmp_path / "first" / "README.md").read_text()
    trained, _ = load_run_model(run, checkpoint=str(steps[0]))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert torch.equal(loaded.transformer.output.bias, trained.output.bias)


class TestPush:
    """`push_to_hub`, the hub replaced by a folder."""

    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderHub:
        return FolderHub(tmp_path, monkeypatch)

    def test_an_exported_model_has_its_card_with_results(self, exported: Path, hub: FolderHub) -> None:
        """And what the hub then holds is the same model, with its tokenizer."""
        model = AutoModelForCausalLM.from_pretrained(exported)
        model.push_to_hub("me/sigma")
        assert hub.commits == [{"config.json", "generation_config.json", "model.safetensors", "README.md"}]
        AutoTokenizer.from_pretrained(exported).push_to_hub("me/sigma")
        pushed = hub.root / "me" / "sigma"
        assert (pushed / "README.md").read_text() == (exported / "README.md").read_text()
        ids = AutoTokenizer.from_pretrained(pushed)(SONG[:60], return_tensors="pt").input_ids
        assert torch.equal(AutoModelForCausalLM.from_pretrained(pushed)(ids).logits, model(ids).logits)

    def test_a_changed_model_claims_no_results(self, exported: Path, hub: FolderHub) -> None:
        model = AutoModelForCausalLM.from_pretrained(exported)
        with torch.no_grad():
            model.transformer.norm.weight.add_(1)
        model.push_to_hub("me/sigma")
        card = (hub.root / "me" / "sigma" / "README.md").read_text()
        assert "# me/sigma" in card and "## Results" not in card


class TestRefused:
    """One line that says what to do, and nothing is written."""

    def refused(self, run: Path, capsys: pytest.CaptureFixture[str], to: Path | None = None) -> str:
        target = to or run.parent / "new"
        existed = target.exists()
        assert main(["export", str(run), "--to", str(target)]) == 2
        assert target.exists() is existed
        assert not list(run.parent.glob(".writing-*"))
        return capsys.readouterr().err

    @pytest.fixture
    def copied(self, run: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(run, tmp_path / "run"))

    def test_a_folder_that_exists(self, run: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = {file: file.stat().st_mtime_ns for file in exported.iterdir()}
        assert "must be a new folder" in self.refused(run, capsys, exported)
        assert {file: file.stat().st_mtime_ns for file in exported.iterdir()} == before

    def test_a_full_disk(self, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """After the weights are written: nothing of them stays."""

        def fail(self: object, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
        assert "No space left on device; fix: make room on the disk" in self.refused(run, capsys)

    def test_a_run_without_a_checkpoint(self, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.rmtree(copied / "checkpoints")
        assert "must hold a checkpoint; got none yet; fix: train it first" in self.refused(copied, capsys)

    def test_no_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "config.json` must exist" in self.refused(tmp_path / "nothing", capsys)

    @pytest.mark.parametrize("version", ["99.0.0", "banana"])
    def test_a_later_version(self, version: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (copied / "environment.json").write_text(json.dumps({"sparseffn": version}))
        assert f"made by '{version}'" in self.refused(copied, capsys)

    def test_a_missing_tokenizer(self, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """It can be left out, which the card says."""
        (copied / "tokenizer.json").unlink()
        assert "tokenizer.json` must exist" in self.refused(copied, capsys)
        assert main(["export", str(copied), "--to", str(copied.parent / "bare"), "--without-tokenizer"]) == 0
        assert "has no tokeniser" in (copied.parent / "bare" / "README.md").read_text()
        assert not (copied.parent / "bare" / "tokenizer.json").exists()
