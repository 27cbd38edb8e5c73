"""Units over local processes: all are done once, whatever dies, and nothing is left behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmsuite.core.pool import run_units
from fmsuite.errors import FmsuiteError, UsageError
from tests.core.pool.works import Doubling, Make, large, unpicklable

ROOT = Path(__file__).resolve().parents[3]


class Lazy(list):
    """Units that are asked for one by one."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("all at once")


def results(work: Doubling, count: int, processes: int, **options: Any) -> list:
    return list(run_units(Make(work), Lazy(range(count)), processes=processes, **options))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(true: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_every_unit_is_done_once(processes: int, tmp_path: Path) -> None:
    found = results(Doubling(tmp_path), 9, processes)
    if processes < 2:
        assert [outcome.number for outcome in found] == list(range(9))
    assert sorted((o.number, o.unit, o.result["twice"], o.failure) for o in found) == [
        (n, n, 2 * n, None) for n in range(9)
    ]
    assert sorted(line.split()[0] for line in (tmp_path / "done.txt").read_text().splitlines()) == list("012345678")
    pids = {outcome.result["pid"] for outcome in found}
    assert (os.getpid() in pids) == (processes == 0)
    assert not any(alive(pid) for pid in pids - {os.getpid()})
    assert list(run_units(Make(Doubling()), [], processes=processes)) == []


def test_a_slow_unit_holds_up_nobody() -> None:
    """While one worker sleeps in its first unit, the other does the rest."""
    found = results(Doubling(pause=0.02, ahead=0), 20, 2)
    slots = [outcome.result["slot"] for outcome in found]
    assert set(slots) == {0, 1}


@pytest.mark.parametrize("processes", [0, 1])
def test_errors_come_up_as_they_are(processes: int) -> None:
    with pytest.raises(FmsuiteError, match=r"^3 cannot be used\. Use another\.$"):
        results(Doubling(wrong={3}), 9, processes)
    with pytest.raises(ZeroDivisionError, match="met 2") as raised:
        results(Doubling(bug={2}), 9, processes)
    assert processes == 0 or "works.py" in raised.value.__notes__[0]


def test_a_result_that_cannot_be_sent_is_an_error() -> None:
    with pytest.raises(Exception, match="pickle"):
        list(run_units(Make(unpicklable), [1, 2], processes=1))


def test_a_killed_worker_costs_nothing(tmp_path: Path) -> None:
    found = results(Doubling(tmp_path, once={4}), 12, 2)
    assert sorted((o.number, o.result["twice"], o.failure) for o in found) == [(n, 2 * n, None) for n in range(12)]


@pytest.mark.parametrize("retries", [0, 1])
def test_a_unit_that_always_kills_is_given_up_and_no_other(retries: int) -> None:
    found = {o.number: o for o in results(Doubling(always={3}, ahead=2), 8, 2, retries=retries)}
    assert sorted(found) == list(range(8))
    failed = found.pop(3)
    assert failed.result is None
    said = "1 worker died" if retries == 0 else "2 workers died"
    assert failed.failure == f"{said} of it: killed by SIGKILL, most often because memory ran out"
    assert all(outcome.failure is None for outcome in found.values())


def test_what_a_work_rests_on_may_die_too() -> None:
    found = results(Doubling(lost={0, 5}), 6, 1, retries=0)
    assert {o.number: o.failure for o in found if o.failure} == {
        n: f"1 worker died of it: a reader died of {n}" for n in (0, 5)
    }
    with pytest.raises(FmsuiteError, match="a reader died of 5"):
        results(Doubling(lost={5}), 6, 0)


def test_workers_that_die_while_they_start_are_not_started_for_ever() -> None:
    with pytest.raises(FmsuiteError, match=r"die while they start \(its process ended with code 3\)"):
        list(run_units(Make(None, deadly=True), [1], processes=1, retries=1))


def test_large_results_wait_until_they_are_taken() -> None:
    seen = []
    for outcome in run_units(Make(large), list(range(6)), processes=2):
        time.sleep(0.05)
        assert outcome.result.shape == (25, 1_000_000)
        assert (outcome.result[[0, -1], ::100_000] == outcome.unit).all()
        seen.append(outcome.number)
    assert sorted(seen) == list(range(6))


def test_logs_of_workers_appear_here(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fmsuite"):
        results(Doubling(), 3, 1)
    assert [r.getMessage() for r in caplog.records if r.name == "fmsuite.test"] == ["did 0", "did 1", "did 2"]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="fmsuite"):
        results(Doubling(), 1, 1)
    assert not caplog.records


def test_closing_ends_all_workers() -> None:
    running = run_units(Make(Doubling(pause=0.01)), range(1000), processes=2)
    pids = {next(running).result["pid"] for _ in range(10)}
    running.close()
    assert pids
    assert not any(alive(pid) for pid in pids)


def test_wrong_numbers_are_refused() -> None:
    for options in ({"processes": -1}, {"retries": -1}):
        with pytest.raises(UsageError, match="less than 0"):
            next(run_units(Make(Doubling()), [1], **options))


SCRIPT = """
import sys
from pathlib import Path
import torch
from torch.utils.data import DataLoader
from fmsuite.core.pool import run_units
from tests.core.pool.loading import Loading

if __name__ == "__main__":
    for outcome in run_units(Loading, range(10**6), processes=2):
        print(*outcome.result, flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_behind(how: signal.Signals, tmp_path: Path) -> None:
    """Two workers, each with a loader's process, and those that multiprocessing keeps beside them."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        pids: set[int] = set()
        while len(pids) < 4:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            pids |= set(map(int, line.split()))
        assert all(alive(pid) for pid in pids)
        # Such a file outlives a process that is killed, unless it has lost its name before.
        assert not [line for pid in pids for line in shared_memory(pid) if not line.endswith("(deleted)")]
        # As a terminal does: to the whole group.
        if how == signal.SIGINT:
            os.killpg(process.pid, how)
        else:
            process.kill()
        until(lambda: not any(alive(pid) for pid in pids))
        until(lambda: not in_session(process.pid) - {process.pid})
        process.stdout.close()
        assert process.wait() == (-how if how == signal.SIGKILL else process.returncode)
        if how == signal.SIGINT:
            assert "KeyboardInterrupt" in process.stderr.read()


def shared_memory(pid: int) -> list[str]:
    return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/dev/shm/" in line]


def in_session(session: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(number) == session and state != "Z":
            found.add(int(stat.parent.name))
    return found


def test_arrays_are_those_that_were_sent() -> None:
    (outcome,) = run_units(Make(Doubling()), [7], processes=1)
    assert np.array_equal(outcome.result["array"], np.full(10, 7))
