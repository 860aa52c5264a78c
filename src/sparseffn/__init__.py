"""Sparse approximations of the Transformer's two-layer feedforward block (arXiv 2310.10837).

    import sparseffn
    layer = sparseffn.SigmaMoE(d_model=512, n_experts=16, expert_size=128, k=4)
    y = layer(x)

Names are imported when they are first used: importing the package is cheap and has no side effect.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseffn.comparison import CompareSettings as CompareSettings
    from sparseffn.comparison import compare as compare
    from sparseffn.errors import UserError as UserError
    from sparseffn.evaluation import evaluate as evaluate
    from sparseffn.ffn import FeedForward as FeedForward
    from sparseffn.ffn import FFNConfig as FFNConfig
    from sparseffn.ffn import build as build
    from sparseffn.ffn import collect_stats as collect_stats
    from sparseffn.ffn import list_methods as list_methods
    from sparseffn.ffn.base import BASE as BASE
    from sparseffn.ffn.base import BASEConfig as BASEConfig
    from sparseffn.ffn.dense import Dense as Dense
    from sparseffn.ffn.dense import DenseConfig as DenseConfig
    from sparseffn.ffn.noisy_moe import NoisyMoE as NoisyMoE
    from sparseffn.ffn.noisy_moe import NoisyMoEConfig as NoisyMoEConfig
    from sparseffn.ffn.pkm import PKM as PKM
    from sparseffn.ffn.pkm import PKMConfig as PKMConfig
    from sparseffn.ffn.s_base import SBASE as SBASE
    from sparseffn.ffn.s_base import SBASEConfig as SBASEConfig
    from sparseffn.ffn.sigma_moe import SigmaMoE as SigmaMoE
    from sparseffn.ffn.sigma_moe import SigmaMoEConfig as SigmaMoEConfig
    from sparseffn.ffn.softmax_moe import SoftmaxMoE as SoftmaxMoE
    from sparseffn.ffn.softmax_moe import SoftmaxMoEConfig as SoftmaxMoEConfig
    from sparseffn.ffn.softmax_renorm_moe import SoftmaxRenormMoE as SoftmaxRenormMoE
    from sparseffn.ffn.softmax_renorm_moe import SoftmaxRenormMoEConfig as SoftmaxRenormMoEConfig
    from sparseffn.ffn.switch import Switch as Switch
    from sparseffn.ffn.switch import SwitchConfig as SwitchConfig
    from sparseffn.ffn.topk import TopK as TopK
    from sparseffn.ffn.topk import TopKConfig as TopKConfig
    from sparseffn.matching import match as match
    from sparseffn.training import TrainConfig as TrainConfig
    from sparseffn.training import train as train

__version__ = "0.2.0"

# What type checkers see above; a test holds the two together.
_NAMES = {
    "comparison": ("CompareSettings", "compare"),
    "errors": ("UserError",),
    "evaluation": ("evaluate",),
    "ffn": ("FFNConfig", "FeedForward", "build", "collect_stats", "list_methods"),
    "ffn.base": ("BASE", "BASEConfig"),
    "ffn.dense": ("Dense", "DenseConfig"),
    "ffn.noisy_moe": ("NoisyMoE", "NoisyMoEConfig"),
    "ffn.pkm": ("PKM", "PKMConfig"),
    "ffn.s_base": ("SBASE", "SBASEConfig"),
    "ffn.sigma_moe": ("SigmaMoE", "SigmaMoEConfig"),
    "ffn.softmax_moe": ("SoftmaxMoE", "SoftmaxMoEConfig"),
    "ffn.softmax_renorm_moe": ("SoftmaxRenormMoE", "SoftmaxRenormMoEConfig"),
    "ffn.switch": ("Switch", "SwitchConfig"),
    "ffn.topk": ("TopK", "TopKConfig"),
    "matching": ("match",),
    "training": ("TrainConfig", "train"),
}
_MODULES = {name: f"sparseffn.{module}" for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    found = _of_a_method(name) if name[:1].isupper() else None
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found


def _of_a_method(name: str) -> type | None:
    """The layer or config of that name of any registered method, so that a new one need not be listed here."""
    from sparseffn.ffn import FeedForward, FFNConfig, list_methods, method_class

    for method in list_methods():
        module = sys.modules[method_class(method).__module__]
        found = getattr(module, name, None)
        if isinstance(found, type) and found.__module__ == module.__name__ and issubclass(found, FeedForward | FFNConfig):
            return found
    return None


def __dir__() -> list[str]:
    return sorted({"__doc__", "__version__", *_MODULES})
