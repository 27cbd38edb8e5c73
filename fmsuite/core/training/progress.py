"""Progress with a rate and the time left: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Item = TypeVar("Item")

ProgressReport = Callable[[Iterable, int, str], Iterable]
"""``report(items, total, title)`` yields the items and shows how far along they are."""

LINE_EVERY_S = 10.0
"""Seconds between plain lines."""


@cache
def console() -> Console:
    """The one console of messages and progress; it writes to the standard error stream, results go to the other."""
    return Console(stderr=True)


def silent(items: Iterable[Item], total: int, title: str) -> Iterable[Item]:
    """Shows nothing."""
    return items


def console_progress(items: Iterable[Item], total: int, title: str) -> Iterator[Item]:
    """Yields the items while showing how many of ``total`` are done, at what rate, and the time left.

    On a terminal this is a bar that stays under other output; elsewhere a line every ten seconds and one at the end.
    """
    return _bar(items, total, title) if console().is_terminal else _lines(items, total, title)


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(format_rate(task.finished_speed or task.speed), style="progress.data.speed")


def _bar(items: Iterable[Item], total: int, title: str) -> Iterator[Item]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _RateColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console()) as bar:
        task = bar.add_task(title, total=total)
        for item in items:
            yield item
            bar.advance(task)


def _lines(items: Iterable[Item], total: int, title: str) -> Iterator[Item]:
    started = last = time.monotonic()
    done = 0

    def show(now: float) -> None:
        rate = done / max(now - started, 1e-9)
        left = f", {format_seconds((total - done) / rate)} left" if 0 < done < total else ""
        line = f"{title}: {done}/{total}, {format_rate(rate)}{left}"
        console().print(line, markup=False, highlight=False, soft_wrap=True)

    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= LINE_EVERY_S:
            show(now)
            last = now
    show(time.monotonic())


def format_rate(rate: float | None) -> str:
    """``3.2/s``, ``12/min``: whichever reads well."""
    if not rate:
        return "-/s"
    if rate >= 1:
        return f"{rate:.1f}/s" if rate < 100 else f"{rate:.0f}/s"
    return f"{rate * 60:.1f}/min"


def format_seconds(seconds: float) -> str:
    """``45 s``, ``12 min 05 s``, ``3 h 20 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
