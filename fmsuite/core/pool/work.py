"""What a unit of work, its result and its worker are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from fmsuite.errors import FmsuiteError

Unit = TypeVar("Unit")
Result = TypeVar("Result")
UnitIn = TypeVar("UnitIn", contravariant=True)
ResultOut = TypeVar("ResultOut", covariant=True)

_slot = 0


class Work(Protocol[UnitIn, ResultOut]):
    """Does the units of one worker. Built once in it.

    It is called with units that arrive while it works: it may take the next while it still works on one, which is how
    the next source is read ahead. It yields exactly one result for each, in order. When the units end it finishes what
    it has; it is called again if there is more to do (after another worker died, say).
    """

    def __call__(self, units: Iterator[UnitIn], /) -> Iterator[ResultOut]: ...


@dataclass(frozen=True)
class Outcome(Generic[Unit, Result]):
    """A unit that is done, or given up.

    Attributes:
        number: its place among the units.
        result: what the work made of it; ``None`` if it was given up. Its arrays may be read-only.
        failure: why it was given up; ``None`` if it was not.
    """

    number: int
    unit: Unit
    result: Result | None
    failure: str | None


@dataclass(frozen=True)
class Resources:
    """What a worker asks of a Ray cluster.

    Attributes:
        cpus: cores; also its number of threads, rounded down, at least 1.
        gpus: devices that it alone sees.
    """

    cpus: float = 1.0
    gpus: float = 0.0


ONE_CORE = Resources()


class WorkerLost(FmsuiteError):
    """A work raises it when a process that it rests on has died: it counts as the death of its worker. Where the work
    is done in the calling process, it ends the run like any other error."""


def slot() -> int:
    """Which worker of this machine this process is, from 0: a worker that takes the place of one that died has its
    number. 0 in the calling process, and on Ray, which shows each worker its own devices only."""
    return _slot


def set_slot(number: int) -> None:
    """For whoever starts workers."""
    global _slot
    _slot = number
