"""What workers and the desk tell each other."""

from __future__ import annotations

import logging
import pickle
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from fmsuite.errors import FmsuiteError


@dataclass(frozen=True)
class Give:
    """To a worker: a unit."""

    number: int
    unit: Any


@dataclass(frozen=True)
class Pause:
    """To a worker that asked for another unit: there is none now, finish what you have."""


@dataclass(frozen=True)
class Stop:
    """To a worker without units: end."""


@dataclass(frozen=True)
class Idle:
    """From a worker: it has no unit, and waits for one."""


@dataclass(frozen=True)
class Want:
    """From a worker that has units: it would take another."""


@dataclass(frozen=True)
class Told:
    """From a worker: the result of a unit."""

    number: int
    result: Any


@dataclass(frozen=True)
class Logged:
    """From a worker: a record of its log, without what cannot be sent."""

    record: logging.LogRecord


@dataclass(frozen=True)
class Lost:
    """From a worker, its last message: something that it rests on has died."""

    reason: str


@dataclass(frozen=True)
class Raised:
    """From a worker, its last message: an error.

    Attributes:
        error: pickled; empty if it cannot be.
        said: the error in one line.
        trace: its traceback.
    """

    error: bytes
    said: str
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> Raised:
        trace = "".join(traceback.format_exception(error))
        said = "".join(traceback.format_exception_only(error)).strip()
        try:
            data = pickle.dumps(error)
            pickle.loads(data)
        except Exception:
            # An exception whose arguments are not those of its class, or that holds what cannot be pickled.
            data = b""
        return cls(data, said, trace)

    def exception(self) -> BaseException:
        """The error as the caller should see it: one that users can act on as it is, others with their traceback."""
        error = pickle.loads(self.error) if self.error else RuntimeError(self.said)
        if not isinstance(error, FmsuiteError):
            error.add_note(f"In a worker:\n{self.trace}")
        return error


def send(connection: Connection, message: Any) -> None:
    """Write a message; the memory of its arrays is not copied. Blocks until there is room.

    Raises:
        OSError: if the other side is gone.
    """
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    connection.send_bytes(len(buffers).to_bytes(4, "little") + head)
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def receive(connection: Connection) -> Any:
    """The next message; its arrays are read-only.

    Raises:
        EOFError, OSError: if the other side is gone, in the middle of a message or before one.
    """
    head = connection.recv_bytes()
    buffers = [connection.recv_bytes() for _ in range(int.from_bytes(head[:4], "little"))]
    return pickle.loads(memoryview(head)[4:], buffers=buffers)
