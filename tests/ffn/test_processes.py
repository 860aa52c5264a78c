"""A batch spread over processes is the batch: outputs, losses, statistics and gradients of every method are those of one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import LENGTH, PARTS, SEED, Spread, difference, join, leave, loss_of, run, wrong
from torch.utils.checkpoint import checkpoint

from sparseffn.errors import UserError
from sparseffn.ffn import BatchGroup, FFNConfig, list_methods, method_class, set_batch_group
from sparseffn.ffn.noisy_moe import NoisyMoEConfig
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.ffn.switch import SwitchConfig

OF_ALL = ("balance_loss", "dropped", "counts", "n_tokens", "weights")


def configs() -> dict[str, FFNConfig]:
    """Every method's examples without dropout of single units, which each process draws by itself."""
    found = {}
    for name in list_methods():
        for i, config in enumerate(method_class(name).examples()):
            has_dropout = any(f.name == "dropout" for f in fields(config))
            found[f"{name}-{i}"] = config.replace(dropout=0.0) if has_dropout else config
    found["switch-expert-dropout"] = SwitchConfig(
        d_model=6, n_experts=3, expert_size=4, k=2, capacity_factor=0.75, expert_dropout=0.3, entropy_weight=0.1, cv_weight=0.1
    )
    return found


def differences(config: FFNConfig, variant: str, group: BatchGroup) -> tuple[dict[str, float], dict[str, Any]]:
    """Of all that a layer does on this rank's rows from what it does on all rows; and what the case holds."""
    torch.manual_seed(1)
    layer = config.build().double().train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.5)
    spread = Spread.of(variant, config.d_model, group.rank, group.size)
    single, x_all = copy.deepcopy(layer), spread.x.clone().requires_grad_()
    torch.manual_seed(SEED)
    y_all, stats_all, loss = loss_of(single, x_all, spread.mask if variant == "masked" else None, spread.weights, 1.0)
    loss.backward()
    set_batch_group(layer, group)
    group.seed(SEED)
    x = spread.x[spread.own].clone().requires_grad_()
    mask = spread.mask[spread.own] if spread.has_mask else None
    y, stats, loss = loss_of(layer, x, mask, spread.weights[spread.own], group.size)
    loss.backward()
    found = {"y": difference(y, y_all[spread.own]), "x.grad": difference(x.grad / group.size, x_all.grad[spread.own])}
    found |= {name: difference(getattr(stats, name), getattr(stats_all, name)) for name in OF_ALL}
    found["active"] = difference(stats.active, stats_all.active.view(-1, LENGTH)[spread.own].flatten())
    for (name, parameter), wanted in zip(layer.named_parameters(), single.parameters(), strict=True):
        # A rank without tokens may have no gradient of a parameter at all; DDP takes it for zero.
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(grad)
        found[f"{name}.grad"] = difference(grad / group.size, wanted.grad)
    set_batch_group(layer, None)
    own = layer(x, mask=mask, return_stats=True)[1].counts
    idle = (own == 0) & (stats.counts > 0)
    return found, {"idle here": int(idle.sum()), "dropped": int(stats.dropped)}


def recomputed(context: bool, group: BatchGroup) -> str:
    """What becomes of a noisy layer that is checkpointed: how far its gradient is off, or the error."""
    torch.manual_seed(1)
    layer = (
        NoisyMoEConfig(d_model=6, n_experts=4, expert_size=3, k=2, selector_init="free", expert_dropout=0.3).build().double()
    )
    set_batch_group(layer, group)
    grads = []
    options: dict[str, Any] = {"context_fn": group.checkpoint_contexts} if context else {}
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False, **options)):
        group.seed(SEED)
        x = torch.linspace(-1, 1, 60, dtype=torch.float64).view(10, 6).requires_grad_()
        try:
            call(x).square().sum().backward()
        except UserError as error:
            return str(error)
        grads.append(x.grad)
        after = group.generator_states()["cpu"]
    assert torch.equal(after, group.generator_states()["cpu"])
    return str(difference(*grads))


