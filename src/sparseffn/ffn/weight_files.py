"""Files of weights that others wrote, read without running anything that is in them.

A `.pth` is a pickle, which can name any function to be called. PyTorch's `weights_only` reader makes tensors and plain values
alone and refuses the rest; nothing is allowed beyond that but the dictionary class of the authors of arXiv 2310.10837, in whose
place an ordinary one is made.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sparseffn.errors import UserError

# Classes of foreign code by name, and what is made instead of them.
_STAND_INS: list[Any] = [(OrderedDict, "framework.data_structures.dotdict.DotDict")]


def read_weights(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """What a `.safetensors` file, a file of `torch.save`, or a dictionary holds; tensors are on the CPU.

    Raises:
        UserError: there is no such file, it is damaged, it holds no dictionary, or it holds more than tensors and plain values.
    """
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    if not path.is_file():
        raise UserError(
            f"`{path}` must be a file of weights; got {'a folder' if path.is_dir() else 'nothing'}; fix: check the path"
        )
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(found, Mapping):
        raise UserError(f"`{path}` must hold a dictionary of tensors; got {type(found).__name__}; fix: save a state_dict()")
    return found


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise UserError(f"`{path}` must be a safetensors file; got a damaged one ({error}); fix: get it again") from None


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise UserError(f"`{path}` must be a file of torch.save; got a damaged or another one; fix: get it again") from None
        raise UserError(
            f"`{path}` must hold tensors and plain values alone; got a file that calls for {named[1]}, which was not run; fix: "
            "if you trust it, save its weights anew where it was made: "
            f"torch.save({{'model': torch.load('{path.name}', weights_only=False)['model']}}, 'weights.pth')"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"`{path}` must be a file of torch.save; got a damaged or another one ({error}); fix: get it again"
        ) from None
