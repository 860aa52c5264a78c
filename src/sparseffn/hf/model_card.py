"""The `README.md` of a Hugging Face folder: what the model is, how it is loaded, what it cost and what it reached.

Nothing is claimed that the folder's own files do not hold: a card has results only where they are handed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sparseffn.accounting import count_block
from sparseffn.ffn import FFNConfig
from sparseffn.ffn.options import field_infos
from sparseffn.storage import write_text

CARD = "README.md"

_LOADING = """## Loading

The folder holds no code. The package must be installed, and imported before the model is loaded; transformers alone does not
know the model type `{model_type}`.

```sh
pip install 'sparseffn[hf]'
```

```python
import sparseffn.hf
from transformers import AutoModelForCausalLM{tokenizer_import}

model = AutoModelForCausalLM.from_pretrained("{path}"){tokenizer_line}
```
"""


def model_card(
    *,
    name: str,
    kind: str,
    model_type: str,
    ffn: FFNConfig,
    n_params: int,
    sizes: Mapping[str, str],
    results: str = "",
    training: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    has_tokenizer: bool = False,
) -> str:
    """The card of a language model with feedforward blocks of ours.

    Args:
        name: the title; also what the example loads.
        kind: what the model is beside its blocks, "Transformer-XL".
        model_type: of its config.
        ffn: config of the blocks.
        n_params: of the whole model.
        sizes: further rows of the model's table, in words.
        results: a table in Markdown, or nothing.
        training: what it was trained on and how, in words.
        notes: what a user must know, a paragraph each.
        has_tokenizer: whether the folder holds a tokenizer.
    """
    counts = count_block(ffn)
    model = {
        "feedforward blocks": f"{ffn.name}: {options_of(ffn)}",
        "parameters": f"{n_params:,}",
        **sizes,
        "parameters of a block": f"{counts.total_params:,}, {counts.active_params:,} of them active for a token",
        "FLOPs a token of a block": f"{counts.forward_flops:,}",
        "pairs that take part": f"{ffn.active_channels:,} of {ffn.n_channels:,} ({counts.active_fraction:.1%})",
    }
    parts = [
        front_matter(ffn.name),
        f"# {name}",
        f"A {kind} language model with feedforward blocks `{ffn.name}`: {ffn.summary} ({ffn.paper}.)",
        how_to_load(name, model_type, has_tokenizer=has_tokenizer),
        *notes,
        "## Model\n\n" + rows(model),
    ]
    if results:
        parts.append(f"## Results\n\n{results.strip()}")
    if training:
        parts.append("## Training\n\n" + rows(training))
    return "\n\n".join(parts) + "\n"


def write_card(model: Any, folder: str | Path, card: str) -> None:
    """Put the card of a model into a folder of its saved files.

    A model that was loaded from a folder with a card, and has not changed since, keeps that card with its results.
    """
    source = Path(model.name_or_path) if model.name_or_path else None
    if source is not None and (source / CARD).is_file() and same_weights(source, Path(folder)):
        card = (source / CARD).read_text(encoding="utf-8")
    write_text(Path(folder) / CARD, card)


class PushedWithCard:
    """A model of transformers that goes to the hub with our card, its `card(name)`, in place of the hub's empty one."""

    def card(self, name: str, **parts: Any) -> str:
        raise NotImplementedError

    def _upload_modified_files(self, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """A step of `push_to_hub`."""
        write_card(self, working_dir, self.card(repo_id))
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold the same parameters, in whatever files."""
    with ExitStack() as stack:
        ours, theirs = (_opened(folder, stack) for folder in (one, other))
        return (
            bool(ours)
            and ours.keys() == theirs.keys()
            and all(torch.equal(file.get_tensor(name), theirs[name].get_tensor(name)) for name, file in ours.items())
        )


def _opened(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """The file of each parameter, of which nothing is read yet."""
    files = [stack.enter_context(safe_open(path, framework="pt")) for path in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def front_matter(*methods: str, base_model: str | None = None) -> str:
    """What the hub reads; `base_model` is a name on the hub, whose card has the licence."""
    base = "" if base_model is None else f"base_model: {base_model}\n"
    tags = "\n".join(f"- {tag}" for tag in ("sparseffn", *methods))
    return f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{base}tags:\n{tags}\n---"


def how_to_load(name: str, model_type: str, *, has_tokenizer: bool) -> str:
    """The section that says so; `name` is what is loaded, a folder or a name on the hub."""
    text = _LOADING.format(
        model_type=model_type,
        path=name,
        tokenizer_import=", AutoTokenizer" if has_tokenizer else "",
        tokenizer_line=f'\ntokenizer = AutoTokenizer.from_pretrained("{name}")' if has_tokenizer else "",
    )
    return text.strip()


def options_of(ffn: FFNConfig) -> str:
    """What is set of a block, without the sizes of the model: `n_experts=16, expert_size=128, k=4`."""
    given = {info.name: getattr(ffn, info.name) for info in field_infos(type(ffn)).values()}
    defaults = {info.name: info.default for info in field_infos(type(ffn)).values()}
    shown = {name: v for name, v in given.items() if name not in ("d_model", "n_layers") and v != defaults[name]}
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def rows(cells: Mapping[str, str]) -> str:
    """A table of two columns without a heading."""
    return "\n".join(["| | |", "| :-- | :-- |", *(f"| {key} | {value} |" for key, value in cells.items())])
