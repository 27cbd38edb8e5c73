"""The files of a folder in eo-learn's layout (see ``eopatch.py``), each read and checked by itself."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fmsuite.domains.remote_sensing.dates import days_of
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.errors import ReadFailure

if TYPE_CHECKING:
    from affine import Affine

TIMESTAMPS = "timestamps.json"


def read_days(path: str) -> tuple[float, ...]:
    """The dates, as days since 2000-01-01.

    Raises:
        ReadFailure: if it is no list of dates.
    """
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


def feature_files(folder: Path, options: RemoteSensingOptions) -> list[Path]:
    """The arrays of ``data``; only those that are needed, where ``data.bands`` says so in their names."""
    files = sorted((folder / "data").glob("*.npy"))
    if options.spectral.bands or options.file_bands is not None or options.wanted_bands is None:
        return files
    wanted = options.wanted_bands
    needed = [f for f in files if any(re.fullmatch(rf"{re.escape(f.stem)}(_\d+)?", name) for name in wanted)]
    return needed or files


def read_array(file: Path, dates: int) -> np.ndarray:
    """A feature or mask, (dates, rows, columns, channels), as it lies in the file.

    Raises:
        ReadFailure: for anything else.
    """
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


def read_mask(folder: Path, name: str, dates: int, needed: bool = False) -> np.ndarray | None:
    """An array of ``mask``; ``None`` where there is none and it is not needed.

    Raises:
        ReadFailure: as ``read_array``, and if one that is needed is missing.
    """
    file = folder / "mask" / f"{name}.npy"
    if file.is_file():
        return read_array(file, dates)
    if needed:
        there = ", ".join(sorted(path.stem for path in (folder / "mask").glob("*.npy"))) or "none"
        raise ReadFailure(str(file), "clouds", f"there is no such mask; there are {there}.", "Correct data.cloud_band.")
    return None


def read_place(folder: Path, shape: tuple[int, int]) -> tuple[Any, Affine]:
    """The coordinate system, and from (column, row) to its coordinates.

    Args:
        shape: (rows, columns).

    Raises:
        ReadFailure: if ``bbox.geojson`` is missing, or says nothing of the kind.
    """
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


def named_bands(
    path: str, arrays: dict[str, np.ndarray], options: RemoteSensingOptions
) -> dict[str, tuple[np.ndarray, int]]:
    """By channel name the array that holds it, and its number there; see ``eopatch.py``.

    Raises:
        ReadFailure: if no feature holds a band.
    """
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
