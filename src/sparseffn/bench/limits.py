"""What a layer's time cannot go below on a machine: its arithmetic, or reading the weights that the batch touches.

    limit = max(FLOPs / measured matrix-product speed, bytes of touched weights / measured bandwidth)

FLOPs count the selector; backward is twice the forward. Forward and backward together also write every weight gradient, those
of experts without tokens too; its time stands beside the limit and is not part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparseffn.accounting import BACKWARD_OVER_FORWARD
from sparseffn.bench.roofline import Roof
from sparseffn.ffn import FeedForward, FFNConfig

# Tables of pairs that hold one row for each unit: a mixture's expert has keys and values of its own, every other method goes
# through all keys and then through the values it selected.
_TABLES_PER_UNIT = {"experts": 2, "values": 1, "channels": 1}


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Seconds that a call takes at the least."""

    arithmetic_s: float
    bytes_s: float
    gradient_s: float
    """Writing the gradients of all weights; 0 for a forward. Not part of the limit."""

    @property
    def seconds(self) -> float:
        """The larger of arithmetic and bytes."""
        return max(self.arithmetic_s, self.bytes_s)


def limit(config: FFNConfig, roof: Roof, *, n_tokens: int, touched_bytes: float, itemsize: int, training: bool) -> Limit:
    """The limit of a forward, or of a forward with its backward."""
    flops = n_tokens * config.forward_flops(training=training) * (1 + BACKWARD_OVER_FORWARD if training else 1)
    return Limit(
        arithmetic_s=flops / roof.flops_per_s,
        bytes_s=touched_bytes / roof.bytes_per_s,
        gradient_s=config.num_params() * itemsize / roof.bytes_per_s if training else 0.0,
    )


def touched_bytes(layer: FeedForward, x: Tensor) -> int:
    """Bytes of the parameters that a batch needs: all but the pairs of units that no token selected."""
    _, stats = layer.eval()(x, return_stats=True)
    return weight_bytes(layer.config, n_unused=int((stats.counts == 0).sum()), n_units=len(stats.counts), itemsize=x.itemsize)


def weight_bytes(config: FFNConfig, *, n_unused: int, n_units: int, itemsize: int) -> int:
    """Bytes of the parameters without those of unused units; the dense block computes all, zero or not."""
    if config.active_channels >= config.n_channels:
        n_unused = 0
    pairs = n_unused * config.n_channels // n_units
    return (config.num_params() - pairs * _TABLES_PER_UNIT[config.unit] * config.d_model) * itemsize


def expected_bytes(config: FFNConfig, *, n_tokens: int, itemsize: int) -> float:
    """The same for tokens that choose their units evenly and independently, in expectation."""
    share = min(1.0, config.active_channels / config.n_channels)
    untouched = 0.0 if share == 1.0 else (1 - share) ** n_tokens
    pairs = untouched * config.n_channels
    return (config.num_params() - pairs * _TABLES_PER_UNIT[config.unit] * config.d_model) * itemsize
