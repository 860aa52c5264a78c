"""Transformers' Trainer on the bytes of a text, from OUT's last checkpoint on: `trained_by_trainer.py OUT TEXT [KEY=VALUE]`.

Keys: steps, batch (of a process), accumulation, save (steps between checkpoints), entropy (weight of the balancing loss; 0
switches dropout off too), checkpointing. The last line that is written is the losses of all
logged steps as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from sparseffn.cli.process import leave
from sparseffn.hf import SparseFFNConfig, SparseFFNForCausalLM

LENGTH = 32
DEFAULTS = {
    "steps": "8", "batch": "4", "accumulation": "1", "save": "3", "entropy": "0.01", "checkpointing": "0"
}  # fmt: skip


def model(entropy: float) -> SparseFFNForCausalLM:
    """A small one, with everything that draws random numbers in training."""
    torch.manual_seed(0)
    ffn = {"method": "sigma-moe", "n_experts": 8, "expert_size": 16, "k": 2, "gated": True, "activation": "silu"}
    ffn |= {"entropy_weight": entropy, "expert_dropout": 0.05}
    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    dropout = 0.1 if entropy else 0.0
    return SparseFFNForCausalLM(
        SparseFFNConfig(**sizes, num_key_value_heads=2, dropout=dropout, ffn=ffn if entropy else {**ffn, "expert_dropout": 0.0})
    )


def rows(text: Path) -> list[dict[str, torch.Tensor]]:
    """Pieces of the text; every third is shorter, padded with tokens that are no targets."""
    tokens, found = torch.tensor(list(text.read_bytes())), []
    for i, piece in enumerate(tokens[: len(tokens) // LENGTH * LENGTH].split(LENGTH)):
        mask = (torch.arange(LENGTH) < (LENGTH - 9 if i % 3 == 0 else LENGTH)).long()
        found.append({"input_ids": piece, "attention_mask": mask, "labels": piece.masked_fill(mask == 0, -100)})
    return found


def last_whole_checkpoint(out: Path) -> str | None:
    """The last with a readable `trainer_state.json`, which Trainer writes last; what was broken off before is removed."""
    while out.exists() and (last := get_last_checkpoint(str(out))):
        try:
            json.loads((Path(last) / "trainer_state.json").read_text())
            return last
        except (OSError, ValueError):
            shutil.rmtree(last)
    return None


def train(out: Path, text: Path, **words: str) -> list[float]:
    """The losses of all logged steps, those before an interruption included."""
    unknown = words.keys() - DEFAULTS.keys()
    assert not unknown, f"unknown {unknown}"
    given = {**DEFAULTS, **words}
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=int(given["steps"]), per_device_train_batch_size=int(given["batch"]),
        learning_rate=3e-3, logging_steps=1, save_steps=int(given["save"]), report_to=[], use_cpu=True,
        disable_tqdm=True, seed=1, dataloader_pin_memory=False,
        activation_checkpointing=given["checkpointing"] == "1", gradient_accumulation_steps=int(given["accumulation"]),
    )  # fmt: skip
    trainer = Trainer(model=model(float(given["entropy"])), args=arguments, train_dataset=rows(text))
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(out))
    trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    losses = train(Path(sys.argv[1]), Path(sys.argv[2]), **dict(word.split("=") for word in sys.argv[3:]))
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stdout.write(json.dumps(losses) + "\n")
    leave(0)
