"""Options of a method: what a config field means, which values it takes, how it is read from the command line.

A field is declared once, `k: Annotated[int, Option("Experts a token uses.", low=1)] = 4`; validation, `sparseffn methods`,
the command line and the contract suite all read that.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sparseffn.errors import UserError, nearest_names, unknown_name

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class Option:
    """The range and meaning of one config field."""

    doc: str
    low: float = -math.inf
    high: float = math.inf
    below: float = math.inf
    """Exclusive upper bound."""
    added_later: bool = False
    """Left out of a config's JSON at its default: runs that are older than the option keep their identity."""

    def range_text(self) -> str:
        bounds = {"at least": self.low, "at most": self.high, "below": self.below}
        parts = [f"{words} {bound:g}" for words, bound in bounds.items() if math.isfinite(bound)]
        return " and ".join(parts) or "a number"


def option(
    doc: str, *, low: float = -math.inf, high: float = math.inf, below: float = math.inf, added_later: bool = False
) -> Option:
    """Shorthand for `Option` with the meaning first."""
    return Option(doc=doc, low=low, high=high, below=below, added_later=added_later)


@dataclass(frozen=True)
class FieldInfo:
    """What is declared about one field of a config."""

    name: str
    kind: type
    """int, float, bool or str."""
    choices: tuple[str, ...]
    """Accepted strings where the type is a Literal, else empty."""
    optional: bool
    """Whether None is accepted."""
    default: Any
    """The default, or `dataclasses.MISSING` where the field is required."""
    option: Option


@functools.cache
def field_infos(config_class: type) -> Mapping[str, FieldInfo]:
    """Every declared option of a config class, in order."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    infos = {}
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        base, declared = hint, Option(doc="")
        if typing.get_origin(hint) is typing.Annotated:
            base = typing.get_args(hint)[0]
            declared = next((m for m in hint.__metadata__ if isinstance(m, Option)), declared)
        optional = False
        if typing.get_origin(base) in (types.UnionType, typing.Union):
            members = [m for m in typing.get_args(base) if m is not types.NoneType]
            optional, base = len(members) < len(typing.get_args(base)), members[0]
        choices = tuple(typing.get_args(base)) if typing.get_origin(base) is typing.Literal else ()
        kind = str if choices else base
        infos[field.name] = FieldInfo(field.name, kind, choices, optional, field.default, declared)
    return types.MappingProxyType(infos)


def from_fields(config_class: type[Config], fields: Mapping[str, Any], *, owner: str, what: str) -> Config:
    """A config from its fields; messages call it `owner` ("a training config") and a field `what` ("training option").

    Raises:
        UserError: a field is unknown, a required one is missing, or a value is out of range.
    """
    infos = field_infos(config_class)
    for key in fields:
        if key not in infos:
            raise unknown_name(what, key, infos)
    missing = [info.name for info in infos.values() if info.default is dataclasses.MISSING and info.name not in fields]
    if missing:
        raise UserError(
            f"{owner} needs {', '.join(missing)}; got {', '.join(fields) or 'nothing'}; "
            f"fix: add {' '.join(f'{m}=...' for m in missing)}"
        )
    return config_class(**fields)


def check_fields(config: object) -> None:
    """Check type and range of every declared option.

    Raises:
        UserError: naming the field, the range and the value.
    """
    for info in field_infos(type(config)).values():
        _check(info, getattr(config, info.name))


# How a value of each type is put right.
_REMEDIES = {int: "pass a whole number", float: "pass a number", bool: "pass true or false", str: "pass text"}


# Of a whole number that a float can hold; JSON has larger ones.
_MOST_BITS = sys.float_info.max_exp - 1


def _check(info: FieldInfo, value: object) -> None:
    if value is None and info.optional:
        return
    if info.choices:
        if value not in info.choices:
            near = nearest_names(str(value), info.choices)
            fix = f"did you mean {' or '.join(map(repr, near))}?" if near else "pass one of these"
            raise UserError(f"`{info.name}` must be one of {', '.join(info.choices)}; got {value!r}; fix: {fix}")
        return
    accepted = (int, float) if info.kind is float else (info.kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and info.kind is not bool):
        raise _wrong_type(info, value)
    if isinstance(value, int | float) and info.kind is not bool:
        o, fix = info.option, "fix: pass a number in this range"
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise UserError(
                f"`{info.name}` must be a number that is computed with; got one of {value.bit_length()} bits; {fix}"
            )
        if not (o.low <= value <= o.high and value < o.below) or not math.isfinite(value):
            raise UserError(f"`{info.name}` must be {o.range_text()}; got {value!r}; {fix}")


def _wrong_type(info: FieldInfo, value: object) -> UserError:
    none = " or none" if info.optional else ""
    return UserError(
        f"`{info.name}` must be {info.kind.__name__}{none}; got {value!r}; fix: {_REMEDIES.get(info.kind, 'pass one')}{none}"
    )


def parse_options(owner: str, config_class: type, texts: Mapping[str, str]) -> dict[str, Any]:
    """Typed values from `key=value` texts; hyphens and underscores are the same in keys. `owner` is the method's name.

    Raises:
        UserError: an unknown key, with the nearest ones, or a text that is not of the field's type.
    """
    infos = field_infos(config_class)
    values = {}
    for key, text in texts.items():
        name = key.replace("-", "_")
        if name not in infos:
            raise unknown_name(f"option of {owner}", key, infos)
        values[name] = _parse(infos[name], text)
    return values


def _parse(info: FieldInfo, text: str) -> object:
    if info.optional and text.lower() in ("none", "null", ""):
        return None
    if info.choices or info.kind is str:
        return text
    if info.kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise UserError(f"`{info.name}` must be true or false; got {text!r}; fix: write {info.name}=true")
        return text.lower() in ("true", "1", "yes")
    try:
        return info.kind(text)
    except ValueError:
        raise _wrong_type(info, text) from None
