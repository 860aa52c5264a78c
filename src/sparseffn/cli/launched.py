"""Commands in several processes, as `torchrun` starts them: all of them work, the first one prints.

Training and evaluation are done together. What else a comparison or a reproduction does, timing and reports, the first process
does alone: the others wait for its next run and train it with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from sparseffn.cli.output import use_machine
from sparseffn.cli.settings import Machine
from sparseffn.distribution import World, joined
from sparseffn.errors import Interrupted, UserError
from sparseffn.training.together import follow, leading


@contextlib.contextmanager
def launched(settings: Machine) -> Iterator[World]:
    """The processes of this command. An error that all of them have is the first one's to report.

    Raises:
        SystemExit: in another process than the first, with the code of its error.
    """
    with joined(settings.device) as world:
        try:
            with world.fail_together():
                world.agree("the settings of the command", dataclasses.asdict(settings))  # pyright: ignore[reportArgumentType]
                yield world
        except UserError as error:
            if not world.leads and world.is_agreed(error):
                _end_silently(2, error)
            raise
        except Interrupted as error:
            if not world.leads:
                _end_silently(error.exit_code, error)
            raise


def _end_silently(code: int, error: BaseException) -> NoReturn:
    """Leave the word to the first process, which a launcher ends as soon as another one has ended."""
    time.sleep(1.0)
    raise SystemExit(code) from error


def led(command: Callable[[Any], int]) -> Callable[[Any], int]:
    """A command that the first of several processes runs; the others train its runs with it."""

    @functools.wraps(command)
    def run(settings: Machine) -> int:
        with launched(settings) as world:
            if world.is_alone:
                return command(settings)
            if world.leads:
                with leading(world):
                    return command(settings)
            use_machine(settings)
            return follow(world)

    return run
