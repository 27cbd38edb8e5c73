"""A domain of text files, importable in worker processes: a file's first word says what is done with it."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import Skipped, SkippedLog
from fmsuite.domains.base import Domain, DomainOptions, Units
from fmsuite.domains.pathology import PathologyDomain
from fmsuite.errors import ReadFailure
from fmsuite.tiling.labels import LabelOptions
from fmsuite.tiling.tasks import SourceFacts, SourceRows, Sources, SourceTask, labelled_sources


class LinesOptions(DomainOptions, LabelOptions):
    """``width``: of a window. ``colour``: matters to nothing. ``trace``: a file in which each look leaves a line."""

    width: float = 2.0
    colour: str = "red"
    trace: Path | None = None


class Lines(Domain):
    """As many windows as a file's text has words.

    ``bad`` cannot be read, ``kill`` kills its process, ``kill-once`` the first time only, ``note`` has something to
    say, ``part of X`` is one thing with all other parts of X.
    """

    name = "lines"
    title = "Lines of text"
    Options = LinesOptions
    default_recipe = ""
    units = Units(source="text")
    free_options = frozenset({"colour", "trace"})
    options: LinesOptions

    def find_sources(self, paths: Sequence[Path], skipped: SkippedLog) -> Sources:
        return labelled_sources(self.options, paths, (".txt",), "texts", skipped)

    def index_source(self, task: SourceTask) -> SourceRows:
        if self.options.trace is not None:
            with self.options.trace.open("a") as file:
                file.write(f"{Path(task.path).name}\n")
        words = Path(task.path).read_text().split()
        if words[0] == "slow":
            time.sleep(0.3)
        if words[0] == "bad":
            raise ReadFailure(task.path, "open", "it is bad.", "Be good.")
        if words[0] == "kill" or (words[0] == "kill-once" and _first_time(task.path)):
            os.kill(os.getpid(), signal.SIGKILL)
        if words[0] == "part" and task.details is None:
            return SourceRows(None, {"whole": words[2]})
        notes = (Skipped(task.path, "read", "a word was left out"),) if words[0] == "note" else ()
        positions = np.arange(len(words), dtype=np.float64)[:, None]
        return SourceRows(task.rows(positions, (self.options.width,)), {"words": words}, notes)

    def settle_sources(self, found: Sequence[SourceFacts], skipped: SkippedLog) -> Sequence[SourceTask]:
        tasks, seen = [], set()
        for source in found:
            whole = source.facts.get("whole")
            if whole is None:
                tasks.append(source.task)
            elif whole not in seen:
                seen.add(whole)
                tasks.append(replace(source.task, details=whole))
            else:
                skipped.add(source.task.path, "metadata", f"another file is {whole} too")
        return tasks

    def index_metadata(self, index: SampleIndex, found: Sequence[SourceFacts], skipped: SkippedLog) -> dict[str, Any]:
        words = Counter(word for source in found for word in source.facts["words"])
        return {"words": dict(sorted(words.items())), "last": found[-1].task.name if found else None}

    def _not_needed(self, *arguments: object) -> Any:
        raise AssertionError

    input_spec = reader = augmentation = to_rgb = example_data = _not_needed


def _first_time(path: str) -> bool:
    seen = Path(f"{path}.seen")
    if seen.exists():
        return False
    seen.touch()
    return True


class Deadly(PathologyDomain):
    """Kills its process, once, at one slide."""

    def __init__(self, options: DomainOptions, at: Path) -> None:
        super().__init__(options)
        self.at = at

    def index_source(self, task: SourceTask) -> SourceRows:
        if task.path == str(self.at) and _first_time(task.path):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().index_source(task)
