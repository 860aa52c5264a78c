"""What `import sparseffn` offers."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparseffn
from sparseffn.ffn import list_methods, method_class

SIZES = {"d_model": 64, "n_experts": 8, "expert_size": 16, "k": 2}
SOURCE = Path(sparseffn.__file__)


def test_importing_the_package_imports_nothing_else() -> None:
    """No torch, no numpy: a second and a half that a version number is not worth."""
    code = "import sparseffn, sys; dir(sparseffn); print([m for m in ('torch', 'numpy', 'sparseffn.ffn') if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(SOURCE.parents[1])}, check=True
    )
    assert found.stdout.strip() == "[]"


def test_type_checkers_see_the_names_that_are_loaded() -> None:
    """From the same modules; and every method's config and layer are among them."""
    (block,) = (node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == sparseffn._MODULES
    for name in list_methods():
        config = method_class(name).examples()[0]
        for one in (type(config), type(config.build())):
            assert getattr(sparseffn, one.__name__) is one
    assert all(getattr(sparseffn, name) is not None for name in dir(sparseffn))


def test_layers_are_built_from_a_config_or_from_its_fields() -> None:
    """To the same bits, by class or by name."""
    layers = []
    for make in (
        lambda: sparseffn.SigmaMoE(**SIZES),
        lambda: sparseffn.SigmaMoE(sparseffn.SigmaMoEConfig(**SIZES)),
        lambda: sparseffn.build("sigma_moe", **SIZES),
    ):
        torch.manual_seed(0)
        layers.append(make())
    for layer in layers[1:]:
        assert layer.config == layers[0].config
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), layers[0].parameters(), strict=True))
    assert list(inspect.signature(sparseffn.SigmaMoE).parameters)[:3] == ["d_model", "activation", "n_layers"]


def test_a_layer_prints_what_was_set_and_its_parameters() -> None:
    """Defaults are left out."""
    shown = str(sparseffn.SigmaMoE(**SIZES))
    assert "d_model=64, n_experts=8, expert_size=16, k=2\n  16,896 parameters, 4,608 active" in shown
    assert "selector [8, 64]" in shown and "keys [8, 64, 16], values [8, 16, 64]" in shown and "dropout" not in shown


@pytest.mark.parametrize(
    ("arguments", "fields", "words"),
    [
        ((), SIZES | {"n_expert": 3}, "unknown option of sigma-moe 'n_expert'; fix: did you mean 'n_experts'"),
        ((), {"d_model": 64}, "sigma-moe needs n_experts, expert_size, k; got d_model"),
        ((), SIZES | {"k": 9}, "`k` must be at most n_experts = 8; got 9"),
        ((64,), {}, "`config` must be a SigmaMoEConfig by itself; got 64; fix: pass its fields by keyword"),
        ((sparseffn.SigmaMoEConfig(**SIZES),), {"k": 3}, "by itself; got SigmaMoEConfig.* and k"),
    ],
    ids=["unknown", "missing", "range", "no-config", "both"],
)
def test_bad_arguments_are_refused(arguments: tuple, fields: dict, words: str) -> None:
    """By the config's own errors, with the nearest names."""
    with pytest.raises(sparseffn.UserError, match=words):
        sparseffn.SigmaMoE(*arguments, **fields)


@pytest.mark.skipif(importlib.util.find_spec("basedpyright") is None, reason="needs basedpyright")
def test_type_checkers_know_the_fields(tmp_path: Path) -> None:
    """The right call is accepted; a wrong type and an unknown name are errors."""
    (tmp_path / "use.py").write_text(
        "import sparseffn\n"
        "layer: sparseffn.SigmaMoE = sparseffn.SigmaMoE(d_model=64, n_experts=8, expert_size=16, k=2)\n"
        "sparseffn.SigmaMoE(layer.config)\n"
        "sparseffn.SigmaMoE(d_model=64, n_experts=8, expert_size='16', k=2)\n"
        "sparseffn.SigmaMoE(d_model=64, n_expert=8, expert_size=16, k=2)\n"
    )
    (tmp_path / "pyrightconfig.json").write_text(
        f'{{"typeCheckingMode": "standard", "extraPaths": ["{SOURCE.parents[1]}"], "include": ["use.py"]}}'
    )
    found = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "-p", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    errors = [line for line in found.stdout.splitlines() if " error: " in line]
    assert len(errors) == 2 and "use.py:4" in errors[0] and "use.py:5" in errors[1], found.stdout
