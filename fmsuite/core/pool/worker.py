"""Inside a worker: units come in, results go out, and the work runs between."""

from __future__ import annotations

import copy
import logging
import os
import queue
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fmsuite.core.pool.messages import Give, Idle, Logged, Lost, Pause, Raised, Stop, Told, Want
from fmsuite.core.pool.work import Work, WorkerLost

OUTBOX = 1
"""Messages that wait to be sent: the work goes on while one result travels and another waits, and no further."""


class Channel:
    """Two queues in a worker. Whoever owns them carries messages between them and the desk, each in a thread of its
    own, so that the work waits neither for the desk to read a result nor to write a unit."""

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.outbox: queue.Queue[Any] = queue.Queue(OUTBOX)


def serve(channel: Channel, make: Callable[[], Work]) -> None:
    """Do units until told to stop. An error goes to the desk, and ends it."""
    try:
        _serve(channel, make)
    except WorkerLost as lost:
        channel.outbox.put(Lost(str(lost)))
    except BaseException as error:
        channel.outbox.put(Lost(str(error)) if _reader_died(error) else Raised.of(error))


def _reader_died(error: BaseException | None) -> bool:
    """Whether torch says that a loader's process has died, which it does in the middle of whatever runs then."""
    while error is not None:
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid"):
            return True
        error = error.__cause__
    return False


def _serve(channel: Channel, make: Callable[[], Work]) -> None:
    work = make()
    taken: deque[int] = deque()

    def stream(first: Give) -> Iterator[Any]:
        given = first
        while True:
            taken.append(given.number)
            yield given.unit
            channel.outbox.put(Want())
            message = channel.inbox.get()
            if isinstance(message, Pause):
                return
            given = message

    while True:
        channel.outbox.put(Idle())
        message = channel.inbox.get()
        if isinstance(message, Stop):
            return
        for result in work(stream(message)):
            channel.outbox.put(Told(taken.popleft(), result))
        if taken:
            raise RuntimeError(f"the work ended without the results of {len(taken)} of its units")


def forward_logs(channel: Channel, levels: Mapping[str, int]) -> None:
    """Send what is logged here to the desk.

    Args:
        levels: of loggers by name, as the desk's process has them.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(_Forward(channel))
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def log_levels() -> dict[str, int]:
    """Levels of the loggers whose records workers forward."""
    return {name: logging.getLogger(name).level for name in ("", "fmsuite")}


class _Forward(logging.Handler):
    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self.channel = channel
        self.pid = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        if os.getpid() != self.pid:
            # A loader's process, which has the queue but not the thread that empties it.
            if logging.lastResort is not None:
                logging.lastResort.handle(record)
            return
        sent = copy.copy(record)
        sent.msg, sent.args = record.getMessage(), None
        if record.exc_info:
            sent.exc_text = logging.Formatter().formatException(record.exc_info)
        sent.exc_info = None
        self.channel.outbox.put(Logged(sent))
