"""One raster file: what it is, how large its pixels are on the ground, and which of them carry data."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fmsuite.core.inputs import Quantification
from fmsuite.domains.remote_sensing.band_names import band_names, colour_names
from fmsuite.domains.remote_sensing.grids import crs_text
from fmsuite.domains.remote_sensing.layers import Layer
from fmsuite.domains.remote_sensing.metres import metres_per_pixel
from fmsuite.domains.remote_sensing.names import layer_of
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.sensors import Kind
from fmsuite.domains.remote_sensing.validity import mask_of, nodata_values, valid_values
from fmsuite.errors import ReadFailure

if TYPE_CHECKING:
    from affine import Affine
    from rasterio.io import DatasetReader

SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2")


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
        stored: dtype of the entries or values in the file.
        nodata: by band number, what the file or the options declare, of what the type can hold.
        masked: by band number, how the file marks pixels beside nodata values: not at all (0), with one mask for all
            bands (its number, below zero), or with the band's own (its number).
        palette: (N, 4) colours; ``bands`` are then red, green and blue of the entries that one band of the file has.
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
    stored: np.dtype
    nodata: dict[int, tuple[float, ...]]
    masked: dict[int, int]
    palette: np.ndarray | None = None

    @property
    def kinds(self) -> dict[str, Kind]:
        """What may vary in each band's values."""
        return {name: self.own.spectral.kind_of(name.rpartition(":")[2]) for name in self.bands}

    @property
    def height(self) -> int:
        return int(self.dataset.height)

    @property
    def width(self) -> int:
        return int(self.dataset.width)

    @property
    def grid(self) -> tuple[Any, ...]:
        """(height, width, CRS, transform), for ``grids.pixel_ratio``."""
        return (self.height, self.width, crs_text(self.dataset.crs), tuple(self.dataset.transform[:6]))

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

        numbers = [self.bands[name] for name in bands] if self.palette is None else [next(iter(self.bands.values()))]
        window = Window(box[1], box[0], box[3], box[2])
        masks: dict[int, np.ndarray] = {}
        try:
            values = self.dataset.read(numbers, window=window, out_shape=(len(numbers), *shape), out_dtype=self.stored)
            for mask in {self.masked[number] for number in numbers} - {0}:
                masks[mask] = self.dataset.read_masks(abs(mask), window=window, out_shape=shape) > 0
        except (RasterioError, OSError, ValueError) as error:
            raise ReadFailure(
                self.path,
                "read",
                f"pixels at row {box[0]}, column {box[1]} cannot be decoded ({reason_of(error)}).",
                "The file is damaged: fetch it again.",
            ) from error
        valid = valid_values(values, numbers, self.nodata, self.masked, masks)
        if self.palette is not None:
            values, valid = self._coloured(values[0], valid[0], bands)
        values, valid = self._physical(values, valid, bands)
        if not valid.all():
            values[~valid] = 0
        return values, valid

    def _coloured(
        self, entries: np.ndarray, valid: np.ndarray, bands: tuple[str, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        assert self.palette is not None
        known = (entries >= 0) & (entries < len(self.palette))
        colours = self.palette[np.where(known, entries, 0)]
        valid = valid & known & (colours[..., 3] > 0)
        order = list(self.bands)
        values = colours[..., [order.index(name) for name in bands]].transpose(2, 0, 1)
        return np.ascontiguousarray(values), np.broadcast_to(valid, values.shape).copy()

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
    tabled = ColorInterp.palette in interpretation
    if tabled and options.palette is None:
        raise ReadFailure(
            path,
            "metadata",
            "its values are entries of a colour table, not measurements.",
            "Read the colours with data.palette=rgb, the entries with data.palette=index, or leave it out.",
        )
    numbers = [n for n in range(1, dataset.count + 1) if interpretation[n - 1] != ColorInterp.alpha]
    if not numbers:
        raise ReadFailure(path, "metadata", "it has no bands of its own.", "A container file? Give its subdatasets.")
    types = {dataset.dtypes[n - 1] for n in numbers}
    if any(name.startswith("complex") for name in types):
        raise ReadFailure(path, "metadata", "its values are complex numbers.", "Detect the amplitude first.")
    stored = np.result_type(*(np.dtype(name) for name in types))
    layer, _ = layer_of(path, options)
    own = options.layout[layer]
    palette = None
    if tabled and options.palette == "rgb":
        own_bands, named = dict.fromkeys(colour_names(path, layer, options), numbers[0]), True
        palette = _colour_table(dataset, numbers[0])
    else:
        names, named = band_names(dataset, path, numbers, layer, options)
        own_bands = {name: number for name, number in zip(names, numbers, strict=True) if name is not None}
    bands = {options.channel_name(layer, name): number for name, number in own_bands.items()}
    tags = {name: (float(dataset.scales[n - 1]), float(dataset.offsets[n - 1])) for name, n in bands.items()}
    declared = [dataset.nodatavals[n - 1] for n in numbers]
    return Raster(
        dataset,
        path,
        bands,
        named,
        str(stored) if palette is None else "uint8",
        tags if any(tag != (1.0, 0.0) for tag in tags.values()) else None,
        metres_per_pixel(dataset.crs, dataset.transform, dataset.height, dataset.width),
        layer,
        own,
        {options.channel_name(layer, name): own.quantification_of(name) for name in own_bands},
        stored,
        {n: nodata_values((nodata, own.nodata), stored) for n, nodata in zip(numbers, declared, strict=True)},
        {n: mask_of(dataset.mask_flag_enums[n - 1], n) for n in numbers},
        palette,
    )


def _colour_table(dataset: DatasetReader, number: int) -> np.ndarray:
    """(N, 4) uint8: red, green, blue and alpha of each entry."""
    table = dataset.colormap(number)
    colours = np.zeros((max(table) + 1, 4), dtype=np.uint8)
    for entry, colour in table.items():
        colours[entry] = colour
    return colours
