"""``fmsuite tile``: find the windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fmsuite.commands.setup import domain_options, open_domain, open_index, parts_of
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import FILE_NAME, SkippedLog
from fmsuite.domains.base import Progress, no_progress
from fmsuite.tiling.parts import discard_parts


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
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    preview: bool = False,
    strict: bool = False,
    processes: int | None = 0,
    ray: str | None = None,
    progress: Progress = no_progress,
) -> Tiled:
    """Write an index of the windows in files and folders, with ``skipped.csv`` and previews beside it.

    After an interruption the same call goes on with the sources that are not finished.
    An index that is not called ``index.parquet`` gives its name to both, so that several can share a folder.

    Args:
        recipe: take the windows that this recipe trains on; the domain's own defaults if not given.
        overrides: ``key=value`` items for single options of the domain.
        processes, ray: who looks at sources; see ``indexing.build_index``.

    Raises:
        UsageError: for bad paths, options, or when no window was found.
    """
    if out.suffix != ".parquet":
        out = out / "index.parquet"
    name = FILE_NAME if out.stem == "index" else f"{out.stem}.{FILE_NAME}"
    log_path = out.with_name(name)
    parts = parts_of(out)
    if not parts.is_dir():
        log_path.unlink(missing_ok=True)
    skipped = SkippedLog(log_path, strict)
    plugin = open_domain(domain, domain_options(domain, overrides, recipe))
    files = [Path(path) for path in paths]
    plugin, index = open_index(plugin, files, skipped, progress, parts=parts, processes=processes, ray=ray)
    index.write(out)
    discard_parts(parts)
    pictures = out.with_name("preview" if out.stem == "index" else f"{out.stem}.preview")
    previews = plugin.preview(index, pictures) if preview else []
    return Tiled(index, out, skipped, previews)
