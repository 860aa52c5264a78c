"""Which of the installed transformers' experts run on our kernels, and why the others do not."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from sparseffn.hf.formulas import Formula, formula_of

_DECORATOR = "@use_experts_implementation"

# What some configs leave open.
_OPEN = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 8}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A class of experts of transformers."""

    family: str
    """Folder under `transformers.models`."""
    experts: str
    """Name of the class."""
    layout: str
    """How its weights are stored: `gated, transposed, biased`."""
    formula: Formula | None
    """What our kernels compute of it."""
    reason: str
    """Why transformers computes it; empty where ours do."""


def families() -> list[Family]:
    """Every class of the installed transformers that chooses its experts' implementation, with its default config."""
    return [_family(name, experts) for name, experts in built()]


def built() -> Iterator[tuple[str, nn.Module]]:
    """Family and an instance of each such class, without memory, on the meta device; importing all of them takes seconds."""
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if _DECORATOR not in path.read_text():
            continue
        modeling = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for experts_class in _classes(modeling, nn.Module):
            if hasattr(experts_class, "_apply_gate") and hasattr(experts_class.__init__, "__wrapped__"):
                yield path.parent.name, _build(experts_class, list(_classes(modeling, PreTrainedConfig, own=False)))


def _family(family: str, experts: Any) -> Family:
    layout = {"gated": experts.has_gate, "transposed": experts.is_transposed, "biased": experts.has_bias}
    formula = formula_of(experts)
    computed = isinstance(formula, Formula)
    return Family(
        family=family,
        experts=type(experts).__name__,
        layout=", ".join(word for word, has in layout.items() if has),
        formula=formula if computed else None,
        reason="" if computed else str(formula),
    )


def _classes(module: ModuleType, base: type, *, own: bool = True) -> Iterator[Any]:
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, base) and (not own or value.__module__ == module.__name__):
            yield value


def _build(experts_class: Any, config_classes: list[Any]) -> nn.Module:
    """With the first of the family's configs that has the fields which the class reads."""
    for config_class, sizes in itertools.product(config_classes, ((), (8,))):
        config = config_class()
        for name in [name for name in _OPEN if getattr(config, name, "") is None]:
            setattr(config, name, _OPEN[name])
        try:
            with torch.device("meta"):
                return experts_class(config, *sizes)
        # The config of another part of the model lacks fields; Ernie's lists a size for each kind of experts.
        except (AttributeError, TypeError):
            continue
    raise AssertionError(f"{experts_class} takes none of {config_classes}")
