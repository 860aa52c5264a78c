"""Routers and their parts: logits in float32, expert dropout, selection, references, and the balancing losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sparseffn import ops
from sparseffn.errors import UserError
from sparseffn.ffn.feedforward import FeedForward, parameter_shapes
from sparseffn.ops import Selection

if TYPE_CHECKING:
    from sparseffn.ffn.mixture import TopKMixtureConfig


class Routing(NamedTuple):
    """What a router decided for a batch; a tuple, so that PyTorch's hooks on a router (FSDP's) find its tensors."""

    logits_TE: Tensor
    """Raw logits, before expert dropout and without noise."""
    indices_TK: Tensor
    weights_TK: Tensor
    """Exactly 0 for a selection that is missing: expert dropout, capacity, padding."""
    dropped: Tensor | None = None
    """int64 scalar: selections lost to a capacity limit."""

    def selection(self) -> Selection:
        return Selection.fixed(self.indices_TK, self.weights_TK, self.logits_TE.shape[1])


@dataclass(frozen=True, slots=True)
class Batch:
    """What a router sees of a batch beside its logits."""

    x_TD: Tensor
    mask_T: Tensor | None = None
    """False for padding."""
    keep_TE: Tensor | None = None
    """False where expert dropout removed an expert from a token's choice (equation 22)."""
    length: int | None = None
    """Tokens of a sequence where x was `(..., length, d_model)`; None: all tokens are one sequence."""


class Router(nn.Module, ABC):
    """Scores experts with `selector [E, d_model]` and selects; one small subclass a method.

    Logits are float32 (float64 in a float64 layer) whatever the layer's dtype and whether or not autocast is on.
    """

    k: int
    in_one_operation: ClassVar[Literal["never", "evaluation", "always"]] = "never"
    """When logits, choice and gates are one operation, and neither `logits` nor `select` is called."""
    batch_group: ops.BatchGroup | None = None
    """The processes that a training batch is spread over; `set_batch_group` sets it."""

    def __init_subclass__(cls, **options: Any) -> None:
        """`logits` and `select` are called unless their class says when not: what overrides another's does not go unheard."""
        super().__init_subclass__(**options)
        first = next(base for base in cls.__mro__ if {"logits", "select", "in_one_operation"} & vars(base).keys())
        if "in_one_operation" not in vars(first):
            cls.in_one_operation = "never"

    def __init__(self, d_model: int, n_experts: int, expert_dropout: float = 0.0, *, gate: ops.GateName | None = None) -> None:
        super().__init__()
        self.expert_dropout = expert_dropout
        self.gate: ops.GateName | None = gate
        """What weights the K largest logits, a config's `gate`; None: `select` has another rule."""
        self.selector = nn.Parameter(torch.empty(n_experts, d_model))

    @abstractmethod
    def select(self, logits_TE: Tensor, batch: Batch) -> Routing:
        """The selection for each token."""

    @abstractmethod
    def scores_reference(self, logits_TE: Tensor, batch: Batch) -> Tensor:
        """s `[T, E]` by the method's equations, slowly; exactly 0 for experts not used."""

    def forward(self, x_TD: Tensor, mask_T: Tensor | None, length: int | None = None) -> Routing:
        """Route a batch; padding gets weights of 0."""
        when = self.in_one_operation
        if self.gate is None or when == "never" or (self.training and when == "evaluation"):
            routing = self.select(self.logits(x_TD), Batch(x_TD, mask_T, self.draw_keep(x_TD), length))
        else:
            # In evaluation nothing is drawn; a call that says so is one more for each token.
            keep_TE = self.draw_keep(x_TD) if self.training else None
            routing = Routing(*ops.route(x_TD, self.selector, k=self.k, gate=self.gate, keep=keep_TE))
        if mask_T is None:
            return routing
        return routing._replace(weights_TK=routing.weights_TK.masked_fill(~mask_T[:, None], 0.0))

    def logits(self, x_TD: Tensor) -> Tensor:
        """What `select` gets: `[T, E]`, or more columns where it knows of them. `reference` computes its own logits."""
        return ops.router_logits(x_TD, self.selector)

    def reference(self, x_TD: Tensor, length: int | None = None) -> Tensor:
        """s `[T, E]`, slowly; draws the same random numbers as `forward`."""
        logits_TE = ops.router_logits(x_TD, self.selector)
        return self.scores_reference(logits_TE, Batch(x_TD, None, self.draw_keep(x_TD), length))

    @property
    def training_group(self) -> ops.BatchGroup | None:
        """`batch_group` in training; in evaluation no token depends on another."""
        return self.batch_group if self.training else None

    def extra_repr(self) -> str:
        return parameter_shapes(self)

    def draw_keep(self, x_TD: Tensor) -> Tensor | None:
        """Expert dropout (equation 22): bool `[T, E]`, False with probability delta; None when nothing is dropped."""
        if not self.training or self.expert_dropout == 0:
            return None
        shape = x_TD.shape[0], self.selector.shape[0]
        if self.batch_group is not None:
            return self.batch_group.draw(torch.rand, *shape, device=x_TD.device) >= self.expert_dropout
        return torch.rand(*shape, device=x_TD.device) >= self.expert_dropout


