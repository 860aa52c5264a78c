"""Same seed, config and machine: same bits, for every method and CPU backend. Threads and backends: to rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trained_twice import SETTINGS, config_of, run_of_three_steps

from sparseffn.ffn import list_methods
from sparseffn.ops import list_backends

BACKENDS = [b.name for b in list_backends() if b.automatic and b.unavailable(torch.device("cpu"), torch.float32) is None]
ROUNDING = 1e-5
"""Relative, of the losses of three steps in float32; docs/determinism.md states it."""


def test_there_is_more_than_one_backend() -> None:
    """Where there is a compiler; otherwise the test below would say little."""
    assert "torch" in BACKENDS and len(BACKENDS) > 1


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", list_methods())
def test_same_seed_gives_same_bits(method: str, backend: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, parameters, moments and memories after three steps with every dropout; another seed gives others."""
    monkeypatch.setenv("SPARSEFFN_BACKEND", backend)
    once, again = (run_of_three_steps(method, precision=precision, seed=3) for _ in range(2))
    assert once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once)
    other = run_of_three_steps(method, precision=precision, seed=4)
    assert not torch.equal(once["losses"], other["losses"])


@pytest.mark.parametrize("method", list_methods())
def test_every_dropout_is_on(method: str) -> None:
    """Each option of a method that draws random numbers, and the model's own."""
    model = config_of(method)
    rates = [name for name in ("dropout", "expert_dropout") if hasattr(model.ffn, name)]
    assert model.dropout > 0 and all(getattr(model.ffn, name) > 0 for name in rates)
    assert SETTINGS.accumulation == 2 and SETTINGS.memory > 0


def test_threads_and_backends_change_no_more_than_rounding() -> None:
    """One thread against two, compiled kernels against PyTorch's, in a process of its own, whose BLAS remembers threads."""
    script = Path(__file__).with_name("trained_twice.py")
    # Threads that wait must not spin: other tests have the cores.
    passive = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, env=passive)
    differences = json.loads(done.stdout)
    assert differences.keys() == {"threads", "backend"} and all(d["losses"] <= ROUNDING for d in differences.values())
    # Sums in another order do differ, if not always in a loss: the test compares two things.
    assert differences["backend"]["tensors"] > 0
