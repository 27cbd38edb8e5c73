"""Who gets which unit, and what becomes of the units of a worker that died."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fmsuite.core.pool.messages import Give, Idle, Logged, Lost, Pause, Raised, Stop, Told, Want
from fmsuite.core.pool.work import Outcome
from fmsuite.errors import FmsuiteError


@dataclass(frozen=True)
class Died:
    """Of a crew: a worker is no more."""

    reason: str


class Crew(Protocol):
    """Workers on one kind of machinery, each known by its number of places."""

    size: int

    def start(self, place: int) -> None:
        """Begin to start a worker at a place that has none."""
        ...

    def give(self, place: int, message: Give | Pause | Stop) -> None:
        """Send a worker a message. If it is dead this does nothing: ``events`` will say so."""
        ...

    def events(self) -> Iterator[tuple[int, Any]]:
        """What workers say, or that they died; waits for at least one."""
        ...

    def discard(self, place: int) -> None:
        """End what is left of a worker."""
        ...

    def close(self, orderly: bool) -> None:
        """End all workers.

        Args:
            orderly: they have been told to stop, and may have a moment for it.
        """
        ...


@dataclass
class _Worker:
    """
    Attributes:
        units: what it was given and has not told of, by number.
        credit: how many units it has asked for and not got; -1 if it has one that it did not ask for.
        ready: it has finished its start.
        idle: it has no units and asked for one.
        alone: it has a suspect, and gets nothing else until that is done.
    """

    units: dict[int, Any] = field(default_factory=dict)
    credit: int = 0
    ready: bool = False
    idle: bool = False
    alone: bool = False


class Desk:
    """Hands units to workers as they ask, and one ahead while there are plenty: a busy caller keeps none waiting.

    When a worker dies with one unit in hand, that one is to blame. With several, any may be: each is then done by a
    worker that has nothing else, so that none is blamed for another.

    Args:
        units: asked for one by one, more than once if a worker dies.
        retries: how often a unit that was to blame is tried again.
    """

    def __init__(self, crew: Crew, units: Sequence[Any], retries: int) -> None:
        self.crew = crew
        self.units = units
        self.retries = retries
        self.next = 0
        self.again: deque[int] = deque()
        """Numbers of suspects."""
        self.blame: Counter[int] = Counter()
        self.workers: dict[int, _Worker] = {}
        self.false_starts = 0

    def run(self) -> Iterator[Outcome]:
        left = len(self.units)
        for place in range(min(self.crew.size, left)):
            self._start(place)
        while left:
            for place, event in self.crew.events():
                outcome = self._take(place, event)
                self._hand_out()
                if outcome is not None:
                    left -= 1
                    yield outcome
        for place in self.workers:
            self.crew.give(place, Stop())

    def _start(self, place: int) -> None:
        self.workers[place] = _Worker()
        self.crew.start(place)

    def _take(self, place: int, event: Any) -> Outcome | None:
        worker = self.workers[place]
        match event:
            case Idle():
                worker.ready = True
                self.false_starts = 0
                if worker.units:
                    # It finished without taking what lies ready for it, and takes that now.
                    worker.credit += 1
                else:
                    worker.idle = True
            case Want():
                worker.credit += 1
            case Told(number, result):
                unit = worker.units.pop(number)
                worker.alone = False
                return Outcome(number, unit, result, None)
            case Logged(record):
                logger = logging.getLogger(record.name)
                if logger.isEnabledFor(record.levelno):
                    logger.handle(record)
            case Raised():
                raise event.exception()
            case Lost(reason) | Died(reason):
                return self._bury(place, worker, reason)
        return None

    def _bury(self, place: int, worker: _Worker, reason: str) -> Outcome | None:
        self.crew.discard(place)
        if not worker.ready:
            self.false_starts += 1
            if self.false_starts > self.retries:
                raise FmsuiteError(
                    f"Worker processes die while they start ({reason}).",
                    "Use fewer of them if memory runs out; without --processes or --ray the error shows where it is.",
                )
        self._start(place)
        if len(worker.units) != 1:
            self.again.extend(worker.units)
            return None
        (number, unit), *_ = worker.units.items()
        self.blame[number] += 1
        if self.blame[number] <= self.retries:
            self.again.append(number)
            return None
        times = self.blame[number]
        return Outcome(number, unit, None, f"{times} worker{'s' if times > 1 else ''} died of it: {reason}")

    def _hand_out(self) -> None:
        for place, worker in self.workers.items():
            if worker.idle:
                if self.again:
                    self._give(place, worker, self.again.popleft())
                    worker.alone = True
                elif self.next < len(self.units):
                    self._give(place, worker, self._fresh())
                else:
                    continue
                worker.idle, worker.credit = False, 0
            elif worker.credit > 0:
                if not worker.alone and self.next < len(self.units):
                    self._give(place, worker, self._fresh())
                else:
                    self.crew.give(place, Pause())
                worker.credit -= 1
            plenty = len(self.units) - self.next > len(self.workers)
            if worker.units and not worker.alone and worker.credit == 0 and plenty:
                self._give(place, worker, self._fresh())
                worker.credit -= 1

    def _fresh(self) -> int:
        self.next += 1
        return self.next - 1

    def _give(self, place: int, worker: _Worker, number: int) -> None:
        unit = self.units[number]
        worker.units[number] = unit
        self.crew.give(place, Give(number, unit))
