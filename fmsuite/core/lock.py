"""One writer at a time: a lock that the operating system lifts when its process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from fmsuite.errors import FmsuiteError, UsageError

_held: set[int] = set()


def _forget_in_child() -> None:
    # Loader workers are forked while a lock is held. Were they to keep its descriptor, a killed writer's lock would
    # live on until the last of them has noticed.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


class WriterLock:
    """An exclusive ``flock`` on a file, held from construction to ``close``.

    Args:
        path: the file; made if missing, and left behind.
        what: what is being written, for the message to a second writer.

    Raises:
        UsageError: if another process, or another object of this one, holds it.
        FmsuiteError: if the file cannot be made, or its file system has no locks.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._descriptor: int | None = _locked(path, what)
        _held.add(self._descriptor)

    def close(self) -> None:
        if self._descriptor is not None and self._descriptor in _held:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None


def _locked(path: Path, what: str) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise FmsuiteError(f"{path}: cannot be made ({error.strerror}).", "Check the folder.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(descriptor)
            now = os.stat(path)
        except FileNotFoundError:
            now = None
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UsageError(
                    f"{what}: another process is writing to it.", "Wait until it has ended, or write somewhere else."
                ) from error
            raise FmsuiteError(
                f"{path}: this file system cannot lock files ({error.strerror}).", "Write to another disk."
            ) from error
        # Between opening and locking, the file may have been replaced by another writer's.
        if now is not None and (held.st_dev, held.st_ino) == (now.st_dev, now.st_ino):
            return descriptor
        os.close(descriptor)
