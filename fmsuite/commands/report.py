"""``fmsuite report``: one page from any runs and results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fmsuite.core.reports.page import render
from fmsuite.core.reports.sources import Source, read_sources
from fmsuite.errors import FmsuiteError, UsageError

NAME = "report.html"


def report(folders: Sequence[Path], out: Path, title: str | None = None) -> Path:
    """Write one self-contained HTML page; an earlier one is replaced by a whole page or stays.

    Args:
        folders: run folders and folders of results, in any mix; what they hold is shown in their order, results first.
        out: the file, or an existing folder for ``report.html`` in it.
        title: heading of the page.

    Returns:
        The file.

    Raises:
        UsageError: if a folder holds neither a run nor results, a file is damaged, or jinja2 is missing.
        FmsuiteError: if the page cannot be written.
    """
    if not folders:
        raise UsageError("No folder was named.", "Name at least one run folder or folder of results.")
    sources: list[Source] = []
    for folder in dict.fromkeys(Path(folder) for folder in folders):
        sources += read_sources(folder)
    page = render(sources, title)
    path = out / NAME if out.is_dir() else out
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise FmsuiteError(
            f"{path}: cannot be written ({error.strerror or error}).", "Choose another --out."
        ) from error
    return path
