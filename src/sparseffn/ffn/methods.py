"""Which methods there are: those of this package, those registered by a user's file, those of installed packages.

An installed package joins by an entry point in the group `sparseffn.methods` that names a module or a config class.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from sparseffn.errors import UserError, unknown_name
from sparseffn.ffn.block_config import FFNConfig
from sparseffn.ffn.options import from_fields

if TYPE_CHECKING:
    from sparseffn.ffn.feedforward import FeedForward

ENTRY_POINT_GROUP = "sparseffn.methods"

_METHODS: dict[str, type[FFNConfig]] = {}
_LOADED_ENTRY_POINTS: set[tuple[str, str]] = set()

Config = TypeVar("Config", bound=FFNConfig)


def register(config_class: type[Config]) -> type[Config]:
    """Class decorator: make a method known under its `name`.

    Raises:
        UserError: another class has that name.
    """
    name = config_class.name
    known = _full_name(_METHODS.get(name, config_class))
    if known != _full_name(config_class):
        raise UserError(f"`name` must be new; got {name!r}, which is {known}; fix: rename")
    _METHODS[name] = config_class
    return config_class


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def unregister(name: str) -> None:
    """Forget a method; for tests and notebooks that define one again."""
    _METHODS.pop(name, None)


def load_builtin_methods(package: str, path: list[str]) -> None:
    """Import every module beside this one: those that hold a method register it."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def _load_entry_points() -> None:
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if (point.name, point.value) not in _LOADED_ENTRY_POINTS:
            _LOADED_ENTRY_POINTS.add((point.name, point.value))
            loaded = point.load()
            if isinstance(loaded, type) and issubclass(loaded, FFNConfig):
                register(loaded)


def list_methods() -> list[str]:
    """Names of all methods: `dense` first, the rest sorted."""
    _load_entry_points()
    return sorted(_METHODS, key=lambda name: (name != "dense", name))


def method_class(name: str) -> type[FFNConfig]:
    """The config class of a method; hyphens and underscores are the same.

    Raises:
        UserError: there is no such method; the nearest names are offered.
    """
    wanted = name.replace("_", "-")
    if wanted not in _METHODS:
        names = list_methods()
        if wanted not in names:
            raise unknown_name("method", name, names)
    return _METHODS[wanted]


def build(method: str, **fields: Any) -> FeedForward:
    """A layer from a method's name and its config's fields: `build("sigma-moe", d_model=512, n_experts=16, ...)`.

    Raises:
        UserError: there is no such method, or the fields make no config of it.
    """
    return make_config(method_class(method), fields).build()


def config_from_json(data: Mapping[str, Any]) -> FFNConfig:
    """The config that `FFNConfig.to_json` wrote.

    Raises:
        UserError: the method or a field is unknown, a required field is missing, or a value is out of range.
    """
    fields = dict(data)
    return make_config(method_class(str(fields.pop("method", ""))), fields)


def make_config(config_class: type[Config], fields: Mapping[str, Any]) -> Config:
    """A config from its fields.

    Raises:
        UserError: a field is unknown, a required one is missing, or a value is out of range.
    """
    return from_fields(config_class, fields, owner=config_class.name, what=f"option of {config_class.name}")
