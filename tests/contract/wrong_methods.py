"""Methods that are wrong on purpose; each breaks one promise, which the contract must name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from sparseffn.errors import UserError
from sparseffn.ffn import FFNConfig, Routed, option
from sparseffn.ffn.dense import Dense, DenseConfig
from sparseffn.ffn.options import check_fields
from sparseffn.ffn.sigma_moe import SigmaMoE, SigmaMoEConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class _WrongDenseConfig(DenseConfig):
    """A dense block with a mistake."""

    layer: ClassVar[type[Dense]]

    def build(self) -> Dense:
        return type(self).layer(self)

    @classmethod
    def examples(cls) -> list[FFNConfig]:
        return [cls(d_model=8, d_ff=24, n_layers=2), cls(d_model=6, d_ff=10, activation="gelu", dropout=0.25)]


def wrong(name: str, layer: type[Dense]) -> type[_WrongDenseConfig]:
    """A dense config whose layer is the given one."""
    return type(name, (_WrongDenseConfig,), {"layer": layer, "__doc__": name, "__slots__": (), "name": name})


class WrongWeight(Dense):
    """Scales its output."""

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        y_TD, routed = super().compute(x_TD, mask_T)
        return y_TD * 1.01, routed


class DroppedToken(Dense):
    """Forgets the last token of a batch."""

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        y_TD, routed = super().compute(x_TD, mask_T)
        keep = torch.arange(len(y_TD)) < len(y_TD) - 1
        return torch.where(keep[:, None], y_TD, 0.0 * y_TD), routed


class LeakingFuture(Dense):
    """Sees the mean of all tokens; its reference and coefficients agree with it."""

    def leak(self, x_TD: Tensor) -> Tensor:
        return x_TD + 0.1 * x_TD.mean(dim=0) if len(x_TD) else x_TD

    def coefficients_TF(self, x_TD: Tensor) -> Tensor:
        return super().coefficients_TF(self.leak(x_TD))

    def reference_TD(self, x_TD: Tensor) -> Tensor:
        return super().reference_TD(self.leak(x_TD))


class StatefulForward(Dense):
    """Counts its calls."""

    n_calls = 0

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        self.n_calls += 1
        return super().compute(x_TD, mask_T)


class UncountedParameter(Dense):
    """Has a parameter that the closed form does not know of."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__(config)
        self.extra = nn.Parameter(torch.ones(config.d_model))

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        y_TD, routed = super().compute(x_TD, mask_T)
        return y_TD * self.extra, routed


class NoisyEvaluation(Dense):
    """Drops units in evaluation too."""

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        y_TD, routed = super().compute(x_TD, mask_T)
        return y_TD + 1e-3 * torch.randn_like(y_TD), routed


class KeepsEverything(Dense):
    """Keeps a tensor for backward that the closed form does not know of."""

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        y_TD, routed = super().compute(x_TD, mask_T)
        return y_TD * torch.ones_like(y_TD).requires_grad_(), routed


class IgnoresMask(Dense):
    """Counts padding."""

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        y_TD, routed = super().compute(x_TD, None)
        balance = (self.coefficients_TF(x_TD) + 1.0).sum()
        return y_TD, Routed(routed.units, balance=lambda: balance)


class _OnceDifferentiable(torch.autograd.Function):
    """u v by a gradient in which no gradient of a gradient passes."""

    @staticmethod
    def forward(u: Tensor, v: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return u @ v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        u, v = (tensor.detach() for tensor in ctx.saved_tensors)
        return grad @ v.t(), u.t() @ grad


class WrongSecondDerivative(Dense):
    """Its backward forgets what it depends on."""

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        u_TF = self.coefficients_TF(x_TD)
        return _OnceDifferentiable.apply(u_TF, self.values) + self.bias, Routed(u_TF)


class LostTangent(Dense):
    """Takes its bias as a constant in forward mode."""

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        y_TD, routed = super().compute(x_TD, mask_T)
        bias = forward_ad.unpack_dual(self.bias).primal if forward_ad._current_level >= 0 else self.bias
        return y_TD - self.bias + bias, routed


class LoopOverValues(Dense):
    """Looks at a number on the host, which batches of functions have none of."""

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        y_TD, routed = super().compute(x_TD, mask_T)
        return (y_TD if float(y_TD.detach().sum()) < 1e30 else y_TD * 2), routed


class Alternating(Dense):
    """Every other call computes a little more."""

    n_calls = 0

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        self.n_calls += 1
        y_TD, routed = super().compute(x_TD, mask_T)
        return y_TD * (1.0 + 1e-3 * (self.n_calls % 3)), routed


class SpreadsNaN(Dense):
    """Adds nothing, taken from all tokens."""

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        y_TD, routed = super().compute(x_TD, mask_T)
        return y_TD + 0.0 * x_TD.sum(), routed


class _Product(nn.Module):
    """A part of a layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(size))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class UncalledPart(Dense):
    """Uses a part's parameter and not the part."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__(config)
        self.part = _Product(config.d_model)

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        y_TD, routed = super().compute(x_TD, mask_T)
        return y_TD @ self.part.weight, routed


class UncalledInTraining(UncalledPart):
    """Calls the part in evaluation alone."""

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        y_TD, routed = Dense.compute(self, x_TD, mask_T)
        return y_TD @ self.part.weight if self.training else self.part(y_TD), routed


class UncalledInEvaluation(UncalledPart):
    """Calls the part in training alone."""

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        y_TD, routed = Dense.compute(self, x_TD, mask_T)
        return self.part(y_TD) if self.training else y_TD @ self.part.weight, routed


class FixedTokensInTraining(Dense):
    """Computes another number where there are more than eight tokens, in training."""

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        y_TD, routed = super().compute(x_TD, mask_T)
        return y_TD * (1.0 if not self.training or len(y_TD) <= 8 else 1.0 + 1e-6), routed


class CopyForgets(Dense):
    """A copy that trains computes something else."""

    is_copy = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "is_copy": True}

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        y_TD, routed = super().compute(x_TD, mask_T)
        return 2.0 * y_TD if self.is_copy and self.training else y_TD, routed


