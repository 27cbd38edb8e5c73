"""A checkpoint on disk: the files of PyTorch's distributed checkpoints, in a folder that appears whole or not at all,
and read so that nothing in them can run."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

DESCRIPTION = "checkpoint.json"
TABLE = ".metadata"
"""Where PyTorch says which tensor is in which file."""
BUFFER = 2**20
"""Bytes that are written at once; a tensor comes in dozens of pieces."""

_TABLE_TYPES = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "pathlib": ("Path", "PosixPath", "WindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath"),
}


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: shape and dtype of the whole."""

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, entry: TensorStorageMetadata) -> Stored:
        return cls(entry.size, entry.properties.dtype)


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if name not in _TABLE_TYPES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)


def read_stored(folder: Path) -> Metadata:
    """The table of a checkpoint's tensors.

    Raises:
        ValueError: if it is damaged, or names anything but tensors in files of this folder.
        OSError: if it cannot be read.
    """
    try:
        with (folder / TABLE).open("rb") as file:
            table = _TableUnpickler(file).load()
        entries, places = table.state_dict_metadata, table.storage_data
        whole = all(isinstance(entry, TensorStorageMetadata) for entry in entries.values())
        inside = all(Path(place.relative_path).name == place.relative_path for place in places.values())
    except OSError:
        raise
    except Exception as error:  # Whatever bytes can make an unpickler do.
        raise ValueError(f"{TABLE}: {error or type(error).__name__}") from error
    if not (isinstance(table, Metadata) and whole and inside):
        raise ValueError(f"{TABLE} names something else than tensors in this folder")
    return table


class Reader(FileSystemReader):
    """Reads tensors (PyTorch opens them with ``weights_only``) by a table that ``read_stored`` has checked."""

    def __init__(self, folder: Path, table: Metadata) -> None:
        super().__init__(folder)
        self.table = table

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self.table.storage_meta is None:
            self.table.storage_meta = StorageMeta()
        return self.table


class _Recorder(io.BufferedWriter):
    """Remembers why a write failed, which ``torch.save`` reports as an unspecific RuntimeError."""

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


class _RecordingFileSystem(FileSystem):
    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with _Recorder(io.FileIO(path, mode), BUFFER) as stream:
            try:
                yield stream
            except RuntimeError as error:
                if stream.failure is None:
                    raise
                raise stream.failure from error


class Writer(FileSystemWriter):
    """Every rank writes its part into ``.NAME.partial``; when all of it is on the disk, rank 0 gives the folder its
    name.

    Args:
        target: the checkpoint's folder.
        description: text of ``checkpoint.json``.
        then: called on rank 0 when the checkpoint has its name.
    """

    def __init__(self, target: Path, description: str, then: Callable[[], None]) -> None:
        self.target, self.partial = target, partial_of(target)
        # What is written is in the host's memory already.
        super().__init__(self.partial, sync_files=True, per_thread_copy_ahead=0)
        self.fs = _RecordingFileSystem()
        self.description = description
        self.then = then

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        # Rank 0 has not necessarily made the folder yet; ``write_data`` is called when it has.
        return plan

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        with self.fs.create_stream(self.partial / DESCRIPTION, "wb") as stream:
            stream.write(self.description.encode("utf-8"))  # type: ignore[attr-defined]
            stream.flush()
            os.fsync(stream.fileno())
        sync_folder(self.partial)
        replaced = self.target.with_name(f".{self.target.name}.replaced")
        if self.target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(self.target, replaced)
        os.replace(self.partial, self.target)
        sync_folder(self.target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        self.then()


def partial_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def remove_checkpoint(path: Path) -> None:
    """Takes its name away first, so that no half-removed folder is found under it."""
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """What a run that was killed left half written or half removed."""
    for kind in ("partial", "replaced", "removed"):
        for path in folder.glob(f".step-*.{kind}"):
            shutil.rmtree(path, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Makes new names themselves durable, where the system can (a folder cannot be opened on Windows)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
