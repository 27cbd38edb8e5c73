"""``fmsuite tile``: find the windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fmsuite.commands.setup import domain_options, open_domain, open_index
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import FILE_NAME, SkippedLog
from fmsuite.domains.base import Progress, no_progress


@dataclass
class Tiled:
    """What was found.

    Attributes:
        index, path: the index and where it was written.
        skipped: what could not be used.
        previews: pictures, if they were asked for.
    """

    index: SampleIndex
    path: Path
    skipped: SkippedLog
    previews: list[Path]


def tile(
    domain: str,
    paths: Sequence[Path],
    out: Path,
    *,
    overrides: Sequence[str] = (),
    preview: bool = False,
    strict: bool = False,
    progress: Progress = no_progress,
) -> Tiled:
    """Write an index of the windows in files and folders, with ``skipped.csv`` and previews beside it.

    Raises:
        UsageError: for bad paths, options, or when no window was found.
    """
    if out.suffix != ".parquet":
        out = out / "index.parquet"
    log_path = out.with_name(FILE_NAME)
    log_path.unlink(missing_ok=True)
    skipped = SkippedLog(log_path, strict)
    plugin = open_domain(domain, domain_options(domain, overrides))
    plugin, index = open_index(plugin, [Path(p) for p in paths], skipped, progress)
    index.write(out)
    previews = plugin.preview(index, out.with_name("preview")) if preview else []
    return Tiled(index, out, skipped, previews)
