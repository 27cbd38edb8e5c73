"""Open files, kept open: bounded, one set a process, reopened after an error."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from typing import Any, Generic, TypeVar

Handle = TypeVar("Handle")


class HandleCache(Generic[Handle]):
    """The last few opened files of this process.

    A handle never crosses a fork (two processes would share its file offset), is dropped when the object is pickled,
    and can be discarded after an error, since some libraries' handles stay dead once they have failed.

    Args:
        opener: opens a path, or several that are one thing; module-level, so that the cache can be pickled.
        closer: closes a handle.
        limit: how many are open at most.
    """

    def __init__(self, opener: Callable[[Any], Handle], closer: Callable[[Handle], object], limit: int = 8) -> None:
        if limit < 1:
            raise ValueError(f"a cache of {limit} open files")
        self.opener = opener
        self.closer = closer
        self.limit = limit
        self._open: OrderedDict[Hashable, Handle] = OrderedDict()
        self._pid = os.getpid()

    def get(self, path: Hashable) -> Handle:
        """The open handle, opened if need be. Whatever the opener raises passes through."""
        if self._pid != os.getpid():
            self._open = OrderedDict()
            self._pid = os.getpid()
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        # Room is made first: the bound then holds while the next one is opened, and a volume may be large.
        while len(self._open) >= self.limit:
            _, oldest = self._open.popitem(last=False)
            self.closer(oldest)
        self._open[path] = self.opener(path)
        return self._open[path]

    def discard(self, path: Hashable) -> None:
        """Close one file; the next ``get`` opens it again."""
        if self._pid == os.getpid() and path in self._open:
            self.closer(self._open.pop(path))

    def close(self) -> None:
        mine = list(self._open.values()) if self._pid == os.getpid() else []
        # One that does not close must not keep the others.
        self._open = OrderedDict()
        with ExitStack() as stack:
            for handle in mine:
                stack.callback(self.closer, handle)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict(), "_pid": -1}