class GraphBreakInTraining(Dense):
    """Looks at a value in training alone."""

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        if self.training and float(x_TD.detach().sum()) == 0.0:
            x_TD = x_TD + 0.0
        return super().compute(x_TD, mask_T)


class GraphBreak(Dense):
    """Goes where a compiler cannot follow."""

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        y_TD, routed = super().compute(x_TD, mask_T)
        return y_TD * float(y_TD.detach().numpy().max() < 1e30), routed


class FixedTokens(Dense):
    """Computes another number where there are more than eight tokens."""

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        y_TD, routed = super().compute(x_TD, mask_T)
        return y_TD * (1.0 if len(y_TD) <= 8 else 1.0 + 1e-6), routed


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyForgetsConfig(DenseConfig):
    """A dense block, see `CopyForgets`; of a class that pickle finds."""

    name: ClassVar[str] = "copy-forgets"

    def build(self) -> Dense:
        return CopyForgets(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadOptionConfig(DenseConfig):
    """A dense block with an option that does nothing."""

    name: ClassVar[str] = "dead-option"
    temperature: Annotated[float, option("Looks useful.", low=0.0)] = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DetachedLossConfig(SigmaMoEConfig):
    """A sigma-MoE whose balancing loss has no gradient."""

    name: ClassVar[str] = "detached-loss"

    def build(self) -> SigmaMoE:
        return DetachedLoss(self)  # type: ignore[return-value]


class DetachedLoss(SigmaMoE):  # type: ignore[misc]
    """Cuts the graph of its balancing loss."""

    def compute(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routed]:
        y_TD, routed = super().compute(x_TD, mask_T)
        balance = routed.balance
        if balance is None:
            return y_TD, routed
        return y_TD, Routed(routed.units, balance=lambda: balance().detach(), dropped=routed.dropped)


@dataclass(frozen=True, kw_only=True, slots=True)
class LooseRangeConfig(DenseConfig):
    """A dense block that accepts a width of zero."""

    name: ClassVar[str] = "loose-range"
    d_ff: Annotated[int, option("Key-value pairs.", low=1)]

    def __post_init__(self) -> None:
        """No checks at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MuteErrorConfig(DenseConfig):
    """A dense block whose errors name the field and keep the value to themselves."""

    name: ClassVar[str] = "mute-error"

    def __post_init__(self) -> None:
        """The same checks, another message."""
        try:
            check_fields(self)
        except UserError as error:
            raise UserError(str(error).partition("; got")[0]) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class NamelessErrorConfig(DenseConfig):
    """A dense block whose errors name the value and not its field."""

    name: ClassVar[str] = "nameless-error"

    def __post_init__(self) -> None:
        """The same checks, another message."""
        try:
            check_fields(self)
        except UserError as error:
            raise UserError(f"this must be another; got {str(error).partition('; got')[2]}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class FalseXfailConfig(DenseConfig):
    """A dense block that declares a failure that does not happen."""

    name: ClassVar[str] = "false-xfail"
    xfail: ClassVar[dict[str, str]] = {"permutation": "says so"}


# The check that must catch each.
WRONG = {
    "reference": wrong("wrong-weight", WrongWeight),
    "token_independence": wrong("leaking-future", LeakingFuture),
    "sum_of_values": wrong("dropped-token", DroppedToken),
    "stateless": wrong("stateful-forward", StatefulForward),
    "parameter_count": wrong("uncounted-parameter", UncountedParameter),
    "deterministic": wrong("noisy-evaluation", NoisyEvaluation),
    "saved_bytes": wrong("keeps-everything", KeepsEverything),
    "mask": wrong("ignores-mask", IgnoresMask),
    "no_dead_option": DeadOptionConfig,
    "second_derivatives": wrong("wrong-second-derivative", WrongSecondDerivative),
    "forward_mode": wrong("lost-tangent", LostTangent),
    "functional": wrong("loop-over-values", LoopOverValues),
    "recomputation": wrong("alternating", Alternating),
    "non_finite": wrong("spreads-nan", SpreadsNaN),
    "hooks": wrong("uncalled-part-hooks", UncalledPart),
    "sharding": wrong("uncalled-part", UncalledPart),
    "compiles": wrong("graph-break", GraphBreak),
    "exports": wrong("fixed-tokens", FixedTokens),
    "copies": CopyForgetsConfig,
    "stats": DetachedLossConfig,
    "bad_values": LooseRangeConfig,
    "permutation": FalseXfailConfig,
}
