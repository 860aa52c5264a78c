"""The config of a method: sizes and options, closed-form counts, and what matching and presets may change."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from sparseffn.errors import UserError
from sparseffn.ffn.options import check_fields, field_infos, option
from sparseffn.ops import GateName
from sparseffn.ops.activations import CLAMPED_SWIGLU, ActivationName, GatedActivationName

if TYPE_CHECKING:
    from sparseffn.ffn.feedforward import FeedForward

# Of an int64, as indices of what is selected are.
INDEX_BYTES = 8

# What size_fields and preset_fields were called in version 0.1.
_FORMER_NAMES = {"knobs": "size_fields", "takes": "preset_fields"}


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """Sizes and rates of a preset's feedforward block; each method uses those that it has."""

    d_model: int
    d_ff: int
    n_experts: int
    expert_size: int
    k: int
    n_heads: int = 4
    """Heads of a product-key memory (the paper uses 4)."""
    n_layers: int = 1
    dropout: float = 0.0
    """The model's dropout rate: on u in the dense block, and in methods that drop units inside experts."""
    expert_dropout: float = 0.0
    entropy_weight: float = 1e-3

    @property
    def active_channels(self) -> int:
        """K x G: channels that every sparse method computes for a token."""
        return self.k * self.expert_size

    def with_one_expert(self) -> BlockShape:
        """For methods that use a single expert: of the size of the K that the others use."""
        n_experts = max(1, round(self.n_experts * self.expert_size / self.active_channels))
        return dataclasses.replace(self, n_experts=n_experts, expert_size=self.active_channels, k=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class FFNConfig(ABC):
    """Base of every method's config; immutable, validated when made."""

    name: ClassVar[str]
    """What the registry and the command line call the method."""
    paper: ClassVar[str]
    """Where it comes from."""
    unit: ClassVar[str] = "channels"
    """What is selected: channels, values or experts."""
    size_fields: ClassVar[tuple[str, ...]]
    """Integer fields that matching may change, in order of preference."""
    preset_fields: ClassVar[tuple[str, ...]] = ("d_model", "n_layers", "d_ff", "n_experts", "expert_size", "k")
    """Fields of a preset's `BlockShape` that the method takes over where it has them."""
    gate: ClassVar[GateName | None] = None
    """How evaluation weights the experts of the K largest logits; None: the method has no such experts or another rule."""
    trains_as_it_evaluates: ClassVar[bool] = False
    """Whether training selects by the K largest logits and weights by `gate` too, dropout and a capacity apart."""
    has_backends: ClassVar[bool] = True
    """Whether the layer runs sparseffn's operations, which several backends offer, or PyTorch's own alone."""
    xfail: ClassVar[Mapping[str, str]] = {}
    """Contract checks that the method cannot pass, each with the reason."""

    d_model: Annotated[int, option("Width of the model: size of the block's input and output.", low=1)]
    activation: Annotated[ActivationName, option("Non-linearity applied to the key scores.")] = "relu"
    n_layers: Annotated[int, option("Depth of the model; used by the initialisation alone.", low=1)] = 1

    def __init_subclass__(cls) -> None:
        for former, name in _FORMER_NAMES.items():
            if former in vars(cls) and name not in vars(cls):
                setattr(cls, name, vars(cls)[former])
            if hasattr(cls, name):
                setattr(cls, former, getattr(cls, name))

    def __post_init__(self) -> None:
        check_fields(self)
        self.validate()

    def validate(self) -> None:  # noqa: B027
        """Check what concerns several fields; raises UserError."""

    @abstractmethod
    def build(self) -> FeedForward:
        """The layer, with freshly drawn parameters."""

    @abstractmethod
    def num_params(self) -> int: ...

    @abstractmethod
    def active_params(self) -> int:
        """Parameters that one token's output depends on, router included."""

    @abstractmethod
    def forward_flops(self, *, training: bool = False) -> int:
        """FLOPs a token of one forward pass: 2 for each multiply-add of a matrix product, router included.

        Backward costs twice as much: one product for each of the two factors.
        """

    @abstractmethod
    def saved_bytes(self, n_tokens: int, itemsize: int = 4) -> int:
        """Bytes that a training forward of T tokens keeps for backward, without parameters and without the block's input."""

    def input_bytes(self, n_tokens: int, *, half: bool = False) -> int:
        """Bytes of x that a training forward keeps: float32, or under autocast (`half`) a copy in two bytes."""
        return n_tokens * self.d_model * (2 if half else 4)

    def work_bytes(self, n_tokens: int, itemsize: int = 4) -> int:
        """Bytes that the block works in at a time, beside what it keeps: gradients of its units before and after activation."""
        return 2 * n_tokens * self.active_channels * itemsize

    @property
    def selects_over_batch(self) -> bool:
        """Whether training selects over a whole batch, whose logits each process needs if it is spread over several."""
        return False

    @property
    def revision(self) -> int:
        """Which revision of what the method computes under this config; stored runs of another revision are other runs."""
        return 1

    def balancing(self) -> Mapping[str, float]:
        """Weight of each balancing loss that the method has; empty where it has none."""
        return {}

    @property
    @abstractmethod
    def n_channels(self) -> int:
        """d_ff: key-value pairs that the block holds."""

    @property
    @abstractmethod
    def active_channels(self) -> int:
        """Pairs that contribute to one token's output: K x G for mixtures."""

    @property
    def rows_per_pair(self) -> int:
        """Rows of d_model parameters that are read for a pair only if it is selected: its value; in mixtures its keys too."""
        return 1

    @classmethod
    @abstractmethod
    def examples(cls) -> list[FFNConfig]:
        """Two to four tiny configs that together use every option; the contract suite runs them."""

    @classmethod
    def identity_example(cls) -> FFNConfig | None:
        """A config under which everything is selected with gate 1, where there is one; see `FeedForward.keys_matrix`."""
        return None

    @classmethod
    def from_shape(cls, shape: BlockShape) -> Self:
        """The method at a preset's sizes, before parameters are matched: its `preset_fields`."""
        return cls(**{key: getattr(shape, key) for key in field_infos(cls) if key in cls.preset_fields})

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict that `config_from_json` reads back."""
        infos = field_infos(type(self))
        later = {key: info.default for key, info in infos.items() if info.option.added_later}
        given = {key: value for key, value in dataclasses.asdict(self).items() if key not in later or value != later[key]}
        return {"method": self.name, **given}

    @property
    def summary(self) -> str:
        """One line on the method: the first of its docstring."""
        return describe(type(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedConfig(FFNConfig):
    """Fields of blocks whose units may be gated: `alpha = act(k . x) (g . x)` in place of `act(k . x)` (Shazeer 2020,
    arXiv 2002.05202), with a gate key g beside each key k.
    """

    activation: Annotated[
        GatedActivationName, option("Non-linearity applied to the key scores; clamped_swiglu is gpt-oss's and needs gated.")
    ] = "relu"
    gated: Annotated[
        bool, option("Multiply each activation by a second product with x (SwiGLU and its kin).", added_later=True)
    ] = False

    def __post_init__(self) -> None:
        FFNConfig.__post_init__(self)
        ungated = self.activation == CLAMPED_SWIGLU and not self.gated
        require(
            not ungated, "activation", "silu or another function of one number without gated", self.activation, "gated=true"
        )

    @property
    def n_products(self) -> int:
        """Matrices of d_model x d_ff that the block holds: keys and values, and gate keys where it is gated."""
        return 2 + self.gated


def describe(config_class: type[FFNConfig]) -> str:
    """The first line of a config's docstring."""
    return (config_class.__doc__ or "").strip().splitlines()[0]


def require(condition: bool, field: str, expectation: str, got: object, fix: str) -> None:
    """Raise a UserError in the house's form unless the condition holds."""
    if not condition:
        raise UserError(f"`{field}` must be {expectation}; got {got!r}; fix: {fix}")
