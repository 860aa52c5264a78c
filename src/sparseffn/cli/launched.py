"""Commands in several processes, as `torchrun` starts them: all of them work, the first one prints.

Training and evaluation are done together. What else a comparison or a reproduction does, timing and reports, the first process
does alone: the others wait for its next run and train it with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from sparseffn.cli.settings import Machine
from sparseffn.distribution import LostProcessError, World, joined
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
        except LostProcessError:
            raise
        except UserError as error:
            _end_silently(world, 2, error)
            raise
        except Interrupted as error:
            _end_silently(world, error.exit_code, error)
            raise


def _end_silently(world: World, code: int, error: BaseException) -> None:
    if not world.leads:
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
            return follow(world)

    return run
