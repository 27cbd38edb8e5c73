"""Ctrl-C and SIGTERM as a request to stop at the next safe point."""

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
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """While entered, SIGINT and SIGTERM set ``requested``; a second SIGINT, a moment later, acts as it did before.

    Launchers pass signals on to processes that got them already, so an echo within a second, and any further SIGTERM,
    changes nothing.

    Loader processes forked meanwhile inherit the handler and pass over the terminal's Ctrl-C in silence, so that the
    step that is being finished still gets its data. Outside the main thread signals are left alone.
    """

    def __init__(self) -> None:
        self.requested = False
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
        if not self.requested:
            self.requested = True
            self._first = time.monotonic()
            name = signal.Signals(number).name
            logger.warning("%s: finishing this step and saving a checkpoint; Ctrl-C again stops at once.", name)
        elif number == signal.SIGINT and time.monotonic() - self._first >= ECHO_S:
            self._restore()
            signal.raise_signal(number)
