"""The planner against measured steps, its arithmetic, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from measured_memory import measured_kept, measured_peak, stepper_after
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparseffn.cli import main
from sparseffn.comparison.matched import match_methods, parse_methods
from sparseffn.devices import memory_there
from sparseffn.ffn import list_methods
from sparseffn.models import ModelConfig
from sparseffn.models.backbones import Backbone
from sparseffn.models.presets import PRESETS, get_preset
from sparseffn.training import TrainConfig, failures, from_preset
from sparseffn.training.layout import Kept, Layout
from sparseffn.training.planner import largest_batch, plan
from sparseffn.training.step_costs import kept_bytes, step_flops

CPU = Layout(device_type="cpu")
KEPT_WITHIN, PEAK_WITHIN = 0.002, 0.07
"""Relative; docs/devices.md states both."""


def run_of(
    method: str, preset: str = "tiny", backbone: Backbone = "transformer-xl", **settings: Any
) -> tuple[ModelConfig, TrainConfig]:
    """A preset's model and settings, with few streams."""
    sizes = {"batch": 2, "context": 64, **{k: v for k, v in settings.items() if k in ("batch", "context")}}
    others = {k: v for k, v in settings.items() if k not in sizes}
    chosen = dataclasses.replace(get_preset(preset), backbone=backbone, **sizes)
    return match_methods(parse_methods([method]), chosen, 300)[0].model, from_preset(chosen, **others)


KINDS: dict[str, dict[str, Any]] = {
    "xl": {},
    "xl-bf16": {"precision": "bfloat16"},
    "llama": {"backbone": "llama"},
    "llama-bf16": {"backbone": "llama", "precision": "bfloat16"},
}


@pytest.mark.parametrize("kind", [*list(KINDS)[:2], *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(KINDS)[2:])])
@pytest.mark.parametrize("method", list_methods())
def test_kept_bytes_are_those_that_autograd_keeps(method: str, kind: str) -> None:
    """Of a whole forward pass with its loss and statistics, every method, either backbone and precision."""
    model, config = run_of(method, **KINDS[kind])
    planned = kept_bytes(model, CPU.micro_batch(config)).total
    assert planned == pytest.approx(measured_kept(model, config), rel=KEPT_WITHIN)


def test_kept_bytes_know_dropout() -> None:
    """`small` drops units, sub-blocks and embeddings; `tiny` nothing."""
    model, config = run_of("dense", "small", context=16)
    planned = kept_bytes(model, CPU.micro_batch(config)).total
    assert planned == pytest.approx(measured_kept(model, config), rel=KEPT_WITHIN)


@pytest.mark.parametrize("method", list_methods())
def test_peak_is_that_of_a_measured_step(method: str) -> None:
    """State, activations and room to work in, as the allocator counts them."""
    model, config = run_of(method, batch=4, context=128)
    assert plan(model, config, CPU).memory.peak == pytest.approx(measured_peak(model, config), rel=PEAK_WITHIN)


SLOW = [
    ("small", "transformer-xl", "float32", 1),
    ("small", "transformer-xl", "bfloat16", 2),
    ("small", "llama", "bfloat16", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "backbone", "precision", "accumulation"), SLOW, ids=["xl", "xl-bf16-2", "llama-bf16"])
@pytest.mark.parametrize("method", list_methods())
def test_peak_of_other_settings(method: str, preset: str, backbone: Backbone, precision: str, accumulation: int) -> None:
    """Micro-batches, autocast, the other backbone, at `small`."""
    settings = {"precision": precision, "accumulation": accumulation, "batch": 4, "context": 256}
    model, config = run_of(method, preset, backbone, **settings)
    assert plan(model, config, CPU).memory.peak == pytest.approx(measured_peak(model, config), rel=PEAK_WITHIN)


@pytest.mark.parametrize("backbone", ["transformer-xl", "llama"])
def test_flops_are_those_that_are_counted(backbone: Backbone) -> None:
    """Forward and backward; attention over the future is counted too."""
    model, config = run_of("sigma-moe", backbone=backbone)
    stepper, window = stepper_after(1, model, config)
    # PyTorch counts no FLOPs of the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stepper.take(*window, lr=1e-4)
    assert counter.get_total_flops() == pytest.approx(step_flops(model, config), rel=0.05)


def test_ddp_sends_a_ring_of_gradients_and_keeps_all() -> None:
    """Once a step, however many micro-batches; one device sends nothing."""
    model, config = run_of("dense", batch=8, accumulation=2)
    alone, four = plan(model, config), plan(model, config, Layout(gpus=4))
    assert alone.communication.total == 0 and four.communication.parameters == 0
    assert four.communication.gradients == pytest.approx(2 * 3 / 4 * 4 * model.num_params())
    assert four.memory.parameters == alone.memory.parameters == 4 * model.num_params()
    assert four.tokens_per_step == alone.tokens_per_step and four.flops_per_device == alone.flops_per_step / 4


