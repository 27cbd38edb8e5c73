"""Folders in eo-learn's layout: ``timestamps.json``, ``bbox.geojson``, ``data/NAME.npy`` and ``mask/NAME.npy``.

Arrays are (dates, rows, columns, channels). A folder is one place, its dates are those of ``timestamps.json``. A
feature of one channel is the band of its name, one of several gives ``NAME_0``, ``NAME_1`` and so on. With a sensor
that has bands, features are called as its bands are, or ``data.file_bands`` names the channels of the one feature that
has as many. Only arrays that numpy itself can read are read, never pickles: a folder from elsewhere may hold anything.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fmsuite.domains.remote_sensing.eopatch_files import (
    TIMESTAMPS,
    feature_files,
    named_bands,
    read_array,
    read_days,
    read_mask,
    read_place,
)
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.plausible import refuse_reflectance
from fmsuite.domains.remote_sensing.probe import Probe
from fmsuite.domains.remote_sensing.raster import metres_per_pixel
from fmsuite.errors import ReadFailure
from fmsuite.tiling.sources import SourceFile

if TYPE_CHECKING:
    from affine import Affine

_DATE = re.compile(rf"(?P<file>.*[\\/]{re.escape(TIMESTAMPS)})#(?P<number>\d+)")


def is_patch(path: str | Path) -> bool:
    """Whether a file is the one by which a folder in this layout is found."""
    return posixpath.basename(str(path).replace("\\", "/")) == TIMESTAMPS


def date_path(path: str, number: int) -> str:
    """By what a date of a folder is called, as if it were a file: its timestamps and a number."""
    return f"{path}#{number}"


def patch_of(paths: tuple[str, ...]) -> tuple[tuple[str, ...], int | None]:
    """What is to be opened for a date, and its number there; ``None`` for files that are no such date."""
    match = _DATE.fullmatch(paths[0])
    return (paths, None) if match is None else ((match["file"],), int(match["number"]))


@dataclass(frozen=True)
class EOPatch:
    """An open folder.

    Attributes:
        path: of its timestamps.
        days: of its dates, in the file's order.
        bands: channel name to the array (T, H, W, C) that holds it and the channel's number in it.
        data: (T, H, W, 1) nonzero where there is data, or ``None``.
        cloud: (T, H, W, 1) the cloud mask that the options name, or ``None``.
        crs: rasterio's CRS. transform: from (column, row) to map coordinates.
    """

    path: str
    days: tuple[float, ...]
    bands: dict[str, tuple[np.ndarray, int]]
    data: np.ndarray | None
    cloud: np.ndarray | None
    crs: Any
    transform: Affine
    options: RemoteSensingOptions

    @property
    def shape(self) -> tuple[int, int]:
        array, _ = next(iter(self.bands.values()))
        return array.shape[1], array.shape[2]

    @cached_property
    def metres(self) -> tuple[float, float] | None:
        return metres_per_pixel(self.crs, self.transform, *self.shape)

    @property
    def grid(self) -> tuple[Any, ...]:
        return (*self.shape, str(self.crs), tuple(self.transform[:6]))

    def close(self) -> None:
        """Nothing: arrays are let go of with it."""

    def date(self, number: int) -> PatchDate:
        """
        Raises:
            ReadFailure: if there is no such date any more.
        """
        if number >= len(self.days):
            raise ReadFailure(self.path, "read", f"it has {len(self.days)} dates and no {number}.", "Tile again.")
        return PatchDate(self, number)

    def probes(self, place: str) -> list[Probe]:
        """What its dates say of themselves, as files do.

        Raises:
            ReadFailure: if the middle one's values contradict the sensor's specification by orders of magnitude.
        """
        self._refuse_implausible()
        dtype = str(np.result_type(*(array.dtype for array, _ in self.bands.values())))
        return [
            Probe(
                date_path(self.path, number),
                tuple(self.bands),
                True,
                dtype,
                False,
                self.metres,
                self.grid,
                place,
                place,
                day,
            )
            for number, day in enumerate(self.days)
        ]

    def _refuse_implausible(self) -> None:
        options, names = self.options, tuple(self.bands)
        sensor = options.spectral
        if not sensor.bands or sensor.kind != "optical" or (options.scale, options.offset) != (None, None):
            return
        values, valid = self.date(len(self.days) // 2).read(names, 0, 0, *self.shape)
        if valid.any():
            quantifications = [options.quantification_of_channel(name) for name in names]
            refuse_reflectance(self.path, values, valid, quantifications, options)


@dataclass(frozen=True)
class PatchDate:
    """One date of a folder, with the interface of ``Stack``."""

    patch: EOPatch
    number: int

    @property
    def path(self) -> str:
        return date_path(self.patch.path, self.number)

    @property
    def bands(self) -> dict[str, tuple[np.ndarray, int]]:
        return self.patch.bands

    @property
    def height(self) -> int:
        return self.patch.shape[0]

    @property
    def width(self) -> int:
        return self.patch.shape[1]

    @property
    def metres(self) -> tuple[float, float] | None:
        return self.patch.metres

    @property
    def grid(self) -> tuple[Any, ...]:
        return self.patch.grid

    @property
    def crs(self) -> Any:
        return self.patch.crs

    @property
    def transform(self) -> Affine:
        return self.patch.transform

    def close(self) -> None:
        self.patch.close()

    def read(
        self, bands: tuple[str, ...], top: int, left: int, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """As ``Stack.read``.

        Raises:
            ReadFailure: if it has not the bands.
        """
        rows = slice(max(top, 0), min(top + height, self.height))
        columns = slice(max(left, 0), min(left + width, self.width))
        dtype = np.result_type(*(self._array(band)[0].dtype for band in bands), *self._decibels)
        values = np.zeros((len(bands), height, width), dtype=dtype)
        valid = np.zeros(values.shape, dtype=bool)
        if rows.stop <= rows.start or columns.stop <= columns.start:
            return values, valid
        place = np.s_[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        values[place], valid[place] = self._box(bands, rows, columns)
        return values, valid

    def overview(self, bands: tuple[str, ...], longest: int) -> np.ndarray:
        """As ``Stack.overview``."""
        factor = max(1.0, max(self.height, self.width) / longest)
        rows, columns = (
            np.minimum((np.arange(max(1, round(n / factor))) * factor).astype(int), n - 1)
            for n in (self.height, self.width)
        )
        values, _ = self.read(bands, 0, 0, self.height, self.width)
        return values[:, rows[:, None], columns]

    @property
    def _decibels(self) -> tuple[np.dtype, ...]:
        return (np.dtype(np.float32),) if self.patch.options.spectral.linear else ()

    def _array(self, band: str) -> tuple[np.ndarray, int]:
        if band not in self.bands:
            raise ReadFailure(
                self.patch.path, "read", f"it has no band {band}; it has {', '.join(self.bands)}.", "Tile again."
            )
        return self.bands[band]

    def _box(self, bands: Sequence[str], rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        patch, options = self.patch, self.patch.options
        found = []
        for band in bands:
            array, channel = self._array(band)
            found.append(array[self.number, rows, columns, channel])
        values = np.stack(found)
        valid = np.isfinite(values)
        if patch.data is not None:
            valid &= patch.data[self.number, rows, columns, 0] != 0
        if patch.cloud is not None:
            valid &= ~np.isin(patch.cloud[self.number, rows, columns, 0], options.cloud_values)
        if options.nodata is not None and not math.isnan(options.nodata):
            valid &= values != options.nodata
        if options.spectral.linear:
            valid &= values > 0
            values = (10 * np.log10(np.where(valid, values, 1), dtype=np.float64)).astype(np.float32)
        return np.where(valid, values, np.zeros((), values.dtype)), valid


def open_patch(path: str, options: RemoteSensingOptions) -> EOPatch:
    """
    Args:
        path: of its timestamps.

    Raises:
        ReadFailure: naming the file that is missing, damaged, or of another shape than the others.
    """
    if options.layers is not None:
        raise ReadFailure(
            path, "metadata", "a folder of this kind is of one sensor, and data.layers are several.", "Leave it out."
        )
    folder = Path(path).parent
    days = read_days(path)
    arrays = {file.stem: read_array(file, len(days)) for file in feature_files(folder, options)}
    if not arrays:
        packed = sorted(file.name for file in (folder / "data").glob("*.npy.gz"))
        why = f"its features are compressed ({packed[0]})" if packed else "it has no data/*.npy"
        raise ReadFailure(path, "metadata", f"{why}.", "Save the features that are wanted as plain .npy files.")
    first, shape = next((name, array.shape[1:3]) for name, array in arrays.items())
    masks = [read_mask(folder, "IS_DATA", len(days))]
    if options.clouds is not None or isinstance(options.cloud_band, int):
        raise ReadFailure(
            path, "clouds", "its clouds are a feature of its folder mask.", "Name it: data.cloud_band=CLM, say."
        )
    masks.append(None if options.cloud_band is None else read_mask(folder, options.cloud_band, len(days), needed=True))
    named = {folder / "data" / f"{name}.npy": array for name, array in arrays.items()}
    named |= {
        folder / "mask" / f"{name}.npy": mask
        for name, mask in zip(("IS_DATA", options.cloud_band), masks, strict=True)
        if mask is not None
    }
    for file, array in named.items():
        if array.shape[1:3] != shape:
            raise ReadFailure(
                str(file),
                "metadata",
                f"it has {array.shape[1]}x{array.shape[2]} pixels, and data/{first}.npy {shape[0]}x{shape[1]}.",
                "Save the folder again.",
            )
    crs, transform = read_place(folder, shape)
    return EOPatch(path, days, named_bands(path, arrays, options), masks[0], masks[1], crs, transform, options)


def place_of(file: SourceFile, options: RemoteSensingOptions) -> str:
    """What the windows of a folder are grouped by: its path below the given folder, or what ``place_pattern`` finds.

    Raises:
        ReadFailure: if that finds nothing.
    """
    place = posixpath.dirname(file.relative) or file.root.name
    if options.place_pattern is None:
        return place
    found = re.search(options.place_pattern, file.path.parent.name)
    if found is None:
        raise ReadFailure(
            str(file.path), "metadata", "data.place_pattern is not found in its folder's name.", "Correct the pattern."
        )
    return found[1] if found.re.groups else found[0]
