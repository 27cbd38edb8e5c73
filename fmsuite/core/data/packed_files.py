"""What both kinds of packed copies share: names, JSON files that are whole or absent, and hashes that are checked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fmsuite.core.data.shards import file_digest
from fmsuite.errors import FmsuiteError

INDEX, PACKING = "index.parquet", "packing.json"
METADATA = "packed"
"""Key of an index's metadata that says where its packed copy lies."""
AGAIN = "Delete the file and run the same `fmsuite pack` again: only its shard is made anew."


def read_json(path: Path) -> Any:
    """
    Raises:
        FmsuiteError: if it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FmsuiteError(f"{path}: cannot be read ({error}).", "Run the same `fmsuite pack` again.") from error


def write_json(path: Path, value: Any) -> None:
    """Whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_ = path.with_name(f".{path.name}.{os.getpid()}")
    partial_.write_text(json.dumps(value), encoding="utf-8")
    os.replace(partial_, path)


def wrong_file(path: Path, size: int, digest: str) -> str | None:
    """What is wrong with a file that had this length and SHA-256; ``None`` if nothing."""
    try:
        length, found = file_digest(path)
    except OSError as error:
        return str(error.strerror)
    if length != size:
        return f"it has {length} bytes instead of {size}"
    return None if found == digest else "its content has changed"