def test_fsdp_keeps_a_share_and_gathers_a_layer_twice() -> None:
    """Embedding and output once a micro-batch."""
    model, config = run_of("dense", batch=8, accumulation=2)
    found = plan(model, config, Layout(gpus=4, strategy="fsdp"))
    rest = 2 * model.vocab_size * model.d_model
    assert found.memory.parameters == pytest.approx(model.num_params(), abs=4)
    assert found.memory.moments == 2 * found.memory.gradients == 2 * found.memory.parameters
    assert found.communication.gradients == pytest.approx(3 / 4 * 4 * model.num_params())
    assert found.communication.parameters == pytest.approx(2 * 3 / 4 * 4 * (2 * model.num_params() - rest))
    assert found.memory.buffers > 4 * rest


def test_experts_are_spread() -> None:
    """Their parameters and gradients are a share; tokens travel four times; other methods have none to spread."""
    model, config = run_of("sigma-moe", batch=4)
    whole, spread = (plan(model, config, Layout(gpus=4, expert_parallel=n)) for n in (1, 4))
    experts = model.n_layers * model.ffn.n_channels * 2 * model.d_model
    assert whole.memory.parameters - spread.memory.parameters == pytest.approx(3 / 4 * 4 * experts, rel=1e-6)
    assert spread.communication.gradients < whole.communication.gradients / 2 and whole.communication.experts == 0
    rows = config.context * model.ffn.n_selected * model.d_model * 4  # pyright: ignore[reportAttributeAccessIssue]
    counts = 8 * model.ffn.n_experts  # pyright: ignore[reportAttributeAccessIssue]
    assert spread.communication.experts == model.n_layers * (4 * rows + counts) * 3 // 4


def test_shards_of_spread_experts_are_of_their_copies() -> None:
    """FSDP leaves each of n devices 1 / n of all parameters, however experts are spread first."""
    model, config = run_of("sigma-moe", batch=8)
    held = [plan(model, config, Layout(gpus=8, strategy="fsdp", expert_parallel=n)).memory.parameters for n in (1, 4)]
    assert held == pytest.approx([4 * model.num_params() / 8] * 2, rel=1e-3)


def test_methods_that_balance_the_batch_gather_its_logits() -> None:
    """BASE and S-BASE, the latter not as it was released."""
    gathered = {}
    for method in ("base", "s-base", "s-base sinkhorn=released"):
        chosen = dataclasses.replace(get_preset("tiny"), batch=4)
        model = match_methods(parse_methods(method.split()), chosen, 300)[0].model
        gathered[method] = plan(model, from_preset(chosen), Layout(gpus=4)).communication.routers
        logits = model.n_layers * 3 * 128 * model.ffn.n_experts * 4  # pyright: ignore[reportAttributeAccessIssue]
        assert (gathered[method] > logits) == (method != "s-base sinkhorn=released")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_largest_batch_fits_and_no_larger_one(strategy: Kept) -> None:
    """Where none does, it is 0."""
    model, config = run_of("topk", batch=8, accumulation=2)
    layout, memory = Layout(gpus=4, strategy=strategy), 10**9
    largest = largest_batch(model, config, layout, memory)
    peaks = [plan(model, dataclasses.replace(config, batch=n), layout).memory.peak for n in (largest, largest + 8)]
    assert largest % 8 == 0 and peaks[0] <= memory < peaks[1]
    assert largest_batch(model, config, layout, 10**6) == 0


