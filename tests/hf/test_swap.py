"""`replace_ffn`: blocks are found and read as they are, new ones start as they should, and a refusal leaves the model alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")

from transformers import AutoModelForCausalLM, Gemma4TextConfig, Qwen3NextConfig

from hf.dense import CONFIGS, FULL, build, ids
from sparseffn.errors import UserError
from sparseffn.ffn import FeedForward, collect_stats
from sparseffn.ffn.mixture import Mixture
from sparseffn.hf import DenseBlock, Random, Split, Upcycle, replace_ffn
from sparseffn.hf.dense_blocks import find_blocks, read_block
from sparseffn.hf.split import balanced_clusters, contributions, fitted_router

D_FF = 48


def deviation(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


@pytest.mark.parametrize("family", CONFIGS)
def test_topk_of_all_pairs_is_every_family_s_dense_block(family: str) -> None:
    """Biases, transposed weights and each activation included; one pair less is another model."""
    model = build(family)
    wanted = model(ids()).logits
    report = replace_ffn(model, "topk", k=D_FF)
    assert deviation(model(ids()).logits, wanted) < 1e-6
    assert [block.n_active for block in report] == [D_FF, D_FF]
    fewer = build(family)
    replace_ffn(fewer, "topk", k=D_FF // 2)
    assert deviation(fewer(ids()).logits, wanted) > 1e-3


@pytest.mark.parametrize("method", ["sigma-moe", "softmax-moe", "softmax-renorm-moe", "switch"])
def test_split_with_every_expert_selected_is_the_dense_block(method: str) -> None:
    """Gates are 1 whatever the method's gate is, so that rounding is all that differs; in float64."""
    model = build("llama", torch.float64)
    wanted = model(ids()).logits
    replace_ffn(model, method, n_experts=6, k=6, calibration=ids())
    assert deviation(model(ids()).logits, wanted) < 1e-13


@pytest.mark.parametrize(("method", "k"), [("sigma-moe", 1), ("sigma-moe", 3), ("softmax-renorm-moe", 2), ("switch", 1)])
def test_an_upcycled_model_starts_as_the_dense_one(method: str, k: int) -> None:
    """But for a router's first logits, and not where half of the pairs are drawn anew."""
    model, again = build("qwen3"), build("qwen3")
    wanted = model(ids()).logits
    report = replace_ffn(model, method, init="upcycle", n_experts=4, k=k)
    assert deviation(model(ids()).logits, wanted) < 0.02
    assert report[0].flops_after > k * report[0].flops_before
    replace_ffn(again, method, init=Upcycle(redraw=0.5), n_experts=4, k=k)
    assert deviation(again(ids()).logits, wanted) > 0.1


def test_redraw_draws_its_share_of_each_expert_s_pairs() -> None:
    """Half are the dense block's to the bit, values to their share of the output; the others are as large and as spread."""
    model = build("llama")
    block = next(iter(find_blocks(model, 0).values()))
    keys_FD, gates_FD = block.gate_proj.weight.detach(), block.up_proj.weight.detach()
    # Two of four experts are selected, and the sigmoid of a logit of 0 is a half.
    values_FD = block.down_proj.weight.detach().t() * (1 / 2 / 0.5)
    replace_ffn(model, "sigma-moe", 0, init=Upcycle(redraw=0.5), n_experts=4, k=2)
    experts = model.model.layers[0].mlp.experts
    kept = []
    for e in range(4):
        parts = [(experts.keys[e].t(), keys_FD), (experts.gate_keys[e].t(), gates_FD), (experts.values[e], values_FD)]
        same = [(found == dense).all(1) for found, dense in parts]
        assert int(same[0].sum()) == D_FF // 2 and all(torch.equal(rows, same[0]) for rows in same)
        for found, dense in parts:
            drawn, replaced = found.detach()[~same[0]], dense[~same[0]]
            assert not (drawn == replaced).any()
            # Of 768 numbers: five standard errors of a mean, and of a standard deviation.
            n, std = drawn.numel(), float(replaced.std())
            assert float(drawn.mean()) == pytest.approx(float(replaced.mean()), abs=5 * std / n**0.5)
            assert float(drawn.std()) == pytest.approx(std, abs=5 * std / (2 * n) ** 0.5)
        kept.append(same[0])
    assert not torch.equal(kept[0], kept[1]), "each expert draws its own pairs"


