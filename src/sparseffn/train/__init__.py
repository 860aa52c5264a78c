"""Training: one readable loop, checkpoints without pickle, metrics as JSON lines."""

from sparseffn.train.config import TrainConfig
from sparseffn.train.folder import RunFolder
from sparseffn.train.loop import NonFiniteLossError, TrainResult, train
from sparseffn.train.restore import RunSettings, load_run_model

__all__ = ["NonFiniteLossError", "RunFolder", "RunSettings", "TrainConfig", "TrainResult", "load_run_model", "train"]
