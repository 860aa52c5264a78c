"""Keys and gate keys in one tensor: the gradients of its halves are its gradient, without a copy where they can be."""

import pytest
import torch
from torch import Tensor

from sparseffn import ops
from sparseffn.errors import UserError

E, D, G, T, K = 4, 16, 24, 30, 2
LAYOUTS = {
    "out-in": ((E, 2 * G, D), 1, False),
    "out-in-interleaved": ((E, 2 * G, D), 1, True),
    "in-out": ((E, D, 2 * G), 2, False),
    "in-out-interleaved": ((E, D, 2 * G), -1, True),
}


def views(both: Tensor, dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The halves by PyTorch's operations alone."""
    if interleaved:
        first = [slice(None)] * both.dim()
        second = list(first)
        first[dim], second[dim] = slice(0, None, 2), slice(1, None, 2)
        return both[tuple(first)], both[tuple(second)]
    return tuple(both.chunk(2, dim))


def draw(layout: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both, values, x, gates and indices; the last expert is nobody's."""
    generator = torch.Generator().manual_seed(3)
    shapes = (LAYOUTS[layout][0], (E, G, D), (T, D))
    both, values, x = (torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)
    gates, indices = torch.rand(T, E - 1, generator=generator).topk(K)
    return both, values, x, gates.to(torch.promote_types(dtype, torch.float32)), indices


def compute(
    halves: tuple[Tensor, Tensor], values: Tensor, x: Tensor, gates: Tensor, indices: Tensor, backend: str = "auto"
) -> Tensor:
    keys, gate_keys = (half if half.shape[1] == D else half.transpose(1, 2) for half in halves)
    return ops.experts(x, keys, values, gates, indices, gate_keys=gate_keys, activation="silu", backend=backend)


def copies(both: Tensor, loss: Tensor) -> set[str]:
    """Operations of a backward that join two tensors by a copy; the gradient goes to `both.grad`."""
    with torch.profiler.profile() as profile:
        loss.backward()
    return {event.key for event in profile.key_averages()} & {"aten::cat", "aten::stack"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_views_and_gradients_are_those_of_pytorch(layout, backend):
    _, dim, interleaved = LAYOUTS[layout]
    both, *rest = draw(layout)
    found, wanted = ops.halves(both, dim=dim, interleaved=interleaved), views(both, dim, interleaved)
    for half, view in zip(found, wanted, strict=True):
        assert half.data_ptr() == view.data_ptr() and half.stride() == view.stride() and torch.equal(half, view)
    gradients = [
        torch.autograd.grad(compute(pair, *rest, backend).square().sum(), (both, *rest[:2])) for pair in (found, wanted)
    ]
    for gradient, of_views in zip(*gradients, strict=True):
        assert torch.equal(gradient, of_views) and gradient.stride() == of_views.stride()
    assert not gradients[0][0][-1].any(), "an expert that no token chose has no gradient"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_of_whole_lines_are_not_copied(layout, dtype):
    """Even and odd columns are no lines, and are joined."""
    _, dim, interleaved = LAYOUTS[layout]
    both, *rest = draw(layout, dtype)
    found = copies(both, compute(ops.halves(both, dim=dim, interleaved=interleaved), *rest).sum())
    assert bool(found) == (layout == "in-out-interleaved")
    assert both.grad.is_contiguous() and both.grad.untyped_storage().nbytes() == both.nbytes


@pytest.mark.parametrize("layout", ["out-in", "out-in-interleaved", "in-out"])
def test_the_halves_of_a_transposed_weight(layout):
    """A weight is transposed before it is halved, or after: the same gradient, without a copy."""
    _, dim, interleaved = LAYOUTS[layout]
    both, *rest = draw(layout)
    found = copies(both, compute(ops.halves(both.transpose(1, 2), dim=3 - dim, interleaved=interleaved), *rest).sum())
    assert not found and both.grad.is_contiguous() and both.grad.untyped_storage().nbytes() == both.nbytes
    (wanted,) = torch.autograd.grad(compute(views(both, dim, interleaved), *rest).sum(), both)
    assert torch.equal(both.grad, wanted)


def test_a_weight_with_gaps_is_joined():
    """Every second line of a larger one: gradients that lie in one memory have no gaps, and are not taken for its own."""
    larger = torch.randn(E, 4 * G, D).requires_grad_()
    _, *rest = draw("out-in")
    pairs = ops.halves(larger[:, ::2], dim=1), views(larger[:, ::2], 1, False)
    found, wanted = (torch.autograd.grad(compute(pair, *rest).sum(), larger)[0] for pair in pairs)
    assert torch.equal(found, wanted)
    sent = torch.randn(E, 2 * G, D)
    (found,) = torch.autograd.grad(ops.halves(larger[:, ::2], dim=1), larger, sent.chunk(2, 1))
    assert torch.equal(found[:, ::2], sent) and not found[:, 1::2].any()
    assert sent.untyped_storage().nbytes() == sent.nbytes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("unused", [0, 1])
def test_one_half_alone(layout, unused):
    """What did not come from `experts` is joined: half of a gradient is zero, or another operation's."""
    _, dim, interleaved = LAYOUTS[layout]
    both, *_ = draw(layout)
    used = ops.halves(both, dim=dim, interleaved=interleaved)[1 - unused]
    (gradient,) = torch.autograd.grad((used * 3).sum(), both)
    parts = views(gradient, dim, interleaved)
    assert (parts[1 - unused] == 3).all() and not parts[unused].any()


def test_halves_that_changed_places_are_joined_in_order():
    """Gradients in one memory, but the wrong way round."""
    both, *rest = draw("out-in")
    pairs = ops.halves(both, dim=1)[::-1], views(both, 1, False)[::-1]
    swapped, wanted = (torch.autograd.grad(compute(pair, *rest).sum(), both)[0] for pair in pairs)
    assert torch.equal(swapped, wanted)


def test_gradients_that_meet_another_use_are_summed():
    both, *rest = draw("out-in")
    pair, wanted = ops.halves(both, dim=1), views(both, 1, False)
    found, expected = (
        torch.autograd.grad(compute(halves, *rest).sum() + halves[0].square().sum() + both.sum(), both)[0]
        for halves in (pair, wanted)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transforms(layout):
    """Second derivatives, batched gradients, forward mode, torch.func and a compiled graph."""
    _, dim, interleaved = LAYOUTS[layout]
    both, *rest = draw(layout, torch.float64)

    def loss(both: Tensor, split=ops.halves) -> Tensor:
        pair = split(both, dim=dim, interleaved=interleaved)
        return compute(pair, *rest).square().sum()

    by_views = lambda both: loss(both, views)  # noqa: E731
    v = torch.randn_like(both)
    hvp = torch.autograd.functional.hvp
    torch.testing.assert_close(hvp(loss, both, v)[1], hvp(by_views, both, v)[1])
    torch.testing.assert_close(torch.func.grad(loss)(both), torch.func.grad(by_views)(both))
    torch.testing.assert_close(torch.func.jvp(loss, (both,), (v,))[1], torch.func.jvp(by_views, (both,), (v,))[1])
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.unpack_dual(loss(torch.autograd.forward_ad.make_dual(both, v))).tangent
    torch.testing.assert_close(tangent, torch.func.jvp(by_views, (both,), (v,))[1])
    y = compute(ops.halves(both, dim=dim, interleaved=interleaved), *rest)
    sent = torch.randn(3, *y.shape, dtype=y.dtype)
    (batched,) = torch.autograd.grad(y, both, sent, is_grads_batched=True, retain_graph=True)
    for one, gradient in zip(sent, batched, strict=True):
        torch.testing.assert_close(torch.autograd.grad(y, both, one, retain_graph=True)[0], gradient)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(both), both)[0], torch.func.grad(by_views)(both))


@pytest.mark.parametrize(("shape", "dim"), [((3, 5), 1), ((3, 4), 2), ((3, 4), -3), ((), 0)])
def test_what_has_no_halves(shape, dim):
    with pytest.raises(UserError, match=r"`both` must have an even size in dimension"):
        ops.halves(torch.zeros(shape), dim=dim)
