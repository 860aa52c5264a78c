"""Layers of `moe_layer` and `sigma-moe`: their names and layouts, held against a plain computation of what they compute."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparseffn.errors import UserError
from sparseffn.ffn.released_layers import load_released_layer

E, D, G, K = 5, 6, 4, 2


def moe_layer(seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names of `moe_layer`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"keys": (E, D, G), "values": (E, G, D), "expert_sel": (E, D)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def sigma_moe(layout: str) -> dict[str, Tensor]:
    """The same weights as `sigma-moe` stores them."""
    of = moe_layer()
    keys, values, found = of["keys"], of["values"], {"expert_sel.weight": of["expert_sel"]}
    if layout == "stacked":
        return {**found, "keys": keys, "values": values}
    if layout == "flat":
        return {**found, "keys": keys.transpose(1, 2).reshape(E * G, D), "values": values.reshape(E * G, D).T}
    singles = {f"keys.{e}.weight": keys[e].T for e in range(E)} | {f"values.{e}.weight": values[e].T for e in range(E)}
    return {**found, **singles}


def plain(weights: dict[str, Tensor], x: Tensor, mode: str, *, after_topk: bool) -> Tensor:
    """One token and one expert at a time, in evaluation."""
    rows = []
    for token in x:
        logits = weights["expert_sel"] @ token
        scores = logits.softmax(0) if mode == "softmax" else logits.sigmoid()
        chosen = scores.argsort(descending=True)[:K]
        gates = logits[chosen].softmax(0) if mode == "softmax" and after_topk else scores[chosen]
        outs = [(token @ weights["keys"][e]).clamp_min(0) @ weights["values"][e] for e in chosen]
        rows.append(sum(gate * out for gate, out in zip(gates, outs, strict=True)))
    return torch.stack([row for row in rows if isinstance(row, Tensor)])


def inputs() -> Tensor:
    return torch.randn(9, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class TestForward:
    @pytest.mark.parametrize("after_topk", [False, True], ids=["before", "after"])
    @pytest.mark.parametrize("mode", ["sigmoid", "softmax", "sinkmoid"])
    def test_every_selection(self, mode: str, after_topk: bool) -> None:
        """As the released layer computes it in evaluation."""
        layer = load_released_layer(
            moe_layer(),
            k=K,
            selection_mode=mode,  # pyright: ignore[reportArgumentType]
            activation_after_topk=after_topk,
        ).eval()
        torch.testing.assert_close(layer(inputs()), plain(moe_layer(), inputs(), mode, after_topk=after_topk))

    @pytest.mark.parametrize("layout", ["stacked", "flat", "traceable"])
    def test_every_layout_of_sigma_moe(self, layout: str) -> None:
        layer = load_released_layer(sigma_moe(layout), k=K).eval()
        torch.testing.assert_close(layer(inputs()), plain(moe_layer(), inputs(), "sigmoid", after_topk=False))

    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    def test_from_a_file_inside_a_model(self, suffix: str, tmp_path: Path) -> None:
        """Among other layers, with the counters that the authors' code keeps; options reach the config."""
        weights = {f"layers.1.pkm.{name}": tensor for name, tensor in moe_layer().items()}
        weights["layers.1.pkm.kv_sel_counts_100"] = torch.zeros(E, G)
        weights["layers.0.pkm.keys"] = torch.zeros(1)
        path = tmp_path / f"model.{suffix}"
        save_file(weights, path) if suffix == "safetensors" else torch.save(weights, path)
        layer = load_released_layer(path, k=K, prefix="layers.1.pkm.", entropy_weight=0.5).eval()
        torch.testing.assert_close(layer(inputs()), plain(moe_layer(), inputs(), "sigmoid", after_topk=False))
        assert layer.config.balancing()["entropy"] == 0.5
        assert layer.experts.keys.dtype == torch.float64


class TestRefused:
    """What is missing is said, and what to do."""

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"bias": torch.ones(E, G)}, "must have no biases"),
            ({"keys.0.bias": torch.ones(G)}, "must have no biases"),
            ({"values": torch.ones(E, G, D + 1)}, "outputs as wide as its inputs, 6; got 7"),
            ({"expert_sel": torch.ones(E, D, 1)}, "as moe_layer or sigma-moe lay them out"),
            ({"keys": torch.ones(E, D + 1, G)}, "as moe_layer or sigma-moe lay them out"),
            ({"shared_keys": torch.ones(D, G)}, "as moe_layer or sigma-moe lay them out; got expert_sel"),
        ],
        ids=["bias", "single-bias", "v-dim", "selector", "keys", "unknown-name"],
    )
    def test_what_our_layers_lack(self, changes: dict[str, Tensor], words: str) -> None:
        with pytest.raises(UserError, match=words):
            load_released_layer({**moe_layer(), **changes}, k=K)

    def test_a_wrong_prefix_or_selection(self) -> None:
        with pytest.raises(UserError, match="got no tensor; fix: check `prefix`"):
            load_released_layer(moe_layer(), k=K, prefix="layers.9.")
        with pytest.raises(UserError, match="did you mean 'sigmoid'"):
            load_released_layer(moe_layer(), k=K, selection_mode="sigmoidal")  # pyright: ignore[reportArgumentType]

    def test_biases_of_zero_say_nothing(self) -> None:
        layer = load_released_layer({**moe_layer(), "bias": torch.zeros(E, G), "o_bias": torch.zeros(D)}, k=K).eval()
        torch.testing.assert_close(layer(inputs()), plain(moe_layer(), inputs(), "sigmoid", after_topk=False))

    def test_code_in_a_file_is_not_run(self, tmp_path: Path) -> None:
        """A pickle that would make a folder: it is named, and not made."""
        made = tmp_path / "made"

        class Harm:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.mkdir, (str(made),)

        torch.save({"model": moe_layer(), "more": Harm()}, tmp_path / "harm.pth")
        with pytest.raises(UserError, match=r"calls for \w+\.mkdir, which was not run; fix: if you trust it"):
            load_released_layer(tmp_path / "harm.pth", k=K)
        assert not made.exists()
        (tmp_path / "plain.pth").write_bytes(pickle.dumps(Harm(), protocol=2))
        with pytest.raises(UserError, match=r"calls for \w+\.mkdir"):
            load_released_layer(tmp_path / "plain.pth", k=K)
        assert not made.exists()

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"no weights at all"], ids=["empty", "zip", "text"])
    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    def test_a_damaged_file(self, suffix: str, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / f"layer.{suffix}"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"layer.{suffix}` must be a"):
            load_released_layer(path, k=K)
        with pytest.raises(UserError, match="must be a file of weights; got a folder"):
            load_released_layer(tmp_path, k=K)

    def test_a_list_is_no_dictionary(self, tmp_path: Path) -> None:
        torch.save([torch.ones(1)], tmp_path / "list.pth")
        with pytest.raises(UserError, match="must hold a dictionary of tensors; got list"):
            load_released_layer(tmp_path / "list.pth", k=K)
