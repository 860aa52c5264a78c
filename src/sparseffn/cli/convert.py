"""`convert`: cheaper feedforward blocks in a model of transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparseffn.cli.output import can_draw, check_out, log, show, use_machine
from sparseffn.cli.run_settings import Convert
from sparseffn.cli.runs import one_method
from sparseffn.errors import UserError
from sparseffn.ffn import method_class, parse_options
from sparseffn.report.convert_report import conversion_tables, facts_line, write_conversion

if TYPE_CHECKING:
    from sparseffn.hf.fill import Fill

# Seconds between lines of steps.
_LOG_EVERY = 15.0


def convert_model(settings: Convert) -> int:
    """Convert, write the page, print the tables."""
    device = use_machine(settings)
    check_out(settings.out)
    choice = one_method(settings.method, "--method")
    try:
        # Takes seconds, and may not be there.
        from transformers.utils.logging import disable_progress_bar

        from sparseffn.hf.conversion import ConvertSettings, convert
    except ImportError as error:
        raise UserError(f"`convert` needs the extra; got none ({error}); fix: pip install 'sparseffn[hf]'") from None

    disable_progress_bar()
    wanted = ConvertSettings(
        model=settings.model,
        method=choice.method,
        options=parse_options(choice.method, method_class(choice.method), choice.options),
        fill=_fill(settings.from_),
        layers=[int(word) if word.lstrip("-").isdecimal() else word for word in settings.layers] or None,
        calibrate=Path(settings.calibrate),
        held_out=None if settings.held_out is None else Path(settings.held_out),
        tokens=settings.tokens,
        eval_tokens=settings.eval_tokens,
        context=settings.context,
        distill=settings.distill,
        end_to_end=settings.end_to_end,
        batch_tokens=settings.batch_tokens,
        lr=settings.lr,
        end_to_end_lr=settings.end_to_end_lr,
        seed=settings.seed,
        dtype=settings.dtype,
        device=str(device),
        out=Path(settings.out),
    )
    result = convert(wanted, _progress())
    written = write_conversion(result, Path(settings.out), drawn=can_draw())
    code = show(result, settings, conversion_tables(result), facts_line(result), written)
    if not settings.json:
        print(f'load it with: import sparseffn.hf; AutoModelForCausalLM.from_pretrained("{settings.out}")')
    return code


def _fill(words: Sequence[str]) -> Fill | None:
    """The way to fill that the words name, None where there are none."""
    from sparseffn.hf.swap import find_fill

    if not words:
        return None
    name, *options = words
    fill = type(find_fill(name, "dense"))
    wrong = [word for word in options if "=" not in word]
    if wrong:
        raise UserError(f"`--from` must name one way, then its options as key=value; got {wrong[0]!r}; fix: split by=keys")
    return fill(**parse_options(name, fill, dict(word.split("=", 1) for word in options)))


def _progress() -> Callable[[str], None]:
    """Lines of progress: every stage, and steps now and then."""
    last = 0.0

    def progress(text: str) -> None:
        nonlocal last
        if "step " not in text or time.monotonic() - last >= _LOG_EVERY:
            last = time.monotonic()
            log(text)

    return progress
