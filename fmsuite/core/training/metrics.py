"""metrics.jsonl and TensorBoard events: what was measured, at which step."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fmsuite.errors import FmsuiteError

logger = logging.getLogger("fmsuite")

Value = float | int | str


class MetricsLog:
    """Appends a JSON object a line, each with the ``step`` (optimiser steps taken) it was measured at.

    Args:
        path: the file.
        tensorboard: folder for TensorBoard events; ``None`` writes none.
        start_step: where the run stands; 0 begins an empty file. Lines measured after it are dropped: they come from
            work that is lost and will be repeated, so that the file of a resumed run is that of an uninterrupted one.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None, start_step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _keep_until(path, start_step if start_step > 0 else -1)
        self._file = path.open("a", encoding="utf-8")
        self._events = _event_writer(tensorboard, start_step) if tensorboard is not None else None

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Append a line and flush it, so that nothing is lost in a crash.

        Raises:
            FmsuiteError: if the file cannot be written.
        """
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise FmsuiteError(
                f"{self.path}: cannot be written ({error.strerror or error}).",
                "Free some space and run again with --resume; the checkpoints are intact.",
            ) from error
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, str):
                    self._events.add_text(name, value, step)
                else:
                    self._events.add_scalar(name, value, step)

    def close(self) -> None:
        # What could not be written was reported by ``write``.
        with suppress(OSError):
            self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file; a last line cut off by a crash is passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def _keep_until(path: Path, step: int) -> None:
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(partial, path)


def _event_writer(folder: Path, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("TensorBoard is not installed, so no event files are written (pip install tensorboard).")
        return None
    return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step > 0 else 0)  # type: ignore[no-untyped-call]
