"""Imports point one way, as CONTRIBUTING says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from torch import nn

import sparseffn

ROOT = Path(sparseffn.__file__).parent
ORDER = [
    "errors",
    "storage",
    "stats",
    "results",
    "devices",
    "distribution",
    "ops",
    "data",
    "ffn",
    "accounting",
    "matching",
    "models",
    "contract",
    "evaluation",
    "training",
    "hf",
    "analysis",
    "bench",
    "comparison",
    "paper",
]


def imported_rooms(path: Path) -> set[str]:
    """First-level modules of the package that a file imports, lazy imports included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparseffn"):
            parts = (node.module or "").split(".")
            names |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names if a.name != "__version__"}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("sparseffn.")}
    return names


def files() -> list[tuple[str, Path]]:
    """Every module with the room that it is in."""
    return [(p.relative_to(ROOT).parts[0].removesuffix(".py"), p) for p in sorted(ROOT.rglob("*.py"))]


# Where a module keeps its parts and its hooks.
OF_MODULES = {name for name in vars(nn.Module()) if re.match(r"_(?!_)", name)}


def private_parts_of_pytorch(text: str) -> set[str]:
    """What a file names of torch that begins with one underscore: imported, reached through dots, or an attribute of a module.

    A class of ours may have `self._modules` of its own; nobody else has hooks.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and node.attr in OF_MODULES:
            own = isinstance(node.value, ast.Name) and node.value.id == "self" and not node.attr.endswith("_hooks")
            found |= set() if own else {ast.unparse(node)}
        names = {ast.unparse(node)} if isinstance(node, ast.Attribute) else set()
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        found |= {name for name in names if re.match(r"torch\.(.*\.)?_(?!_)", name)}
    return found


@pytest.mark.parametrize("path", [p for room, p in files() if room != "ops"], ids=lambda path: str(path.relative_to(ROOT)))
def test_private_parts_of_pytorch_are_named_by_operations_alone(path: Path) -> None:
    """One place to look where a release of PyTorch moves them."""
    assert not private_parts_of_pytorch(path.read_text())


def test_private_parts_of_pytorch_are_found() -> None:
    """Those that operations do need, and any way to name one."""
    assert any(private_parts_of_pytorch(path.read_text()) for room, path in files() if room == "ops")
    for line in (
        "import torch._dynamo",
        "from torch.nn import _reduction",
        "torch._C._log_api_usage_once('')",
        "module._forward_hooks",
        "self.layer._forward_pre_hooks.clear()",
        "self._backward_hooks",
        "model._modules['mlp']",
    ):
        assert private_parts_of_pytorch(line), line
    assert not private_parts_of_pytorch("self._modules(stage), model.__dict__, module.register_forward_hook(f)")


@pytest.mark.parametrize(("room", "path"), files(), ids=[str(p.relative_to(ROOT)) for _, p in files()])
def test_imports_point_one_way(room: str, path: Path) -> None:
    """A module imports only what stands before it; `report` reads typed results; nobody imports `cli`, few `hf`."""
    found = imported_rooms(path) - {room}
    assert "hf" not in found or room in ("bench", "cli"), f"{path.name} imports hf, which needs transformers"
    if room in ORDER:
        allowed = set(ORDER[: ORDER.index(room)])
    elif room == "report":
        allowed = {"errors", "storage", "stats", "results"}
    else:
        assert room in ("cli", "__main__", "__init__"), f"{room} has no place in the order"
        allowed = {*ORDER, "report", "cli"} if room != "__init__" else {*ORDER}
    assert found <= allowed, f"{path.name} imports {sorted(found - allowed)}"


@pytest.mark.parametrize("path", [p for _, p in files()], ids=[str(p.relative_to(ROOT)) for _, p in files()])
def test_every_file_opens_with_a_docstring(path: Path) -> None:
    """What it is comes first."""
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
