"""The root of a feature store: what decides its features, and how it is begun, recognised and compared."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import zarr
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fmsuite.core.data.grouping import By
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.lock import WriterLock
from fmsuite.errors import FmsuiteError, UsageError

FORMAT = "fmsuite features"
FORMAT_VERSION = 1
INDEX = "index.parquet"
LOCK = ".lock"
UNREADABLE = "unreadable.json"
_ROOT = "zarr.json"


class StoreFacts(BaseModel):
    """What decides the features of a store, and where they came from: the attributes of its root group.

    Attributes:
        domain: the index's.
        identity: ``Encoder.identity``.
        name: the encoder as the user called it.
        provenance: the encoder's own.
        pooling: how tokens became one vector.
        normalisation: one sentence on what raw values became; empty in stores that were made before it was kept.
        dim: D.
        size, axes: the encoder's input.
        index_hash: ``SampleIndex.hash``.
        by: what a group is.
        batch_size: windows in a batch; the last bits of features depend on it.
        batching: the rule by which groups are cut into batches (``embedding_plan.BATCHING``); stores without it have
            the first, whose batches could hold windows of any groups.
        precision: number format of the encoder's matrix products.
        versions: of the packages that made the features.
        command: the command line that began the store.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    domain: str
    identity: str
    name: str
    provenance: dict[str, Any] = Field(default_factory=dict)
    pooling: str
    normalisation: str = ""
    dim: int = Field(ge=1)
    size: tuple[int, ...]
    axes: tuple[str, ...]
    index_hash: str
    by: By
    batch_size: int = Field(ge=1)
    batching: int = Field(default=1, ge=1)
    precision: str = "float32"
    versions: dict[str, str] = Field(default_factory=dict)
    command: list[str] = Field(default_factory=list)

    def differences(self, other: StoreFacts) -> list[str]:
        """What would make other features, each with both values: ``batch_size 64 against 32``."""
        found = []
        if (self.domain, self.index_hash) != (other.domain, other.index_hash):
            found.append(f"index {self.index_hash} ({self.domain}) against {other.index_hash} ({other.domain})")
        if self.identity != other.identity:
            found.append(f"encoder {self.name} ({self.identity}) against {other.name} ({other.identity})")
        for name in ("pooling", "dim", "size", "axes", "by", "batch_size", "batching", "precision"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                found.append(f"{name} {mine} against {theirs}")
        return found


def read_facts(path: Path) -> StoreFacts | None:
    """The facts of a store; ``None`` if the folder is none.

    Raises:
        UsageError: if it is of a newer version.
        FmsuiteError: if it says that it is a store, and its facts are damaged.
    """
    try:
        attributes = json.loads((path / _ROOT).read_text(encoding="utf-8"))["attributes"]
        if attributes.pop("format") != FORMAT:
            return None
    except (OSError, KeyError, TypeError, AttributeError):
        return None
    except ValueError as error:
        if (path / INDEX).is_file() and (path / LOCK).is_file():
            raise damage(path / _ROOT, str(error), path) from error
        return None
    version = attributes.pop("format_version", None)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UsageError(f"{path}: written by a newer fmsuite.", "Upgrade fmsuite to read it.")
    try:
        return StoreFacts.model_validate(attributes)
    except ValidationError as error:
        raise damage(path / _ROOT, f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}", path) from error


def begin_store(path: Path, facts: StoreFacts, index: SampleIndex, replace: bool) -> WriterLock:
    """Put an empty store in place, in one step, and lock it.

    Args:
        replace: there is a store, which is moved aside for it and then removed.
    """
    new, aside = (path.with_name(f".{path.name}.{os.getpid()}.{role}") for role in ("new", "old"))
    lock: WriterLock | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)
        attributes = {"format": FORMAT, "format_version": FORMAT_VERSION, **facts.model_dump(mode="json")}
        zarr.open_group(str(new), mode="w-", attributes=attributes)
        index.write(new / INDEX)
        lock = WriterLock(new / LOCK, str(path))
        if replace:
            os.rename(path, aside)
        try:
            os.rename(new, path)
        except OSError:
            if replace:
                os.rename(aside, path)
            raise
    except OSError as error:
        if lock is not None:
            lock.close()
        raise FmsuiteError(
            f"{path}: cannot be written ({error.strerror or error}).", "Check the folder and the free space."
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if replace:
        shutil.rmtree(aside)
    return lock


def damage(file: Path, reason: str, remove: Path | None = None) -> FmsuiteError:
    """The error for a file of a store that is not as it was written, and what to remove."""
    return FmsuiteError(
        f"{file}: damaged ({reason}).",
        f"Remove {remove or file} and run `fmsuite embed` again: it makes only what is missing.",
    )
