"""SIGTERM and Ctrl-C: a run finishes its step, saves and leaves, with a message how to go on; a second signal ends it there."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self, final

from sparseffn.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DEFAULTS = (signal.default_int_handler, signal.SIG_DFL)


@final
class Interruption:
    """Notes a signal while steps are taken, so that they end where a checkpoint can be written.

    Outside the main thread, and where the program has a handler of its own or ignores the signal, nothing is changed.
    """

    def __init__(self, how_to_go_on: Callable[[], str]) -> None:
        """From a function that says how a run that ends where it is goes on."""
        self._how_to_go_on = how_to_go_on
        self.number: int | None = None
        """The signal that came, if one did."""
        self.all_is_saved = False
        """Whether nothing would be lost: a signal then ends the run where it is."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            free = [number for number in SIGNALS if signal.getsignal(number) in _DEFAULTS]
            self._before = {number: signal.signal(number, self._note) for number in free}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.all_is_saved or self.number is not None:
            raise Interrupted(f"interrupted; {self._how_to_go_on()}", number)
        self.number = number