class TopKRouter(Router):
    """Takes the K largest logits, or what a subclass ranks by, in `select`."""

    def __init__(self, config: TopKMixtureConfig) -> None:
        if config.gate is None and type(self).select is TopKRouter.select:
            raise TypeError(
                f"{type(self).__name__} must have a `select` of its own, or a config with a `gate`; fix: define one"
            )
        super().__init__(config.d_model, config.n_experts, config.expert_dropout, gate=config.gate)
        self.k = config.k

    def select(self, logits_TE: Tensor, batch: Batch) -> Routing:
        """The K largest of the experts that expert dropout left, weighted by `gate`."""
        return self.choose(logits_TE, batch)

    def choose(
        self,
        logits_TE: Tensor,
        batch: Batch,
        *,
        ranks: Tensor | None = None,
        spread: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Routing:
        """The K largest that expert dropout left, with the gates of their logits; the rest as in `ops.choose`."""
        assert self.gate is not None, "a router without a gate weights what it chooses by itself"
        weights_TK, indices_TK = ops.choose(
            logits_TE, k=self.k, gate=self.gate, keep=batch.keep_TE, ranks=ranks, spread=spread, noise=noise
        )
        return Routing(logits_TE, indices_TK, weights_TK)

    @staticmethod
    @abstractmethod
    def score(logits: Tensor, chosen: list[int]) -> Tensor:
        """Weights of one token's chosen experts, for the reference."""

    def scores_reference(self, logits_TE: Tensor, batch: Batch) -> Tensor:
        return scores_by_token(logits_TE, logits_TE, batch, self.k, self.score)


def all_if_none(mask_T: Tensor | None, logits_TE: Tensor) -> Tensor:
    """The mask, all True if there is none: another process may have one."""
    return torch.ones(logits_TE.shape[0], dtype=torch.bool, device=logits_TE.device) if mask_T is None else mask_T


def select_topk(logits_TE: Tensor, k: int, keep_TE: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Indices of the K largest logits that expert dropout left, and which of them it left (None: all)."""
    if keep_TE is None:
        return ops.topk(logits_TE, k), None
    indices_TK = ops.topk(logits_TE.detach().masked_fill(~keep_TE, -torch.inf), k)
    return indices_TK, keep_TE.gather(1, indices_TK)


def drop(weights_TK: Tensor, alive_TK: Tensor | None) -> Tensor:
    """Weights, exactly 0 where the selection is missing."""
    return weights_TK if alive_TK is None else weights_TK.masked_fill(~alive_TK, 0.0)


def scores_by_token(
    logits_TE: Tensor, ranks_TE: Tensor, batch: Batch, k: int, score: Callable[[Tensor, list[int]], Tensor]
) -> Tensor:
    """The slow reference of a top-K router: s `[T, E]`, token by token.

    The K largest of `ranks_TE` that expert dropout left are chosen, ties to the lowest index; `score` makes their weights of a
    token's logits and their indices.
    """
    rows = []
    for t, (logits, ranks) in enumerate(zip(logits_TE, ranks_TE.detach().tolist(), strict=True)):
        order = sorted(range(len(ranks)), key=lambda e: (-ranks[e], e))
        chosen = [e for e in order if batch.keep_TE is None or bool(batch.keep_TE[t, e])][:k]
        row = logits.new_zeros(len(logits))
        index = torch.tensor(chosen, dtype=torch.int64, device=logits.device)
        rows.append(row.scatter(0, index, score(logits, chosen)) if chosen else row)
    return torch.stack(rows) if rows else logits_TE


def sigmoid_scores(logits: Tensor, chosen: list[int]) -> Tensor:
    return torch.sigmoid(logits[chosen])


def softmax_scores(logits: Tensor, chosen: list[int]) -> Tensor:
    """The chosen entries of a softmax over all experts."""
    return logits.softmax(dim=0)[chosen]


def renormalised_scores(logits: Tensor, chosen: list[int]) -> Tensor:
    """The same, divided by their sum."""
    s = softmax_scores(logits, chosen)
    return s / s.sum()


def entropy_loss(logits_TE: Tensor, mask_T: Tensor | None, weight: float = 1.0, group: ops.BatchGroup | None = None) -> Tensor:
    """`weight sum_e p[e] log p[e]` of the batch-mean distribution p: minus its entropy (equations 20, 21)."""
    return ops.batch_entropy(logits_TE, mask_T, weight, group=group)


def switch_loss(routing: Routing, mask_T: Tensor | None, weight: float = 1.0, group: ops.BatchGroup | None = None) -> Tensor:
    """`weight N_E f . p`, f the share of all selections that an expert receives, p its mean probability (equations 15-17)."""
    return ops.switch_balance(routing.logits_TE, routing.indices_TK, routing.weights_TK, mask_T, weight, group=group)


def cv_loss(routing: Routing, weight: float = 1.0, group: ops.BatchGroup | None = None) -> Tensor:
    """`weight CV^2` of the weights summed over the batch: variance over squared mean (equation 14)."""
    return ops.load_variation(routing.weights_TK, routing.indices_TK, routing.logits_TE.shape[1], weight, group=group)


def set_batch_group(model: nn.Module, group: ops.BatchGroup | None) -> None:
    """Tell every layer in `model` which processes its training batches are spread over; None: this one alone.

    Balancing losses, batch-wide routing, random numbers of routers, and statistics but for those of single tokens are then of
    the batch of all processes. In evaluation nothing is.

    Raises:
        UserError: `model` holds no such layer.
    """
    found = [module for module in model.modules() if isinstance(module, FeedForward | Router)]
    if not found:
        raise UserError("`model` must hold a sparseffn layer; got none; fix: build one with `FFNConfig.build()`")
    for module in found:
        module.batch_group = group
