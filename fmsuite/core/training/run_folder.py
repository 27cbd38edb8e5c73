"""A run's folder: what lies where, and the facts needed to repeat the run."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from fmsuite import __version__
from fmsuite.core.config import RunConfig
from fmsuite.core.data.pairs import FILE_NAME as PAIRS_NAME
from fmsuite.core.data.skipped import FILE_NAME as SKIPPED_NAME
from fmsuite.core.distributed import launch_id, world_size
from fmsuite.core.training.checkpoint import list_checkpoints
from fmsuite.core.versions import package_versions
from fmsuite.errors import UsageError

_PACKAGES = ("timm", "numpy", "zarr", "pyarrow", "pydantic", "monai", "albumentations", "rasterio")

HashName = Literal["index_hash", "pairs_hash"]


class RunFolder:
    """Paths in a run's folder.

    Args:
        path: the folder; made when something is written to it.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def facts_path(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def views_path(self) -> Path:
        return self.path / "views.png"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def index_path(self) -> Path:
        return self.path / "index.parquet"

    @property
    def pairs_path(self) -> Path:
        return self.path / PAIRS_NAME

    @property
    def skipped_path(self) -> Path:
        return self.path / SKIPPED_NAME

    def refuse_if_begun(self) -> None:
        """
        Raises:
            UsageError: if a run has left checkpoints or metrics here.
        """
        if list_checkpoints(self.checkpoints) or self.metrics_path.exists():
            raise UsageError(
                f"{self.path}: there is a run in this folder already.",
                "Continue it with --resume, or choose another folder with --out.",
            )

    def refuse_other(self, name: HashName, now: str) -> None:
        """
        Raises:
            UsageError: if the run was begun on data of another hash.
        """
        before = self.facts().get(name, now)
        if before != now:
            what = {"index_hash": "another index", "pairs_hash": "other pairs"}[name]
            raise UsageError(
                f"{self.path}: the run was begun on {what} ({before}, now {now}).",
                "Resume on the original data, or start a new run in another folder.",
            )

    def begin(
        self,
        config: RunConfig,
        index_hash: str,
        command: Sequence[str] | None = None,
        resume: bool = False,
        pairs_hash: str | None = None,
    ) -> None:
        """Write ``config.yaml`` and ``run.json``; a resumed run adds a start to the latter.

        Args:
            index_hash: ``SampleIndex.hash`` of the windows trained on.
            command: the command line; this process's own by default.
            pairs_hash: ``Pairs.hash`` of what is paired with them; ``None`` where nothing is.

        Raises:
            UsageError: if a run is here and ``resume`` is False, or if it was begun on another index or other pairs.
        """
        if not resume:
            self.refuse_if_begun()
        facts = self.facts() if resume else {}
        hashes: dict[HashName, str] = {"index_hash": index_hash}
        if pairs_hash is not None:
            hashes["pairs_hash"] = pairs_hash
        if resume:
            for name, now in hashes.items():
                self.refuse_other(name, now)
        start = {
            "command": list(sys.argv if command is None else command),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "ranks": world_size(),
            "launch": launch_id(),
            "versions": {"fmsuite": __version__, "torch": torch.__version__, **package_versions(_PACKAGES)},
        }
        facts = {
            "seed": config.seed,
            **{str(name): now for name, now in hashes.items()},
            "starts": [*facts.get("starts", []), start],
        }
        self.path.mkdir(parents=True, exist_ok=True)
        _replace_text(self.config_path, config.to_yaml())
        _replace_text(self.facts_path, json.dumps(facts, indent=2) + "\n")

    @property
    def last_launch(self) -> str | None:
        """Under which launcher the run was started last; ``None`` if under none."""
        starts = self.facts().get("starts") or [{}]
        return starts[-1].get("launch")

    def facts(self) -> dict[str, Any]:
        """``run.json``: seed, index hash, and an entry for each time that the run was started; empty if not begun.

        Raises:
            UsageError: if the file is damaged.
        """
        if not self.facts_path.exists():
            return {}
        try:
            return json.loads(self.facts_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(
                f"{self.facts_path}: not valid JSON ({error}).", "Remove it to go on without it."
            ) from error


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
