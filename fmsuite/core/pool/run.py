"""Runs units, here or elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence

from fmsuite.core.pool.desk import Crew, Desk
from fmsuite.core.pool.processes import Processes
from fmsuite.core.pool.work import ONE_CORE, Outcome, Resources, Result, Unit, Work
from fmsuite.errors import UsageError


def run_units(
    make: Callable[[], Work[Unit, Result]],
    units: Sequence[Unit],
    *,
    processes: int = 0,
    ray: str | None = None,
    retries: int = 2,
    resources: Resources = ONE_CORE,
) -> Generator[Outcome[Unit, Result], None, None]:
    """Outcomes as they are finished, in any order.

    Workers pull units from one queue, so that a slow unit holds up nobody else. While the caller does something else,
    each worker goes on until it has two finished results that nobody took; so memory is bounded by a few units and
    results a worker, and one result here.

    A worker that dies (out of memory, a C library that crashes) is replaced, and its units are done again. If it had
    several, these are then done one by one; a unit of which ``retries`` + 1 workers died, alone with it, is given up.

    Closing the generator, Ctrl-C or the death of this process ends all workers, those of their loaders included, and
    leaves no process and no shared memory behind. Workers ignore Ctrl-C. What they log appears here.

    Args:
        make: builds the work in each worker; picklable, as units and results are.
        units: asked for one by one (and again after a worker's death), so that they need not exist all at once.
        processes: workers. 0 does the units in this process, in order and as they are asked for; with ``ray``, as many
            workers as the cluster has room for.
        ray: the address of a cluster; ``auto`` for that of this machine, ``local`` starts one here.
        retries: how often a unit that was to blame for a worker's death is tried again.
        resources: of a worker on Ray.

    Raises:
        UsageError: if Ray is not installed, or does not answer.
        Exception: whatever a worker raises: a ``FmsuiteError`` as it is, others with the worker's traceback as a note.
    """
    if processes < 0 or retries < 0:
        raise UsageError(f"{processes} processes and {retries} retries.", "Neither can be less than 0.")
    if ray is None and processes == 0:
        yield from _inline(make, units)
        return
    if not len(units):
        return
    crew: Crew
    if ray is None:
        crew = Processes(make, min(processes, len(units)))
    else:
        from fmsuite.core.pool.ray_actors import RayActors

        crew = RayActors(make, len(units), processes, ray, resources)
    orderly = False
    try:
        yield from Desk(crew, units, retries).run()
        orderly = True
    finally:
        crew.close(orderly)


def _inline(
    make: Callable[[], Work[Unit, Result]], units: Sequence[Unit]
) -> Generator[Outcome[Unit, Result], None, None]:
    taken: deque[tuple[int, Unit]] = deque()

    def stream() -> Iterator[Unit]:
        for number in range(len(units)):
            taken.append((number, units[number]))
            yield taken[-1][1]

    results = make()(stream())
    try:
        for result in results:
            number, unit = taken.popleft()
            yield Outcome(number, unit, result, None)
    finally:
        # A work need not be a generator.
        close = getattr(results, "close", None)
        if close is not None:
            close()
    if taken:
        raise RuntimeError(f"the work ended without the results of {len(taken)} of its units")
