"""Ctrl-C and SIGTERM as a request to stop at the next safe point."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger("fmsuite")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """While entered, the first SIGINT or SIGTERM sets ``requested``; a second one acts as it did before.

    Loader processes forked meanwhile inherit the handler and pass over the terminal's Ctrl-C in silence, so that the
    step that is being finished still gets its data. Outside the main thread signals are left alone.
    """

    def __init__(self) -> None:
        self.requested = False
        self._owner = os.getpid()
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
        self.requested = True
        self._restore()
        name = signal.Signals(number).name
        logger.warning("%s: finishing this step and saving a checkpoint; once more stops at once.", name)
