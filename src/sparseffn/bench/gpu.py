"""What is measured on a GPU, in parts of under eight minutes: `make gpu`, which is `python -m sparseffn bench gpu`.

Every part is a command in a process of its own, with a time limit, so that a lost device costs that part alone. It writes
OUT/PART.json, typed as `GpuPart`; a part that is done is not run again, and one that failed or met its limit goes on from its
folder in WORK. On a machine without network or installed metadata `PYTHONPATH=src` is enough, with `NEEDED` beside it.
How to use a machine that is lent for half an hour: results/gpu/README.md.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sparseffn.bench.candidates import Progress, no_progress
from sparseffn.errors import UserError, unknown_name
from sparseffn.results.bench_result import FORMAT, Environment, FiguresResult, LayerResult, StepResult
from sparseffn.results.comparison_result import ComparisonResult
from sparseffn.results.gpu_result import (
    CasesResult,
    ComparedMethod,
    ComparedResult,
    GpuContent,
    GpuPart,
    LaunchesResult,
    TilesResult,
)
from sparseffn.storage import read, read_json, rounded, write_bytes

ROOT = Path(__file__).parents[3]
"""Of the source tree: the Triton tests are not in the package."""
NEEDED = ("msgspec", "tyro", "docstring_parser", "typeguard", "filelock", "rich", "jinja2", "numpy", "safetensors")
"""Imported by every part beside PyTorch; scipy and transformers by some, pooch by none."""
WHEELS_FIX = "`make gpu-wheels` where there is a network, then `make gpu WHEELS=FOLDER`"
LIMIT_S = 470.0
"""Of each part: machines are lent for ten minutes a command."""
# Lines of a failed command's output that its file keeps.
_ERROR_LINES = 12

_PROBE = """
import sys, msgspec
from sparseffn.bench.machine import measured_on
from sparseffn.devices import find_device
sys.stdout.buffer.write(msgspec.json.encode(measured_on(find_device(sys.argv[1]))))
"""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and at which sizes a part is run."""

    device: str
    work: Path
    """The part's own folder."""
    rehearse: bool
    """Tiny sizes, to try the commands where there is no GPU."""

    @property
    def log(self) -> Path:
        """What the command prints; beside the folder, which belongs to the command."""
        return self.work.with_name(f"{self.work.name}.log")


@dataclass(frozen=True)
class Part:
    """A command, its sizes, and how its result is read."""

    name: str
    title: str
    collect: Callable[[Path, Environment], GpuContent]
    """The result in the part's folder, as far as it came."""
    command: str
    """After `python`; may name `{device}`, `{work}` and `{root}`, as may the sizes."""
    measure: str = ""
    rehearse: str = ""
    limit_s: float = LIMIT_S

    def words(self, place: Place) -> list[str]:
        text = f"{self.command} {self.rehearse if place.rehearse else self.measure}"
        return [word.format(device=place.device, work=place.work, root=ROOT) for word in text.split()]


def _reads(name: str, kind: type[GpuContent]) -> Callable[[Path, Environment], GpuContent]:
    return lambda work, environment: read(work / name, kind, fix="run the part again")


def _read_cases(work: Path, environment: Environment) -> CasesResult:
    found = read_json(work / "cases.json", fix="run the part again")
    return msgspec.convert({**found, "kind": "cases", "format": FORMAT, "environment": environment}, CasesResult)


def _read_comparison(work: Path, environment: Environment) -> ComparedResult:
    found = read(work / "comparison.json", ComparisonResult, fix="run the part again")
    methods = [
        ComparedMethod(
            label=method.label,
            params=method.total_params,
            valid=method.valid and method.valid.mean,
            test=method.test and method.test.mean,
            step_s=method.step_time_s,
            layer_forward_over_dense=method.layer_time_forward_vs_dense,
            layer_training_over_dense=method.layer_time_training_vs_dense,
        )
        for method in found.methods
    ]
    return ComparedResult(
        format=FORMAT,
        environment=environment,
        preset=found.preset or "",
        corpus=found.corpus["name"],
        metric=found.metric,
        seeds=tuple(found.seeds),
        steps=found.steps,
        tokens_per_step=found.tokens_per_step or 0,
        methods=tuple(methods),
    )


_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
_WHERE = "--device {device} --out {work}"

PARTS = {
    part.name: part
    for part in (
        Part(
            "triton-cases",
            "The cases of the Triton tests",
            _read_cases,
            "{root}/tests/ops/triton_backend/run_on_device.py {work}/cases.json --limit 440",
            measure="--workers 12",
            rehearse="--workers 1 --only experts-relu-one-float32-small",
        ),
        *(
            Part(
                f"layer-{short}",
                f"Layers in {dtype}",
                _reads("layer.json", LayerResult),
                f"-m sparseffn bench layer --methods sigma-moe --dtype {dtype} {_WHERE}",
                measure="--preset paper --tokens 64 1024 8192 32768",
                rehearse="--preset tiny --tokens 65 --rounds 1 --no-peers",
            )
            for short, dtype in _DTYPES.items()
        ),
        *(
            Part(
                f"step-{short}",
                f"Training steps in {dtype}",
                _reads("step.json", StepResult),
                f"-m sparseffn bench step --precision {dtype} {_WHERE}",
                measure="--preset wt-s --batch 16 --rounds 10",
                rehearse="--preset tiny --batch 1 --rounds 1 --vocab-size 100",
            )
            for short, dtype in _DTYPES.items()
        ),
        Part(
            "launches",
            "Host time against device time",
            _reads("launches.json", LaunchesResult),
            "-m sparseffn.bench.launches {work}/launches.json --device {device}",
            rehearse="--tokens 32 --shapes 32,4 --calls 1 --dtype float32",
        ),
        Part(
            "figures",
            "Figures 2 and 8 to 11 at 32,768 tokens, bfloat16",
            _reads("figures.json", FiguresResult),
            f"-m sparseffn bench figures --dtype bfloat16 {_WHERE}",
            measure="--figures 2 8 9 10 11 --tokens 32768 --time-limit 400s",
            rehearse="--figures 11 --tokens 2 --rounds 1 --time-limit 2.2s",
        ),
        *(
            Part(
                f"compare-{preset}",
                f"Dense against sigma-MoE, preset {preset}, 6 minutes",
                _read_comparison,
                f"-m sparseffn compare --methods dense sigma-moe {_WHERE}",
                measure=f"--preset {preset} --budget 6m",
                rehearse="--preset tiny --steps 2 --batch 2 --context 16 --corpus text --data-dir {root}/README.md",
            )
            for preset in ("small", "wt-s")
        ),
        Part(
            "tiles",
            "Tiles of the Triton kernels",
            _reads("tiles.json", TilesResult),
            "-m sparseffn.bench.kernel_tiles {work}/tiles.json --device {device}",
            rehearse="--shapes 32,16,4,2,20 --most 1 --dtype float32",
        ),
    )
}
"""In the order in which they are run, which is that of `GPU_PARTS`."""


