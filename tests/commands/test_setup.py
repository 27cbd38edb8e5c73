"""Options and indexes meet: what an index fixes, what it leaves open, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmsuite.commands import setup
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.base import Domain, DomainOptions
from fmsuite.errors import UsageError
from fmsuite.tiling.tasks import SourceFacts, SourceRows, Sources, SourceTask


class LinesOptions(DomainOptions):
    size: int = 8
    mirror: bool = False


class Lines(Domain):
    """Remembers in its index only what it says it does."""

    name = "lines"
    Options = LinesOptions
    recorded: tuple[str, ...] | None = None
    options: LinesOptions

    def find_sources(self, paths: Sequence[Path], skipped: SkippedLog) -> Sources:
        return Sources([SourceTask("a", "a")])

    def index_source(self, task: SourceTask) -> SourceRows:
        return SourceRows(task.rows(np.zeros((1, 1)), (8.0,)))

    def index_metadata(self, index: SampleIndex, found: Sequence[SourceFacts], skipped: SkippedLog) -> dict[str, Any]:
        if self.recorded is None:
            return {}
        return {"options": {key: getattr(self.options, key) for key in self.recorded}}

    def _not_needed(self, *arguments: object) -> None:
        raise AssertionError

    input_spec = reader = augmentation = to_rgb = example_data = _not_needed


Lines.__abstractmethods__ = frozenset()


@pytest.mark.parametrize("recorded", [None, ("size",), ("size", "mirror")])
def test_options_survive_the_way_through_a_stored_index(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recorded: tuple[str, ...] | None
) -> None:
    monkeypatch.setattr(Lines, "recorded", recorded)
    asked = Lines(LinesOptions(size=4, mirror=True))
    _, index = setup.open_index(asked, [tmp_path], SkippedLog())
    index.write(tmp_path / "index.parquet")
    opened, _ = setup.open_index(asked, [tmp_path / "index.parquet"], SkippedLog())
    assert opened.options == asked.options


def test_an_index_keeps_the_options_it_was_made_with_and_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Lines, "recorded", ("size",))
    path = tmp_path / "index.parquet"
    _, index = setup.open_index(Lines(LinesOptions(size=4)), [tmp_path], SkippedLog())
    index.write(path)
    other = Lines(LinesOptions(size=16, mirror=True))
    opened, _ = setup.open_index(other, [path], SkippedLog(), asked={"mirror"})
    assert opened.options == LinesOptions(size=4, mirror=True)
    with pytest.raises(UsageError, match=r"made with data.size=4, not 16"):
        setup.open_index(other, [path], SkippedLog(), asked={"size"})
