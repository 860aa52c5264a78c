"""`sparseffn convert`: streaming, resumed with the same numbers, measured, and nothing of the model's own is touched."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hf.dense import build
from hf.folder_hub import FolderHub
from hf.tiny import save_byte_tokenizer
from sparseffn.cli import main
from sparseffn.errors import UserError
from sparseffn.hf import Split, Upcycle, held_out
from sparseffn.hf.conversion import ConvertSettings, convert
from sparseffn.report.convert_report import USUAL_FILL, conversion_page, conversion_tables, conversions_table
from sparseffn.results.convert_result import ConvertResult, read_conversion
from sparseffn.storage import file_digest

CONTEXT = 136


@pytest.fixture(scope="module", autouse=True)
def _few_rounds() -> Iterator[None]:
    """Nothing here is about speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "_ROUNDS", 1)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama, its tokenizer, and beside it a text."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    config = LlamaConfig(vocab_size=256, **sizes, max_position_embeddings=512, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1 + 0.2 * (parameter.dim() > 1))
    model.save_pretrained(folder / "model")
    save_byte_tokenizer(folder / "model")
    (folder / "text.txt").write_text("".join(f"{i} bottles of beer on the wall\n" for i in range(120)))
    return folder


@pytest.fixture(scope="module")
def settings(source: Path) -> ConvertSettings:
    return ConvertSettings(
        model=str(source / "model"),
        method="sigma-moe",
        options={"n_experts": 6, "k": 2},
        calibrate=source / "text.txt",
        tokens=8 * CONTEXT,
        eval_tokens=4 * CONTEXT,
        context=CONTEXT,
        distill=3,
        end_to_end=23,
        batch_tokens=CONTEXT,
        out=source / "out",
    )


@pytest.fixture(scope="module")
def converted(settings: ConvertSettings) -> ConvertResult:
    return convert(settings)


