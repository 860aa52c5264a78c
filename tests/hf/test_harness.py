"""lm-evaluation-harness, where it is installed, on our models: tasks of a local file, of choices and of generated text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")
# Of no extra: pip install lm-eval.
pytest.importorskip("lm_eval", reason="needs the harness: pip install lm-eval")

from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
from transformers import AutoTokenizer

from sparseffn.data.tokenizers import BytesTokenizer, CharsTokenizer
from sparseffn.hf import SparseFFNConfig, SparseFFNForCausalLM, TransformerXLForCausalLM, TransformerXLHubConfig
from sparseffn.hf.fast_tokenizers import fast_tokenizer

FFN = {"method": "sigma-moe", "n_experts": 4, "expert_size": 8, "k": 2}
SIZES: dict[str, Any] = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
QUESTIONS = [
    {"question": f"{'so ' * n}{n + 1} bottles\n{n}", "choices": [" bottles", " zebras eat", "!"], "answer": 0} for n in range(5)
]
TASK = {
    "task": "bottles",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


GENERATION = {
    "task": "songs",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": [], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


def decoder() -> SparseFFNForCausalLM:
    return SparseFFNForCausalLM(SparseFFNConfig(**SIZES, num_key_value_heads=1, ffn=FFN))


def transformer_xl() -> TransformerXLForCausalLM:
    ffn = {**FFN, "d_model": 16, "n_layers": 2}
    return TransformerXLForCausalLM(TransformerXLHubConfig(**SIZES, memory_length=64, ffn=ffn))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [decoder, transformer_xl], ids=lambda make: make.__name__)
def test_choices_get_the_models_own_probabilities(make: Any, tmp_path: Path) -> None:
    """Of contexts and choices of several lengths in one batch, which the harness pads without a mask."""
    model = make().eval()
    found = evaluated(model, fast_tokenizer(BytesTokenizer()), TASK, tmp_path)
    for sample, question in zip(found, QUESTIONS, strict=True):
        for choice, (answer,) in zip(question["choices"], sample["resps"], strict=True):
            assert float(answer[0]) == pytest.approx(log_likelihood(model, question["question"], choice), rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [decoder, transformer_xl], ids=lambda make: make.__name__)
class TestGeneration:
    """Prompts of several lengths in one batch, which the harness pads on the left."""

    def test_it_goes_on_until_the_limit(self, make: Any, tmp_path: Path) -> None:
        """A model that never wrote an end of a text; each prompt goes on as by itself."""
        model = make().eval()
        for sample in evaluated(model, fast_tokenizer(BytesTokenizer()), GENERATION, tmp_path):
            ((found,),) = sample["resps"]
            assert found == continuation(model, sample["doc"]["question"], 12).decode(errors="replace")

    def test_it_ends_where_the_task_says(self, make: Any, tmp_path: Path) -> None:
        """At a text of the task, or at the token that its user names for the end; here of characters, which name none."""
        # Some seeds repeat one character from the first on.
        torch.manual_seed(1)
        model, characters = make().eval(), CharsTokenizer("".join(map(chr, range(1, 257))))
        fast_tokenizer(characters).save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path, eos_token="\n")
        wanted = [continuation(model, question["question"], 12, less=1) for question in QUESTIONS]
        stop = characters.decode([wanted[0][2]])
        task = {**GENERATION, "generation_kwargs": {**GENERATION["generation_kwargs"], "until": [stop]}}
        assert wanted[0].index(wanted[0][2]) == 2
        for sample, ids in zip(evaluated(model, tokenizer, task, tmp_path), wanted, strict=True):
            text = characters.decode(list(ids)).split("\n")[0].split(stop)[0]
            assert sample["resps"] == [[text]]


@pytest.mark.slow
def test_the_command_of_the_page_gives_the_same(tmp_path: Path) -> None:
    """As docs/own-models.md has it: a folder of ours, a task of a local file."""
    model, tokenizer = transformer_xl().eval(), fast_tokenizer(BytesTokenizer())
    found = evaluated(model, tokenizer, TASK, tmp_path)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    data = {"data_files": {"test": str(tmp_path / "questions.jsonl")}, "cache_dir": str(tmp_path)}
    (tasks / "bottles.yaml").write_text(json.dumps({**TASK, "dataset_kwargs": data}))
    start = "import sparseffn.hf; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    command = [sys.executable, "-c", start, "run", "--model", "hf", "--include_path", str(tasks), "--tasks", "bottles"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},prefix_token_id=10", "--device", "cpu"]
    command += ["--log_samples", "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_bottles_*.jsonl")
    lines = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda one: one["doc_id"])
    for line, one in zip(lines, found, strict=True):
        for (answer,), (wanted,) in zip(line["resps"], one["resps"], strict=True):
            assert float(answer[0]) == pytest.approx(float(wanted[0]), rel=1e-4)


def evaluated(model: Any, tokenizer: Any, task: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """What the harness has of each question, in their order."""
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu", prefix_token_id=10)
    local = {**task, "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder)}}
    found = simple_evaluate(harness, tasks=[local], log_samples=True, bootstrap_iters=0)["samples"][task["task"]]
    return sorted(found, key=lambda one: one["doc_id"])


@torch.no_grad()
def continuation(model: Any, text: str, n_tokens: int, less: int = 0) -> bytes:
    """The likeliest tokens, one after the other, without a cache; `less` is what tokens are less than characters."""
    ids = [number - less for number in text.encode()]
    for _ in range(n_tokens):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return bytes(ids[len(text) :])


@torch.no_grad()
def log_likelihood(model: Any, context: str, continuation: str) -> float:
    """One text by itself, byte for byte."""
    ids = torch.tensor([list((context + continuation).encode())])
    logs = model(ids, use_cache=False).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
    return float(logs[-len(continuation.encode()) :].sum())
