"""Training: one readable loop, checkpoints without pickle, metrics as JSON lines."""

from sparseffn.train.config import TrainConfig
from sparseffn.train.folder import RunFolder
from sparseffn.train.loop import NonFiniteLossError, TrainResult, load_run_model, train

__all__ = ["NonFiniteLossError", "RunFolder", "TrainConfig", "TrainResult", "load_run_model", "train"]
