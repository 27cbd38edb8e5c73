"""Finished sources, kept on disk while an index is being built: what dies on slide 4,812 of 5,000 goes on there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fmsuite import __version__

_FACTS_KEY = b"fmsuite part"


class PartStore:
    """Rows of single sources by the source's path, size and time of change, and by all that decided them.

    Args:
        folder: where the parts lie; ``None`` keeps nothing.
        decided_by: whatever else the rows depend on (options, labels), as JSON values. Parts of other decisions, or of
            another version of this package, are not found.
    """

    def __init__(self, folder: Path | None, decided_by: Any) -> None:
        self.folder = folder
        self.decided_by = json.dumps([__version__, decided_by], sort_keys=True)

    def load(self, source: Path, note: Any) -> tuple[pa.Table, dict[str, Any]] | None:
        """The rows of a source and what was remembered of it; ``None`` if they have to be found (again).

        Args:
            note: what else its rows depend on, as JSON values.
        """
        path = self._path(source, note)
        if path is None or not path.is_file():
            return None
        try:
            table = pq.read_table(path)
            facts = json.loads(table.schema.metadata[_FACTS_KEY])
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
            # A damaged part is no loss: the source is looked at again.
            return None
        return table.replace_schema_metadata(None), facts

    def save(self, source: Path, note: Any, table: pa.Table, facts: dict[str, Any]) -> None:
        """Keep a source's rows; the part is whole or absent."""
        path = self._path(source, note)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        pq.write_table(table.replace_schema_metadata({_FACTS_KEY: json.dumps(facts).encode()}), partial)
        os.replace(partial, path)

    def _path(self, source: Path, note: Any) -> Path | None:
        if self.folder is None:
            return None
        status = source.stat()
        identity = json.dumps([str(source), status.st_size, status.st_mtime_ns, self.decided_by, note], sort_keys=True)
        return self.folder / f"{hashlib.blake2b(identity.encode(), digest_size=12).hexdigest()}.parquet"


def discard_parts(folder: Path) -> None:
    """Remove the parts once the index that they were for has been written."""
    shutil.rmtree(folder, ignore_errors=True)
