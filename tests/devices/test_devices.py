"""Names of devices, precisions and generator states."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from sparseffn import devices
from sparseffn.errors import UserError

CPU = torch.device("cpu")
STATE = torch.zeros(16, dtype=torch.uint8)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if PyTorch saw two."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("name", "device"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")])
def test_names_on_a_machine_with_gpus(name: str, device: str) -> None:
    """`auto` takes the current GPU; a number is always part of the answer."""
    assert devices.find_device(name) == torch.device(device)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    """With the number that there are."""
    with pytest.raises(UserError, match="got 'cuda:2', but only 2 GPUs are visible; fix: --device auto"):
        devices.find_device("cuda:2")


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_without_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is the CPU, and asking for a GPU is an error, never a silent CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.find_device("auto") == CPU
    with pytest.raises(UserError, match="no GPU is visible"):
        devices.find_device(name)


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cpu:1", "meta"])
def test_other_names_are_refused(name: str) -> None:
    """With the ones that there are."""
    with pytest.raises(UserError, match="must be auto, cpu, cuda or cuda:N"):
        devices.find_device(name)


@pytest.mark.parametrize("precision", devices.PRECISIONS)
def test_autocast_computes_in_the_precision(precision: str) -> None:
    """In float32 without autocast; any other name is refused."""
    with devices.autocast(precision, CPU):
        assert str(torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype) == f"torch.{precision}"
    with pytest.raises(UserError, match="float32, bfloat16, float16; got 'float8'"):
        devices.autocast("float8", CPU)


def test_generators_go_on_where_their_state_was_taken() -> None:
    """The same numbers again."""
    states = devices.generator_states(CPU)
    first = torch.rand(3)
    devices.restore_generators(states, CPU, seed=0)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize(("kept", "called"), [(True, ("set", STATE)), (False, ("seed", 7))], ids=["same", "new"])
def test_a_gpu_without_a_state_starts_from_a_seed(
    kept: bool, called: tuple[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where the checkpoint has none of it."""
    calls: list[tuple[str, object]] = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: calls.append(("set", state)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: calls.append(("seed", seed)))
    states = {"cpu": torch.get_rng_state()} | ({"cuda": STATE} if kept else {})
    devices.restore_generators(states, torch.device("cuda", 0), seed=7)
    ((name, value),) = calls
    assert name == called[0] and value is called[1]
