"""One self-contained HTML page from results and runs: no network, no other file, no script."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmsuite import __version__
from fmsuite.core.reports.charts import swatch
from fmsuite.core.reports.class_maps import MapFolder, MapSection, map_section
from fmsuite.core.reports.runs import RunSection, run_section
from fmsuite.core.reports.sections import ComparisonSection, comparison_section
from fmsuite.core.reports.sources import Comparison, Source
from fmsuite.core.reports.svg import plain
from fmsuite.core.reports.tuned import Tuned
from fmsuite.core.reports.tuned_section import TunedSection, tuned_section
from fmsuite.core.reports.wording import plural
from fmsuite.errors import UsageError

Section = ComparisonSection | TunedSection | MapSection | RunSection

TEMPLATES = Path(__file__).parent / "templates"


def render(sources: Sequence[Source], title: str | None = None) -> str:
    """The page, of which the same sources make the same text.

    Every value is escaped; characters that a page cannot hold are replaced.

    Args:
        title: heading of the page; that of the first section if not given.

    Raises:
        UsageError: if there is nothing to show, or jinja2 is not installed.
    """
    if not sources:
        raise UsageError("There is nothing to report.", "Name at least one folder of results or run folder.")
    environment = _environment()
    keys = (f"chart-{number}" for number in itertools.count(1))
    comparisons: list[ComparisonSection] = []
    tuned: list[TunedSection] = []
    maps: list[MapSection] = []
    runs: list[RunSection] = []
    for source in sources:
        if isinstance(source, Comparison):
            comparisons.append(comparison_section(source, f"results-{len(comparisons) + 1}", keys))
        elif isinstance(source, Tuned):
            tuned.append(tuned_section(source, f"tuned-{len(tuned) + 1}", keys))
        elif isinstance(source, MapFolder):
            maps.append(map_section(source, f"maps-{len(maps) + 1}"))
        else:
            runs.append(run_section(source, f"run-{len(runs) + 1}", keys))
    sections: list[Section] = [*tuned, *comparisons, *maps, *runs]
    heading = sections[0].title
    _tell_apart(sections)
    return environment.get_template("page.html").render(
        title=title or heading, tuned=tuned, comparisons=comparisons, maps=maps, runs=runs, version=__version__
    )


def _tell_apart(sections: Sequence[Section]) -> None:
    """Give sections of equal titles their folders' names."""
    titles = Counter(section.title for section in sections)
    for section in sections:
        if titles[section.title] > 1:
            section.title = f"{section.title} ({section.folder})"


def _environment() -> Any:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise UsageError("Reports need jinja2.", "pip install 'fmsuite[reports]'") from error

    def clean(value: object) -> object:
        return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=clean,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(swatch=swatch, plural=plural)
    return environment
