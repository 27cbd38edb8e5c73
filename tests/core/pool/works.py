"""Works for the tests of the pool, importable in its workers."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fmsuite.core.pool import WorkerLost, slot
from fmsuite.errors import FmsuiteError


@dataclass
class Doubling:
    """Doubles numbers, one ahead, and does to some of them what their name says.

    Attributes:
        folder: where units leave traces.
        once: kills the worker the first time that a unit is taken.
        always: kills it each time.
        lost, wrong, bug: raise.
        pause: seconds a unit.
        ahead: how many units are taken before the first result.
    """

    folder: Path | None = None
    once: set[int] = field(default_factory=set)
    always: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    wrong: set[int] = field(default_factory=set)
    bug: set[int] = field(default_factory=set)
    pause: float = 0.0
    ahead: int = 1

    def __call__(self, units: Iterator[int]) -> Iterator[Any]:
        waiting: list[int] = []
        for unit in units:
            self._meet(unit)
            waiting.append(unit)
            if len(waiting) > self.ahead:
                yield self._done(waiting.pop(0))
        for unit in waiting:
            yield self._done(unit)

    def _meet(self, unit: int) -> None:
        if unit in self.always:
            os.kill(os.getpid(), signal.SIGKILL)
        if unit in self.once:
            assert self.folder is not None
            mark = self.folder / f"once-{unit}"
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        if unit in self.lost:
            raise WorkerLost(f"a reader died of {unit}")
        if unit in self.wrong:
            raise FmsuiteError(f"{unit} cannot be used.", "Use another.")
        if unit in self.bug:
            raise ZeroDivisionError(f"met {unit}")

    def _done(self, unit: int) -> dict[str, Any]:
        time.sleep(self.pause)
        if self.folder is not None:
            with (self.folder / "done.txt").open("a") as file:
                file.write(f"{unit} {os.getpid()}\n")
        logging.getLogger("fmsuite.test").info("did %d", unit)
        return {"twice": 2 * unit, "pid": os.getpid(), "slot": slot(), "array": np.full(10, unit)}


@dataclass
class Make:
    """Builds the work."""

    work: Any
    deadly: bool = False

    def __call__(self) -> Any:
        if self.deadly:
            os._exit(3)
        return self.work


def large(units: Iterator[int]) -> Iterator[np.ndarray]:
    """Results of 100 MB."""
    for unit in units:
        yield np.full((25, 1_000_000), unit, dtype=np.float32)


def unpicklable(units: Iterator[int]) -> Iterator[Any]:
    for _ in units:
        yield lambda: None
