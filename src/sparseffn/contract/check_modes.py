"""Checks of a layer in use: gradients, determinism, copies, state, dtypes, compilation, learning."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseffn.contract.harness import contract, make_layer, require, seeded, step, tokens
from sparseffn.ffn import FeedForward, FFNConfig
from sparseffn.models import TransformerXL, TransformerXLConfig

_LEARNING_STEPS = 40


@contract
def gradients(config: FFNConfig) -> None:
    """Every parameter gets a gradient in training, and not only zeros over a few batches."""
    layer = make_layer(config, training=True)
    touched: dict[str, bool] = {name: False for name, _ in layer.named_parameters()}
    for seed in range(4):
        layer.zero_grad(set_to_none=True)
        x = tokens(config, 64, seed=seed)
        (layer(x) * tokens(config, 64, seed=90 + seed)).sum().backward()
        for name, parameter in layer.named_parameters():
            require(parameter.grad is not None, f"{name} gets no gradient")
            touched[name] |= bool(parameter.grad is not None and parameter.grad.any())
    dead = [name for name, has in touched.items() if not has]
    require(not dead, f"the gradient is zero everywhere for {', '.join(dead)}")


@contract
def deterministic(config: FFNConfig) -> None:
    """Same seed, same bits: parameters, training output; evaluation draws nothing."""
    first, second = config.build(), config.build()
    for layer in (first, second):
        layer.reset_parameters(torch.Generator().manual_seed(5))
    same = all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    require(same, "reset_parameters with equal generators gives different parameters")
    layer, x = make_layer(config, training=True), tokens(config)
    require(torch.equal(seeded(lambda: layer(x)), seeded(lambda: layer(x))), "training with one seed gives two outputs")
    layer.eval()
    require(torch.equal(seeded(lambda: layer(x), 1), seeded(lambda: layer(x), 2)), "evaluation depends on the generator")


@contract
def copies(config: FFNConfig) -> None:
    """deepcopy, pickle and state_dict give an equal layer that shares nothing; copies of a layer in training train."""
    layer, x = make_layer(config), tokens(config)
    y = layer(x)
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    loaded = config.build().double().eval()
    loaded.load_state_dict(torch.load(stored, weights_only=True))
    ours = {p.data_ptr() for p in layer.parameters()}
    for name, other in (
        ("deepcopy", copy.deepcopy(layer)),
        ("pickle", pickle.loads(pickle.dumps(layer))),
        ("state_dict", loaded),
    ):
        require(torch.equal(other(x), y), f"{name} gives another output")
        require(not ours & {p.data_ptr() for p in other.parameters()}, f"{name} shares parameters")
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        require(torch.equal(layer(x), y), f"changing a {name} changes the layer")
    trains = make_layer(config, training=True)
    others = {"deepcopy": copy.deepcopy(trains), "pickle": pickle.loads(pickle.dumps(trains))}
    wanted = seeded(lambda: step(trains, trains, x))
    for name, other in others.items():
        require(other.training, f"a {name} of a layer in training is in evaluation")
        got = seeded(lambda: step(other, other, x))  # noqa: B023
        same = len(got) == len(wanted) and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        require(same, f"a {name} trains otherwise")
    names = {n for n, _ in layer.named_parameters()} | {n for n, _ in layer.named_buffers()}
    require(set(layer.state_dict()) == names, "state_dict holds more than parameters and buffers")


@contract
def stateless(config: FFNConfig) -> None:
    """Forward leaves parameters, buffers and attributes as they were."""
    layer = make_layer(config, training=True)
    for training in (True, False):
        layer.train(training)
        before = _state(layer)
        layer(tokens(config), return_stats=True)
        after = _state(layer)
        changed = [key for key in {*before, *after} if not _same(before.get(key), after.get(key))]
        require(not changed, f"forward changes {', '.join(sorted(changed))}")


def _state(layer: FeedForward) -> dict[str, Any]:
    """Everything a module tree holds by attribute, tensors copied."""
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    found: dict[str, Any] = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    everyones = vars(nn.Module())
    for prefix, module in layer.named_modules():
        for key, value in vars(module).items():
            if key not in everyones:
                found[f"{prefix}.{key}"] = value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return bool(a == b)


@contract
def dtypes(config: FFNConfig) -> None:
    """Output dtype follows x in float32, bfloat16 and float16, and autocast as `nn.Linear` does; results stay near."""
    layer, x = make_layer(config, dtype=torch.float32), tokens(config, dtype=torch.float32)
    truth = layer(x)
    scale = float(truth.detach().abs().max()) + 1e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, stats = layer(x, return_stats=True)
        wanted = F.linear(x, torch.zeros(1, config.d_model)).dtype
    require(y.dtype == wanted, f"under autocast the output is {y.dtype}, nn.Linear's {wanted}")
    require(stats.weights.dtype == torch.float32, f"under autocast selection weights are {stats.weights.dtype}")
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(layer).to(dtype)
        leaf = x.to(dtype).requires_grad_()
        y = low(leaf)
        require(y.dtype == dtype, f"a {dtype} layer gives {y.dtype}")
        y.float().sum().backward()
        require(leaf.grad is not None and bool(leaf.grad.isfinite().all()), f"no finite gradient in {dtype}")
        # A rounded score may select another unit for a token; most tokens must agree all the same.
        gap = (y.detach().float() - truth.detach()).abs().amax(dim=-1)
        require(float(gap.median()) <= 0.1 * scale, f"{dtype} is off by {float(gap.median()):.2g} of {scale:.2g}")


@contract
def learns(config: FFNConfig) -> None:
    """Forty steps lower the loss of a small language model, balancing loss included in what is minimised."""
    model = TransformerXL(
        TransformerXLConfig(vocab_size=11, d_model=config.d_model, n_layers=1, n_heads=2, d_head=4, ffn=config)
    )
    model.init_parameters(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    # A sequence that its last two tokens determine.
    sequence = torch.tensor([(i * i + i // 3) % 11 for i in range(4 * 25)]).view(4, 25)
    losses = []
    for _ in range(_LEARNING_STEPS):
        output = model(sequence[:, :-1], return_stats=True)
        loss = F.cross_entropy(output.logits.flatten(0, 1), sequence[:, 1:].flatten())
        balance = sum(s.balance_loss for s in output.stats or ())
        optimizer.zero_grad()
        (loss + balance).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    require(losses[-1] < 0.9 * losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
