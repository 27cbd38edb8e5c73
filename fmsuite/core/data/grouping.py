"""Which windows belong together in a feature store: those of a source, of a folder, or of the index's group."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Literal

import numpy as np

from fmsuite.core.data.index import SampleIndex

By = Literal["source", "group", "folder"]

_LONGEST_NAME = 200
"""Bytes; file systems allow 255."""
_UNSAFE = re.compile(r"[%/\\:*?\"<>|#\x00-\x1f\x7f]")


def group_codes(index: SampleIndex, by: By) -> tuple[list[str], np.ndarray]:
    """The ids of the groups in the order of their first windows, and for each row its group's position among them.

    Args:
        by: ``source``: a slide, volume, raster or drawing, by its path below the folder that all sources share;
            ``group``: the index's group (patient, scene); ``folder``: the folder that a source lies in, by its path
            from the first folder in which they differ.

    Returns:
        G ids, all different, and (N,) int64 codes.
    """
    column = index.table.select(["group" if by == "group" else "source"]).unify_dictionaries().column(0)
    encoded = column.combine_chunks()
    codes, first, inverse = np.unique(encoded.indices.to_numpy(), return_index=True, return_inverse=True)
    dictionary = encoded.dictionary.to_pylist()
    names = [str(dictionary[code]) for code in codes]
    if by == "source":
        names = _relative(names)
    elif by == "folder":
        unique, merged = np.unique(_folders(names), return_inverse=True)
        names = [str(name) for name in unique]
        inverse = merged[inverse]
        first = np.array([first[merged == number].min() for number in range(len(names))])
    order = np.argsort(first)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    return [names[number] for number in order], place[inverse]


def group_ids(index: SampleIndex, by: By) -> list[str]:
    """For each row the id of its group; see ``group_codes``."""
    ids, codes = group_codes(index, by)
    return [ids[code] for code in codes]


def default_by(index: SampleIndex) -> By:
    """``source`` where sources have more than one window on average, or else (tile images, drawings) ``folder``."""
    return "source" if len(index) > len(index.sources) else "folder"


def group_key(id: str) -> str:
    """The name of a group's folder: the id itself where it can be one, and different for every id.

    What a file name, a hidden name or a Zarr node cannot hold is written as ``%XX``; long names are cut and end in a
    hash.
    """
    key = _UNSAFE.sub(lambda match: f"%{ord(match[0]):02X}", id)
    if key.startswith((".", "__")) or key in ("", "zarr.json", "index.parquet", "unreadable.json"):
        key = f"%{ord(id[0]):02X}{key[1:]}" if id else "%"
    if len(key.encode()) > _LONGEST_NAME:
        cut = key.encode()[: _LONGEST_NAME - 18].decode(errors="ignore")
        key = f"{cut}%%{hashlib.blake2b(id.encode(), digest_size=8).hexdigest()}"
    return key


def _relative(sources: Sequence[str]) -> list[str]:
    """Paths below the innermost folder that holds all sources."""
    return _below(sources, _common([str(PurePath(source).parent) for source in sources]))


def _folders(sources: Sequence[str]) -> list[str]:
    """For each source its folder, from below the innermost folder that holds all of these and is none of them."""
    folders = [str(PurePath(source).parent) for source in sources]
    common = _common(folders)
    if common in folders:
        common = str(PurePath(common).parent)
    return _below(folders, common)


def _common(folders: Sequence[str]) -> str:
    try:
        return os.path.commonpath(folders)
    except ValueError:
        # On several drives.
        return ""


def _below(paths: Sequence[str], folder: str) -> list[str]:
    return [Path(path).relative_to(folder).as_posix() if folder else Path(path).as_posix() for path in paths]
