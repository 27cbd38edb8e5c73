"""Files of results appear together, or the earlier ones stay."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fmsuite.errors import FmsuiteError

RESULTS = "results.json"


def write_results(folder: Path, texts: Mapping[str, str]) -> None:
    """Write texts under their names. Earlier files stay as they are until all of these are on the disk. While they are
    being exchanged there is no ``RESULTS``, so that whoever is killed then leaves no results rather than parts of two.

    Args:
        texts: ``RESULTS`` last.

    Raises:
        FmsuiteError: if a file cannot be written.
    """
    partials = {name: folder / f".{name}.partial" for name in texts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, partial in partials.items():
            partial.write_text(texts[name], encoding="utf-8", newline="")
        (folder / RESULTS).unlink(missing_ok=True)
        for name, partial in partials.items():
            os.replace(partial, folder / name)
    except OSError as error:
        raise FmsuiteError(
            f"{folder}: the results cannot be written ({error.strerror or error}).",
            "Check the folder's permissions and the space left.",
        ) from error
    finally:
        for partial in partials.values():
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def as_csv(rows: Sequence[Sequence[Any]]) -> str:
    """The rows, the first of them names."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()