def test_the_result_is_measured_and_the_folder_loads(converted: ConvertResult, settings: ConvertSettings) -> None:
    """By AutoModelForCausalLM, with the tokenizer; the loss is that of the result, and distillation lowers the errors."""
    assert converted == read_conversion(settings.out / "convert.json")
    model = AutoModelForCausalLM.from_pretrained(settings.out)
    tokenizer = AutoTokenizer.from_pretrained(settings.out)
    text = settings.calibrate.read_text()
    ids = torch.tensor(tokenizer(text).input_ids)[8 * CONTEXT : 12 * CONTEXT].view(4, CONTEXT)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert float(loss) == pytest.approx(converted.converted.nats, rel=1e-6)
    assert sum(p.numel() for p in model.parameters()) == converted.params_after
    assert all(block.error < block.filled_error for block in converted.blocks)
    assert converted.converted.nats != converted.filled.nats != converted.dense.nats
    assert converted.active_share == pytest.approx(1 / 3)
    assert {path.name for path in settings.out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not (settings.out / "work").exists()


def test_the_card_has_the_measured_numbers(
    converted: ConvertResult, settings: ConvertSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes to the hub with the model, as long as that is the one that was measured."""
    card = (settings.out / "README.md").read_text()
    assert f"| dense | {converted.dense.perplexity:.2f} |  |" in card
    assert f"| distilled, 3 + 23 steps | {converted.converted.perplexity:.2f} | {converted.converted.change:+.2%} [" in card
    assert f"| decoding, 16 tokens | {converted.speeds[1].before:,.1f} |" in card
    assert "| pairs that take part | 24 of 72 in all replaced blocks (33.3%) |" in card
    assert "| filled from the dense blocks by | `split` |" in card
    assert "| base model | model, of the family `llama` |" in card and str(settings.model) not in card
    assert 'tokenizer = AutoTokenizer.from_pretrained("out")' in card
    hub, model = FolderHub(tmp_path, monkeypatch), AutoModelForCausalLM.from_pretrained(settings.out)
    model.push_to_hub("me/cheaper")
    assert (hub.root / "me" / "cheaper" / "README.md").read_text() == card
    with torch.no_grad():
        model.model.model.norm.weight.add_(1)
    model.push_to_hub("me/cheaper")
    assert "## Results" not in (hub.root / "me" / "cheaper" / "README.md").read_text()


class Killed(Exception):
    """Stands for a signal."""


@pytest.mark.parametrize(
    "stage", ["running", "distilling model.layers.1", "end to end, step 22", "perplexity of the converted"]
)
def test_a_conversion_that_was_killed_gives_the_same(
    stage: str, converted: ConvertResult, settings: ConvertSettings, tmp_path: Path
) -> None:
    """In any stage: every parameter, every loss and every error, bit by bit."""

    def killing(text: str) -> None:
        if text.startswith(stage):
            raise Killed

    broken = replace(settings, out=tmp_path / "out")
    with pytest.raises(Killed):
        convert(broken, killing)
    assert not (broken.out / "config.json").exists()
    again = convert(broken)
    first, second = (load_file(folder / "model.safetensors") for folder in (settings.out, broken.out))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert (again.blocks, again.converted) == (converted.blocks, converted.converted)


@pytest.mark.slow
def test_a_conversion_killed_by_the_system_gives_the_same(source: Path, tmp_path: Path) -> None:
    """SIGKILL at several moments of one conversion: every parameter, bit by bit."""
    command = [sys.executable, "-m", "sparseffn", "convert", str(source / "model"), "--calibrate", str(source / "text.txt")]
    command += ["--method", "sigma-moe", "n_experts=6", "k=2", "--tokens", str(8 * CONTEXT), "--context", str(CONTEXT)]
    command += ["--eval-tokens", str(4 * CONTEXT), "--batch-tokens", str(CONTEXT), "--distill", "40", "--end-to-end", "40"]
    command += ["--threads", "1", "--out"]
    start = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, timeout=300)
    took, n_killed = time.monotonic() - start, 0
    for share in (0.4, 0.5, 0.6, 0.7, 0.5, 0.6, 0.8):
        broken = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            broken.wait(timeout=share * took)
        except subprocess.TimeoutExpired:
            broken.kill()
        n_killed += broken.wait() == -signal.SIGKILL
    # Each that goes on has less to do; how many are there to be killed is the machine's.
    assert n_killed >= 1, "it was never broken off"
    subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True, timeout=300)
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)


def test_a_finished_conversion_is_not_made_again(converted: ConvertResult, settings: ConvertSettings) -> None:
    """And another one finds no room in its folder."""
    said: list[str] = []
    assert convert(settings, said.append) == converted and said[-1] == "this conversion is finished"
    with pytest.raises(UserError, match=r"`out` must be new, or hold this very conversion; got .*another one.*fix: "):
        convert(replace(settings, seed=1))


def test_the_model_s_own_files_stay_as_they_are(settings: ConvertSettings, tmp_path: Path) -> None:
    """Digests before and after; nor may the result go into its folder."""
    folder = Path(settings.model)
    before = {path.name: file_digest(path) for path in folder.iterdir()}
    convert(replace(settings, method="topk", options={"k": 6}, distill=0, end_to_end=0, out=tmp_path / "topk"))
    assert {path.name: file_digest(path) for path in folder.iterdir()} == before
    for out in (folder, folder / "converted"):
        with pytest.raises(UserError, match="`out` must not be within the model's folder"):
            replace(settings, out=out)


def test_another_dtype_is_kept(settings: ConvertSettings, tmp_path: Path) -> None:
    """A bfloat16 model is distilled in float32 and saved in bfloat16."""
    result = convert(replace(settings, dtype="bfloat16", end_to_end=1, out=tmp_path / "out"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16} and result.facts.dtype == "bfloat16"
    assert all(block.error < block.filled_error for block in result.blocks)


def without_tokenizer(settings: ConvertSettings, tmp_path: Path) -> ConvertSettings:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model").mkdir(exist_ok=True)
        shutil.copy(Path(settings.model) / name, tmp_path / "model" / name)
    return replace(settings, model=str(tmp_path / "model"))


def quantised(settings: ConvertSettings, tmp_path: Path) -> ConvertSettings:
    """A folder that says so; its weights would load as they are."""
    shutil.copytree(settings.model, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = {**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq", "bits": 4}}
    path.write_text(json.dumps(config))
    return replace(settings, model=str(tmp_path / "model"))


REFUSED: dict[str, tuple[Callable[[ConvertSettings, Path], Any], str]] = {
    "quantised": (quantised, "`model` must have weights of floating-point numbers; got .*which is quantised; fix: convert"),
    "tokenizer": (without_tokenizer, "`model` must have a tokenizer.*fix: copy tokenizer.json"),
    "model": (lambda s, path: replace(s, model=str(path / "none")), "`model` must have a tokenizer; got .*none"),
    "text": (lambda s, path: replace(s, calibrate=path / "none.txt"), "none.txt` must be a text file; got No such file"),
    "short": (lambda s, _: replace(s, tokens=10**6), "must have .* tokens; got .*fix: a longer text"),
    "context": (lambda s, _: replace(s, tokens=CONTEXT - 1), "`tokens` must be at least the context"),
    "lr": (lambda s, _: replace(s, lr=-1.0), "`lr` must be positive"),
    "experts": (
        lambda s, _: replace(s, options={"n_experts": 5, "k": 2}),
        "`n_experts` must divide the dense block's 24 pairs",
    ),
    "held": (lambda s, path: _stray(s, path), "`out` must be new.*which holds notes.txt"),
}


def _stray(settings: ConvertSettings, path: Path) -> ConvertSettings:
    (path / "out").mkdir()
    (path / "out" / "notes.txt").write_text("mine")
    return settings


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_refused(case: str, settings: ConvertSettings, tmp_path: Path) -> None:
    """With what to do, and before anything is left in a new folder."""
    change, message = REFUSED[case]
    with pytest.raises(UserError, match=f"(?s){message}"):
        convert(replace(change(settings, tmp_path), out=tmp_path / "out"))
    out = tmp_path / "out"
    assert not out.exists() or {path.name for path in out.iterdir()} == {"notes.txt", ".lock"}


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, AutoTokenizer], ids=lambda loader: loader.__name__)
def test_a_package_that_is_missing_is_named(
    loader: Any, settings: ConvertSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, where transformers writes a paragraph that begins with an empty one."""

    def lacking(*args: object, **named: object) -> object:
        raise ImportError("\nLoading it requires `nowhere`.\nYou can install it with pip.\n")

    monkeypatch.setattr(loader, "from_pretrained", lacking)
    wanted = r"`model` must load with what is installed; got '.*model' \(Loading it requires `nowhere`\.\); fix: install the"
    with pytest.raises(UserError, match=wanted):
        convert(replace(settings, out=tmp_path / "out"))


def test_the_model_s_folder_is_known_by_any_path(settings: ConvertSettings, tmp_path: Path) -> None:
    """Through a link to it, up and down again, and where the model itself is named by a link."""
    model, link = Path(settings.model), tmp_path / "link"
    link.symlink_to(model, target_is_directory=True)
    for out in (link / "out", model.parent / "x" / ".." / model.name / "out", model / "out"):
        for named in (settings.model, str(link)):
            with pytest.raises(UserError, match="`out` must not be within the model's folder"):
                replace(settings, model=named, out=out)
    assert replace(settings, model=str(link), out=tmp_path / "out").out == tmp_path / "out"


def test_a_distillation_that_diverges_says_so(settings: ConvertSettings, tmp_path: Path) -> None:
    """Before a number of it is used."""
    with pytest.raises(UserError, match=r"the loss of the distillation must be finite.*fix: a lower --lr"):
        convert(replace(settings, lr=1e30, distill=20, out=tmp_path / "out"))


def test_the_page_and_the_tables_say_what_was_measured(converted: ConvertResult) -> None:
    """From the result alone."""
    model, speed, blocks = conversion_tables(converted)
    assert [row.cells[0].text for row in model.rows] == ["dense", "filled, not trained", "distilled, 3 + 23 steps"]
    assert model.rows[0].cells[1].text == f"{converted.dense.perplexity:.2f}" and model.rows[1].cells[3].text == "33.3%"
    assert len(blocks.rows) == 3 and len(speed.rows) == 2
    page = conversion_page(converted)
    assert "sigma-moe n_experts=6 k=2 from split" in page and "http" not in page.replace("http-equiv", "")


def test_seeds_share_a_row(converted: ConvertResult) -> None:
    """Mean and deviation over seeds; upcycled models stand apart."""
    other = structs.replace(converted, facts=structs.replace(converted.facts, seed=1))
    upcycled = structs.replace(converted, facts=structs.replace(converted.facts, fill="upcycle"))
    (row,) = conversions_table([converted, other, upcycled]).rows
    assert [cell.text for cell in row.cells][:4] == ["sigma-moe n_experts=6 k=2 from split", "3 + 23", "544 / 136", "33.3%"]
    assert row.cells[-1].text == "2" and " ± 0.00, " in row.cells[-4].text
    redrawn = structs.replace(upcycled, facts=structs.replace(upcycled.facts, fill_options={"redraw": 0.5}))
    rows = conversions_table([converted, other, upcycled, redrawn], upcycled=True).rows
    assert [row.cells[0].text.partition("from ")[2] for row in rows] == ["upcycle", "upcycle redraw=0.5"]
    assert [row.cells[-1].text for row in rows] == ["1", "1"]


def test_usual_options_are_the_fills_own() -> None:
    """A description leaves out what nobody chose."""
    assert {**vars(Split()), **vars(Upcycle())} == USUAL_FILL


def test_the_command(settings: ConvertSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Upcycled, with the way's options; a page beside the model."""
    # Another number would stay, and with it other roundings of the tests that follow.
    threads = str(torch.get_num_threads())
    words = ["convert", settings.model, "--method", "sigma-moe", "n_experts=3", "k=1", "--from", "upcycle", "redraw=0.5"]
    words += ["--calibrate", str(settings.calibrate), "--context", str(CONTEXT), "--eval-tokens", str(3 * CONTEXT)]
    words += [
        "--tokens",
        str(4 * CONTEXT),
        "--batch-tokens",
        str(CONTEXT),
        "--threads",
        threads,
        "--out",
        str(tmp_path / "out"),
    ]
    words += ["--layers", "0", "*.2.mlp"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "sigma-moe n_experts=3 k=1 from upcycle" in printed and "Tokens per second" in printed
    assert (tmp_path / "out" / "page.html").read_text().count("<svg") == 1
    result = read_conversion(tmp_path / "out" / "convert.json")
    assert [block.name for block in result.blocks] == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert main([*words[:5], "--from", "upcycle", "redraw", *words[8:]]) == 2
    assert "`--from` must name one way" in capsys.readouterr().err


def test_without_transformers_the_command_says_what_to_install(
    settings: ConvertSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line."""
    monkeypatch.setitem(sys.modules, "sparseffn.hf.conversion", None)
    words = ["convert", settings.model, "--method", "topk", "k=1", "--calibrate", "none.txt", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "fix: pip install 'sparseffn[hf]'" in capsys.readouterr().err


def test_gpt2_keeps_its_dropout(tmp_path: Path, source: Path) -> None:
    """Biases, transposed weights and a dropout after the block, all the way to what is loaded again."""
    model = build("gpt2")
    model.resize_token_embeddings(256)
    model.save_pretrained(tmp_path / "model")
    save_byte_tokenizer(tmp_path / "model")
    result = convert(
        ConvertSettings(
            model=str(tmp_path / "model"), method="topk", options={"k": 48}, calibrate=source / "text.txt", tokens=256,
            eval_tokens=272, context=34, batch_tokens=34, out=tmp_path / "out",
        )
    )  # fmt: skip
    assert result.converted.nats == pytest.approx(result.dense.nats, rel=1e-6)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.model.transformer.h[0].mlp[1].p == 0.1
