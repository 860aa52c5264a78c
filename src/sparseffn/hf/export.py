"""From a run folder of `sparseffn train` to a folder that `AutoModelForCausalLM` loads.

DIR/model.safetensors, config.json, generation_config.json     the last checkpoint's weights, the sizes
DIR/tokenizer.json, tokenizer_config.json                      the run's tokeniser, for transformers alone
DIR/README.md                                                  the model card
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sparseffn import __version__
from sparseffn.errors import UserError
from sparseffn.hf.fast_tokenizers import fast_tokenizer
from sparseffn.hf.model_card import CARD
from sparseffn.hf.run_card import made_by, run_card
from sparseffn.hf.sparse_model import SparseFFNForCausalLM
from sparseffn.hf.xl_model import TransformerXLForCausalLM
from sparseffn.models import Decoder
from sparseffn.storage import write_folder, write_text
from sparseffn.training import RunFolder, RunSettings, load_run_model, load_run_tokenizer
from sparseffn.training.checkpoint import step_of
from sparseffn.training.restore import find_checkpoint


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    path: Path
    step: int
    """Of the checkpoint."""
    n_params: int
    has_tokenizer: bool


def export_run(
    run: str | Path, to: str | Path, *, checkpoint: str = "last", results: str = "", with_tokenizer: bool = True
) -> Exported:
    """Write a Hugging Face folder, whole or not at all.

    Args:
        run: a run folder with a checkpoint.
        to: a new folder.
        checkpoint: `last`, `best` (on validation, of those that are kept), or a step.
        results: a table in Markdown for the model card, of the finished run; "": the run's own losses.
        with_tokenizer: whether the run's tokeniser is written too.

    Raises:
        UserError: the folder is there already; the run has no such checkpoint, a damaged file or is of a later version; its
            tokeniser is missing, or transformers can have no such one; the folder cannot be written.
    """
    folder, target = RunFolder(run), Path(to)
    if target.exists():
        raise UserError(f"`to` must be a new folder; got {str(target)!r}, which exists; fix: choose another, or remove it")
    _check_version(folder)
    trained, _ = load_run_model(run, checkpoint=checkpoint)
    step = step_of(find_checkpoint(folder, checkpoint))
    tokenizer = load_run_tokenizer(folder) if with_tokenizer else None
    fast = None if tokenizer is None else fast_tokenizer(tokenizer)
    train = RunSettings.read(folder).train
    if isinstance(trained, Decoder):
        model = SparseFFNForCausalLM.of_model(trained, max_position_embeddings=train.context)
    else:
        model = TransformerXLForCausalLM.of_model(trained, memory_length=train.eval_memory)
    card = run_card(folder, model, tokenizer, name=target.resolve().name, step=step, results=results)
    with write_folder(target) as partial:
        model.save_pretrained(partial)
        if fast is not None:
            fast.save_pretrained(partial)
        write_text(partial / CARD, card)
    n_params = trained.config.num_params()
    return Exported(path=target, step=step, n_params=n_params, has_tokenizer=with_tokenizer)


def _check_version(folder: RunFolder) -> None:
    """A later version may mean other things by the same config."""
    version = made_by(folder)
    if version is None:
        return
    numbers = [re.findall(r"\d+", text)[:2] for text in (version, __version__)]
    of_run, ours = ([int(number) for number in found] for found in numbers)
    if len(of_run) < 2 or of_run > ours:
        raise UserError(
            f"`run` must be of sparseffn {__version__} or before; got {folder.path}, made by {version!r}; "
            f"fix: export it with that version, or upgrade"
        )
