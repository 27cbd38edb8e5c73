"""Patch features of one source in a Zarr folder, so that another click does not compute them again."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from fmsuite.core.similarity import TokenMap
from fmsuite.core.zarr_arrays import Damaged, read_array, write_array
from fmsuite.errors import FmsuiteError, UsageError

FORMAT = 1
CHUNK = 4096
"""Tokens in a file."""


def write_features(folder: Path, tokens: TokenMap, facts: Mapping[str, Any]) -> None:
    """The folder appears whole or not at all.

    Args:
        facts: JSON values that say what the features are of.

    Raises:
        FmsuiteError: if it cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    described: dict[str, Any] = {"format": FORMAT, "patch": list(tokens.patch), "size": list(tokens.size)}
    described |= {"tokens": list(tokens.valid.shape), "of": dict(facts)}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        zarr.open_group(str(partial), mode="w", attributes=described)
        write_array(partial / "features", tokens.features.flatten(1).T.contiguous().numpy(), CHUNK)
        write_array(partial / "valid", tokens.valid.flatten().numpy(), CHUNK)
        os.replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise FmsuiteError(
            f"{folder}: the features cannot be written ({error.strerror or error}).", "Choose another --features."
        ) from error


def read_features(folder: Path, facts: Mapping[str, Any]) -> TokenMap:
    """
    Raises:
        UsageError: if the folder holds something else, damaged features, or those of another encoder, file or way of
            reading it.
    """
    hint = "Remove it, or choose another --features."
    try:
        described: dict[str, Any] = dict(zarr.open_group(str(folder), mode="r").attrs)
        known, version = described["of"], described["format"]
        patch, size, shape = (tuple(map(int, described[name])) for name in ("patch", "size", "tokens"))
    except Exception as error:
        # zarr raises whatever JSON, the file system or its own checks meet.
        raise UsageError(f"{folder}: there are no features of `fmsuite similar` in it ({error}).", hint) from error
    if version != FORMAT:
        raise UsageError(f"{folder}: features of another version of fmsuite.", hint)
    differing = [
        f"{name} {known.get(name)!r}, now {facts.get(name)!r}"
        for name in sorted(known.keys() | facts.keys())
        if known.get(name) != facts.get(name)
    ]
    if differing:
        raise UsageError(f"{folder}: holds features of something else: {'; '.join(differing)}.", hint)
    try:
        features, valid = read_array(folder / "features"), read_array(folder / "valid")
    except Damaged as error:
        raise UsageError(f"{error.file}: damaged ({error.reason}).", hint) from error
    if valid.shape != (math.prod(shape),) or len(features) != len(valid):
        raise UsageError(f"{folder}: damaged (features and tokens differ in number).", hint)
    return TokenMap(
        torch.from_numpy(np.ascontiguousarray(features.T)).unflatten(1, shape),
        torch.from_numpy(valid).unflatten(0, shape),
        patch,
        size,
    )
