"""The runs that are tortured: small ones of every method and kind of state, compared bit by bit with undisturbed ones."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from sparseffn.data import Corpus, load_corpus
from sparseffn.distribution import joined
from sparseffn.errors import Interrupted, UserError
from sparseffn.ffn import list_methods, method_class
from sparseffn.models import DecoderConfig, ModelConfig, TransformerXLConfig
from sparseffn.training import RunFolder, TrainConfig, train
from sparseffn.training.checkpoint import list_checkpoints, load_checkpoint
from sparseffn.training.layout import Layout, Strategy

TRACEBACK, HANG = 99, 98
"""Exit codes of a child that raised what no user should see, and of one that had to be ended."""

SONG = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer\n" for i in range(400))

KINDS: list[dict[str, Any]] = [
    {"precision": "bfloat16"},
    {"accumulation": 2},
    {"optimizer": "adamw", "weight_decay": 0.1},
    {"precision": "float16"},
    {},
]


@dataclass(frozen=True)
class Victim:
    """A run and its corpus."""

    name: str
    model: ModelConfig
    config: TrainConfig
    corpus: Corpus

    def train(self, out: Path, strategy: Strategy = "ddp") -> None:
        train(self.model, self.config, self.corpus, out, device="cpu", strategy=strategy)

    def strategies(self) -> list[Strategy]:
        """By which two processes can train it."""
        found: list[Strategy] = []
        for strategy in get_args(Strategy):
            with contextlib.suppress(UserError):
                Layout.of(2, strategy, "cpu").check(self.model, self.config)
                found.append(strategy)
        return found


@dataclass(frozen=True)
class Pair:
    """A run of two processes."""

    victim: Victim
    strategy: Strategy

    @property
    def name(self) -> str:
        return f"{self.victim.name}, two processes by {self.strategy}"

    def start(self, out: Path, log: Path) -> list[int]:
        """The numbers of two children that train together; the second one's output goes beside the log."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        logs = (log, log.with_suffix(".second"))
        return [in_child(lambda rank=rank: self._train(out, rank, port), path) for rank, path in enumerate(logs)]

    def train(self, out: Path) -> int:
        """Train in two children of this process; the exit code is that of one that failed, if one did."""
        codes = [wait(child) for child in self.start(out, out.with_suffix(".first"))]
        return next((code for code in codes if code), 0)

    def _train(self, out: Path, rank: int, port: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with joined("cpu"):
            self.victim.train(out, self.strategy)


def wait(child: int) -> int:
    """The exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def make_corpus(folder: Path) -> Corpus:
    """A song of 20 kB, by characters."""
    (folder / "song.txt").write_text(SONG)
    return load_corpus("text", data_dir=folder / "song.txt", cache_dir=folder / "cache", tokenizer="chars")


def make_victims(corpus: Corpus) -> list[Victim]:
    """One of every method, with dropout and memory; precision, micro-batches and optimiser change in turn."""
    victims = []
    for i, name in enumerate(list_methods()):
        example = method_class(name).examples()[0]
        sizes = {"d_model": 16, "n_layers": 2, "n_experts": 4, "dropout": 0.1, "expert_dropout": 0.1}
        ffn = dataclasses.replace(example, **{key: value for key, value in sizes.items() if hasattr(example, key)})
        kind = KINDS[i % len(KINDS)]
        model = TransformerXLConfig(
            vocab_size=corpus.tokenizer.vocab_size, d_model=16, n_layers=2, n_heads=2, d_head=8, dropout=0.1, ffn=ffn
        )
        config = TrainConfig(
            steps=14,
            batch=4,
            context=16,
            memory=16,
            eval_memory=16,
            lr=5e-3,
            warmup=2,
            eval_every=5,
            eval_tokens=200,
            checkpoint_every=2 + i % 3,
            seed=i,
            **kind,
        )
        victims.append(Victim(f"{name} {kind or 'float32'}", model, config, corpus))
    ffn = victims[0].model.ffn
    decoder = DecoderConfig(
        vocab_size=corpus.tokenizer.vocab_size, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_head=8, ffn=ffn
    )
    config = dataclasses.replace(victims[0].config, memory=0, eval_memory=0)
    return [*victims, Victim("decoder", decoder, config, corpus)]


def in_child(work: Callable[[], object], log: Path) -> int:
    """Do something in a child of this process, whose output goes to `log`; returns the child's number."""
    child = os.fork()
    if child:
        return child
    code = TRACEBACK
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = int(work() or 0)  # pyright: ignore[reportArgumentType]
    except Interrupted as error:
        code = error.exit_code
    except UserError as error:
        sys.stdout.write(f"refused: {error}\n")
        code = 2
    except BaseException:
        # Nothing leaves a forked child but its log and its exit code, which says that this was no error of ours.
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def everything(out: Path) -> dict[str, object]:
    """Every tensor of the last checkpoint, every line of the metrics and the final numbers, but for what a clock says."""
    folder = RunFolder(out)
    checkpoint = load_checkpoint(list_checkpoints(folder.checkpoints)[-1], run=folder.digest())
    lines = [json.loads(line) for line in folder.metrics_path.read_text().splitlines()]
    result = json.loads(folder.result_path.read_text())
    tensors = {name: tensor.view(torch.uint8) if tensor.ndim else tensor for name, tensor in checkpoint.tensors.items()}
    return {
        "tensors": {name: tensor.numpy().tobytes() for name, tensor in tensors.items()},
        "scaler": dict(checkpoint.scaler),
        "metrics": [{key: value for key, value in line.items() if key != "time_s"} for line in lines],
        "result": {key: result[key] for key in ("steps", "valid", "test", "notes")},
        "routing": {path.name: path.read_bytes() for path in sorted((out / "routing").glob("*"))},
    }
