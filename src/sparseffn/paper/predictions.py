"""What the framework predicts of a mixture at initialisation, before anything is measured; argued in docs/why-this-selector.md.

A token x of norm `sqrt(d_model)`, which is what a layer norm hands out, meets expert e's selector row in the logit `a t`: `a`
is the logits' standard deviation, t has mean 0 and variance 1 and is independent between experts. Rows drawn freely make t
normal; rows of one norm make it `sqrt(d_model)` times the cosine of a random angle. Everything follows from the law of the K
largest of N_E such t, which is integrated on a grid. Ratios are over the dense block of the same `d_ff = N_E G`, keys and
values drawn by the same rule. Only the sigmoid gate has exact moments; `gate_square` says what is approximated of softmaxes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
from numpy.typing import NDArray

from sparseffn.ffn.mixture import TopKMixtureConfig
from sparseffn.ops import GateName
from sparseffn.paper.initialisation import BlockScale

Array = NDArray[np.float64]

# Half-width of the grid of t in standard deviations, and its points: the trapezoid rule is then exact to 1e-9.
_REACH, _POINTS = 8.0, 4001


@final
@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The law of t, and of the t of the K largest of N_E."""

    n_experts: int
    k: int
    d_model: int
    equal_norm: bool

    @cached_property
    def t(self) -> Array:
        """The grid; the cosine of an angle is at most 1."""
        reach = min(_REACH, math.sqrt(self.d_model)) if self.equal_norm else _REACH
        return np.linspace(-reach, reach, _POINTS)

    @cached_property
    def density(self) -> Array:
        """Of t: normal, or `(1 - t^2 / d_model)^((d_model - 3) / 2)`, the law of an angle between random directions."""
        if self.equal_norm:
            weight = np.clip(1 - self.t**2 / self.d_model, 0, None) ** ((self.d_model - 3) / 2)
        else:
            weight = np.exp(-(self.t**2) / 2)
        return weight / _integral(weight, self.t)

    @cached_property
    def chance(self) -> Array:
        """P(an expert is among the K largest | its t): at most K - 1 of the N_E - 1 others lie above."""
        from scipy.special import bdtr

        step = self.t[1] - self.t[0]
        below = np.concatenate(([0.0], np.cumsum((self.density[1:] + self.density[:-1]) / 2 * step)))
        above = np.clip(1 - below, 1e-15, 1 - 1e-15)
        return bdtr(self.k - 1, self.n_experts - 1, above)

    def mean(self, f: Callable[[Array], Array]) -> float:
        """Mean of f(t) over experts."""
        return _integral(self.density * f(self.t), self.t)

    def mean_of_selected(self, f: Callable[[Array], Array]) -> float:
        """Mean of f(t) over the K selected experts."""
        return _integral(self.density * self.chance * f(self.t), self.t) * self.n_experts / self.k

    @cached_property
    def elasticity(self) -> float:
        """`d log load / d log norm` of one selector row, the others held: `(N_E / K) E[t P'(t)]`.

        For many experts `tau phi(tau) / Q(tau)` with `Q(tau) = K / N_E`: 0 at K = N_E / 2, negative above.
        """
        slope = np.gradient(self.chance, self.t)
        return _integral(self.density * self.t * slope, self.t) * self.n_experts / self.k


def ranking(config: TopKMixtureConfig) -> Ranking:
    return Ranking(
        n_experts=config.n_experts, k=config.k, d_model=config.d_model, equal_norm=config.selector_init == "equal-norm"
    )


def variance_factors(config: TopKMixtureConfig) -> tuple[float, float]:
    """Variance of the keys, and of the values, over the dense block's."""
    n = config.n_experts
    return {"shared": (1.0, 1.0), "standard": (1.0, float(n)), "switch": (0.1, 0.1 * n)}[config.init]


def logit_std(config: TopKMixtureConfig) -> float:
    """a: rows have the keys' variance `2 / (d_model n_layers)`, x has norm `sqrt(d_model)`."""
    return math.sqrt(2.0 * variance_factors(config)[0] / config.n_layers)


def gate_square(config: TopKMixtureConfig, gate: GateName = "sigmoid") -> float:
    """`E[s^2]` over the selected experts.

    The softmaxes' denominators are replaced by their means: over all N_E (good to 1 / N_E), or over the K selected.
    """
    law, a = ranking(config), logit_std(config)
    if gate == "sigmoid":
        return law.mean_of_selected(lambda t: _sigmoid(a * t) ** 2)
    square = law.mean_of_selected(lambda t: np.exp(2 * a * t))
    if gate == "softmax":
        return square / (config.n_experts * law.mean(lambda t: np.exp(a * t))) ** 2
    return square / (config.k * law.mean_of_selected(lambda t: np.exp(a * t))) ** 2


def ratios(config: TopKMixtureConfig) -> BlockScale:
    """Output variance and squared gradients of sigma-MoE over the dense block's, for gradients g of y independent of x.

    K of N_E experts, each weighted by s: `(K / N_E) E[s^2]`, times what the initialisation changes. The gradient of x has a
    second path through the gate, `2 kappa E[s'^2] / n_layers` beside `E[s^2]`.
    """
    law, a = ranking(config), logit_std(config)
    keys, values = variance_factors(config)
    share = config.k / config.n_experts
    square = gate_square(config)
    slope = law.mean_of_selected(lambda t: (_sigmoid(a * t) * (1 - _sigmoid(a * t))) ** 2)
    through_gate = 2 * keys / config.n_layers * slope
    return BlockScale(
        output=share * square * keys * values,
        keys=share * square * values,
        values=share * square * keys,
        input=share * keys * values * (square + through_gate),
    )


