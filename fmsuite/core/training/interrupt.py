"""Ctrl-C, SIGTERM and SIGUSR1 as a request to stop at the next safe point."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger("fmsuite")

ECHO_S = 1.0
"""Seconds within which a second signal is taken for an echo of the first."""
WARNING = getattr(signal, "SIGUSR1", None)
"""What Slurm sends ahead of the end (``--signal``); the same as SIGTERM. Windows has none."""
_SIGNALS = tuple(number for number in (signal.SIGINT, signal.SIGTERM, WARNING) if number is not None)


def warning_ends() -> None:
    """Outside training, where nothing can be saved, the scheduler's warning acts as SIGTERM does."""
    if WARNING is not None and threading.current_thread() is threading.main_thread():
        signal.signal(WARNING, lambda number, frame: signal.raise_signal(signal.SIGTERM))


class Interrupt:
    """While entered, SIGINT, SIGTERM and SIGUSR1 set ``requested``; a second SIGINT, a moment later, acts as it did
    before.

    Launchers pass signals on to processes that got them already, so an echo within a second, and any further SIGTERM,
    changes nothing.

    Loader processes forked meanwhile inherit the handler and pass over the terminal's Ctrl-C in silence, so that the
    step that is being finished still gets its data. Outside the main thread signals are left alone.

    Attributes:
        requested: SIGINT or SIGTERM (for which SIGUSR1 counts), whichever came first; ``None`` before.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._owner = os.getpid()
        self._first = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return
        if self.requested is None:
            self.requested = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
            self._first = time.monotonic()
            name = signal.Signals(number).name
            logger.warning("%s: finishing this step and saving a checkpoint; Ctrl-C again stops at once.", name)
        elif number == signal.SIGINT and time.monotonic() - self._first >= ECHO_S:
            self._restore()
            signal.raise_signal(number)
