"""What a user sets on the command line: one frozen class a command, each option declared once. Nothing here needs PyTorch.

A class's docstring is its command's help, a field's is the option's. Types and options that commands share stand first, then
commands that are of no run; the others have modules of their own.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

from tyro.conf import Positional, arg

# The text says what is taken where nothing is given; "default: None" would say less.
_UNSAID = arg(help_behavior_hint="")

MaybeText = Annotated[str | None, _UNSAID]
MaybeInt = Annotated[int | None, _UNSAID]
MaybeFloat = Annotated[float | None, _UNSAID]
Flag = Annotated[bool, _UNSAID]
Words = Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="")]
Ints = Annotated[tuple[int, ...], arg(metavar="N ...", help_behavior_hint="")]
Run = Annotated[Positional[str], arg(metavar="RUN")]

Precision = Literal["float32", "bfloat16", "float16"]

Class = TypeVar("Class")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings_class(cls: type[Class]) -> type[Class]:
    """A frozen dataclass whose help begins with what is required, then what is its own; what it shares comes last."""
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    order = [name for part in made.__mro__ for name in inspect.get_annotations(part)]
    found = {field.name: field for field in dataclasses.fields(made)}  # pyright: ignore[reportArgumentType]
    ranks = {name: (field.default is not dataclasses.MISSING, order.index(name)) for name, field in found.items()}
    made.__dataclass_fields__ = {name: found[name] for name in sorted(found, key=ranks.__getitem__)}  # pyright: ignore[reportAttributeAccessIssue]
    return made


@settings_class
class Printed:
    json: Flag = False
    """print JSON instead of a table"""


@settings_class
class Machine:
    threads: MaybeInt = None
    """CPU threads (default: all cores)"""
    device: str = "auto"
    """where to compute: auto, cpu, cuda or cuda:N; auto takes a GPU where there is one"""


@settings_class
class Spread(Machine):
    """Of what trains in several processes."""

    strategy: Literal["ddp", "ep", "fsdp", "ep-fsdp"] = "ddp"
    """under torchrun: the model whole in each process, its experts spread (ep), in shards (fsdp), or ep-fsdp, which is both"""


@settings_class
class Places:
    data_dir: MaybeText = None
    """your file or folder, for text, or with a copy of a published corpus (default: as prepared, or as the run had it)"""
    cache_dir: MaybeText = None
    """where downloads and token files are kept (default: the user's cache folder)"""


@settings_class
class Tokens(Places):
    tokenizer: MaybeText = None
    """bytes, seen-bytes, chars, words or bpe (default: the corpus's own)"""
    vocab_size: MaybeInt = None
    """pieces of a bpe vocabulary (default: 8000)"""

    def corpus_options(self) -> dict[str, Any]:
        """How the corpus is opened, as arguments of `load_corpus` and of settings that have them."""
        return {name: getattr(self, name) for name in ("tokenizer", "vocab_size", "data_dir", "cache_dir")}


@settings_class
class Methods(Printed):
    """List the methods, or the options of one.

    Examples:
      sparseffn methods
      sparseffn methods sigma-moe
    """

    method: Annotated[Positional[str | None], arg(metavar="METHOD", help_behavior_hint="")] = None
    """show this method's options"""
    markdown: Flag = False
    """the table of the README"""


@settings_class
class Matched(Printed):
    """Size a method so that it has another one's parameters.

    Options of a method follow its name as key=value; matching then changes the sizes that are left. Exits with 1 where no
    sizes are within the tolerance.

    Examples:
      sparseffn match --method pkm --like dense --d-model 412 --d-ff 2053
      sparseffn match --method sigma-moe expert_size=64 k=8 --like dense --d-model 412 --d-ff 2053
      sparseffn match --method switch --like dense --preset wt-b --vocab-size 8000   # within the whole model
    """

    method: Words
    """method, then its options as key=value"""
    like: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ("dense",)
    """method to match, then its options"""
    d_model: MaybeInt = None
    """width of the model"""
    d_ff: MaybeInt = None
    """key-value pairs of the dense block"""
    preset: MaybeText = None
    """take sizes from a preset and match the whole model"""
    vocab_size: int = 8000
    """vocabulary of the preset's model"""


@settings_class
class DataList(Printed):
    """List every corpus: whether it is here, its size, and whether its published digest was ever verified.

    Example:
      sparseffn data list
    """

    cache_dir: MaybeText = None
    """where downloads and token files are kept (default: the user's cache folder)"""


@settings_class
class DataPrepare(Tokens, Printed):
    """Get a corpus, check it, make its tokens.

    Where a transfer breaks off, the same command goes on. A wrong file is removed, and the next mirror is asked. Of your
    copy in --data-dir the cache keeps the text, so that later commands need no --data-dir.

    Examples:
      sparseffn data prepare --corpus enwik8
      sparseffn data prepare --corpus wikitext103 --data-dir downloads/   # holds wikitext-103-v1.zip or wiki.*.tokens
    """

    corpus: str
    """one that `data list` shows"""
    offline: Flag = False
    """download nothing"""
    accept_digest: Words = ()
    """accept a file with this digest, as the error gave it, for one whose published digest is unverified"""


@settings_class
class DataCheck(Tokens, Printed):
    """Check a corpus that is here, without a network: size, digest, tokens, vocabulary, first lines decoded.

    Examples:
      sparseffn data check
      sparseffn data check --corpus ptb --data-dir ptb/ --tokenizer chars
    """

    corpus: MaybeText = None
    """one that `data list` shows (default: all that are here)"""


@settings_class
class Doctor(Printed):
    """Report what this installation can do: versions, threads, backends and why, extras.

    Paste it into a report of a problem.

    Examples:
      sparseffn doctor
      sparseffn doctor --json > doctor.json
    """
