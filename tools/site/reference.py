"""The pages of the API reference: public names alone, from what the packages say they offer, rendered by mkdocstrings."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from gallery import options_table

import sparseffn
from sparseffn.ffn import list_methods, method_class

# Page, its title, and the packages whose `__all__` it shows.
PACKAGES = {
    "hf": ("Hugging Face", "sparseffn.hf"),
    "write-a-method": ("Writing a method", "sparseffn.ffn"),
    "ops": ("Operations", "sparseffn.ops"),
    "contract": ("The contract suite", "sparseffn.contract"),
    "data": ("Text and tokenisers", "sparseffn.data"),
    "models": ("Models", "sparseffn.models"),
    "training": ("Training", "sparseffn.training"),
    "comparison": ("Comparing", "sparseffn.comparison"),
}
# Modules without `__all__`: what has no underscore is public.
MODULES = {"accounting": ("Parameters, FLOPs, bytes", "sparseffn.accounting"), "matching": ("Matching", "sparseffn.matching")}
# Whose parameters the layers have.
SHARED = ("sparseffn.ffn.dense.TwoMatrices", "sparseffn.ffn.mixture.Mixture")


def reference_pages() -> Mapping[str, str]:
    """Markdown by the page's name."""
    pages = {"index": _functions(), "layers": _layers()}
    for name, (title, module) in (PACKAGES | MODULES).items():
        pages[name] = f"# {title}\n\n::: {module}\n    options:\n      heading_level: 2\n      show_root_heading: false\n"
    return pages


def _functions() -> str:
    """What `import sparseffn` offers, without classes that have a page of their own."""
    elsewhere = {cls.__name__ for name in list_methods() for cls in _classes_of(name)} | {"FFNConfig", "FeedForward"}
    names = [name for name in dir(sparseffn) if not name.startswith("_") and name not in elsewhere]
    lead = (
        "What `import sparseffn` offers, loaded when it is used. [Layers and configs](layers.md) and "
        "[their two bases](write-a-method.md) have their own pages."
    )
    return "\n\n".join(["# The package", lead, *(_entry(f"sparseffn.{name}", level=2) for name in names)]) + "\n"


def _layers() -> str:
    """Layer and config of each method; what they compute beside it is the base's to document."""
    lead = (
        "Each config's fields are its layer's arguments, by keyword. What every layer can do is said of "
        "[FeedForward][sparseffn.ffn.FeedForward]; [the gallery](../methods/index.md) has the equations."
    )
    entries = ["## What they share", *(_entry(path, level=3, members=False) for path in SHARED)]
    for name in list_methods():
        layer, config = (_entry(f"{cls.__module__}.{cls.__qualname__}", level=3, members=False) for cls in _classes_of(name))
        entries += [f"## {name}", layer, config, options_table(method_class(name))]
    return "\n\n".join(["# Layers and configs", lead, *entries]) + "\n"


def _entry(path: str, *, level: int, members: bool = True) -> str:
    shown = "" if members else "\n      members: false\n      show_bases: false"
    return f"::: {path}\n    options:\n      heading_level: {level}{shown}"


def _classes_of(method: str) -> tuple[type, type]:
    """Layer and config."""
    config = method_class(method).examples()[0]
    with torch.device("meta"):
        return type(config.build()), type(config)
