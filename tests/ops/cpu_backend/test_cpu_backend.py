"""How the compiled backend lives: building, choosing, compiling models, determinism, processes, bad input."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparseffn import ops
from sparseffn.errors import UserError
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.ops.cpu import build

needs_compiler = pytest.mark.skipif(build.unavailable() is not None, reason="no compiled kernels here")
CONFIG = SigmaMoEConfig(d_model=32, n_experts=6, expert_size=16, k=2)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done


def test_import_compiles_nothing() -> None:
    """Nothing is built or imported for it before an operation runs."""
    code = "import sparseffn.ffn; from sparseffn.ops.cpu import build; print(build.library.cache_info().currsize)"
    assert python(code).stdout == "0\n"
    used = code.replace("print", "import torch; from sparseffn import ops; ops.topk(torch.ones(1, 2), 1); print")
    if build.unavailable() is None:
        assert python(used).stdout == "1\n"


@needs_compiler
def test_library_is_compiled_once_by_whoever_comes_first(tmp_path: Path) -> None:
    """Two processes at once: one says so in one line, both use it, nothing else is left; the third waits for nothing."""
    (tmp_path / "csrc").mkdir()
    # Large enough for the second to come while the first compiles.
    (tmp_path / "csrc" / "some.cpp").write_text('#include <algorithm>\n#include <regex>\nstd::regex made("a*");\n')
    folder, sources = (f"pathlib.Path({str(tmp_path / name)!r})" for name in ("out", "csrc"))
    code = "import pathlib; from sparseffn.ops.cpu import build; "
    code += f"print(build.compile_library({folder}, sources={sources}))"
    running = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert sum(text.count("compiled the CPU kernels") for text in said) == 1
    out = tmp_path / "out"
    assert len(list(out.glob("*.so"))) == 1 and not list(out.glob(".*"))
    assert python(code).stderr == ""


def test_refused_compilation_leaves_nothing(tmp_path: Path) -> None:
    """The compiler's first error is reported, and no half-made library stays."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "broken.cpp").write_text("int f() { return nonsense; }\n")
    with pytest.raises(build.CompilerError, match="nonsense"):
        build.compile_library(tmp_path / "out", sources=tmp_path / "csrc")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".lock"}


def test_without_a_compiler_pytorch_serves(tmp_path: Path) -> None:
    """Logged once, visible in `sparseffn doctor`, refused where it is asked for by name."""
    code = (
        "import torch; from sparseffn import ops; from sparseffn.ffn.sigma_moe import SigmaMoEConfig\n"
        "layer = SigmaMoEConfig(d_model=8, n_experts=4, expert_size=4, k=2).build()\n"
        "layer(torch.randn(3, 8)); layer(torch.randn(3, 8)); print(ops.explain_backend(torch.device('cpu')))"
    )
    missing = {"CXX": "no-such-compiler", "SPARSEFFN_CACHE": str(tmp_path)}
    done = python(code, **missing)
    assert "torch" in done.stdout and "not cpu: no C++ compiler found" in done.stdout
    assert done.stderr.count("no compiled CPU kernels") == 1
    told = subprocess.run(
        [sys.executable, "-m", "sparseffn", "doctor"], capture_output=True, text=True, env={**os.environ, **missing}
    )
    assert "no C++ compiler found" in told.stdout
    forced = "import torch; from sparseffn import ops; ops.topk(torch.ones(2), 1, backend='cpu')"
    with pytest.raises(AssertionError, match="backend 'cpu' cannot run on cpu: no C\\+\\+ compiler found"):
        python(forced, **missing)