def others(group: BatchGroup) -> dict[str, Any]:
    """What a group promises beside the layers."""
    layer = SigmaMoEConfig(d_model=6, n_experts=4, expert_size=3, k=2, expert_dropout=0.5).build()
    set_batch_group(layer, group)
    sent = pickle.loads(pickle.dumps(layer))
    x = torch.randn(3 + group.rank, 6)
    layer.eval()
    # In evaluation ranks need not do the same: only one of them runs.
    alone = layer(x, return_stats=True)[1].n_tokens.item() if group.rank == 0 else 3
    group.seed(SEED)
    drawn = [group.draw(torch.rand, 3, 2, device=x.device)]
    states = group.generator_states()
    drawn += [group.draw(torch.rand, 3, 2, device=x.device) for _ in range(2)]
    group.restore(states)
    drawn.append(group.draw(torch.rand, 3, 2, device=x.device))
    ranks = torch.tensor(group.rank + 1.0)
    broken = ""
    try:
        BatchGroup(even=True).draw(torch.rand, 3 + group.rank, 2, device=x.device)
    except UserError as error:
        broken = str(error)
    return {
        "broken promise": broken,
        "copy shares": copy.deepcopy(layer).router.batch_group is group,
        "pickled": [sent.batch_group, sent.router.batch_group],
        "evaluation": alone,
        "draws again": [bool(torch.equal(drawn[1], drawn[3])), bool(torch.equal(drawn[2], drawn[3]))],
        "sum": group.sum(ranks).item(),
        "before": group.before(ranks).item(),
    }


def work(rank: int, size: int, folder: str) -> None:
    """One of the processes: everything that the tests ask about, in one file of each rank."""
    join(rank, size, folder)
    group, even = BatchGroup(), BatchGroup(even=True)
    found = {
        f"{name} {variant}": differences(config, variant, even if variant == "even" else group)
        for name, config in configs().items()
        for variant in PARTS
    }
    report = {"differences": {case: d for case, (d, _) in found.items()}, "held": {case: h for case, (_, h) in found.items()}}
    report |= {"others": others(group), "recomputed": [recomputed(c, group) for c in (True, False)]}
    leave(rank, folder, report)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """Of two processes."""
    yield run(work, 2, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("variant", list(PARTS))
@pytest.mark.parametrize("name", list(configs()))
def test_two_processes_compute_what_one_does(name: str, variant: str, reports: list[dict[str, Any]]) -> None:
    """Rows of the output, balancing loss, statistics and averaged gradients, to 1e-9."""
    assert len(reports[0]["differences"][f"{name} {variant}"]) > len(OF_ALL) + 3
    assert wrong(reports, f"{name} {variant}") == {}


@pytest.mark.parametrize("variant", list(PARTS))
def test_cases_hold_what_may_go_wrong(variant: str, reports: list[dict[str, Any]]) -> None:
    """Experts without a token on one rank that have some on the other, and selections without a place."""
    held = [report["held"] for report in reports]
    assert held[0][f"sigma-moe-0 {variant}"]["idle here"] > 0
    assert all(rank[f"switch-2 {variant}"]["dropped"] > 0 for rank in held)


@pytest.mark.slow
def test_four_processes_compute_what_one_does(tmp_path: Path) -> None:
    """The same of every method."""
    assert wrong(run(work, 4, tmp_path)) == {}


def test_evaluation_asks_no_other_process(reports: list[dict[str, Any]]) -> None:
    """A rank evaluates by itself, and counts its own tokens."""
    assert [report["others"]["evaluation"] for report in reports] == [3, 3]


def test_copies_share_the_group_and_pickles_leave_it(reports: list[dict[str, Any]]) -> None:
    """Neither fails."""
    for report in reports:
        assert report["others"]["copy shares"] is True
        assert report["others"]["pickled"] == [None, None]


def test_generator_states_are_put_back(reports: list[dict[str, Any]]) -> None:
    """The draw after it is the one that followed, and not the next one."""
    assert [report["others"]["draws again"] for report in reports] == [[True, False]] * 2


def test_a_broken_promise_of_even_rows_is_one_error_on_all_ranks(reports: list[dict[str, Any]]) -> None:
    """Not a collective of other sizes, which kills a process."""
    assert ["got 3, 4 tokens on the ranks" in report["others"]["broken promise"] for report in reports] == [True, True]


def test_sums_are_over_all_ranks_or_those_before(reports: list[dict[str, Any]]) -> None:
    """1 + 2, and nothing before rank 0."""
    assert [(report["others"]["sum"], report["others"]["before"]) for report in reports] == [(3.0, 0.0), (3.0, 1.0)]


def test_what_is_computed_again_draws_the_same_numbers_or_is_refused(reports: list[dict[str, Any]]) -> None:
    """With the group's contexts the gradient is that without checkpointing; without them there is none."""
    for report in reports:
        with_contexts, without = report["recomputed"]
        assert float(with_contexts) == 0.0
        assert "context_fn=group.checkpoint_contexts" in without


def test_a_group_needs_processes() -> None:
    """The remedy is named."""
    with pytest.raises(UserError, match="torchrun"):
        BatchGroup()


def test_a_model_without_layers_has_no_use_for_a_group() -> None:
    """A typo in what is passed shows."""
    with pytest.raises(UserError, match="`model` must hold a sparseffn layer"):
        set_batch_group(torch.nn.Linear(2, 2), None)
