"""Folders in eo-learn's layout: ``timestamps.json``, ``bbox.geojson``, ``data/NAME.npy`` and ``mask/NAME.npy``.

Arrays are (dates, rows, columns, channels). A folder is one place, its dates are those of ``timestamps.json``. A
feature of one channel is the band of its name, one of several gives ``NAME_0``, ``NAME_1`` and so on. With a sensor
that has bands, features are called as its bands are, or ``data.file_bands`` names the channels of the one feature that
has as many. Only arrays that numpy itself can read are read, never pickles: a folder from elsewhere may hold anything.
"""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fmsuite.domains.remote_sensing.dates import days_of
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.probe import Probe
from fmsuite.domains.remote_sensing.raster import metres_per_pixel
from fmsuite.errors import ReadFailure
from fmsuite.tiling.sources import SourceFile

if TYPE_CHECKING:
    from affine import Affine

TIMESTAMPS = "timestamps.json"
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
        """What its dates say of themselves, as files do."""
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
    days = _days(path)
    arrays = {file.stem: _array(file, len(days)) for file in _features(folder, options)}
    if not arrays:
        packed = sorted(file.name for file in (folder / "data").glob("*.npy.gz"))
        why = f"its features are compressed ({packed[0]})" if packed else "it has no data/*.npy"
        raise ReadFailure(path, "metadata", f"{why}.", "Save the features that are wanted as plain .npy files.")
    first, shape = next((name, array.shape[1:3]) for name, array in arrays.items())
    masks = [_mask(folder, "IS_DATA", len(days))]
    if options.clouds is not None or isinstance(options.cloud_band, int):
        raise ReadFailure(
            path, "clouds", "its clouds are a feature of its folder mask.", "Name it: data.cloud_band=CLM, say."
        )
    masks.append(None if options.cloud_band is None else _mask(folder, options.cloud_band, len(days), needed=True))
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
    crs, transform = _place(folder, shape)
    return EOPatch(path, days, _named(path, arrays, options), masks[0], masks[1], crs, transform, options)


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


def _days(path: str) -> tuple[float, ...]:
    stamps = _json(Path(path))
    if not isinstance(stamps, list) or not stamps:
        raise ReadFailure(path, "metadata", "it is not a list of dates.", "Is this an EOPatch of eo-learn?")
    try:
        return tuple(days_of(datetime.fromisoformat(stamp)) for stamp in stamps)
    except (TypeError, ValueError) as error:
        raise ReadFailure(path, "metadata", f"a date in it cannot be parsed ({error}).", "Correct it.") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReadFailure(str(path), "open", f"it cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ReadFailure(str(path), "open", f"not JSON ({error}).", "Save the folder again.") from error


def _features(folder: Path, options: RemoteSensingOptions) -> list[Path]:
    """The arrays of ``data``; only those that are needed, where ``data.bands`` says so in their names."""
    files = sorted((folder / "data").glob("*.npy"))
    if options.spectral.bands or options.file_bands is not None or options.wanted_bands is None:
        return files
    wanted = options.wanted_bands
    needed = [f for f in files if any(re.fullmatch(rf"{re.escape(f.stem)}(_\d+)?", name) for name in wanted)]
    return needed or files


def _array(file: Path, dates: int) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ReadFailure(str(file), "open", f"not an array that numpy reads ({reason}).", "Fetch it again.") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise ReadFailure(str(file), "metadata", "it is no array of numbers.", "Save it again.")
    if array.ndim != 4 or 0 in array.shape:
        raise ReadFailure(
            str(file),
            "metadata",
            f"its shape is {array.shape}, not (dates, rows, columns, channels).",
            "Save it again.",
        )
    if len(array) != dates:
        raise ReadFailure(
            str(file), "metadata", f"it has {len(array)} dates, and {TIMESTAMPS} {dates}.", "Save the folder again."
        )
    return array


def _mask(folder: Path, name: str, dates: int, needed: bool = False) -> np.ndarray | None:
    file = folder / "mask" / f"{name}.npy"
    if file.is_file():
        return _array(file, dates)
    if needed:
        there = ", ".join(sorted(path.stem for path in (folder / "mask").glob("*.npy"))) or "none"
        raise ReadFailure(str(file), "clouds", f"there is no such mask; there are {there}.", "Correct data.cloud_band.")
    return None


def _place(folder: Path, shape: tuple[int, int]) -> tuple[Any, Affine]:
    from rasterio.crs import CRS
    from rasterio.errors import CRSError
    from rasterio.transform import from_bounds

    file = folder / "bbox.geojson"
    box = _json(file)
    try:
        crs = CRS.from_user_input(box["crs"]["properties"]["name"])
        corners = np.asarray(box["coordinates"][0], dtype=np.float64)[:, :2]
        (west, south), (east, north) = corners.min(0), corners.max(0)
    except (KeyError, IndexError, TypeError, ValueError, CRSError) as error:
        raise ReadFailure(
            str(file),
            "metadata",
            f"not a box with a coordinate system ({type(error).__name__}: {error}).",
            "Correct it.",
        ) from error
    if not (west < east and south < north):
        raise ReadFailure(str(file), "metadata", "its box is empty.", "Correct it.")
    return crs, from_bounds(west, south, east, north, shape[1], shape[0])


def _named(
    path: str, arrays: dict[str, np.ndarray], options: RemoteSensingOptions
) -> dict[str, tuple[np.ndarray, int]]:
    sensor = options.spectral
    if options.file_bands is not None:
        fitting = [array for array in arrays.values() if array.shape[3] == len(options.file_bands)]
        if len(fitting) != 1:
            raise ReadFailure(
                path,
                "metadata",
                f"{len(fitting)} of its features have {len(options.file_bands)} channels, as data.file_bands names.",
                "Name the channels of one feature.",
            )
        return {name: (fitting[0], number) for number, name in enumerate(options.file_bands)}
    found: dict[str, tuple[np.ndarray, int]] = {}
    for feature, array in arrays.items():
        for number in range(array.shape[3]):
            text = feature if array.shape[3] == 1 else f"{feature}_{number}"
            name = sensor.recognise(text) if sensor.bands else text
            if name is not None:
                found[name] = (array, number)
    if not found:
        raise ReadFailure(
            path,
            "metadata",
            f"its features ({', '.join(arrays)}) are none of {sensor.name}'s bands.",
            "Name the channels of one feature with data.file_bands, or set data.sensor to generic.",
        )
    return found
