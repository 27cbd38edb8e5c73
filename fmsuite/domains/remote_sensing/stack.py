"""One date of one scene: one file, or several whose pixels make one grid."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fmsuite.domains.remote_sensing.clouds import Clouds, clouded
from fmsuite.domains.remote_sensing.grids import misfit, pixel_ratio
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.raster import Raster, open_raster
from fmsuite.errors import ReadFailure

if TYPE_CHECKING:
    from affine import Affine


@dataclass(frozen=True)
class Part:
    """One file of a stack.

    Attributes:
        ratio: how many pixels of the stack one of its own measures along (y, x).
    """

    raster: Raster
    ratio: tuple[int, int]


@dataclass(frozen=True)
class Stack:
    """Open files that are read as one raster.

    The grid is the finest of the files'. A coarser one, whose pixels must be whole multiples with the same corner, is
    read by repeating each of its pixels: values and nodata stay what was measured.

    Attributes:
        parts: the files.
        bands: channel name to the part that holds it.
        grid_of: the part whose grid is the stack's.
        optional: channels that no file needs to have; they read as invalid.
        clouds: what is to be invalid besides.
    """

    parts: tuple[Part, ...]
    bands: dict[str, Part]
    grid_of: Raster
    optional: frozenset[str] = frozenset()
    clouds: Clouds | None = None

    @property
    def path(self) -> str:
        return self.parts[0].raster.path

    @property
    def height(self) -> int:
        return self.grid_of.height

    @property
    def width(self) -> int:
        return self.grid_of.width

    @property
    def metres(self) -> tuple[float, float] | None:
        """True size of a pixel on the ground along (y, x); ``None`` without a known place on Earth."""
        return self.grid_of.metres

    @property
    def grid(self) -> tuple[Any, ...]:
        """(height, width, CRS, transform), for ``grids.pixel_ratio``."""
        return self.grid_of.grid

    @property
    def crs(self) -> Any:
        """rasterio's CRS, or ``None``."""
        return self.grid_of.crs

    @property
    def transform(self) -> Affine:
        """From (column, row) to map coordinates."""
        return self.grid_of.transform

    def close(self) -> None:
        with ExitStack() as closing:
            for part in self.parts:
                closing.callback(part.raster.close)
            if self.clouds is not None:
                closing.callback(self.clouds.close)

    def read(
        self, bands: tuple[str, ...], top: int, left: int, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """A box of pixels of the stack's grid, as ``Raster.read``; of each file all bands at once.

        Returns:
            values (C, height, width) and valid, bool, of the same shape.

        Raises:
            ReadFailure: if a band is in no file, or pixels cannot be decoded.
        """
        values, valid = self._read_files(bands, top, left, height, width)
        if self.clouds is not None:
            valid = valid & self.clouds.clear(self.path, top, left, height, width)
            values = np.where(valid, values, np.zeros((), values.dtype))
        return values, valid

    def _read_files(
        self, bands: tuple[str, ...], top: int, left: int, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        shared = self._shared(bands)
        if len(shared) == 1 and len(shared[0][1]) == len(bands) and shared[0][0].ratio == (1, 1):
            return shared[0][0].raster.read(bands, top, left, height, width)
        found = []
        for part, names in shared:
            (down, across), first = part.ratio, (top // part.ratio[0], left // part.ratio[1])
            rows, columns = -(-(top + height) // down) - first[0], -(-(left + width) // across) - first[1]
            pair = part.raster.read(names, *first, rows, columns)
            skip = (top - first[0] * down, left - first[1] * across)
            found.append(tuple(_repeated(array, part.ratio, skip, (height, width)) for array in pair))
        return self._joined(bands, shared, found, (height, width))

    def overview(self, bands: tuple[str, ...], longest: int) -> np.ndarray:
        """(C, h, w): the whole raster, reduced until its longer side measures at most ``longest``; 0 where invalid.

        Raises:
            ReadFailure: as ``read``.
        """
        factor = max(1.0, max(self.height, self.width) / longest)
        shape = (max(1, round(self.height / factor)), max(1, round(self.width / factor)))
        shared = self._shared(bands)
        found = [part.raster.reduced(names, shape) for part, names in shared]
        return self._joined(bands, shared, found, shape)[0]

    def _shared(self, bands: Sequence[str]) -> list[tuple[Part, tuple[str, ...]]]:
        """The files, each with those of the bands that it holds.

        Raises:
            ReadFailure: if none holds one that is not optional.
        """
        lacking = [name for name in bands if name not in self.bands and name not in self.optional]
        if lacking:
            raise ReadFailure(
                self.path,
                "read",
                f"it has no band {', '.join(lacking)}; it has {', '.join(self.bands)}.",
            )
        held: dict[int, list[str]] = {}
        for name in bands:
            if name in self.bands:
                held.setdefault(id(self.bands[name]), []).append(name)
        return [(part, tuple(held[id(part)])) for part in self.parts if id(part) in held]

    def _joined(
        self,
        bands: tuple[str, ...],
        shared: Sequence[tuple[Part, tuple[str, ...]]],
        found: Sequence[tuple[np.ndarray, ...]],
        shape: tuple[int, int],
    ) -> tuple[np.ndarray, np.ndarray]:
        dtype = np.result_type(*(values.dtype for values, _ in found)) if found else np.dtype(np.float32)
        # Of 64 bits, tensors keep 32.
        values = np.zeros((len(bands), *shape), dtype=np.float32 if dtype.kind == "f" else dtype)
        valid = np.zeros(values.shape, dtype=bool)
        place = {name: number for number, name in enumerate(bands)}
        for (_, names), (some, some_valid) in zip(shared, found, strict=True):
            numbers = [place[name] for name in names]
            values[numbers], valid[numbers] = some, some_valid
        return values, valid


def open_stack(paths: tuple[str, ...], options: RemoteSensingOptions) -> Stack:
    """The files of one date of one scene.

    Raises:
        ReadFailure: if one is not a raster, its bands cannot be understood, another has the same, or their pixels do
            not coincide; as ``clouds.clouded``.
    """
    with ExitStack() as opened:
        rasters = []
        for path in paths:
            rasters.append(open_raster(path, options))
            opened.callback(rasters[-1].close)
        finest = min(rasters, key=lambda raster: abs(raster.transform.determinant))
        parts = []
        bands: dict[str, Part] = {}
        for raster in rasters:
            ratio = pixel_ratio(finest.grid, raster.grid)
            if ratio is None:
                raise ReadFailure(raster.path, "metadata", misfit(finest.path, finest.grid, raster.grid))
            parts.append(Part(raster, ratio))
            for name in raster.bands:
                if name in bands:
                    raise ReadFailure(raster.path, "metadata", f"{bands[name].raster.path} has the band {name} too.")
                bands[name] = parts[-1]
        stack = clouded(Stack(tuple(parts), bands, finest, _optional(options)), options)
        opened.pop_all()
    return stack


def close_stack(stack: Stack) -> None:
    stack.close()


def _optional(options: RemoteSensingOptions) -> frozenset[str]:
    return frozenset(
        options.channel_name(number, band)
        for number, layer in enumerate(options.layout)
        if not layer.required
        for band in layer.spectral.band_names
    )


def _repeated(array: np.ndarray, ratio: tuple[int, int], skip: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    if ratio == (1, 1):
        return array
    for axis, count in zip((1, 2), ratio, strict=True):
        array = array.repeat(count, axis=axis)
    return array[:, skip[0] : skip[0] + size[0], skip[1] : skip[1] + size[1]]
