"""Training: one readable loop, checkpoints without pickle, metrics as JSON lines."""

from sparseffn.errors import Interrupted
from sparseffn.training.config import TrainConfig, from_preset
from sparseffn.training.layout import Layout
from sparseffn.training.loop import NonFiniteLossError, train
from sparseffn.training.planner import Plan, largest_batch, plan
from sparseffn.training.restore import RunSettings, load_run_corpus, load_run_model, load_run_tokenizer
from sparseffn.training.result import TrainResult
from sparseffn.training.run_folder import RunFolder

__all__ = [
    "Interrupted",
    "Layout",
    "NonFiniteLossError",
    "Plan",
    "RunFolder",
    "RunSettings",
    "TrainConfig",
    "TrainResult",
    "from_preset",
    "largest_batch",
    "load_run_corpus",
    "load_run_model",
    "load_run_tokenizer",
    "plan",
    "train",
]
