"""Cloud masks: pixels that a mask beside a file, or a band of it, says are not to be looked at."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from fmsuite.domains.remote_sensing.grids import misfit, pixel_ratio
from fmsuite.errors import ReadFailure
from fmsuite.tiling.sources import SourceFile
from fmsuite.tiling.templates import absolute_template, is_template

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

    from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
    from fmsuite.domains.remote_sensing.stack import Stack

FIELDS = ("name", "stem", "folder")
DEFAULT_VALUES = (1,)


class CloudOptions(BaseModel):
    """The part of the ``data:`` options that says where clouds are.

    Pixels under them are invalid in every band. A date whose window is all cloud stays in its series, without a valid
    token, so that all windows of a place have the same dates; ``min_valid`` is about a window with all of its dates.

    Attributes:
        clouds: where the mask of a file lies: a path with some of ``{name}``, ``{stem}`` and ``{folder}`` of the file
            (of several that are one picture, the first), or the folder of masks that are called as the files are. Its
            first band is read; its pixels are those of the file, or whole multiples of them.
        cloud_band: the band of the file itself, by its description or its number from 1; of an EOPatch, the name of a
            feature in ``mask``. It need not be one of ``bands``.
        cloud_values: the mask's values that mean cloud (or shadow, or snow).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    clouds: str | None = None
    cloud_band: str | int | None = None
    cloud_values: tuple[int, ...] = DEFAULT_VALUES

    @field_validator("clouds")
    @classmethod
    def _is_a_template(cls, template: str | None) -> str | None:
        if template is None:
            return None
        return absolute_template("clouds", template, FIELDS)

    @model_validator(mode="after")
    def _one_way(self) -> CloudOptions:
        if self.clouds is not None and self.cloud_band is not None:
            raise ValueError("clouds and cloud_band both say where clouds are: give one")
        if not self.cloud_values:
            raise ValueError("cloud_values is empty: leave it out")
        if self.clouds is None and self.cloud_band is None and self.cloud_values != DEFAULT_VALUES:
            raise ValueError("cloud_values has no effect without clouds or cloud_band")
        return self

    @property
    def masks_clouds(self) -> bool:
        return self.clouds is not None or self.cloud_band is not None


def cloud_path(path: str, template: str) -> str:
    """Where the mask of a file lies."""
    folder, name = os.path.split(path)
    if not is_template(template):
        return os.path.join(template, name)
    return os.path.normpath(template.format(name=name, stem=Path(name).stem, folder=folder))


def without_clouds(files: Sequence[SourceFile], options: CloudOptions) -> list[SourceFile]:
    """The files that are not the cloud mask of another."""
    if options.clouds is None:
        return list(files)
    masks = {cloud_path(str(file.path), options.clouds) for file in files}
    return [file for file in files if str(file.path) not in masks]


def clouded(stack: Stack, options: RemoteSensingOptions) -> Stack:
    """The same files, with the pixels under clouds invalid, where the options say where these are.

    Raises:
        ReadFailure: if the mask is missing, is no raster, or its pixels do not coincide with the files'.
    """
    if not options.masks_clouds:
        return stack
    mask, own = _mask_of(stack, options)
    try:
        grid = (mask.height, mask.width, str(mask.crs), tuple(mask.transform[:6]))
        ratio = pixel_ratio(stack.grid, grid)
        if ratio is None:
            raise ReadFailure(stack.path, "clouds", f"of its cloud mask: {misfit(stack.path, stack.grid, grid)}")
        number = 1 if options.clouds is not None else _band_number(mask, options.cloud_band)
    except BaseException:
        if own:
            mask.close()
        raise
    return replace(stack, clouds=Clouds(mask, number, ratio, options.cloud_values, own))


@dataclass(frozen=True)
class Clouds:
    """An open mask.

    Attributes:
        number: of its band, from 1.
        ratio: how many pixels of the pictures one of its own measures along (y, x).
        values: that mean cloud.
        own: it is to be closed with the pictures, and is not one of them.
    """

    dataset: DatasetReader
    number: int
    ratio: tuple[int, int]
    values: tuple[int, ...]
    own: bool

    def close(self) -> None:
        if self.own:
            self.dataset.close()

    def clear(self, path: str, top: int, left: int, height: int, width: int) -> np.ndarray:
        """(height, width) bool, False under clouds; what is outside of the mask is clear.

        Raises:
            ReadFailure: if the mask cannot be decoded.
        """
        from rasterio.errors import RasterioError
        from rasterio.windows import Window

        down, across = self.ratio
        first, last = max(0, top // down), min(self.dataset.height, -(-(top + height) // down))
        begin, end = max(0, left // across), min(self.dataset.width, -(-(left + width) // across))
        clear = np.ones((height, width), dtype=bool)
        if last <= first or end <= begin:
            return clear
        try:
            values = self.dataset.read(self.number, window=Window(begin, first, end - begin, last - first))
        except (RasterioError, OSError, ValueError) as error:
            raise ReadFailure(
                path, "read", f"its cloud mask cannot be decoded ({error}).", "Fetch it again."
            ) from error
        cloud = np.isin(values, self.values).repeat(down, 0).repeat(across, 1)
        # Where the mask begins in the box, and the box in what was read of the mask.
        row, column = first * down - top, begin * across - left
        cloud = cloud[max(0, -row) :, max(0, -column) :][: height - max(0, row), : width - max(0, column)]
        clear[max(0, row) :, max(0, column) :][: cloud.shape[0], : cloud.shape[1]] = ~cloud
        return clear


def _mask_of(stack: Stack, options: RemoteSensingOptions) -> tuple[DatasetReader, bool]:
    if options.clouds is None:
        holders = [part.raster.dataset for part in stack.parts if _has_band(part.raster.dataset, options.cloud_band)]
        if len(holders) != 1:
            raise ReadFailure(
                stack.path,
                "clouds",
                f"{'none' if not holders else 'several'} of its files have the band {options.cloud_band!r} for clouds.",
                "Correct data.cloud_band.",
            )
        return holders[0], False
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    path = cloud_path(stack.path, options.clouds)
    if not Path(path).exists():
        raise ReadFailure(
            stack.path, "clouds", f"its cloud mask is missing: there is no {path}.", "Correct data.clouds."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            return rasterio.open(path), True
    except (RasterioError, OSError, ValueError) as error:
        raise ReadFailure(stack.path, "clouds", f"its cloud mask, {path}, is no raster ({error}).") from error


def _has_band(dataset: DatasetReader, band: str | int | None) -> bool:
    if isinstance(band, int):
        return 1 <= band <= dataset.count
    return band in [(text or "").strip() for text in dataset.descriptions]


def _band_number(dataset: DatasetReader, band: str | int | None) -> int:
    if isinstance(band, int):
        return band
    return [(text or "").strip() for text in dataset.descriptions].index(str(band)) + 1
