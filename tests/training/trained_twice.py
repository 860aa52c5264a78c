"""Three training steps as a function of method, precision and seed; as a script, what threads and backends change in them."""

from __future__ import annotations

import dataclasses
import json
import os
import sys

import torch
from torch import Tensor

from sparseffn.ffn import field_infos, method_class
from sparseffn.models import TransformerXLConfig, build_model
from sparseffn.training import TrainConfig
from sparseffn.training.stepper import Stepper

SETTINGS = TrainConfig(steps=3, batch=4, context=12, memory=12, lr=1e-3, accumulation=2)


def config_of(method: str, *, dropout: float = 0.2) -> TransformerXLConfig:
    """A small model whose every dropout is on."""
    config_class = method_class(method)
    ffn = config_class.examples()[0]
    rates = {name: dropout for name in ("dropout", "expert_dropout") if name in field_infos(config_class)}
    ffn = ffn.replace(**rates)
    return TransformerXLConfig(vocab_size=40, d_model=ffn.d_model, n_layers=2, n_heads=2, d_head=4, dropout=dropout, ffn=ffn)


def run_of_three_steps(method: str, *, precision: str = "float32", seed: int = 0, dropout: float = 0.2) -> dict[str, Tensor]:
    """Losses, and every tensor of a checkpoint."""
    model = build_model(config_of(method, dropout=dropout)).train()
    model.init_parameters(seed)
    torch.manual_seed(seed)
    stepper = Stepper(model, dataclasses.replace(SETTINGS, precision=precision))
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(SETTINGS.steps):
        tokens = torch.randint(40, (SETTINGS.batch, SETTINGS.context + 1), generator=generator)
        losses.append(stepper.take(tokens[:, :-1], tokens[:, 1:], lr=1e-3)[0])
    return {"losses": torch.stack(losses), **stepper.tensors()}


def main() -> None:
    """What threads and another backend change, without dropout, by name, as JSON.

    The largest relative difference of a loss, and how many tensors of the checkpoints have other bits.
    """

    def runs() -> list[dict[str, Tensor]]:
        return [run_of_three_steps(method, dropout=0.0) for method in ("dense", "sigma-moe")]

    torch.set_num_threads(1)
    one = runs()
    os.environ["SPARSEFFN_BACKEND"] = "torch"
    plain = runs()
    del os.environ["SPARSEFFN_BACKEND"]
    torch.set_num_threads(2)
    found = {}
    for name, others in {"threads": runs(), "backend": plain}.items():
        pairs = list(zip(one, others, strict=True))
        largest = max(float((b["losses"] / a["losses"] - 1).abs().max()) for a, b in pairs)
        found[name] = {"losses": largest, "tensors": sum(not torch.equal(a[key], b[key]) for a, b in pairs for key in a)}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
