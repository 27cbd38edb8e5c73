"""One raster file: what it is, how large its pixels are on the ground, and which of them carry data."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fmsuite.core.inputs import Quantification
from fmsuite.domains.remote_sensing.layers import Layer
from fmsuite.domains.remote_sensing.names import band_of, layer_of
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.errors import ReadFailure

if TYPE_CHECKING:
    from affine import Affine
    from rasterio.io import DatasetReader

SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2")

_STACK_HINT = (
    "Name the bands with data.file_bands, or set data.sensor; of files of one band each, say with data.band_pattern "
)
_STACK_HINT += "where their names tell the band."


@dataclass(frozen=True)
class Raster:
    """An open raster and what was understood of it.

    Attributes:
        bands: name of each channel to its 1-based number in the file.
        named: whether the file itself says what its bands are (so that names can be compared between files).
        dtype: of the stored values.
        tagged: (scale, offset) of each band in ``bands``, where any differs from (1, 0); otherwise ``None``.
        metres: true size of a pixel on the ground along (y, x); ``None`` without a known place on Earth.
        layer: number of its layer in the options' ``layout``.
        quantifications: of each band in ``bands``.
        own: its layer.
        nodata: by band number, what the file or the options declare.
        masked: by band number, how the file marks pixels beside nodata values: not at all (0), with one mask for all
            bands (its number, below zero), or with the band's own (its number).
    """

    dataset: DatasetReader
    path: str
    bands: dict[str, int]
    named: bool
    dtype: str
    tagged: dict[str, tuple[float, float]] | None
    metres: tuple[float, float] | None
    layer: int
    own: Layer
    quantifications: dict[str, Quantification]
    nodata: dict[int, tuple[float, ...]]
    masked: dict[int, int]

    @property
    def height(self) -> int:
        return int(self.dataset.height)

    @property
    def width(self) -> int:
        return int(self.dataset.width)

    @property
    def grid(self) -> tuple[Any, ...]:
        """(height, width, CRS, transform), for ``grids.pixel_ratio``."""
        return (self.height, self.width, str(self.dataset.crs), tuple(self.dataset.transform[:6]))

    @property
    def crs(self) -> Any:
        """rasterio's CRS, or ``None``."""
        return self.dataset.crs

    @property
    def transform(self) -> Affine:
        """From (column, row) to map coordinates."""
        return self.dataset.transform

    def close(self) -> None:
        self.dataset.close()

    def read(
        self, bands: tuple[str, ...], top: int, left: int, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """A box of pixels; the part outside the raster is invalid.

        A value is valid where the file's own mask, its declared nodata value and ``data.nodata`` allow it and where it
        is finite. Scale and offset tags are applied, and the result is expressed in the sensor's own counts, so that
        the quantification of the input's specification holds for every file. Linear radar power becomes decibels.

        Returns:
            values (C, height, width), native dtype unless tags or decibels make it float32, 0 where invalid; and
            valid, bool, of the same shape.

        Raises:
            ReadFailure: if the pixels cannot be decoded.
        """
        first_row, first_column = max(top, 0), max(left, 0)
        rows = max(min(top + height, self.height) - first_row, 0)
        columns = max(min(left + width, self.width) - first_column, 0)
        if not rows or not columns:
            return np.zeros((len(bands), height, width), dtype=self.dtype), np.zeros((len(bands), height, width), bool)
        inner, inner_valid = self._decode(bands, (first_row, first_column, rows, columns), (rows, columns))
        if (rows, columns) == (height, width):
            return inner, inner_valid
        place = np.s_[:, first_row - top : first_row - top + rows, first_column - left : first_column - left + columns]
        values = np.zeros((len(bands), height, width), dtype=inner.dtype)
        valid = np.zeros(values.shape, dtype=bool)
        values[place] = inner
        valid[place] = inner_valid
        return values, valid

    def reduced(self, bands: tuple[str, ...], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """The whole raster taken to ``shape``: values (C, *shape), 0 where invalid, and valid.

        Raises:
            ReadFailure: as ``read``.
        """
        return self._decode(bands, (0, 0, self.height, self.width), shape)

    def _decode(
        self,
        bands: tuple[str, ...],
        box: tuple[int, int, int, int],
        shape: tuple[int, int],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Values and validity of a box (row, column, rows, columns) inside the raster, taken to ``shape`` by nearest
        neighbour."""
        from rasterio.errors import RasterioError
        from rasterio.windows import Window

        numbers = [self.bands[name] for name in bands]
        window = Window(box[1], box[0], box[3], box[2])
        masks: dict[int, np.ndarray] = {}
        try:
            values = self.dataset.read(numbers, window=window, out_shape=(len(numbers), *shape))
            for mask in {self.masked[number] for number in numbers} - {0}:
                masks[mask] = self.dataset.read_masks(abs(mask), window=window, out_shape=shape) > 0
        except (RasterioError, OSError, ValueError) as error:
            raise ReadFailure(
                self.path,
                "read",
                f"pixels at row {box[0]}, column {box[1]} cannot be decoded ({reason_of(error)}).",
                "The file is damaged: fetch it again.",
            ) from error
        floating = values.dtype.kind == "f"
        valid = np.isfinite(values) if floating else np.ones(values.shape, dtype=bool)
        for place, number in enumerate(numbers):
            if self.masked[number]:
                valid[place] &= masks[self.masked[number]]
            for nodata in self.nodata[number]:
                if not math.isnan(nodata) and (floating or _holds(values.dtype, nodata)):
                    valid[place] &= values[place] != values.dtype.type(nodata)
        values, valid = self._physical(values, valid, bands)
        if not valid.all():
            values[~valid] = 0
        return values, valid

    def _physical(self, values: np.ndarray, valid: np.ndarray, bands: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        if self.tagged is not None:
            gain, shift, offset, scale = (
                np.array(column)[:, None, None]
                for column in zip(
                    *((*self.tagged[b], self.quantifications[b].offset, self.quantifications[b].scale) for b in bands),
                    strict=True,
                )
            )
            values = ((np.where(valid, values, 0) * gain + shift - offset) / scale).astype(np.float32)
        if self.own.spectral.linear:
            valid = valid & (values > 0)
            values = (10 * np.log10(np.where(valid, values, 1), dtype=np.float64)).astype(np.float32)
        return values, valid


def _holds(dtype: np.dtype, value: float) -> bool:
    """Whether an integer type has the value."""
    limits = np.iinfo(dtype)
    return value == int(value) and limits.min <= value <= limits.max


def open_raster(path: str, options: RemoteSensingOptions) -> Raster:
    """
    Raises:
        ReadFailure: if the file is not a raster, or its bands cannot be understood.
    """
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            dataset = rasterio.open(path)
    except (RasterioError, OSError, ValueError) as error:
        raise ReadFailure(
            path, "open", f"not a raster that GDAL can open ({reason_of(error)}).", "Remove it or fetch it again."
        ) from error
    try:
        return _describe(dataset, path, options)
    except BaseException:
        dataset.close()
        raise


def close_raster(raster: Raster) -> None:
    raster.close()


def reason_of(error: BaseException) -> str:
    """GDAL's own words, which rasterio hides behind "Read or write failed"."""
    cause = error.__cause__ or error.__context__
    return " ".join(str(cause if cause is not None else error).split()) or type(error).__name__


def _describe(dataset: DatasetReader, path: str, options: RemoteSensingOptions) -> Raster:
    from rasterio.enums import ColorInterp

    interpretation = dataset.colorinterp
    if ColorInterp.palette in interpretation:
        raise ReadFailure(
            path,
            "metadata",
            "its values are entries of a colour table, not measurements.",
            "Expand it with `gdal_translate -expand rgb`, or leave it out.",
        )
    numbers = [n for n in range(1, dataset.count + 1) if interpretation[n - 1] != ColorInterp.alpha]
    if not numbers:
        raise ReadFailure(path, "metadata", "it has no bands of its own.", "A container file? Give its subdatasets.")
    types = {dataset.dtypes[n - 1] for n in numbers}
    if any(name.startswith("complex") for name in types):
        raise ReadFailure(path, "metadata", "its values are complex numbers.", "Detect the amplitude first.")
    layer, _ = layer_of(path, options)
    own = options.layout[layer]
    names, named = _band_names(dataset, path, numbers, layer, options)
    own_bands = {name: number for name, number in zip(names, numbers, strict=True) if name is not None}
    bands = {options.channel_name(layer, name): number for name, number in own_bands.items()}
    tags = {name: (float(dataset.scales[n - 1]), float(dataset.offsets[n - 1])) for name, n in bands.items()}
    declared = [dataset.nodatavals[n - 1] for n in numbers]
    return Raster(
        dataset,
        path,
        bands,
        named,
        str(np.result_type(*(np.dtype(name) for name in types))),
        tags if any(tag != (1.0, 0.0) for tag in tags.values()) else None,
        metres_per_pixel(dataset.crs, dataset.transform, dataset.height, dataset.width),
        layer,
        own,
        {options.channel_name(layer, name): own.quantification_of(name) for name in own_bands},
        {
            n: tuple(float(value) for value in (nodata, own.nodata) if value is not None)
            for n, nodata in zip(numbers, declared, strict=True)
        },
        {n: _mask(dataset.mask_flag_enums[n - 1], n) for n in numbers},
    )


def _mask(flags: list[Any], number: int) -> int:
    from rasterio.enums import MaskFlags

    if MaskFlags.all_valid in flags or flags == [MaskFlags.nodata]:
        return 0
    # One mask, whichever band it is asked of.
    return -1 if MaskFlags.per_dataset in flags else number


def _band_names(
    dataset: DatasetReader, path: str, numbers: list[int], layer: int, options: RemoteSensingOptions
) -> tuple[list[str | None], bool]:
    """A name for each band (``None`` for one that the sensor does not know), and whether the file gave them."""
    from rasterio.enums import ColorInterp

    own = options.layout[layer]
    sensor = own.spectral
    described = [(dataset.descriptions[n - 1] or "").strip() for n in numbers]
    if own.band_pattern is not None or (len(numbers) == 1 and not described[0]):
        held = band_of(path, layer, options)
        if held is not None:
            if len(numbers) > 1:
                raise ReadFailure(
                    path, "metadata", f"its name says that it is the band {held[0]}, and it has {len(numbers)} bands."
                )
            return [held[0]], True
    if own.file_bands is not None:
        if len(own.file_bands) != len(numbers):
            raise ReadFailure(
                path,
                "metadata",
                f"it has {len(numbers)} bands and data.file_bands names {len(own.file_bands)}.",
                "Index files of one kind at a time.",
            )
        return list(own.file_bands), True
    colours = [dataset.colorinterp[n - 1] for n in numbers]
    if not any(described) and {ColorInterp.red, ColorInterp.green, ColorInterp.blue} <= set(colours):
        known = {ColorInterp.red: "red", ColorInterp.green: "green", ColorInterp.blue: "blue"}
        described = [known.get(colour, f"band{n}") for colour, n in zip(colours, numbers, strict=True)]
        if sensor.layouts and len(numbers) in {len(layout) for layout in sensor.layouts}:
            described = [""] * len(numbers)
    if not sensor.bands:
        if all(described) and len(set(described)) == len(described):
            return list(described), True
        return [f"band{n}" for n in numbers], False
    if any(described):
        names = [sensor.recognise(text) if text else None for text in described]
        twice = [name for name, count in Counter(n for n in names if n).items() if count > 1]
        if twice:
            raise ReadFailure(
                path, "metadata", f"two of its bands call themselves {twice[0]}.", "Name them with data.file_bands."
            )
        if any(names):
            return list(names), True
        raise ReadFailure(
            path,
            "metadata",
            f"its bands ({', '.join(text or '?' for text in described)}) are none of {sensor.name}'s.",
            _STACK_HINT,
        )
    for layout in sensor.layouts:
        if len(layout) == len(numbers):
            return list(layout), True
    expected = " or ".join(str(len(layout)) for layout in sensor.layouts)
    raise ReadFailure(
        path,
        "metadata",
        f"it has {len(numbers)} undescribed band{'s' * (len(numbers) > 1)}; {sensor.name} has {expected}.",
        _STACK_HINT,
    )


def metres_per_pixel(crs: Any, transform: Any, height: int, width: int) -> tuple[float, float] | None:
    """The size of the raster's middle pixel on the ground along (y, x), in metres.

    Geographic coordinates are converted with the radii of curvature of the CRS's own ellipsoid at that latitude:
    north-south by the meridian's ``M = a (1 - e^2) / (1 - e^2 sin^2 phi)^(3/2)``, east-west by the parallel's
    ``N cos phi = a cos phi / (1 - e^2 sin^2 phi)^(1/2)`` (Snyder 1987, "Map Projections: A Working Manual", equations
    4-18 to 4-21). Projected coordinates count at their nominal size, as a grid's users do, unless the projection
    inflates areas by more than 1 % there (Web Mercator away from the equator); both sides then shrink by the root of
    that factor.

    Args:
        crs: rasterio's CRS, or ``None``.
        transform: pixel to CRS coordinates, possibly rotated.

    Returns:
        ``None`` if there is no CRS, no transform, or one without metres (a local engineering system).
    """
    if crs is None or transform.is_identity:
        return None
    import pyproj
    from pyproj.exceptions import ProjError

    try:
        system = pyproj.CRS.from_wkt(crs.to_wkt())
        ellipsoid = system.ellipsoid
        unit = system.axis_info[0].unit_conversion_factor if system.axis_info else 1.0
    except ProjError:
        return None
    x = transform.a * width / 2 + transform.b * height / 2 + transform.c
    y = transform.d * width / 2 + transform.e * height / 2 + transform.f
    if system.is_geographic:
        if ellipsoid is None:
            return None
        squared = 1 - (ellipsoid.semi_minor_metre / ellipsoid.semi_major_metre) ** 2
        latitude = y * unit
        bend = 1 - squared * math.sin(latitude) ** 2
        north = ellipsoid.semi_major_metre * (1 - squared) / bend**1.5 * unit
        east = ellipsoid.semi_major_metre / math.sqrt(bend) * math.cos(latitude) * unit
    elif system.is_projected:
        north = east = unit / math.sqrt(area_inflation(system, x, y))
    else:
        return None
    along_x = math.hypot(transform.a * east, transform.d * north)
    along_y = math.hypot(transform.b * east, transform.e * north)
    if not (math.isfinite(along_x) and math.isfinite(along_y) and along_x > 0 and along_y > 0):
        return None
    return along_y, along_x


def area_inflation(system: Any, x: float, y: float) -> float:
    """Areal scale of a projection at a point; 1 where it is within 1 % or cannot be told."""
    import pyproj
    from pyproj.exceptions import ProjError

    try:
        projection = pyproj.Proj(system)
        longitude, latitude = projection(x, y, inverse=True)
        factor = float(projection.get_factors(longitude, latitude).areal_scale)
    except ProjError:
        return 1.0
    return factor if math.isfinite(factor) and factor > 0 and abs(factor - 1) > 0.01 else 1.0