REFUSED = {
    "no-device": ("--method dense --gpus 0", r"`--gpus` must be 1 to .*; got 0; fix: --gpus 1 is one device"),
    "batch": (
        "--method dense --gpus 3",
        r"`--batch` must be a multiple of processes x accumulation = 3 x 1; got 16.*--batch 15 or 18",
    ),
    "small-batch": ("--method dense --gpus 32", r"must be a multiple .* got 16; fix: --batch 32"),
    "spread": ("--method sigma-moe --gpus 4 --expert-parallel 3", r"`--expert-parallel` must divide --gpus 4; got 3"),
    "no-experts": ("--method dense --gpus 4 --expert-parallel 2", r"over 1 device for dense, which has none; got 2"),
    "experts": (
        "--method switch --gpus 16 --expert-parallel 16",
        r"must divide the 8 of a layer; got 16; fix: one of 1, 2",
    ),
    "inner": ("--method sigma-moe inner_k=64 --gpus 4 --expert-parallel 2", r"`inner_k` must be none .* got 64"),
    "float16": ("--method dense --gpus 4 --strategy fsdp --precision float16", r"`--precision` must be float32 or bfloat16"),
    "memory": ("--method dense --memory 80XB", r"`--memory` must be a size such as 80GB or 24GiB; got '80XB'"),
    "no-memory": ("--method dense --memory 0GB", r"`--memory` must be a size .* got '0GB'"),
    "two": ("--method dense topk", r"`--method` must name one method"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_does_not_divide_is_refused(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, with what to type."""
    assert main(["plan", *words.split()]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_the_command_prints_what_the_library_plans(capsys: pytest.CaptureFixture[str]) -> None:
    """As JSON, and as two tables with the verdict; exit code 1 where it does not fit."""
    options = "--method sigma-moe --preset wt-b --gpus 64 --precision bfloat16"
    words = ["plan", *options.split()]
    assert main([*words, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    chosen = get_preset("wt-b")
    model = match_methods(parse_methods(["sigma-moe"]), chosen, 8000)[0].model
    found = plan(model, from_preset(chosen, precision="bfloat16"), Layout(gpus=64))
    assert data["memory"] == dataclasses.asdict(found.memory) and data["communication"]["total"] == found.communication.total
    assert main([*words, "--memory", "80GB"]) == 0
    text = capsys.readouterr().out
    assert "batch 64 fits 74.51 GiB a device; the largest batch that fits is" in text and "parameters  " in text
    assert main([*words, "--memory", "2GB"]) == 1
    assert "batch 64 does not fit 1.86 GiB a device; no batch does" in capsys.readouterr().out


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("backbone", ["transformer-xl", "llama"])
def test_every_preset_and_method_is_planned(preset: str, backbone: Backbone) -> None:
    """Where the method can be matched; more devices take no more memory, FSDP less than DDP where the model is most of it."""
    for method in list_methods():
        chosen = dataclasses.replace(get_preset(preset), backbone=backbone, batch=64)
        model = match_methods(parse_methods([method]), chosen, 8000)[0].model
        config = from_preset(chosen, precision="bfloat16")
        layouts = Layout(), Layout(gpus=64), Layout(gpus=64, strategy="fsdp")
        one, many, sharded = (plan(model, config, layout) for layout in layouts)
        assert sharded.memory.parameters < many.memory.parameters == one.memory.parameters
        assert sharded.memory.peak < many.memory.peak < one.memory.peak
        assert 0 < many.communication.total < sharded.communication.total


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of addresses are Linux's")
def test_a_limit_of_addresses_is_what_is_there() -> None:
    """Less what libraries map; without a limit no more than the machine has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    whole = memory_there(torch.device("cpu"))
    assert 0 < whole <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    mapped, own = (int(n) * os.sysconf("SC_PAGE_SIZE") for n in Path("/proc/self/statm").read_text().split()[:2])
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**28, before[1]))
    try:
        assert memory_there(torch.device("cpu")) == pytest.approx(own + 2**28, rel=0.05)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_out_of_memory_names_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """More micro-batches of the same batch, or a smaller batch; processes share the memory."""
    model, config = run_of("sigma-moe", "small", batch=64, context=256)

    def message(memory: float, layout: Layout | None = None) -> str:
        monkeypatch.setattr(failures, "memory_there", lambda device: round(memory))
        return str(failures.out_of_memory(config, model, "cpu", 3, "none", layout))

    parts = re.search(r"fix: --accumulation (\d+) ", message(2e9))
    assert parts is not None
    counts = int(parts[1]), int(parts[1]) // 2
    peaks = [plan(model, dataclasses.replace(config, accumulation=n), CPU).memory.peak for n in counts]
    assert peaks[0] <= 0.9 * 2e9 - 0.5e9 < peaks[1]
    assert re.search(r"fix: --batch \d+ \(the largest that is planned to fit\)", message(0.95e9))
    assert "fix: a smaller --context" in message(0.6e9)
    assert "with 16 streams of 256 tokens" in (shared := message(8e9, Layout(gpus=4))) and "1.86 GiB are there" in shared


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "method"), [("ddp", "s-base"), ("fsdp", "sigma-moe"), ("experts over 2", "sigma-moe")])
def test_two_processes_send_what_is_planned(strategy: str, method: str, tmp_path: Path) -> None:
    """The collectives that a step calls, each at what a ring sends of it; with experts spread, loads are a little uneven."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    tool, out = Path(__file__).parents[2] / "tools" / "planned.py", tmp_path / "run.json"
    words = ["--worker", out, "--strategy", strategy, "--method", method, "--accumulation", "1"]
    subprocess.run([*launcher, tool, *words], check=True, capture_output=True)
    run = json.loads(out.read_text())
    within = 0.1 if strategy == "experts over 2" else 1e-4
    assert run["counted_sent"] == pytest.approx(run["planned_sent"], rel=within)
    assert run["measured_peak"] == pytest.approx(run["planned_peak"], rel=PEAK_WITHIN)
