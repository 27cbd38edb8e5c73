"""What commands print, and how they end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fmsuite.core.training.progress import console as progress_console

if TYPE_CHECKING:
    from fmsuite.core.evaluation.cases import FinetuneResults
    from fmsuite.core.evaluation.results import Results

DONE, FAILED, WRONG_USE, DONE_WITH_SKIPS, INTERRUPTED = 0, 1, 2, 3, 128 + signal.SIGINT
out_console = Console(width=None if sys.stdout.isatty() else 160)
console = progress_console()


def say(text: str) -> None:
    out_console.print(escape(text), highlight=False, soft_wrap=True)


def finish(skipped: str) -> None:
    from fmsuite.core.distributed import launched

    if skipped:
        say(skipped)
        # torchrun takes any code but 0 for a failure, and may start the job again.
        if not launched():
            raise typer.Exit(DONE_WITH_SKIPS)


def reported(folder: Path, wanted: bool, results: Sequence[Path] = ()) -> None:
    """
    Args:
        results: folders of results, if they are others than the one that gets the report.
    """
    from fmsuite.commands.report import report as write

    folders = list(results) or [folder]
    if wanted:
        say(f"Report: {write(folders, folder / 'report.html')}")
    say(f"Results: {', '.join(str(each / 'results.json') for each in folders)}")


def show_results(results: Results) -> None:
    """The primary metric of every evaluation, as a table."""
    from fmsuite.core.reports.wording import of, shots_name

    several = any(e.fraction is not None for e in results.evaluations)
    heading = "shots or share" if several else "shots"
    table = Table("encoder", "method", heading, results.primary.replace("_", " "), box=None, pad_edge=False)
    for e in results.evaluations:
        metric = results.primary if results.primary in e.metrics else next(iter(e.metrics), results.primary)
        value = of(e, metric)
        other = "" if metric == results.primary else f" {metric}"
        interval = "" if value.low is None or value.high is None else f" ({value.low:.3f}-{value.high:.3f})"
        method = f"{e.method}, shuffled labels" if e.shuffled else e.method
        shots = shots_name(e.shots) if e.fraction is None else f"{e.fraction:.3g} of the groups"
        table.add_row(escape(e.encoder), method, shots, f"{value.mean:.3f}{interval}{other}")
    out_console.print(table)


def show_finetuned(results: FinetuneResults) -> None:
    """The primary metric of every arm and fraction, and how far it is above the control, as a table."""
    from fmsuite.core.evaluation.cases import OVERALL

    metric = results.metrics[results.primary]
    table = Table("arm", "labels", metric.short, "difference to scratch", box=None, pad_edge=False)
    for cell in results.cells:
        numbers = []
        for scores, sign in ((cell.scores, ""), (cell.differences, "+")):
            value = scores.get(results.primary, {}).get(OVERALL)
            interval = (
                "" if value is None or value.low is None else f" ({value.low:{sign}.3f} to {value.high:{sign}.3f})"
            )
            numbers.append("" if value is None else f"{value.mean:{sign}.3f}{interval}")
        table.add_row(escape(cell.arm), f"{cell.fraction:.3g}", *numbers)
    out_console.print(table)
