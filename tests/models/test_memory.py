"""What a position may see: its past and the memory, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.small import METHODS, VOCAB, assert_same, small_model, text
from sparseffn.errors import UserError
from sparseffn.models import Memory, ModelOutput, PlainAttention, RelativeAttention, TransformerXL
from sparseffn.models.transformer_xl import Block


def test_what_does_not_fit_is_said() -> None:
    """A memory of another batch or model, tokens that there are not, parameters without a place."""
    model, tokens = small_model("dense"), text(8)
    memory = model(tokens, memory_length=4).memory
    with pytest.raises(UserError, match=r"`memory` must be \[batch = 3, positions, d_model = .*; fix: begin without memory"):
        model(tokens[:1].repeat(3, 1), memory, memory_length=4)
    with pytest.raises(UserError, match=r"`memory` must have one tensor a layer"):
        model(tokens, memory[:1], memory_length=4)
    with pytest.raises(UserError, match=rf"`tokens` must be 0 to {VOCAB - 1}; got .* to {VOCAB}; fix: use the tokenizer"):
        model(torch.full_like(tokens, VOCAB))
    with pytest.raises(UserError, match=r"got `embedding.weight` on meta; fix: model.to_empty"):
        model.to("meta").init_parameters(0)


ATTENTIONS = {"relative": RelativeAttention, "plain": PlainAttention}


@torch.no_grad()
def in_windows(model: TransformerXL, tokens: Tensor, sizes: list[int], memory_length: int) -> tuple[Tensor, Memory]:
    """Logits of all windows joined, and the last memory."""
    logits, memory = [], None
    for window in tokens.split(sizes, dim=1):
        out: ModelOutput = model(window, memory, memory_length=memory_length)
        logits.append(out.logits)
        memory = out.memory
    assert memory is not None
    return torch.cat(logits, dim=1), memory


def changes(a: Tensor, b: Tensor) -> Tensor:
    """Largest difference at each position."""
    return (a - b).abs().amax(dim=(0, 2))


class TestCausality:
    @pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS.keys())
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("t", [0, 3, 7], ids=lambda t: f"token{t}")
    def test_a_token_changes_its_own_and_later_logits_only(self, t: int, method: str, attention: type) -> None:
        """With a memory before the window."""
        model, tokens = small_model(method, attention=attention), text(8)
        memory = model(text(4, seed=9), memory_length=4).memory
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        difference = changes(model(tokens, memory).logits, model(changed, memory).logits)
        assert difference[:t].sum() == 0
        assert difference[t:].min() > 1e-9

    @pytest.mark.parametrize("position", [0, 2], ids=["oldest", "newest"])
    @pytest.mark.parametrize("layer", [0, 1], ids=["layer0", "layer1"])
    def test_every_position_sees_all_of_the_memory(self, layer: int, position: int) -> None:
        """One entry of one layer's memory changes all logits."""
        model, tokens = small_model(), text(5)
        memory = model(text(3, seed=9), memory_length=3).memory
        other = [m.clone() for m in memory]
        other[layer][:, position, 0] += 1.0
        assert changes(model(tokens, memory).logits, model(tokens, tuple(other)).logits).min() > 1e-9

    def test_sequences_of_a_batch_do_not_mix(self) -> None:
        """A row by itself has the logits it has among others, memory included."""
        model, tokens = small_model("sigma-moe"), text(9, batch=3)
        whole, _ = in_windows(model, tokens, [5, 4], 5)
        alone, _ = in_windows(model, tokens[1:2], [5, 4], 5)
        assert_same(whole[1:2], alone)


class TestWindows:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(
        "sizes", [[12, 12], [6] * 4, [1] * 24, [5, 1, 11, 7]], ids=["halves", "quarters", "tokens", "uneven"]
    )
    def test_windows_with_enough_memory_equal_the_whole_text(self, sizes: list[int], method: str) -> None:
        """The memory carries all that the text before has to say."""
        model, tokens = small_model(method), text(24)
        logits, _ = in_windows(model, tokens, sizes, 24)
        assert_same(logits, model(tokens).logits)

    def test_a_short_memory_forgets(self) -> None:
        """One layer, one token a window: m - 1 remembered positions and itself are all it depends on."""
        model, tokens = small_model(n_layers=1), text(10)
        logits, _ = in_windows(model, tokens, [1] * 10, 3)
        assert_same(logits[:, 9], model(tokens[:, 6:]).logits[:, 3])
        assert changes(logits[:, 9:], model(tokens).logits[:, 9:]).min() > 1e-9


