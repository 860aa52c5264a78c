"""Checks of the function that a layer computes: shapes, reference, sum of values, independence of tokens, identity."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseffn.contract.harness import (
    ATOL,
    contract,
    differ,
    make_layer,
    require,
    seeded,
    tokens,
    without_dropout,
)
from sparseffn.errors import UserError
from sparseffn.ffn import FeedForward, FFNConfig, field_infos
from sparseffn.ops.activations import hidden_units

_MODES = ((False, "evaluation"), (True, "training"))


@contract
def shapes(config: FFNConfig) -> None:
    """Any leading shape, zero tokens, non-contiguous input; a wrong width is refused."""
    layer, d_model = make_layer(config), config.d_model
    for shape in ((3, 4), (5,), (), (2, 3, 2), (0,), (2, 0)):
        x = torch.randn(*shape, d_model, dtype=torch.float64, requires_grad=True)
        y, stats = layer(x, return_stats=True)
        require(y.shape == x.shape and y.dtype == x.dtype, f"input {tuple(x.shape)} gives {tuple(y.shape)} of {y.dtype}")
        (y.sum() + stats.balance_loss).backward()
        require(x.grad is not None and bool(x.grad.isfinite().all()), f"no finite input gradient for {tuple(x.shape)}")
    x = tokens(config, 6)
    spread = torch.stack((x, x), dim=-1)[..., 0]
    require(differ(layer(x), layer(spread)) <= ATOL, "non-contiguous input gives another output")
    try:
        layer(torch.randn(3, d_model + 1))
    except UserError as error:
        require(str(d_model) in str(error), "the error for a wrong width does not name d_model")
    else:
        require(False, "input of the wrong width is accepted")


@contract
def reference(config: FFNConfig) -> None:
    """Output and every gradient equal the reference's, in evaluation, and in training with equal generator state."""
    config = without_dropout(config)
    for training, mode in _MODES:
        layer = make_layer(config, training=training)
        got = _with_gradients(layer, "forward", config)
        wanted = _with_gradients(layer, "reference", config)
        for name, value in wanted.items():
            gap = differ(got[name], value)
            require(gap <= ATOL * max(1.0, float(value.abs().max())), f"{name} differs by {gap:.2g} in {mode}")


def _with_gradients(layer: FeedForward, function: str, config: FFNConfig) -> dict[str, Tensor]:
    """Output, and the gradients of a random projection of it."""
    x = tokens(config).requires_grad_()
    layer.zero_grad(set_to_none=True)
    y = seeded(lambda: getattr(layer, function)(x))
    (y * tokens(config, seed=3)).sum().backward()
    results = {"output": y.detach(), "gradient of x": torch.zeros_like(x) if x.grad is None else x.grad}
    for name, parameter in layer.named_parameters():
        grad = parameter.grad
        results[f"gradient of {name}"] = torch.zeros_like(parameter) if grad is None else grad.clone()
    return results


@contract
def sum_of_values(config: FFNConfig) -> None:
    """`layer(x) == coefficients(x) @ values_matrix() + output_bias()`."""
    config = without_dropout(config)
    for training, mode in _MODES:
        layer, x = make_layer(config, training=training), tokens(config)
        _check_sum(layer, x, config, mode)


def _check_sum(layer: FeedForward, x: Tensor, config: FFNConfig, mode: str) -> None:
    values = layer.values_matrix()
    require(values.shape == (config.n_channels, config.d_model), f"values_matrix has shape {tuple(values.shape)}")
    alpha, bias = seeded(lambda: layer.coefficients(x)), layer.output_bias()
    total = alpha @ values if bias is None else alpha @ values + bias
    gap = differ(seeded(lambda: layer(x)), total)
    require(gap <= ATOL, f"the output differs from the sum of values by {gap:.2g} in {mode}")
    most = min(config.active_channels, config.n_channels)
    require(int((alpha != 0).sum(dim=-1).max()) <= most, f"more than {most} coefficients are not zero")


@contract
def identity(config: FFNConfig) -> None:
    """With everything selected and every gate 1, the method is the dense block, where such a setting exists."""
    example = config.identity_example()
    if example is None:
        return
    _check_identity(example)
    if "gated" in field_infos(type(example)):
        _check_identity(example.replace(gated=True))


def _check_identity(example: FFNConfig) -> None:
    layer, x = make_layer(example), tokens(example)
    x[:, 0] = 1.0
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("selector"):
                parameter.zero_()
                parameter[:, 0] = 100.0
    keys = layer.keys_matrix()
    if keys is None:
        require(False, "identity_example is given but keys_matrix() returns None")
        return
    gate_keys = layer.gate_keys_matrix()
    up = None if gate_keys is None else F.linear(x, gate_keys, layer.gate_bias_vector())
    u = hidden_units(example.activation, F.linear(x, keys, layer.key_bias_vector()), up)
    bias = layer.output_bias()
    dense = u @ layer.values_matrix() + (0.0 if bias is None else bias)
    gap = differ(layer(x), dense)
    require(gap <= ATOL, f"it differs from the dense block by {gap:.2g}")


@contract
def token_independence(config: FFNConfig) -> None:
    """In evaluation an output depends on its own token alone; hence a causal model stays causal."""
    _independence(config, training=False)


@contract
def training_independence(config: FFNConfig) -> None:
    """The same in training; routing that looks at the whole batch must declare that it breaks this."""
    _independence(config, training=True)


def _independence(config: FFNConfig, *, training: bool) -> None:
    layer, x = make_layer(config, training=training), tokens(config, 16)
    before = seeded(lambda: layer(x))
    for t in (0, 7, 15):
        changed = x.clone()
        changed[t] = tokens(config, 1, seed=50 + t)[0] * 3
        after = seeded(functools.partial(layer, changed))
        others = [i for i in range(16) if i != t]
        gap = differ(before[others], after[others])
        require(gap <= ATOL, f"changing token {t} changes other tokens' outputs by {gap:.2g}")


@contract
def permutation(config: FFNConfig) -> None:
    """Permuting the tokens permutes the outputs, in evaluation."""
    layer, x = make_layer(config), tokens(config, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    gap = differ(layer(x)[order], layer(x[order]))
    require(gap <= ATOL, f"permuted tokens give outputs that differ by {gap:.2g}")
