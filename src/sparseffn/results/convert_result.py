"""`convert.json`: what a model's feedforward blocks were replaced by, and what that cost and saved; format 1."""

from __future__ import annotations

from msgspec import Struct

from sparseffn.storage import Count, PositiveInt

FORMAT = 1


class ReplacedBlock(Struct, frozen=True, kw_only=True):
    """One block before and after."""

    name: str
    """Of the module in its model."""
    kind: str
    """Class of the dense block."""
    method: str
    n_pairs: PositiveInt
    """Key-value pairs that the new block holds."""
    n_active: PositiveInt
    """Of those, how many a token uses."""
    params_before: PositiveInt
    params_after: PositiveInt
    active_params: PositiveInt
    """Parameters that one token's output depends on, router included."""
    flops_before: Count
    """FLOPs a token of a forward pass."""
    flops_after: Count
