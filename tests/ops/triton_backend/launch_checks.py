"""What the operations launch: how often, nothing for gradients that nobody needs, and nothing that waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from differentiable import experts, in_layers, route
from interpreted_checks import D, E, G, K, T, layer, leaves
from launch_count import LaunchCount
from torch import Tensor

from sparseffn.ffn import method_class
from sparseffn.ops.triton import launch, operations


def launches_are_few() -> str:
    """A routed layer launches at most 12 kernels forward and 14 backward, plain or gated, in training and evaluation."""
    said = []
    for gated in (False, True):
        given = leaves(gated=gated)
        with LaunchCount() as evaluated, torch.no_grad():
            layer(**given)
        with LaunchCount() as forward:
            y = layer(**given)
        grad = torch.ones_like(y)
        with LaunchCount() as backward, mock.patch.object(launch, "PART_ROWS", 4):
            torch.autograd.grad(y, list(given.values()), grad)
        launches = [len(evaluated.found), len(forward.found), len(backward.found)]
        if launches[0] > 12 or launches[1] > 12 or launches[2] > 14:
            said.append(f"{launches}: {forward.found} {backward.found}")
        assert backward.found.count("sum_parts_kernel") == 3, "sums were to be split"
    return "; ".join(said)


# Method and options of a layer, whether it trains, whether statistics are asked for, and how many operations launch forward and
# backward: gated experts, sums split over rows.
LAYERS: tuple[tuple[str, dict[str, Any], bool, bool, int, int], ...] = (
    ("sigma-moe", {}, True, False, 8, 13),
    ("sigma-moe", {}, True, True, 12, 14),
    ("sigma-moe", {"expert_dropout": 0.1}, True, False, 10, 13),
    ("sigma-moe", {"inner_k": 7}, True, False, 9, 14),
    ("softmax-renorm-moe", {}, True, False, 8, 13),
    ("softmax-renorm-moe", {"expert_dropout": 0.1}, True, False, 10, 13),
    ("softmax-moe", {}, False, False, 8, 13),
    ("softmax-moe", {}, True, False, 8, 13),
    ("softmax-moe", {"expert_dropout": 0.1}, True, False, 10, 13),
    ("softmax-moe", {"expert_dropout": 0.1}, False, False, 8, 13),
    ("s-base", {}, False, False, 8, 13),
    ("base", {}, False, False, 7, 12),
    ("noisy-moe", {}, False, False, 8, 13),
    ("switch", {}, False, False, 7, 12),
    ("switch", {"expert_dropout": 0.1}, True, False, 9, 12),
    ("switch", {}, True, False, 7, 12),
    ("switch", {"capacity_factor": 1.0}, True, False, 10, 13),
    ("noisy-moe", {}, True, False, 10, 14),
    ("s-base", {}, True, False, 12, 13),
    ("s-base", {"sinkhorn": "released"}, True, False, 12, 13),
    ("s-base", {"expert_dropout": 0.1}, True, False, 14, 13),
    ("noisy-moe", {"expert_dropout": 0.1}, True, False, 12, 14),
    ("switch", {"capacity_factor": 1.0, "expert_dropout": 0.1}, True, False, 12, 13),
    ("base", {}, True, False, 10, 14),
    ("switch", {}, True, True, 11, 13),
    ("switch", {"capacity_factor": 1.0}, True, True, 14, 14),
    ("noisy-moe", {}, True, True, 14, 16),
)


def layers_launch_as_documented() -> str:
    """Whole layers of methods, in training and evaluation, as often as ops/README.md says."""
    said = []
    for method, options, training, with_stats, n_forward, n_backward in LAYERS:
        k = {} if method in ("switch", "base") else {"k": K}
        config = method_class(method)(d_model=D, n_experts=E, expert_size=G, gated=True, **k, **options)
        module = config.build().train(training)
        # Sequences, of which some layers know.
        x = torch.randn(4, T // 4, D, generator=torch.Generator().manual_seed(5)).requires_grad_()
        with in_layers(), mock.patch.object(launch, "PART_ROWS", 1):
            with LaunchCount() as forward:
                y, *stats = module(x, return_stats=True) if with_stats else (module(x),)
            outputs = [y, *(each.balance_loss for each in stats)]
            ones = [torch.ones_like(output) for output in outputs]
            with LaunchCount() as backward:
                names, parameters = zip(*module.named_parameters(), strict=True)
                grads = torch.autograd.grad(outputs, [x, *parameters], ones, allow_unused=True)
            # The noise has no part in evaluation.
            unused = {name for name, grad in zip(names, grads[1:], strict=True) if grad is None}
            assert grads[0] is not None and unused == ({"router.noise_selector"} & set(names) if not training else set()), (
                unused
            )
        if (len(forward.found), len(backward.found)) != (n_forward, n_backward):
            launched = f"{len(forward.found)} and {len(backward.found)}: {forward.found} {backward.found}"
            said.append(f"{method} {options}, training {training}, statistics {with_stats}: {launched}")
    return "\n".join(said)


def unneeded_gradients_launch_nothing() -> None:
    """Each gradient alone has the bits that it has beside the others; of x no product for a weight is launched, and so on."""
    given = leaves(gated=True)
    x, selector, keys, values, gate_keys = (leaf.detach() for leaf in given.values())
    logits, indices, gates, shares = operations.route_kept(x, selector, K, "sigmoid")
    biases = (torch.randn(E, G), torch.randn(E, G), torch.randn(E, D))
    arguments = (x, keys, values, gates, indices, gate_keys, *biases, None, 1.0, "silu", 1.0, 1.0, None)
    y, *kept = operations.experts_kept(*arguments)
    calls: dict[str, tuple[Callable[..., tuple[Tensor, ...]], int, dict[int, str]]] = {
        "experts": (
            lambda *needed: operations.experts_backward(y, *arguments, *kept, *needed),
            8,
            {0: "experts_bwd_x", 1: "experts_bwd_keys", 2: "experts_bwd_values", 4: "experts_bwd_keys"}
            | dict.fromkeys((5, 6, 7), "experts_bwd_bias"),
        ),
        "route": (
            lambda *needed: operations.route_backward(
                logits, gates, x, selector, K, "sigmoid", indices, gates, shares, *needed
            ),
            2,
            {0: "route_bwd_x", 1: "route_bwd_selector"},
        ),
        "cvmm": (
            lambda *needed: operations.cvmm_backward(x @ keys[0], x, indices[:, 0], keys, *needed),
            2,
            {0: "experts_down", 1: "experts_bwd_keys"},
        ),
        "weighted_rows": (
            lambda *needed: operations.weighted_rows_backward(x, selector, indices, gates, *needed),
            2,
            {0: "weighted_rows_bwd_values", 1: "weighted_rows_bwd_weights"},
        ),
    }
    for name, (call, n, kernels) in calls.items():
        whole = call()
        for i in range(n):
            with LaunchCount() as count:
                found = call([j == i for j in range(n)])
            assert [bool(t.numel()) for t in found] == [j == i for j in range(n)], name
            assert torch.equal(found[i], whole[i]), (name, i)
            launched = {kernel for kernel in kernels.values() if any(each.startswith(kernel) for each in count.found)}
            assert launched == ({kernels[i]} if i in kernels else set()), (name, i, count.found)


def statistics_launch_four() -> None:
    """Four kernels forward and one backward, whatever is selected."""
    logits, indices, weights = torch.randn(T, E), torch.zeros(T, K, dtype=torch.int64), torch.rand(T, K)
    with LaunchCount() as forward:
        operations.routing_counts(indices, weights, E)
        loss, kept = operations.batch_entropy_kept(logits, None, 0.1)
    with LaunchCount() as backward:
        operations.batch_entropy_backward(loss, logits, None, 0.1, kept)
    assert len(forward.found) == 4 and len(backward.found) == 1, (forward.found, backward.found)


def counting_sees_launches() -> None:
    """PyTorch's operations, but no views and allocations, and kernels of Triton."""
    x = torch.ones(4, 3)
    with LaunchCount() as count:
        y = x.t().reshape(12)[3:].view(3, 3)
        torch.empty_like(y)
        y.add(1).cumsum(0)
        operations.router_logits(x, x)
    # `reshape` of what is transposed copies.
    assert count.found == ["clone", "add", "cumsum", "route_logits_kernel"], count.found


def device_is_not_waited_for() -> None:
    """No operation reads a value back or has a shape that depends on values: the calls can be captured in a CUDA graph."""
    waits = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "equal", "item", "_assert_async")
    for inner_k in (None, 7):
        given = leaves(gated=True)
        x, selector, keys, values, gate_keys = given.values()
        with LaunchCount() as count:
            _, indices, gates = route(x, selector, K, "renormalised")
            y = experts(x, keys, values, gates, indices, gate_keys, None, None, None, None, 1.0, "relu", 1.0, 1.0, inner_k)
            torch.autograd.grad(y, list(given.values()), torch.ones_like(y))
        waiting = [name for name in count.found if name.startswith(waits)]
        assert not waiting and "experts_up_fwd_kernel" in count.found, waiting
