"""lm-evaluation-harness on our models: a multiple choice task of a local file, where the harness is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")
# Of no extra: pip install lm-eval.
pytest.importorskip("lm_eval", reason="needs the harness: pip install lm-eval")

from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

from sparseffn.data.tokenizers import BytesTokenizer
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
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    model, tokenizer = make().eval(), fast_tokenizer(BytesTokenizer())
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu", prefix_token_id=10)
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path)}}
    found = simple_evaluate(harness, tasks=[task], log_samples=True, bootstrap_iters=0)["samples"]["bottles"]
    assert len(found) == len(QUESTIONS)
    for sample, question in zip(sorted(found, key=lambda one: one["doc_id"]), QUESTIONS, strict=True):
        for choice, (answer,) in zip(question["choices"], sample["resps"], strict=True):
            assert float(answer[0]) == pytest.approx(log_likelihood(model, question["question"], choice), rel=1e-4)


@torch.no_grad()
def log_likelihood(model: Any, context: str, continuation: str) -> float:
    """One text by itself, byte for byte."""
    ids = torch.tensor([list((context + continuation).encode())])
    logs = model(ids, use_cache=False).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
    return float(logs[-len(continuation.encode()) :].sum())