def test_the_fitted_router_finds_the_experts_that_contribute() -> None:
    """A block in which each expert answers to a direction of its own: half of the experts leave little out."""
    generator = torch.Generator().manual_seed(0)
    directions = nn.functional.normalize(torch.randn(4, 16, generator=generator), dim=1)
    keys = directions.repeat_interleave(8, dim=0) + 0.05 * torch.randn(32, 16, generator=generator)
    order = torch.randperm(32, generator=generator)
    block = DenseBlock(kind="made", activation="relu", keys=keys[order], values=torch.randn(32, 16, generator=generator))
    x_TD = torch.randn(512, 16, generator=generator)
    profiles = nn.functional.normalize(block.coefficients(x_TD).t(), dim=1)
    pairs_EG = balanced_clusters(profiles, 4, 10, generator)
    found = {frozenset((order[pairs] // 8).tolist()) for pairs in pairs_EG}
    assert found == {frozenset({e}) for e in range(4)}, "each cluster is of one direction"
    energies_TE = contributions(block, pairs_EG, x_TD)
    logits_TE = x_TD @ fitted_router(x_TD, energies_TE, 2, 100, generator).t()
    kept = energies_TE.gather(1, logits_TE.topk(2, dim=1).indices).sum() / energies_TE.sum()
    best = energies_TE.topk(2, dim=1).values.sum() / energies_TE.sum()
    assert kept > 0.9 * best > 0.8


def test_what_is_drawn_follows_from_the_seed() -> None:
    """And each layer draws by itself: fewer layers leave the others' numbers as they are."""

    def first(seed: int, layers: Any = None) -> Tensor:
        model = build("mistral")
        replace_ffn(model, "sigma-moe", layers, n_experts=6, k=2, calibration=ids(), seed=seed)
        return model.model.layers[1].mlp.router.selector.detach()

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


def test_layers_are_named_by_number_name_and_class() -> None:
    """In the model's order, each once."""
    model = build("gemma3")
    names = list(find_blocks(model))
    assert names == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert list(find_blocks(model, -1)) == names[1:]
    assert list(find_blocks(model, ["model.layers.*.mlp", 0])) == names
    assert list(find_blocks(model, type(model.model.layers[0].mlp))) == names
    replace_ffn(model, "topk", 0, k=4)
    assert list(find_blocks(model)) == names[1:]


def test_blocks_of_a_mixture_are_found_by_name_alone() -> None:
    """The shared expert of Qwen3-Next, of a dense block's class, and the block that Gemma 4 computes next to its experts."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    qwen = AutoModelForCausalLM.from_config(Qwen3NextConfig(**FULL, **sizes, mlp_only_layers=[0]))
    shared = "model.layers.1.mlp.shared_expert"
    assert type(qwen.get_submodule(shared)) is type(qwen.model.layers[0].mlp)
    assert list(find_blocks(qwen)) == ["model.layers.0.mlp"] and list(find_blocks(qwen, shared)) == [shared]
    sizes = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8, "enable_moe_block": True}
    gemma = AutoModelForCausalLM.from_config(
        Gemma4TextConfig(**FULL, **sizes, global_head_dim=16, hidden_size_per_layer_input=0)
    )
    with pytest.raises(UserError, match="got Gemma4ForCausalLM, which has none; fix: name them in layers="):
        find_blocks(gemma)


def test_a_module_of_anybody_s_is_replaced_by_name() -> None:
    """A sequence of PyTorch's modules, and one whose parts a reader names."""
    model = nn.ModuleDict({"ffn": nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6), nn.Dropout(0.5)), "own": Own()})
    x = torch.randn(3, 6)
    wanted = [model["ffn"].eval()(x), model["own"](x)]
    replace_ffn(model, "topk", "ffn", k=10)
    replace_ffn(model, "topk", Own, k=10, reader=Own.read)
    assert [deviation(model[name](x), y) < 1e-6 for name, y in zip(model, wanted, strict=True)] == [True, True]
    assert isinstance(model["ffn"][1], nn.Dropout) and model["ffn"][1].p == 0.5, "the output's dropout stays"


class Own(nn.Module):
    """No name that anybody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.randn(2, 10, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.both[0].t()) @ self.both[1]

    @staticmethod
    def read(module: Any) -> DenseBlock:
        return DenseBlock(kind="Own", activation="relu", keys=module.both[0], values=module.both[1])


class Doubled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def spoilt(change: Callable[[Any], object]) -> nn.Module:
    model = build("llama")
    change(model.model.layers[1])
    return model


def doubled(layer: Any) -> None:
    layer.mlp.forward = lambda x, f=layer.mlp.forward: 2 * f(x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "unknown family": (lambda: nn.Sequential(nn.Linear(2, 2)), {"k": 1}, "`model` must hold feedforward blocks of gemma"),
    "meta": (lambda: build("llama").to("meta"), {"k": 1}, "meta device.*load the model's weights first"),
    "mixed dtypes": (lambda: spoilt(lambda layer: layer.mlp.up_proj.half()), {"k": 1}, "mixes float16 and float32"),
    "quantised": (lambda: spoilt(lambda layer: layer.mlp.to(torch.float8_e4m3fn)), {"k": 1}, "weights of float8_e4m3fn"),
    "adapter": (
        lambda: spoilt(lambda layer: setattr(layer.mlp, "up_proj", nn.Sequential(layer.mlp.up_proj))),
        {"k": 1},
        "holds a Sequential in place of nn.Linear.*merge adapters",
    ),
    "hook": (lambda: spoilt(lambda layer: layer.mlp.register_forward_hook(lambda *_: None)), {"k": 1}, "carries hooks"),
    "backward hook": (
        lambda: spoilt(lambda layer: layer.mlp.register_full_backward_hook(lambda *_: None)),
        {"k": 1},
        "carries hooks",
    ),
    "other forward": (lambda: spoilt(doubled), {"k": 1}, "something else than its parts say"),
    "activation": (lambda: spoilt(lambda layer: setattr(layer.mlp, "act_fn", nn.Tanh())), {"k": 1}, "unknown here, Tanh"),
    "k": (lambda: build("llama"), {"k": D_FF + 1}, "`k` must be at most d_ff = 48"),
    "option of the block": (lambda: build("llama"), {"k": 1, "d_ff": 7}, "`d_ff` must be left out"),
    "n_experts": (
        lambda: build("llama"),
        {"method": "sigma-moe", "n_experts": 7, "k": 2, "calibration": ids()},
        "`n_experts` must divide the dense block's 48 pairs; got 7; fix: 4, 6 or 8",
    ),
    "biases": (
        lambda: build("gpt2"),
        {"method": "sigma-moe", "n_experts": 6, "k": 2, "calibration": ids()},
        "`method` must have biases, as the dense block GPT2MLP has",
    ),
    "no calibration": (lambda: build("llama"), {"method": "sigma-moe", "n_experts": 6, "k": 2}, "`calibration` must be token"),
    "calibration": (lambda: build("llama"), {"k": 1, "calibration": ids()}, "`calibration` must be left out"),
    "same": (lambda: build("llama"), {"method": "sigma-moe", "init": "same", "n_experts": 6, "k": 2}, "`init` must be split"),
    "split": (lambda: build("llama"), {"init": "split", "k": 2}, "`init` must be same or random for topk"),
    "init": (lambda: build("llama"), {"init": "upcicle", "k": 2}, "unknown init 'upcicle'.*upcycle"),
    "layer number": (lambda: build("llama"), {"layers": 2, "k": 2}, "`layers` must be numbers below 2"),
    "layer name": (lambda: build("llama"), {"layers": "mlp.*", "k": 2}, "`layers` must name modules.*'mlp.\\*'"),
    "no block": (lambda: build("llama"), {"layers": "model.norm", "k": 2}, "LlamaRMSNorm, whose parts are unknown"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_leaves_every_block_in_place(case: str) -> None:
    """All or nothing, with an error that says what to do."""
    make, options, message = REFUSED[case]
    model = make()
    before = dict(model.named_modules())
    options = dict(options)
    with pytest.raises(UserError, match=f"(?s){message}"):
        replace_ffn(model, options.pop("method", "topk"), **options)
    assert dict(model.named_modules()) == before


def test_the_new_block_is_of_the_old_one_s_dtype_and_mode() -> None:
    """bfloat16, training, frozen parameters; and statistics are collected from within."""
    model = build("llama", torch.bfloat16).train()
    model.model.layers[0].mlp.requires_grad_(False)
    wanted = model.eval()(ids()).logits.float()
    model.train()
    replace_ffn(model, "sigma-moe", init=Split(by="keys", rounds=2, router_steps=5), n_experts=6, k=6, calibration=ids())
    first, second = (layer.mlp for layer in model.model.layers)
    assert isinstance(first, Mixture) and first.training and first.experts.keys.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in first.parameters()) and all(p.requires_grad for p in second.parameters())
    model.eval()
    with collect_stats(model) as stats:
        assert deviation(model(ids()).logits.float(), wanted) < 0.02
    assert len(stats) == 2


def test_random_takes_any_method_with_its_own_sizes() -> None:
    """Product keys have neither a gate nor d_ff."""
    model = build("llama")
    replace_ffn(model, "pkm", init=Random(), n_subkeys=8, k=2, n_heads=2)
    assert all(isinstance(layer.mlp, FeedForward) for layer in model.model.layers)
    model(ids()).logits.sum().backward()


def test_the_report_counts_what_is_there() -> None:
    """Parameters and FLOPs before and after, printed as a table."""
    model = build("llama")
    before = sum(p.numel() for p in model.model.layers[0].mlp.parameters())
    report = replace_ffn(model, "sigma-moe", n_experts=6, k=3, calibration=ids())
    after = sum(p.numel() for p in model.model.layers[0].mlp.parameters())
    assert (report[0].params_before, report[0].params_after) == (before, after)
    assert report[0].flops_before == 2 * 3 * 32 * D_FF and report[0].n_active / report[0].n_pairs == 0.5
    assert "model.layers.1.mlp  LlamaMLP  sigma-moe  48     24" in str(report)
    assert "save it by sparseffn.hf.save_converted(model, FOLDER)" in str(report)


def test_a_shared_block_is_replaced_wherever_it_stands() -> None:
    """And stays shared."""
    model = build("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    replace_ffn(model, "topk", k=4)
    assert model.model.layers[1].mlp is model.model.layers[0].mlp


def test_a_block_is_read_without_a_copy() -> None:
    """Views, in whatever layout."""
    for family in ("llama", "gpt2"):
        module = next(iter(find_blocks(build(family)).values()))
        addresses = {p.data_ptr() for p in module.parameters()}
        assert {t.data_ptr() for t in read_block("mlp", module).tensors().values()} == addresses


def test_a_model_without_weights_can_be_built_from_its_config() -> None:
    """The tiny models of these tests are the families' own classes."""
    assert {type(AutoModelForCausalLM.from_config(make())).__module__.split(".")[2] for make in CONFIGS.values()} == set(
        CONFIGS
    )