class TestEmptyMemory:
    def test_none_and_zero_length_are_the_same(self) -> None:
        """Nobody attends to a memory that is not there."""
        model, tokens = small_model(), text(6)
        empty = model(tokens).memory
        assert [m.shape for m in empty] == [(2, 0, 8)] * 2
        assert torch.equal(model(tokens, empty).logits, model(tokens).logits)

    def test_zeros_are_something_to_attend_to(self) -> None:
        """A memory of zeros changes every position, so the start must not be one."""
        model, tokens = small_model(), text(6)
        zeros = tuple(torch.zeros(2, 3, 8, dtype=torch.float64) for _ in range(2))
        assert changes(model(tokens, zeros).logits, model(tokens).logits).min() > 1e-9


class TestContents:
    @pytest.mark.parametrize("length", [0, 1, 4, 6, 9, 20], ids=lambda n: f"length{n}")
    def test_memory_is_the_last_inputs_of_each_layer(self, length: int) -> None:
        """Of two windows, 5 and 4 long, before the layer norm."""
        model, tokens, seen = small_model(), text(9), [[], []]
        for i, layer in enumerate(model.layers):
            layer.register_forward_pre_hook(lambda _, args, i=i: seen[i].append(args[0]))
        _, memory = in_windows(model, tokens, [5, 4], length)
        assert torch.equal(torch.cat(seen[0], dim=1), model.embedding(tokens))
        for kept, inputs in zip(memory, seen, strict=True):
            assert torch.equal(kept, torch.cat(inputs, dim=1)[:, max(0, 9 - length) :])

    def test_memory_is_detached(self) -> None:
        """No gradient reaches the window before; the embedding rows used there alone stay at zero."""
        model = small_model()
        memory = model(torch.tensor([[1, 2]]), memory_length=2).memory
        assert not any(m.requires_grad for m in memory)
        model(torch.tensor([[3, 4]]), memory).logits.square().sum().backward()
        grad = model.embedding.weight.grad
        assert grad is not None
        assert grad.abs().sum(dim=1).nonzero().flatten().tolist() == [3, 4]

    @pytest.mark.parametrize("name", ["key", "value"])
    def test_projections_learn_from_the_memory(self, name: str) -> None:
        """Position j is the unit vector j, so column j of the gradient is what position j contributes."""
        attention = small_model().layers[0].attention
        context = torch.eye(8, dtype=torch.float64)[None, :5]
        attention(context[:, 4:], context).square().sum().backward()
        contribution = getattr(attention, name).weight.grad.abs().sum(dim=0)
        assert contribution[:5].min() > 0
        assert contribution[5:].max() == 0


class TestErrors:
    @pytest.mark.parametrize("shape", [(4,), (2, 0), (1, 2, 3)], ids=["vector", "no-positions", "cube"])
    def test_tokens_must_be_a_batch_of_windows(self, shape: tuple[int, ...]) -> None:
        """The message shows the shape."""
        with pytest.raises(UserError, match=r"`tokens` must be \[batch, length >= 1\]; got \("):
            small_model()(torch.zeros(shape, dtype=torch.int64))

    def test_memory_must_be_of_this_model(self) -> None:
        """One tensor a layer."""
        model = small_model()
        with pytest.raises(UserError, match="`memory` must have one tensor a layer, 2; got 1"):
            model(text(3), model(text(3)).memory[:1])


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS.keys())
@pytest.mark.parametrize("method", METHODS)
def test_padding_before_a_text_changes_nothing(method: str, attention: type) -> None:
    """A layer's output at the text, with a memory that is part padding; experts see the text's tokens alone."""
    block = small_model(method, attention=attention).layers[0]
    assert isinstance(block, Block)
    memory, x = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64)
    padding = torch.tensor([[True, True, False, False]]).repeat(2, 1)
    padding = torch.cat((torch.ones(2, 3, dtype=torch.bool), padding), dim=1)
    y, stats = block(x, memory, return_stats=True, padding=padding)
    alone, of_text = block(x[:, 2:], None, return_stats=True)
    assert_same(y[:, 2:], alone)
    assert stats is not None
    assert of_text is not None
    assert torch.equal(stats.counts, of_text.counts)
    assert int(stats.n_tokens) == 4
