"""The command: what works, what is refused and how."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sparseffn.cli import describe, main, output
from sparseffn.cli.run_settings import Eval
from sparseffn.matching import Match
from sparseffn.ops.cpu import build

BENCHES = ("layer", "experts", "hf", "step", "memory", "roofline", "figures", "kernels", "gpu")
BENCH = ("bench", *(f"bench {kind}" for kind in BENCHES))
REPRODUCE = ("reproduce", *(f"reproduce {kind}" for kind in ("table", "figure", "evidence")))
DATA = ("data", *(f"data {kind}" for kind in ("list", "prepare", "check")))
COMMANDS = (
    "methods",
    "match",
    "compare",
    "train",
    "plan",
    "eval",
    "generate",
    "export",
    "analyze",
    "convert",
    *BENCH,
    *REPRODUCE,
    "study",
    *DATA,
    "doctor",
)


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text."""
    path = tmp_path_factory.mktemp("song") / "song.txt"
    path.write_text("".join(f"{i} bottles of beer on the wall\n" for i in range(600)))
    return path


@pytest.fixture(scope="module")
def run(song: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run."""
    out = tmp_path_factory.mktemp("runs") / "sigma"
    words = ["train", "--method", "sigma-moe", "--corpus", "text", "--data-dir", str(song), "--steps", "4"]
    assert main([*words, "--batch", "2", "--context", "16", "--out", str(out), "--tensorboard"]) == 0
    assert any((out / "tensorboard").iterdir())
    return out


def help_text(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `--help` prints."""
    with pytest.raises(SystemExit, match="0"):
        main([*words.split(), "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command says what it does and shows an example; no default stands where there is none, and none twice."""
    text = help_text(command, capsys)
    assert f"sparseffn {command}" in text.split("Example", 1)[1]
    assert "default: None" not in text and "default: False" not in text and "==SUPPRESS==" not in text
    words = " ".join(text.replace("│", " ").split())
    assert ") (default" not in words.replace(") (default: float32)", "") and "(default: )" not in words


def test_help_knows_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The list that the test before this one goes through is whole."""
    listed = re.findall(r"^    (\w+) ", help_text("", capsys), flags=re.MULTILINE)
    for group in ("bench", "reproduce", "data"):
        listed += [f"{group} {kind}" for kind in re.findall(r"^    (\w+) ", help_text(group, capsys), flags=re.MULTILINE)]
    assert set(listed) == set(COMMANDS)


def test_help_shows_defaults_as_one_types_them(capsys: pytest.CaptureFixture[str]) -> None:
    """A list without brackets, a line end visibly, a zero too."""
    assert "(default: dense)" in help_text("match", capsys)
    text = help_text("generate", capsys)
    assert "(default: '\\n')" in text and "(default: 0)" in text


MISSPELT = {
    "option": ("compare --methods dense --stepz 4 --out x", "unknown option --stepz; fix: did you mean --steps"),
    "required-option": ("compare --methodz dense --out x", "unknown option --methodz; fix: did you mean --methods"),
    "option-with-value": ("train --method dense --sed=1 --out x", "unknown option --sed; fix: did you mean --seed"),
    "no-near-option": ("doctor --zzzzqqq", "unknown option --zzzzqqq; fix: see `sparseffn doctor --help`"),
    "command": ("comparr --methods dense", "unknown command 'comparr'; fix: did you mean 'compare'?"),
    "sub-command": ("bench stp", "unknown command 'stp'; fix: did you mean 'step'?"),
    "no-command": ("", "a command must follow; got none; fix: see `sparseffn --help`"),
    "no-sub-command": ("bench", "a command must follow; got none; fix: see `sparseffn bench --help`"),
    "choice": ("train --method dense --optimizer adam2 --out x", "unknown --optimizer 'adam2'; fix: did you mean 'adam'"),
    "study": ("study ini", "unknown STUDY 'ini'; fix: did you mean 'init'"),
    "int": ("train --method dense --steps x --out x", "`--steps` must be a whole number; got 'x'; fix: see `sparseffn train"),
    "float": ("train --method dense --lr x --out x", "`--lr` must be a number; got 'x'; fix: see `sparseffn train --help`"),
    "ints": ("bench layer --tokens 1 x", "`--tokens` must be a whole number; got 'x'; fix: see `sparseffn bench layer --help`"),
    "missing": ("eval", "`RUN` must be given; got none; fix: see `sparseffn eval --help`"),
    "missing-option": ("train --method dense", "`--out` must be given; got none; fix: see `sparseffn train --help`"),
    "no-value": ("train --method dense --out", "`--out` must have a value; got none; fix:"),
    "no-values": ("compare --methods --out x", "`--methods` must have at least one value; got none; fix:"),
    "no-name": ("reproduce table", "`NAMES` must have at least one value; got none; fix: see `sparseffn reproduce table"),
    "too-many": ("eval a b", "unexpected argument 'b'; fix: see `sparseffn eval --help`"),
    "exclusive": ("compare --methods dense --steps 4 --budget 8m --out x", "`--steps` and `--budget` must not both be given"),
    "one-of": (
        "reproduce evidence",
        "`--budget` or `--list` must be given; got neither; fix: see `sparseffn reproduce evidence",
    ),
    "old-table": ("reproduce table3 --view", "fix: sparseffn reproduce table table3"),
    "old-all": ("reproduce all --dry-run", "fix: sparseffn reproduce table all"),
    "old-figure": ("reproduce fig2", "fix: sparseffn reproduce figure fig2"),
}


@pytest.mark.parametrize(("words", "message"), MISSPELT.values(), ids=list(MISSPELT))
def test_misspelt_words_get_one_line_with_the_nearest_names(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    out, error = capsys.readouterr()
    assert error.startswith("sparseffn: ") and error.count("\n") == 1 and message in error and out == ""
    assert not list(tmp_path.iterdir())


def test_match_prints_the_published_size(capsys: pytest.CaptureFixture[str]) -> None:
    """62 sub-keys, 8,233 parameters below the dense block."""
    words = ["match", "--method", "pkm", "--like", "dense", "--d-model", "412", "--d-ff", "2053"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "n_subkeys=62" in text and "-8,233" in text and "-0.486%" in text


@pytest.mark.parametrize(
    ("preset", "method", "size"),
    [("wt-b", "pkm", {"n_subkeys": 89}), ("e8", "pkm", {"n_subkeys": 62}), ("wt-s-star", "sigma-moe", {"n_experts": 128})],
    ids=["wt-b-pkm", "e8-pkm", "wt-s-star-sigma-moe"],
)
def test_match_within_a_preset(preset: str, method: str, size: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    """The published sizes come out within the whole model's tolerance."""
    assert main(["match", "--method", method, "--preset", preset, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] and size.items() <= found["config"].items()


@pytest.mark.parametrize(
    "words",
    [["methods"], ["methods", "pkm"], ["doctor"], ["data", "list"], ["data", "check"], ["data", "check", "--corpus", "stdlib"]],
    ids=" ".join,
)
def test_tables_come_as_json_too(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The same command with and without `--json`."""
    assert main(words) == 0
    assert capsys.readouterr().out.strip()
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_run_is_evaluated_and_writes_text(run: Path, song: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`eval` gives the trained loss again, `--data-dir` or not; `generate` begins with its prompt and is repeatable."""
    assert main(["eval", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nats_per_token"] == json.loads((run / "result.json").read_text())["test"]
    assert main(["eval", str(run), "--data-dir", str(song)]) == 0
    assert f"digest {found['digest']}" in capsys.readouterr().out
    words = ["generate", str(run), "--prompt", "99 bottles", "--n-tokens", "20", "--temperature", "1"]
    texts = []
    for _ in range(2):
        assert main(words) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("99 bottles") and texts[0] == texts[1]


def test_generated_text_cannot_steer_a_terminal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters are escaped, line ends and tabs are not."""
    assert main(["generate", str(run), "--prompt", "a\tb\n\x1b[31m", "--n-tokens", "1"]) == 0
    assert capsys.readouterr().out.startswith("a\tb\n\\x1b[31m")


def test_device_that_is_not_there_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By name, and one that does not exist at all."""
    for name, message in (
        ("cuda:99", "`--device` must be one that this machine has"),
        ("gpu", "must be auto, cpu, cuda or cuda:N"),
    ):
        assert main(["eval", str(run), "--device", name]) == 2
        assert message in capsys.readouterr().err


def test_device_is_reported_where_it_is_no_cpu(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On standard error; the CPU of a machine that has nothing else is not."""
    assert main(["eval", str(run)]) == 0 and "device" not in capsys.readouterr().err
    monkeypatch.setattr(output, "find_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(output, "device_name", lambda device: "a GPU of the test")
    output.use_machine(Eval(run=str(run)))
    assert capsys.readouterr().err == "device: meta, a GPU of the test\n"


def test_interrupted_command_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With what to do next."""
    monkeypatch.setattr(describe, "list_methods", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["methods"]) == 130
    assert capsys.readouterr().err == (
        "sparseffn: interrupted; the same command begins again, a run at its last checkpoint where it has one\n"
    )


def test_accumulation_is_noted_once(song: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """When the run begins, not when the same command goes on; the result keeps the note."""
    words = ["train", "--method", "sigma-moe", "--corpus", "text", "--data-dir", str(song), "--steps", "2", "--batch", "4"]
    words += ["--context", "16", "--accumulation", "2", "--out", str(tmp_path / "run")]
    assert main(words) == 0 and main(words) == 0
    note = "balancing losses and batch-wide routing are per micro-batch of 2 streams"
    notes = [record.message for record in caplog.records if record.name == "sparseffn.training.loop"]
    assert notes == [note]
    (tmp_path / "run" / "result.json").unlink()
    assert main(words) == 0
    assert sum(record.message == note for record in caplog.records) == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["notes"] == [note]


def test_run_without_accumulation_has_no_note(run: Path) -> None:
    """There is nothing to be said."""
    assert json.loads((run / "result.json").read_text())["notes"] == []


BAD = {
    "method": (["compare", "--methods", "sigma-mo"], "did you mean 'sigma-moe'"),
    "option": (["compare", "--methods", "sigma-moe", "n_expert=4"], "did you mean 'n_experts'"),
    "corpus": (["compare", "--methods", "dense", "--corpus", "stdlb"], "did you mean 'stdlib'"),
    "preset": (["compare", "--methods", "dense", "--preset", "tiy"], "did you mean 'tiny'"),
    "k": (["compare", "--methods", "sigma-moe", "k=99"], "`k` must be at most n_experts"),
    "renorm": (["compare", "--methods", "softmax-renorm-moe", "k=1"], "the constant 1"),
    "budget": (["compare", "--methods", "dense", "--budget", "soon"], "`budget` must be a time such as"),
    "seeds": (["compare", "--methods", "dense", "--seeds", "1000000000"], "`--seeds` must be 1 to 1000"),
    "twice": (["compare", "--methods", "dense", "dense"], "named once"),
    "warmup": (["compare", "--methods", "dense", "--warmup", "-1"], "`warmup` must be at least 0; got -1"),
    "warmup-budget": (
        ["compare", "--methods", "dense", "--warmup", "-1", "--budget", "1m"],
        "`warmup` must be at least 0; got -1",
    ),
    "seed": (["compare", "--methods", "dense", "--seed", "-1", "--steps", "1"], "`seed` must be at least 0; got -1"),
    "second-seed": (["compare", "--methods", "dense", "--seed", "-1", "--seeds", "2"], "`seed` must be at least 0; got -1"),
    "lr": (["compare", "--methods", "dense", "--lr", "nan"], "`lr` must be at least 0; got nan"),
    "context": (["compare", "--methods", "dense", "--context", "0"], "`context` must be at least 1; got 0"),
    "clip": (["train", "--method", "dense", "--clip", "-1"], "`clip` must be at least 1e-12; got -1"),
    "text-without-data": (["compare", "--methods", "dense", "--corpus", "text"], "--data-dir"),
    "missing-file": (["compare", "--methods", "dense", "--corpus", "text", "--data-dir", "/no/such/place"], "/no/such/place"),
    "home": (["compare", "--methods", "dense", "--cache-dir", "~nosuchuser/x"], "must begin with a home folder that exists"),
    "keep": (["train", "--method", "dense", "--keep", "0"], "`keep` must be at least 1; got 0"),
    "accumulation": (["train", "--method", "dense", "--accumulation", "3"], "`batch` must be a multiple of accumulation = 3"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=list(BAD))
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Value and remedy, no traceback, nothing written."""
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.strip().splitlines()[-1].startswith("sparseffn: ") and message in error
    assert "Traceback" not in error and not (tmp_path / "out").exists()


def test_sizes_that_cannot_be_matched_exit_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of `compare`, before anything is written, and of `match`, with its table or its JSON."""
    method = ["pkm", "k=none", "n_heads=4000"]
    assert main(["compare", "--methods", *method, "--out", str(tmp_path / "out")]) == 1
    assert "within 0.5% of the dense model" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setattr(Match, "equal", False)
    sizes = ["match", "--method", "pkm", "--d-model", "412", "--d-ff", "2053"]
    assert main(sizes) == 1 and "not within 0.5%" in capsys.readouterr().out
    assert main([*sizes, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["equal"] is False


RANGES = {
    "low": ("k=0", "`k` must be at least 1; got 0; fix: pass a number in this range"),
    "int": ("k=many", "`k` must be int; got 'many'; fix: pass a whole number"),
    "float": ("dropout=x", "`dropout` must be float; got 'x'; fix: pass a number"),
    "below": ("dropout=1", "`dropout` must be at least 0 and below 1; got 1.0; fix: pass a number in this range"),
    "choice": ("activation=rellu", "got 'rellu'; fix: did you mean 'relu'"),
    "no-near-choice": ("activation=xyz", "got 'xyz'; fix: pass one of these"),
}


@pytest.mark.parametrize(("word", "message"), RANGES.values(), ids=list(RANGES))
def test_option_out_of_range_gets_value_and_remedy(
    word: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Types and ranges of a method's options."""
    assert main(["train", "--method", "sigma-moe", word, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


SIZES = {
    "one": ("--d-model 412", "got --d-model 412 alone; fix: --d-model 412 --d-ff 2053"),
    "other": ("--d-ff 2053", "got --d-ff 2053 alone; fix:"),
    "none": ("", "got neither; fix:"),
    "zero": ("--d-model 0 --d-ff 10", "`--d-model` must be at least 1; got 0; fix: pass a positive number"),
    "negative": ("--preset tiny --d-ff -5", "`--d-ff` must be at least 1; got -5; fix: pass a positive number"),
}


@pytest.mark.parametrize(("words", "message"), SIZES.values(), ids=list(SIZES))
def test_match_says_which_sizes_came(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One of two, none, or one that is no size."""
    assert main(["match", "--method", "pkm", *words.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eval --memory -3", "`memory` must be at least 0; got -3; fix:"),
        ("eval --eval-batch 0", "`batch` must be"),
        ("generate --memory -3", "`memory_length` must be at least 1; got -3; fix:"),
    ],
)
def test_evaluation_refuses_sizes_out_of_range(
    words: str, message: str, run: Path, song: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the memory and of the batch."""
    command, *options = words.split()
    data = ["--data-dir", str(song)] if command == "eval" else []
    assert main([command, str(run), *options, *data]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("size", [0, 30], ids=["empty", "tiny"])
def test_corpus_with_too_little_text_is_refused(size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By name, with the remedy."""
    (tmp_path / "t.txt").write_text("x" * size)
    words = ["compare", "--methods", "dense", "--corpus", "text", "--data-dir", str(tmp_path / "t.txt")]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "fix:" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_folders_that_are_no_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`eval` of nothing; `compare` into a folder with other files."""
    assert main(["eval", str(tmp_path / "nothing")]) == 2
    assert "config.json` must exist" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("precious")
    assert main(["compare", "--methods", "dense", "--out", str(tmp_path)]) == 2
    assert "which holds other files" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_help_and_misspelt_words_need_no_torch() -> None:
    """No help of any command imports PyTorch, and all of it answers within half a second."""
    code = (
        "import sys, time\nfrom sparseffn.cli import main\n"
        f"for words in {['', *COMMANDS]!r}:\n"
        "    start = time.perf_counter()\n"
        "    try: main([*words.split(), '--help'])\n"
        "    except SystemExit as end: assert not end.code\n"
        "    assert time.perf_counter() - start < 0.5, words\n"
        "assert main(['train', '--stepz', '1']) == 2 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert min(map(seconds_of_help, range(3))) < 0.5


def seconds_of_help(_: int) -> float:
    """From the start of Python to the end of `sparseffn --help`."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "sparseffn", "--help"], check=True, capture_output=True, text=True)
    assert "compare" in done.stdout
    return time.perf_counter() - start


def test_a_closed_output_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `>&-` gives it: there is no stream at all."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["methods"]) == 0


@pytest.mark.parametrize("words", ["data list", "reproduce table table7 --json --out OUT"], ids=["lines", "one-write"])
def test_reader_that_leaves_is_no_error(words: str, tmp_path: Path) -> None:
    """As `| head` does: nothing is reported, what was left to print is dropped, and files are there before."""
    code = "import sys; from sparseffn.cli import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", code, *words.replace("OUT", str(tmp_path)).split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
    assert "OUT" not in words or (tmp_path / "table7.json").exists()


def test_import_is_light_and_brings_no_extra() -> None:
    """Under half a second more than torch, best of three; no extra, no Triton kernels of ours, no output."""
    code = (
        "import time, sys; a = time.perf_counter(); import torch; known = set(sys.modules); b = time.perf_counter();"
        "import sparseffn, sparseffn.ffn; c = time.perf_counter();"
        "new = {m.split('.')[0] for m in set(sys.modules) - known};"
        "assert not new & {'matplotlib', 'sentencepiece', 'tensorboard', 'transformers', 'triton', 'rich'}, new;"
        "print(c - b)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout) for _ in range(3)
    ]
    assert min(times) < 0.5


def test_bench_kernels_lists_resources(capsys: pytest.CaptureFixture[str]) -> None:
    """Compiled ahead of time; names that do not exist are refused with the nearest."""
    pytest.importorskip("triton", reason="Triton is not installed here")
    words = ["bench", "kernels", "--targets", "sm_90", "--kernels", "token_sum_kernel", "--dtypes", "float32"]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows and all(row["spills"] == 0 and row["registers"] > 0 for row in rows)
    assert main(words) == 0 and "token_sum_kernel" in capsys.readouterr().out
    assert main(["bench", "kernels", "--targets", "sm90"]) == 2
    assert "sm_90" in capsys.readouterr().err


def test_doctor_reports_where_a_wish_cannot_be_met(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A backend that cannot run is a line of the report, not its end; so are every backend, compiler, cache and Triton."""
    monkeypatch.setenv("SPARSEFFN_BACKEND", "triton")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backend on cpu"].startswith("none: backend 'triton' cannot run on cpu: it needs a CUDA or ROCm device")
    assert facts["backend triton"].startswith("not on cpu: ") and facts["backend torch"] == "runs on cpu"
    by_name = "if asked for by name" if hasattr(torch.nn.functional, "grouped_mm") else f"this is {torch.__version__}"
    assert facts["backend grouped_mm"].endswith(by_name)
    assert "no-such-compiler" in facts["C++ compiler"]
    # Kernels that were compiled before need no compiler.
    wanted = build.instruction_sets() if build.unavailable() is None else "none: "
    assert wanted and facts["compiled kernels"].startswith(wanted)
    assert {"triton", "blas"} <= set(facts)
