"""The authors' checkpoints: every kind of block, held against a plain computation over windows with memory; what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from models.released import HEADS, N_LAYERS, VOCAB, D, arguments, logits, weights
from sparseffn.errors import UserError
from sparseffn.models import TransformerXL, load_released_model

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dense": ("preln_relative", "dense", {}),
    "topk": ("preln_topk", "topk", {}),
    "pkm-dense": ("preln_kvmem", "pkm", {"pkm__knn": 128}),
    "pkm-softmax": ("preln_kvmem", "pkm", {"pkm__knn": 128, "transformer__activation": "softmax"}),
    "pkm-k": ("preln_kvmem", "pkm", {"pkm__knn": 2}),
    "sigmoid": ("preln_moe", "sigma-moe", {}),
    "softmax": ("preln_moe", "softmax-moe", {"moe__selection_mode": "gate"}),
    "softmax-after": ("preln_moe", "softmax-renorm-moe", {"moe__selection_mode": "gate", "moe__activation_after_topk": 1}),
    "sinkmoid": ("preln_moe", "s-base", {"moe__selection_mode": "sinkmoid2"}),
}

# Position codes are float32 in a float64 model, theirs too.
SINUSOIDS = {"rtol": 1e-6, "atol": 1e-6}


def checkpoint(path: Path, of: dict[str, Tensor], args: dict[str, Any]) -> Path:
    """As their code saves one, with its own kind of dictionary."""
    name = "framework.data_structures.dotdict"
    module = ModuleType(name)
    dot_dict = type("DotDict", (dict,), {"__module__": name})
    module.DotDict = dot_dict  # pyright: ignore[reportAttributeAccessIssue]
    saved = {
        "state": dot_dict({"iter": 100000, "best_losses": {"val": {"iter": 1, "loss": 2.0, "accuracy": 0.5}}, "epoch": 3}),
        "run_invariants": {"args": args, "wandb_id": None},
        "model": of,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "interface": {},
    }
    # They import each other by these names; nothing of them is left when the file is read.
    with patch.dict(sys.modules, {name.rsplit(".", n)[0]: module for n in (0, 1, 2)}):
        torch.save(saved, path)
    return path


@torch.no_grad()
def in_windows(model: TransformerXL, tokens: Tensor) -> Tensor:
    memory, found = None, []
    for window in tokens.split(4):
        out = model(window[None], memory, memory_length=100)
        memory = out.memory
        found.append(out.logits[0])
    return torch.cat(found)


def plain_windows(of: dict[str, Tensor], args: dict[str, Any], tokens: Tensor) -> Tensor:
    past, found = None, []
    for window in tokens.split(4):
        out, past = logits(of, args, window, past)
        found.append(out)
    return torch.cat(found)


def text() -> Tensor:
    return torch.randint(VOCAB, (10,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("variant", "method", "changes"), CASES.values(), ids=CASES.keys())
def test_a_checkpoint_is_the_model_that_it_was(variant: str, method: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Logits over three windows, by nothing but the file."""
    of, args = weights(variant), arguments(variant, **changes)
    model = load_released_model(checkpoint(tmp_path / "model-100000.pth", of, args))
    assert model.config.ffn.name == method
    assert model.config.dropout == 0.1
    assert not model.training
    torch.testing.assert_close(in_windows(model, text()), plain_windows(of, args, text()), **SINUSOIDS)


def test_weights_alone_with_what_they_lack() -> None:
    """A state dict; without K the error asks for it, without a method two matrices are the dense block."""
    of = weights("preln_moe")
    with pytest.raises(UserError, match="`k` must be given, as `source` does not say it"):
        load_released_model(of)
    args = arguments("preln_moe")
    torch.testing.assert_close(in_windows(load_released_model(of, k=2), text()), plain_windows(of, args, text()), **SINUSOIDS)
    softmax = load_released_model(of, k=2, selection_mode="softmax", expert_dropout=0.2)
    assert softmax.config.ffn.to_json()["expert_dropout"] == 0.2
    assert softmax.config.ffn.name == "softmax-moe"
    assert load_released_model(weights("preln_relative")).config.ffn.name == "dense"
    assert load_released_model(weights("preln_topk"), method="topk", k=3).config.ffn.name == "topk"
    assert load_released_model(weights("preln_kvmem"), k=2).config.ffn.active_channels == 2 * HEADS


def test_balancing_is_the_released_one() -> None:
    """For training on: entropy, its form over the slots, and Switch's mean over experts."""
    of = weights("preln_moe")

    def balancing(**changes: Any) -> dict[str, float]:
        args = arguments("preln_moe", **changes)
        ffn = load_released_model({"model": of, "run_invariants": {"args": args}}).config.ffn
        return {name: weight for name, weight in ffn.balancing().items() if weight}

    assert balancing() == {"entropy": 0.01}
    assert balancing(moe__selection_mode="gate", moe__activation_after_topk=1) == {"slot_entropy": 0.01}
    assert balancing(moe__selection_mode="gate", moe__reg_type="switch") == {"switch": pytest.approx(0.01 / 25)}


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"moe__sel_norm": "cos"}, "must have moe.sel_norm = none; got 'cos'"),
            ({"lm__trafo__test_pos_clamp": 100}, "must have lm.trafo.test_pos_clamp = none; got 100"),
            ({"pkm__knn": 3}, "must have pkm.knn = 0; got 3"),
            ({"moe__selection_mode": "gumbel"}, "unknown moe.selection_mode 'gumbel'"),
            ({"transformer__activation": "sigmoid"}, "`activation` must be"),
        ],
        ids=["sel-norm", "clamp", "knn", "selection", "activation"],
    )
    def test_settings_that_we_do_not_compute(self, changes: dict[str, Any], words: str) -> None:
        args = arguments("preln_moe", **changes)
        with pytest.raises(UserError, match=words):
            load_released_model({"model": weights("preln_moe"), "run_invariants": {"args": args}})

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"out_norm.weight": None}, r"got no out_norm\.weight; fix: use a checkpoint of variant"),
            ({"embedding_adapter.weight": torch.ones(D, D)}, r"got unknown embedding_adapter\.weight"),
            ({"layers.1.self_attn.scale": None}, r"got no layers\.1\.self_attn\.scale"),
            ({"layers.0.pkm.shared_keys": torch.ones(D, 4)}, "as moe_layer or sigma-moe lay them out"),
            ({"layers.0.linear1.weight": torch.ones(4, D)}, "must have dense, Top-K, product-key or mixture blocks"),
            ({"layers.1.norm1.weight": torch.ones(D + 1)}, "must have the shapes of one model; got another: size mismatch"),
            ({"layers.3.norm1.weight": torch.ones(D)}, "must be a Transformer-XL with pre-layernorm"),
        ],
        ids=["post-norm", "adapter", "no-scale", "shared-keys", "parallel", "shape", "layer-missing"],
    )
    def test_weights_of_another_model(self, changes: dict[str, Tensor | None], words: str) -> None:
        of = {name: w for name, w in {**weights("preln_moe"), **changes}.items() if w is not None}
        with pytest.raises(UserError, match=words):
            load_released_model(of, k=2)

    def test_no_model_at_all(self) -> None:
        with pytest.raises(UserError, match="must be a Transformer-XL with pre-layernorm of the authors' code"):
            load_released_model({"weight": torch.ones(2)})
        assert N_LAYERS == 2