def run_gpu(
    out: Path,
    *,
    parts: Sequence[str] = (),
    device: str = "cuda",
    work: Path = Path("runs/gpu"),
    rehearse: bool = False,
    progress: Progress = no_progress,
) -> list[GpuPart]:
    """Run what is not done yet of some parts, or of all.

    Args:
        out: where the parts' files go, `results/gpu`.
        parts: names from `PARTS`.
        device: `cuda` or `cuda:N`; `cpu` with `rehearse` alone.
        work: folder of the parts' own files, which a part goes on from.
        rehearse: tiny sizes, to try the commands on any machine.
        progress: receives a line for each part.

    Returns:
        The parts asked for, those that were done before included.

    Raises:
        UserError: an unknown part; a package or the device is not there; measuring without a GPU.
    """
    for name in parts:
        if name not in PARTS:
            raise unknown_name("part", name, PARTS)
    if not rehearse and not device.startswith("cuda"):
        raise UserError(f"`--device` must be a GPU to measure it; got {device!r}; fix: --device cuda, or --rehearse")
    found: list[GpuPart] = []
    environment = _probe(device)
    for name in parts or PARTS:
        part, path = PARTS[name], out / f"{name}.json"
        before = read(path, GpuPart, fix="remove it") if path.exists() else None
        if before is not None and before.state == "done" and before.rehearsal == rehearse:
            progress(f"{name}: done before; remove {path} to run it again")
            found.append(before)
            continue
        progress(f"{name}: {part.title}, at most {part.limit_s / 60:.0f} minutes")
        place = Place(device=device, work=work / name, rehearse=rehearse)
        done = run_part(part, place, environment)
        write_bytes(path, msgspec.json.encode(rounded(done)) + b"\n")
        progress(f"{name}: {done.state} after {done.seconds:.0f} s{'' if done.state == 'done' else f'; see {place.log}'}")
        found.append(read(path, GpuPart, fix="remove it"))
    return found


def went_well(part: GpuPart) -> bool:
    """Whether a part is done and none of the Triton tests' cases went wrong."""
    return part.state == "done" and not (isinstance(part.result, CasesResult) and part.result.wrong)


def run_part(part: Part, place: Place, environment: Environment) -> GpuPart:
    """Run a part's command within its limit, and collect what it left."""
    words = part.words(place)
    place.work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    code = _run([sys.executable, *words], place.log, part.limit_s, interpret=place.rehearse and place.device == "cpu")
    seconds = time.monotonic() - start
    error = "" if code == 0 else "\n".join(place.log.read_text(errors="replace").strip().splitlines()[-_ERROR_LINES:])
    result = None
    try:
        result = part.collect(place.work, environment)
    except UserError as absent:
        error = error or str(absent)
    return GpuPart(
        format=FORMAT,
        environment=environment,
        part=part.name,
        title=part.title,
        command=("python", *(_relative(word) for word in words)),
        seconds=round(seconds, 1),
        limit_s=part.limit_s,
        state="time limit" if code is None else "done" if code == 0 and result is not None else "failed",
        rehearsal=place.rehearse,
        error=error,
        result=result,
    )


def _relative(word: str) -> str:
    """A path inside the source tree from there: results name no machine's folders."""
    return Path(word).relative_to(ROOT).as_posix() if word.startswith(str(ROOT)) else word


def _run(command: Sequence[str], log: Path, limit_s: float, *, interpret: bool) -> int | None:
    """The exit code, None where the time limit came first and the process was killed with its children."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=_environment(interpret), start_new_session=True
        )
        try:
            return process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _environment(interpret: bool) -> Mapping[str, str]:
    """This process's, with the source tree first; on a CPU Triton interprets."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    return found | {"TRITON_INTERPRET": "1"} if interpret else found


def _probe(device: str) -> Environment:
    """Machine and versions, found by a process of its own so that this one holds no context of the device.

    Raises:
        UserError: a package or the device is not there.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"packages must be installed or on PYTHONPATH; got no {', '.join(missing)}; fix: {WHEELS_FIX}")
    words = [sys.executable, "-c", _PROBE, device]
    done = subprocess.run(words, capture_output=True, env=_environment(False), check=False)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise UserError("".join(last).partition("UserError: ")[2] or f"the device must answer; got {last}; fix: --device cuda")
    return msgspec.json.decode(done.stdout, type=Environment)
