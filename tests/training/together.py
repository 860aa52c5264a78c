"""A script that several processes run: `together.py JOBS DATA CACHE`; each job of the JSON file is a run to be trained."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparseffn.data import Corpus, load_corpus
from sparseffn.distribution import LostProcessError, joined
from sparseffn.errors import Interrupted, UserError
from sparseffn.models import model_config_from_json
from sparseffn.storage import read_json
from sparseffn.training import TrainConfig, train
from sparseffn.training.journal import StepReport

jobs, data, cache = sys.argv[1:]


def fault(kind: str, step: int) -> None:
    """What befalls this process after a step."""
    if kind == f"killed {step}":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == f"fails {step}":
        raise ZeroDivisionError("a fault of this process alone")
    if kind == f"terminated {step}":
        os.kill(os.getpid(), signal.SIGTERM)


class Stop(Exception):
    """What a caller's own function raises."""


def stop_at(step: int) -> Callable[[StepReport], None]:
    """A function to be called after steps, which ends the run."""

    def on_step(report: StepReport) -> None:
        if report.step == step:
            raise Stop("enough")

    return on_step


def raise_in_streams(corpus: Corpus) -> None:
    """A corpus that this process cannot read."""

    def refuse(**_: Any) -> Any:
        raise UserError("the text must be there; got none; fix: bring it")

    object.__setattr__(corpus, "training_streams", refuse)


def run(job: dict[str, Any], rank: int) -> None:
    """Train; what one process alone is to suffer is named by its rank."""
    torch.set_default_dtype(getattr(torch, job.get("dtype", "float32")))
    config = TrainConfig.from_json({**job["train"], **job.get("only", {}).get(str(rank), {})})
    befalls = job.get("faults", {}).get(str(rank), "")
    corpus = load_corpus("text", data_dir=data, cache_dir=cache)
    if befalls.startswith("reads"):
        raise_in_streams(corpus)
    elif befalls and not befalls.startswith("callback"):
        window, taken = corpus.training_streams, 0

        def counted(**settings: Any) -> Any:
            streams = window(**settings)
            read = streams.window

            def next_window(*args: Any) -> Any:
                nonlocal taken
                fault(befalls, taken)
                taken += 1
                return read(*args)

            streams.window = next_window
            return streams

        object.__setattr__(corpus, "training_streams", counted)
    on_step = stop_at(int(befalls.split()[1])) if befalls.startswith("callback") else None
    strategy = job.get("strategy", "ddp")
    train(model_config_from_json(job["model"]), config, corpus, job["out"], strategy=strategy, on_step=on_step)


torch.set_num_threads(1)
code = 0
with joined("cpu") as world:
    for job in read_json(Path(jobs)):
        try:
            run(job, world.rank)
        except UserError as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            code = 2
            if isinstance(error, LostProcessError):
                break
        except Stop as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            code = 3
        except Interrupted as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            code = error.exit_code
            break
# A process that lost others has nothing left to take leave of.
sys.stderr.flush()
os._exit(code)
