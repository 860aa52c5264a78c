"""What a released checkpoint says of its model beside the weights: the arguments of the authors' `main.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparseffn.errors import UserError, unknown_name

# Arguments that change what evaluation computes, and the only value under which it is what we compute. Those that change names
# or shapes are found by these.
_NEEDED = {
    "transformer.output_mode": "normal",
    "lm.trafo.last_layer_context": 0,
    "lm.trafo.same_length": 0,
    "lm.trafo.same_length_eval": 0,
    "lm.trafo.test_pos_clamp": "none",
    "moe.half_key": 0,
    "moe.key_mode": "moe",
    "moe.norm_expert_scores": 0,
    "moe.sel_norm": "none",
    "moe.slope_multiplier": 1,
    "moe.topk_mode": "full",
    "kvmem.full_key": 0,
    "kvmem.approx_topk": 0,
    "kvmem.factorize": 0,
    "kvmem.head_merge_topk": 0,
    "kvmem.randomize_indices": 0,
    "pkm.slice_values": 0,
}
# Ours by the authors' names.
_SELECTIONS = {"sigmoid": "sigmoid", "gate": "softmax", "sinkmoid": "sinkmoid", "sinkmoid2": "sinkmoid"}
_OPTIONS = ("method", "k", "selection_mode", "activation_after_topk", "activation", "dropout")


@dataclass(frozen=True)
class ReleasedSettings:
    """Settings of a released model, the caller's in place of the file's; None for what neither says."""

    arguments: Mapping[str, Any]
    """Of the file; empty where it has none."""
    options: Mapping[str, Any]
    """The caller's, of which those that no property reads are fields of the block's config."""
    where: str

    @classmethod
    def of_file(cls, found: Mapping[str, Any], options: Mapping[str, Any], *, where: str) -> ReleasedSettings:
        """The settings in a checkpoint.

        Raises:
            UserError: one of them makes the model another than ours.
        """
        invariants = found.get("run_invariants")
        arguments = invariants.get("args") if isinstance(invariants, Mapping) else None
        given = arguments if isinstance(arguments, Mapping) else {}
        for name, needed in _NEEDED.items():
            value = given.get(name, needed)
            # None is "none", and switches are 0 or 1.
            if ("none" if value is None else value) != needed:
                raise UserError(f"{where} must have {name} = {needed}; got {value!r}; fix: our models do not compute that")
        return cls(given, options, where)

    def get(self, name: str, argument: str, default: Any = None) -> Any:
        """An option, else an argument of the file, else the default."""
        return self.options[name] if name in self.options else self.arguments.get(argument, default)

    def need(self, name: str, argument: str) -> Any:
        """A setting without a default.

        Raises:
            UserError: nobody says it.
        """
        value = self.get(name, argument)
        if value is None:
            raise UserError(f"`{name}` must be given, as {self.where} does not say it; got none; fix: pass {name}=...")
        return value

    @property
    def dropout(self) -> float:
        return float(self.get("dropout", "dropout", 0.0))

    @property
    def activation(self) -> str:
        return str(self.get("activation", "transformer.activation", "relu"))

    @property
    def selection_mode(self) -> str:
        """Of `released_method`."""
        if "selection_mode" in self.options:
            return str(self.options["selection_mode"])
        theirs = str(self.arguments.get("moe.selection_mode", "sigmoid"))
        if theirs not in _SELECTIONS:
            raise unknown_name("moe.selection_mode", theirs, _SELECTIONS)
        return _SELECTIONS[theirs]

    @property
    def fields(self) -> dict[str, Any]:
        """The caller's fields of the block's config."""
        return {name: value for name, value in self.options.items() if name not in _OPTIONS}
