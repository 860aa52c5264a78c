"""What a process calls first decides nothing: a compiler finds our kernels, not the composition they take the place of."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

COMPILED = """
import torch
from torch._dynamo.backends.common import aot_autograd
from functorch.compile import make_boxed_func
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
def show(graph, inputs):
    print(*(node.target for node in graph.graph.nodes if node.op == "call_function"))
    return make_boxed_func(graph)
layer = SigmaMoEConfig(d_model=16, n_experts=4, expert_size=8, k=2).build()
run = torch.compile(layer, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=show, bw_compiler=show))
run(torch.randn(3, 16)).sum().backward()
"""
EXPORTED = """
import torch
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
layer = SigmaMoEConfig(d_model=16, n_experts=4, expert_size=8, k=2).build().eval()
print(torch.export.export(layer, (torch.randn(3, 16),)).graph_module.code)
"""


TOGETHER = """
import threading
import torch
from sparseffn import ops
x, keys, values = (torch.randn(*size).requires_grad_() for size in ((5, 8), (4, 8, 6), (4, 6, 8)))
indices, gates, found = torch.randint(4, (5, 2)), torch.rand(5, 2), []
start = threading.Barrier(8)
def call():
    start.wait()
    y = ops.experts(x, keys, values, gates, indices)
    found.append([y, *torch.autograd.grad(y.sum(), (x, keys, values))])
threads = [threading.Thread(target=call) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(found) == 8
for tensors in zip(*found): assert all(torch.equal(tensors[0], t) for t in tensors)
"""


def test_threads_that_call_first_load_the_library_once() -> None:
    """All get the same numbers and gradients, and PyTorch has no kernel that takes another's place."""
    done = subprocess.run([sys.executable, "-c", TOGETHER], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Overriding" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("program", "operations"),
    [
        (COMPILED, ["route_kept", "experts_kept", "experts_backward", "route_backward"]),
        (EXPORTED, ["route.default", "experts.default"]),
    ],
    ids=["compile", "export"],
)
def test_the_first_graph_of_a_process_calls_our_kernels(program: str, operations: list[str]) -> None:
    """Traced before any eager call, when the library is not loaded yet."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for operation in operations:
        assert f"sparseffn.{operation}" in done.stdout, done.stdout
    assert "aten.sort" not in done.stdout, "the composition was inlined"
    called = set(re.findall(r"ops\.(\w+)\.\w+", done.stdout)) | set(re.findall(r"\b(\w+)\.\w+\.default", done.stdout))
    assert called <= {"aten", "sparseffn", "ops"}, f"something else than operations on tensors is in the graph: {called}"
