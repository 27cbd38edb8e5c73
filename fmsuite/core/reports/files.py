"""Reading what folders hold, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fmsuite.core.data.skipped import Skipped, SkippedLog
from fmsuite.errors import UsageError


def json_object(path: Path) -> dict[str, Any]:
    """
    Raises:
        UsageError: if the file cannot be read, or is not a JSON object.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as JSON ({error}).", "Restore it, or make it again.") from error
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: not a JSON object.", "Restore it, or make it again.")
    return raw


def skipped_lines(path: Path) -> list[Skipped]:
    """None where there is no such file.

    Raises:
        UsageError: if it cannot be read.
    """
    try:
        return SkippedLog(path).entries if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}).", "Restore or remove it.") from error
