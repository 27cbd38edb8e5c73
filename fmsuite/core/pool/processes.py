"""Workers that are processes of this machine.

Each has one socket to the desk and no shared memory, semaphore or lock, so that none can be held by one that was
killed. A worker leads a process group of its own, with the loader's processes in it: what is typed at the terminal does
not reach it, and the group ends at once when the worker dies or its socket closes, however the desk ended.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from fmsuite.core.pool.desk import Died
from fmsuite.core.pool.messages import Give, Pause, Raised, Stop, receive, send
from fmsuite.core.pool.work import Work, set_slot
from fmsuite.core.pool.worker import Channel, forward_logs, log_levels, serve

_MOMENT_S = 2.0
"""How long workers that were told to stop may take, all together."""


@dataclass
class _Place:
    process: BaseProcess
    connection: Connection


class Processes:
    """A ``Crew`` of local processes, which share this process's threads among them.

    They are forked from a process that has only imported what this one has of the package, which takes hundredths of a
    second each; that process starts with the first of them.

    Args:
        make: builds the work; picklable.
        size: how many.
    """

    def __init__(self, make: Callable[[], Work], size: int) -> None:
        self.size = size
        # Not through the process's arguments, which would put tensors into shared memory.
        self.make = pickle.dumps(make, protocol=5)
        self.threads = max(1, torch.get_num_threads() // size)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([name for name in sorted(sys.modules) if _preloaded(name)])
        self.places: dict[int, _Place] = {}
        # Before multiprocessing's own, which would wait for workers of a run that was left in the middle.
        atexit.register(self.close, False)

    def start(self, place: int) -> None:
        here, there = self.context.Pipe()
        process = self.context.Process(
            target=_worker, args=(there, place, self.threads, log_levels()), name=f"fmsuite-worker-{place}"
        )
        process.start()
        there.close()
        self.places[place] = _Place(process, here)
        with suppress(OSError):
            here.send_bytes(self.make)

    def give(self, place: int, message: Give | Pause | Stop) -> None:
        with suppress(OSError):
            send(self.places[place].connection, message)

    def events(self) -> Iterator[tuple[int, Any]]:
        waited: dict[Any, tuple[int, _Place]] = {}
        for number, place in self.places.items():
            waited[place.connection] = waited[place.process.sentinel] = (number, place)
        for ready in wait(list(waited)):
            number, place = waited[ready]
            if self.places.get(number) is not place:
                # It died earlier in this round.
                continue
            if ready is place.connection:
                try:
                    message = receive(place.connection)
                except (EOFError, OSError):
                    yield number, self._died(place)
                else:
                    yield number, message
            else:
                # What it said before it died first.
                _end(place)
                try:
                    while self.places.get(number) is place:
                        yield number, receive(place.connection)
                except (EOFError, OSError):
                    yield number, self._died(place)

    def discard(self, place: int) -> None:
        gone = self.places.pop(place)
        _end(gone)
        gone.process.join()
        gone.process.close()
        gone.connection.close()

    def close(self, orderly: bool) -> None:
        atexit.unregister(self.close)
        if orderly:
            end = time.monotonic() + _MOMENT_S
            for place in self.places.values():
                place.process.join(max(0.0, end - time.monotonic()))
        for number in list(self.places):
            self.discard(number)

    def _died(self, place: _Place) -> Died:
        _end(place)
        place.process.join()
        return Died(_how(place.process.exitcode))


def _preloaded(module: str) -> bool:
    return module.partition(".")[0] == "fmsuite" and not module.endswith("__main__")


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            name = signal.Signals(-code).name
            return f"killed by {name}" + (", most often because memory ran out" if name == "SIGKILL" else "")
    return f"its process ended with code {code}"


def _end(place: _Place) -> None:
    """Kill a worker and its loader's processes."""
    pid = place.process.pid
    assert pid is not None
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        # It has no group yet, or nobody is left in it.
        place.process.kill()


def _worker(connection: Connection, place: int, threads: int, levels: dict[str, int]) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        # Loaders' processes are then this one's children, in its group, and not those of the process it came from.
        multiprocessing.set_start_method("fork", force=True)
    set_slot(place)
    torch.set_num_threads(threads)
    channel = Channel()
    try:
        make = connection.recv_bytes()
    except (EOFError, OSError):
        return
    threading.Thread(target=_bring, args=(connection, channel), daemon=True).start()
    carrier = threading.Thread(target=_carry, args=(connection, channel))
    carrier.start()
    forward_logs(channel, levels)
    serve(channel, _Unpickled(make))
    channel.outbox.put(None)
    carrier.join()


class _Unpickled:
    """Makes the work where its errors are told."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __call__(self) -> Work:
        make = pickle.loads(self.data)
        self.data = b""
        return make()


def _bring(connection: Connection, channel: Channel) -> None:
    """Carry messages from the desk; when it is gone, end this worker and the loader's processes."""
    try:
        while True:
            message = receive(connection)
            channel.inbox.put(message)
            if isinstance(message, Stop):
                return
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)


def _carry(connection: Connection, channel: Channel) -> None:
    """Carry messages to the desk."""
    while (message := channel.outbox.get()) is not None:
        try:
            send(connection, message)
        except OSError:
            os.killpg(0, signal.SIGKILL)
        except Exception as error:
            # A result that cannot be pickled.
            send(connection, Raised.of(error))