@needs_compiler
def test_backend_is_forced_or_raises(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """By the environment: what it cannot run raises, what it does not have is left to others and logged."""
    monkeypatch.setenv("SPARSEFFN_BACKEND", "grouped_mm")
    with pytest.raises(
        UserError, match=r"backend 'grouped_mm' cannot run on cpu: (it computes in|torch.nn.functional.grouped_mm came)"
    ):
        CONFIG.build().double()(torch.randn(2, 32).double())
    with caplog.at_level(logging.WARNING):
        ops.sinkhorn(torch.randn(4, 3))
        ops.sinkhorn(torch.randn(4, 3))
    assert sum("has no sinkhorn" in record.message for record in caplog.records) == 1
    with pytest.raises(UserError, match="backend 'grouped_mm' has no 'sinkhorn'"):
        ops.sinkhorn(torch.randn(4, 3), backend="grouped_mm")


@needs_compiler
@pytest.mark.parametrize("inner_k", [None, 5], ids=["all-units", "inner-top-k"])
def test_layer_compiles_once_for_all_token_counts(inner_k: int | None) -> None:
    """fullgraph, dynamic; forward and backward equal the eager layer's."""
    torch._dynamo.reset()
    layer = CONFIG.replace(inner_k=inner_k).build()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    counter = torch._dynamo.utils.counters["stats"]
    counter.clear()
    for n_tokens in (2, 7, 64, 300):
        x = torch.randn(n_tokens, 32)
        grads = []
        for function in (layer, compiled):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            y.square().sum().backward()
            grads.append((y.detach(), leaf.grad))
        for got, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(got, wanted)
    assert counter["unique_graphs"] == 1


@needs_compiler
@pytest.mark.parametrize("drop", [0.0, 0.1], ids=["whole", "dropout"])
@pytest.mark.parametrize("n_tokens", [3, 100, 200], ids=["few", "some", "many"])
def test_results_are_the_same_from_run_to_run(n_tokens: int, drop: float) -> None:
    """Output and gradients, bit by bit, in deterministic mode."""
    layer, x = CONFIG.replace(expert_dropout=2 * drop, dropout=drop).build(), torch.randn(n_tokens, 32)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(3):
            torch.manual_seed(1)
            leaf = x.clone().requires_grad_()
            layer.zero_grad()
            y = layer(leaf)
            y.sin().sum().backward()
            runs.append([y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def in_large_pages(tensor: torch.Tensor) -> bool:
    """Whether the system was asked for large pages for the middle of a tensor's memory."""
    middle, here = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            begin, end = (int(edge, 16) for edge in first.split("-"))
            here = begin <= middle < end
        elif here and first == "VmFlags:":
            return "hg" in rest
    raise AssertionError("no mapping holds the tensor")


@needs_compiler
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without large pages on request")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_large_gradients_lie_in_large_pages(dtype: torch.dtype) -> None:
    """That of one tensor, and that of two halves of one."""
    x, gates = torch.randn(8, 64).to(dtype), torch.rand(8, 2)
    both, values = (torch.randn(32, n, 64).to(dtype).requires_grad_() for n in (4096, 2048))
    keys, gate_keys = (half.transpose(1, 2) for half in ops.halves(both, dim=1))
    indices = torch.rand(8, 32).topk(2).indices
    ops.experts(x, keys, values, gates, indices, gate_keys=gate_keys, activation="silu", backend="cpu").sum().backward()
    assert both.grad is not None and in_large_pages(both.grad)
    assert values.grad is not None and in_large_pages(values.grad)


@needs_compiler
def test_autocast_computes_in_bfloat16() -> None:
    """As `nn.Linear`; the router stays in float32."""
    layer, x = CONFIG.build(), torch.randn(40, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, stats = layer(x, return_stats=True)
    assert y.dtype == torch.bfloat16 and stats.weights.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), atol=0.05, rtol=0.05)


WORKER = """
import multiprocessing, os, sys, torch
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
torch.manual_seed(0)
layer, x = SigmaMoEConfig(d_model=32, n_experts=6, expert_size=16, k=2).build(), torch.randn(300, 32)

def work(queue, what):
    if what == "mm":
        torch.randn(600, 600) @ torch.randn(600, 600)
    else:
        layer(x).sum().backward()
    queue.put(what)

def finishes(what):
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.Queue()
    process = context.Process(target=work, args=(queue, what), daemon=True)
    process.start()
    # A spawned one imports torch; a forked one that hangs does so at once.
    process.join(60 if sys.argv[1] == "spawn" else 10)
    alive = process.is_alive()
    process.kill()
    return not alive and process.exitcode == 0

if __name__ == "__main__":
    layer(x).sum().backward()
    torch.randn(600, 600) @ torch.randn(600, 600)
    print(finishes("mm"), finishes("experts"))
"""


@needs_compiler
@pytest.mark.parametrize("how", ["spawn", "fork"])
def test_layer_runs_in_worker_processes(how: str, tmp_path: Path) -> None:
    """In a spawned one always; in a forked one wherever PyTorch's own product runs there."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = subprocess.run([sys.executable, str(script), how], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    product, experts = done.stdout.split()
    assert experts == product
    assert how == "fork" or experts == "True"


X, W = torch.ones(3, 4), torch.ones(2, 4, 5)
GATES, INDICES = torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda b: ops.experts(X, W, W, GATES, INDICES, backend=b), r"must be \[T, D\], \[E, D, G\] and \[E, G, D\]"),
        (lambda b: ops.experts(X.double(), W, W.mT, GATES, INDICES, backend=b), "must share a floating dtype"),
        (lambda b: ops.experts(X, W, W.mT, GATES.double(), INDICES, backend=b), "`gates` must be torch.float32"),
        (lambda b: ops.experts(X, W, W.mT, GATES, INDICES + 2, backend=b), "between 0 and 1, an expert each"),
        (lambda b: ops.experts(X, W, W.mT, GATES, INDICES - 1, backend=b), "between 0 and 1, an expert each"),
        (lambda b: ops.experts(X, W, W.mT, GATES[:, :0], INDICES[:, :0], backend=b), "K >= 1"),
        (lambda b: ops.experts(X, W, W.mT, GATES, INDICES, activation="rleu", backend=b), "did you mean 'relu'"),
        (lambda b: ops.experts(X, W, W.mT, GATES, INDICES, inner_k=6, backend=b), "between 1 and K G = 5; got 6"),
        (lambda b: ops.experts(X.to("meta"), W, W.mT, GATES, INDICES, backend=b), "on one device; got cpu and meta"),
        (lambda b: ops.weighted_rows(X, INDICES + 3, GATES, backend=b), "between 0 and 2, a row of `values` each"),
        (lambda b: ops.router_logits(X, X[:, :2], backend=b), r"must be \[T, D\] and \[E, D\]"),
        (lambda b: ops.route(X, X[:2], k=3, gate="sigmoid", backend=b), "number of experts 2; got 3"),
    ],
    ids=[
        "ranks",
        "dtypes",
        "gates-dtype",
        "index-high",
        "index-low",
        "k-zero",
        "activation",
        "inner",
        "devices",
        "rows",
        "widths",
        "routed-k",
    ],
)
def test_bad_input_is_refused(call: Callable[[str], object], words: str, backend: str) -> None:
    """A clear error, the same from every backend, never a crash."""
    with pytest.raises(UserError, match=words):
        call(backend)


@pytest.mark.parametrize("trained", ["router.selector", "experts.keys", "experts.values"])
def test_evaluation_gives_a_gradient_to_the_only_trained_tensor(trained: str) -> None:
    """Whichever it is: the others are frozen."""
    layer = CONFIG.build().eval()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == trained)
    layer(torch.randn(5, 32)).sum().backward()
    grad = layer.get_parameter(trained).grad
    assert grad is not None and bool(grad.any())


@needs_compiler
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_of_either_sign_is_chosen_first(sign: float, backend: str) -> None:
    """A diverged expert must not be passed over in silence."""
    nan = torch.tensor(torch.nan).copysign(torch.tensor(sign))
    for n, k in ((6, 2), (60, 30)):
        scores = torch.randn(2, n)
        scores[:, 3] = nan
        assert ops.topk(scores, k, backend=backend)[:, 0].tolist() == [3, 3]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ops.weighted_rows(X, INDICES.int(), GATES), "`indices` int64"),
        (lambda: ops.weighted_rows(X[0], INDICES, GATES), r"`values` must be \[rows, width\]"),
        (lambda: ops.weighted_rows(X.to("meta"), INDICES, GATES), "on one device; got cpu and meta"),
        (lambda: ops.router_logits(X, X.to("meta")), "on one device; got cpu and meta"),
        (lambda: ops.product_key_topk(X, X.to("meta"), 2), "on one device; got cpu and meta"),
    ],
    ids=["int32", "rank", "rows-device", "router-device", "keys-device"],
)
def test_operations_refuse_what_an_address_cannot_tell(call: Callable[[], object], words: str) -> None:
    """Before a kernel reads memory as what it is not."""
    with pytest.raises(UserError, match=words):
        call()


SERVES = """
import os, torch
from sparseffn import ops
from sparseffn.ops.cpu import build
x, weights = torch.ones(3, 4), torch.ones(2, 4, 5)
for _ in range(2):
    y = ops.experts(x, weights, weights.mT.contiguous(), torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64))
assert torch.equal(y, torch.full((3, 4), 20.0))
print(build.unavailable() is None)
"""


# What Python does for a user without an account and without HOME, as in a container.
HOMELESS = """
import os, pathlib
for name in ("SPARSEFFN_CACHE", "XDG_CACHE_HOME", "HOME"):
    os.environ.pop(name, None)
def expanduser(self):
    raise RuntimeError("Could not determine home directory.")
pathlib.Path.expanduser = expanduser
"""


@needs_compiler
def test_without_a_home_folder_pytorch_serves() -> None:
    """Logged once, with the reason; `doctor` says it too."""
    done = python(HOMELESS + SERVES)
    assert done.stdout == "False\n" and done.stderr.count("no compiled CPU kernels") == 1
    assert "must begin with a home folder that exists" in done.stderr
    told = python(HOMELESS + "from sparseffn.cli import main; raise SystemExit(main(['doctor', '--json']))")
    assert '"cache": "none: a path must begin with a home folder' in told.stdout


@needs_compiler
def test_with_an_unwritable_cache_pytorch_serves(tmp_path: Path) -> None:
    """Logged once, with the folder and a remedy; here a folder inside a file, which root cannot write to either."""
    (tmp_path / "file").touch()
    done = python(SERVES, SPARSEFFN_CACHE=str(tmp_path / "file" / "cache"))
    assert done.stdout == "False\n" and done.stderr.count("no compiled CPU kernels") == 1
    assert f"cannot write '{tmp_path / 'file'}" in done.stderr and "set SPARSEFFN_CACHE" in done.stderr


@needs_compiler
@pytest.mark.parametrize("left", [0, 4096, 0.5, 0.99], ids=["nothing", "page", "half", "most"])
def test_library_that_lost_its_end_is_compiled_again(left: float, tmp_path: Path) -> None:
    """Loaded, one that was cut in the middle would end the process by SIGBUS."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    path = build.compile_library(tmp_path, sources=tmp_path / "csrc")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left if left > 1 else left * len(whole))])
    assert build.compile_library(tmp_path, sources=tmp_path / "csrc") == path
    assert path.read_bytes() == whole
    # What is whole stays.
    before = path.stat().st_mtime_ns
    build.compile_library(tmp_path, sources=tmp_path / "csrc")
    assert path.stat().st_mtime_ns == before


@needs_compiler
def test_a_library_that_does_not_load_leaves_pytorch_to_serve(tmp_path: Path) -> None:
    """Whole, but with a function that nothing has: logged once with the loader's reason; Triton is then refused with it too."""
    code = (
        "import pathlib\nfrom sparseffn.ops.cpu import build\n"
        f"build.compile_library = lambda folder: pathlib.Path({str(tmp_path / 'lib.so')!r})\n{SERVES}"
        "from sparseffn.ops.backends import list_backends\n"
        "backend = {b.name: b for b in list_backends()}.get('triton')\n"
        "print(backend.unavailable(torch.device('cuda'), torch.float32) if backend else 'no triton')\n"
    )
    (tmp_path / "lib.cpp").write_text("void nowhere(); struct Now { Now() { nowhere(); } } now;\n")
    compiler = build.find_compiler()
    subprocess.run([*compiler, "-shared", "-fPIC", str(tmp_path / "lib.cpp"), "-o", str(tmp_path / "lib.so")], check=True)
    done = python(code)
    assert done.stdout.startswith("False\n") and done.stderr.count("no compiled CPU kernels") == 1
    assert "undefined symbol" in done.stderr
    assert "no triton" in done.stdout or "undefined symbol" in done.stdout


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_elements_beyond_two_to_the_31_are_found(dtype: torch.dtype) -> None:
    """Only pages that a token reads are real: the rest of the 4 GiB a tensor is memory that nobody touches."""
    n_experts, width, size = 2**15 + 8, 256, 256
    keys, values = (torch.empty(n_experts, *s, dtype=dtype) for s in ((width, size), (size, width)))
    assert keys.numel() > 2**31
    read = torch.tensor([0, n_experts // 2, n_experts - 1])
    few_keys, few_values = torch.randn(3, width, size).to(dtype) / 16, torch.randn(3, size, width).to(dtype) / 16
    keys[read], values[read] = few_keys, few_values
    x, which, gates = torch.randn(70, width).to(dtype), torch.randint(3, (70, 1)), torch.rand(70, 1)
    torch.testing.assert_close(
        ops.experts(x, keys, values, gates, read[which]), ops.experts(x, few_keys, few_values, gates, which), atol=0, rtol=0
    )
    rows = values.view(-1, width)
    torch.testing.assert_close(
        ops.weighted_rows(rows, read[which] * size + 7, gates), few_values[which[:, 0], 7] * gates, atol=1e-2, rtol=1e-2,
        check_dtype=False,
    )  # fmt: skip


@pytest.mark.slow
@needs_compiler
def test_memory_that_is_not_there_is_an_error() -> None:
    """In a process of its own, which a C++ exception in a thread would end; see `scarce_memory.py`."""
    command = [sys.executable, str(Path(__file__).with_name("scarce_memory.py"))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-2000:]


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of a process's memory")
def test_no_weight_is_copied() -> None:
    """In no layout, for few tokens and for many; gradients of interleaved columns alone are joined by a copy."""
    command = [sys.executable, str(Path(__file__).with_name("growth_of_calls.py"))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 24
    for line in lines:
        layout, name, growth = line.split()[1], line.split()[3], float(line.split()[-1])
        joined = 2 / 3 if layout == "interleaved" and name == "training:" else 0
        # In bfloat16, of 100 MB.
        assert growth < joined + (0.05 if name == "forward:" else 0.1), line


@needs_compiler
def test_backend_asked_for_first_in_inference_mode_has_autocast() -> None:
    """The compiled library, which casts, is loaded before the first call."""
    code = (
        "import torch; from sparseffn import ops\n"
        "x, keys, values = torch.randn(4, 6), torch.randn(3, 6, 5), torch.randn(3, 5, 6)\n"
        "with torch.inference_mode(), torch.autocast('cpu'):\n"
        "    y = ops.experts(x, keys, values, torch.rand(4, 1), torch.zeros(4, 1).long())\n"
        "assert y.dtype == torch.bfloat16, y.dtype\n"
    )
    python(code, SPARSEFFN_BACKEND="cpu")