def interference_bounds(config: TopKMixtureConfig, gate: GateName) -> tuple[float, float]:
    """Share of the logits' squared gradient that is other experts', at equal logits: contributions independent, and alike.

    Expert j's own part is `c_j s_j (1 - s_j)`, the others' `-s_j sum_{i != j} c_i s_i`, c the gradients of the gates.
    """
    n, k = config.n_experts, config.k
    if gate == "sigmoid":
        return 0.0, 0.0
    # Experts that share a denominator; all but the selected ones of them have a part of others alone.
    m = n if gate == "softmax" else k
    own = k * (m - 1) ** 2
    independent, alike = k * (m - 1), k * (k - 1) ** 2 + k**2 * (m - k)
    return independent / (own + independent), alike / (own + alike)


def load_variation(config: TopKMixtureConfig, n_tokens: int) -> float:
    """Standard deviation over mean of the experts' load for isotropic x: norms, angles between rows, and chance.

    Free rows differ in log norm by `1 / sqrt(2 d_model)`; the mean cosine of a row with the others, by `1 / sqrt(d_model
    (N_E - 1))`, acts like a smaller norm. First order in both, hence for N_E below d_model.
    """
    law = ranking(config)
    return math.sqrt(_norm_part(config, law) + _angle_part(config, law) + _chance_part(config, n_tokens))


def load_norm_correlation(config: TopKMixtureConfig, n_tokens: int) -> float | None:
    """Of load and row norm, for isotropic x; None where all norms are equal."""
    law = ranking(config)
    if law.equal_norm:
        return None
    return math.copysign(math.sqrt(_norm_part(config, law)) / load_variation(config, n_tokens), law.elasticity)


def _norm_part(config: TopKMixtureConfig, law: Ranking) -> float:
    return 0.0 if law.equal_norm else law.elasticity**2 * (1 - 1 / config.n_experts) / (2 * config.d_model)


def _angle_part(config: TopKMixtureConfig, law: Ranking) -> float:
    n = config.n_experts
    return law.elasticity**2 * n / ((n - 2) * config.d_model * (n - 1)) if n > 2 else 0.0


def _chance_part(config: TopKMixtureConfig, n_tokens: int) -> float:
    return (config.n_experts / config.k - 1) / n_tokens


def load_variation_on(x_TD: Array, config: TopKMixtureConfig, n_tokens: int) -> float:
    """The same for given tokens: the mean over pairs of them of how much the choice of one tells of the other's.

    For a cosine c, `P(both select e) / P(one does)^2 - 1` of a bivariate normal with correlation c and the threshold that K of
    N_E exceed. Rows of one norm lack the part of the norms. For many experts: their competition is left out.

    Args:
        x_TD: a sample of the tokens, at least two.
        n_tokens: tokens whose load is counted, for what is left to chance.
    """
    return load_variation_of_pairs(mean_excess(x_TD, config.k / config.n_experts), config, n_tokens)


def mean_excess(x_TD: Array, share: float) -> float:
    """Over pairs of tokens: `P(both select an expert) / share^2 - 1`, share being K / N_E."""
    angles, excess = _joint_excess(share)
    units = x_TD / np.linalg.norm(x_TD, axis=1, keepdims=True)
    cosines = np.clip(units @ units.T, -1, 1)[np.triu_indices(len(units), 1)]
    return float(np.interp(np.arcsin(cosines), angles, excess).mean())


def load_variation_of_pairs(mean: float, config: TopKMixtureConfig, n_tokens: int) -> float:
    """`load_variation_on` from its mean over pairs, which does not depend on the selector's norms."""
    law = ranking(config)
    norms = law.elasticity**2 / (2 * config.d_model) if law.equal_norm else 0.0
    return math.sqrt(max(0.0, mean - norms) + _chance_part(config, n_tokens))


def _joint_excess(share: float) -> tuple[Array, Array]:
    """`P(both exceed) / share^2 - 1` for two standard normals whose correlation is the sine of an angle, on a grid of angles.

    `d P(both) / d angle = exp(-tau^2 / (1 + sin angle)) / (2 pi)`.
    """
    threshold = _upper_quantile(share)
    angles = np.linspace(-math.pi / 2, math.pi / 2, 2001)[1:]
    slope = np.exp(-(threshold**2) / (1 + np.sin(angles))) / (2 * math.pi)
    both = np.concatenate(([0.0], np.cumsum((slope[1:] + slope[:-1]) / 2 * np.diff(angles))))
    return angles, (both - np.interp(0.0, angles, both)) / share**2


def largest_of_normals(n: int) -> float:
    """Expected largest of n standard normal numbers."""
    return Ranking(n_experts=n, k=1, d_model=2, equal_norm=False).mean_of_selected(lambda t: t)


def largest_over_mean(variation: float, n_experts: int) -> float:
    """Largest load over the mean, if loads were normal with that variation."""
    return 1 + variation * largest_of_normals(n_experts)


def _upper_quantile(share: float) -> float:
    law = Ranking(n_experts=2, k=1, d_model=2, equal_norm=False)
    below = np.cumsum(law.density) * (law.t[1] - law.t[0])
    return float(np.interp(1 - share, below, law.t))


def _sigmoid(t: Array) -> Array:
    return 1 / (1 + np.exp(-t))


def _integral(y: Array, x: Array) -> float:
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum())
