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
