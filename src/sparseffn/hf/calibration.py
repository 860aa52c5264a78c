"""Text for a conversion: token ids of a file, and the inputs that a model's blocks see on them, kept on the disk.

Neither needs memory that grows with the text: the file is read piece by piece, and the inputs lie in memory-mapped files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sparseffn.errors import UserError
from sparseffn.hf.swap import visit_inputs
from sparseffn.storage import digest_of, read, sync, write_json

# Lines that are tokenised together, pieces of a text's own, whatever the number of tokens that is asked for; and the characters
# after which a line goes on as another, so that a text without line ends is read in pieces too.
_LINES = 200
_LINE = 1 << 14
# Windows that the model is run on at a time.
WINDOWS_AT_ONCE = 4


def read_windows(path: Path, tokenizer: PreTrainedTokenizerBase, n_tokens: int, context: int) -> Tensor:
    """Token ids `[n, context]` of a text's first `n_tokens`, less what fills no window.

    Raises:
        UserError: there is no such file, it is no UTF-8, or it is too short.
    """
    windows = n_tokens // context
    if windows < 1:
        raise UserError(f"`tokens` must be at least one window of {context}; got {n_tokens}; fix: ask for more")
    wanted = windows * context
    found, n_found = torch.empty(wanted, dtype=torch.int64), 0
    try:
        with path.open(encoding="utf-8") as file:
            lines = iter(lambda: file.readline(_LINE), "")
            while n_found < wanted and (piece := "".join(islice(lines, _LINES))):
                ids = torch.tensor(tokenizer(piece, add_special_tokens=False)["input_ids"], dtype=torch.int64)
                found[n_found : n_found + len(ids)] = ids[: wanted - n_found]
                n_found += len(ids)
    except OSError as error:
        raise UserError(f"`{path}` must be a text file; got {error.strerror or error}; fix: check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"`{path}` must be UTF-8 text; got {error.reason}; fix: convert it, as with iconv") from None
    if n_found < wanted:
        raise UserError(
            f"`{path}` must have {wanted:,} tokens; got {n_found:,}; fix: a longer text, or fewer --tokens and --eval-tokens"
        )
    return found.view(windows, context)


def digest_of_ids(ids: Tensor) -> str:
    return digest_of(ids.contiguous().numpy().tobytes())


@final
@dataclass(frozen=True, kw_only=True)
class StoredInputs:
    """Inputs of every block over all windows, `[tokens, d_model]` each, in files that are mapped into memory."""

    folder: Path
    names: Sequence[str]
    d_model: int
    dtype: torch.dtype
    n_tokens: int

    def of(self, name: str) -> Tensor:
        """The inputs of a block; reading them brings in what is read."""
        path, shape = str(self._path(name)), (self.n_tokens, self.d_model)
        return torch.from_file(path, shared=True, size=math.prod(shape), dtype=self.dtype).view(shape)

    def _path(self, name: str) -> Path:
        return self.folder / f"{list(self.names).index(name):04d}.bin"

    def collect(self, model: nn.Module, windows: Tensor) -> None:
        """Run the model on the windows that are not done yet; where this breaks off, it goes on."""
        done_file = self.folder / "done.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        done = read(done_file, int, fix="remove the folder") if done_file.exists() else 0
        context = windows.shape[1]
        for start in range(done, len(windows), WINDOWS_AT_ONCE):
            batch = windows[start : start + WINDOWS_AT_ONCE]
            rows = slice(start * context, (start + len(batch)) * context)

            def keep(name: str, x_TD: Tensor, rows: slice = rows) -> None:
                self.of(name)[rows] = x_TD.to("cpu", self.dtype)

            visit_inputs(model, self.names, batch, keep)
            # What is said to be done must outlive a failure of the machine.
            for name in self.names:
                sync(self._path(name))
            write_json(done_file, start + len(batch))
