"""Cloud-optimised GeoTIFFs, written box by box: tiled, compressed, with overviews, over the raster that they are of."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fmsuite.core.class_colours import class_colours
from fmsuite.core.data.sample import Array
from fmsuite.core.data.scene_maps import Kind, MapKind
from fmsuite.errors import FmsuiteError

SUFFIX = ".tif"
TILE = 512
NO_CLASS = 255
"""Of a class map, where the raster has no data."""
NO_COLOUR = 0
"""Of a picture."""
CACHE = 64 << 20
"""Bytes that GDAL may keep of what it has read and is going to write."""
_DTYPES: dict[Kind, str] = {"classes": "uint8", "scores": "float32", "picture": "uint8"}
_NODATA: dict[Kind, float] = {"classes": NO_CLASS, "scores": float("nan"), "picture": NO_COLOUR}


@dataclass(frozen=True)
class Ground:
    """Where the pixels of a file lie.

    Attributes:
        shape: (height, width).
        crs: rasterio's, or ``None``.
        transform: pixel corners (column, row) to coordinates; it may be rotated. The identity where there is none.
        gcps: ground control points with their CRS, of files that have these in place of a transform.
    """

    shape: tuple[int, int]
    crs: Any
    transform: Any
    gcps: tuple[Sequence[Any], Any] | None = None


class CogFile:
    """A map that grows box by box, each pixel written once; what is not written is nodata: ``NO_CLASS`` in a map of
    classes, which has a colour table and overviews of the most frequent class; NaN in one of scores, and ``NO_COLOUR``
    in a picture, whose overviews are means.

    The boxes go to a plain tiled GeoTIFF beside the map, which is turned into the map at the end; until then the map's
    name does not exist (or is an earlier map's). Memory does not depend on the map's size.

    Args:
        path: without a suffix.
        bands: how many.

    Raises:
        FmsuiteError: if it cannot be written.
    """

    def __init__(self, path: Path, ground: Ground, what: MapKind, bands: int = 1) -> None:
        import rasterio

        self.path = path.with_name(path.name + SUFFIX)
        self._rough = path.with_name(f".{path.name}.rough{SUFFIX}")
        self._partial = path.with_name(f".{path.name}.partial{SUFFIX}")
        self._what = what
        picture = {"photometric": "RGB"} if what.kind == "picture" else {}
        try:
            with _quiet(), rasterio.Env(GDAL_CACHEMAX=CACHE):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = rasterio.open(
                    self._rough,
                    "w",
                    driver="GTiff",
                    height=ground.shape[0],
                    width=ground.shape[1],
                    count=bands,
                    dtype=_DTYPES[what.kind],
                    nodata=_NODATA[what.kind],
                    crs=ground.crs,
                    transform=ground.transform,
                    tiled=True,
                    blockxsize=TILE // 2,
                    blockysize=TILE // 2,
                    interleave="band",
                    bigtiff="IF_SAFER",
                    sparse_ok=True,
                    **picture,
                )
                self._describe(ground, what)
        except (rasterio.errors.RasterioError, OSError) as error:
            raise _unwritten(self.path, error) from error

    def _describe(self, ground: Ground, what: MapKind) -> None:
        if ground.gcps is not None:
            self._file.gcps = ground.gcps
        if what.kind == "classes":
            self._file.write_colormap(
                1, {n: (*colour, 255) for n, colour in enumerate(class_colours(max(len(what.names), 2)))}
            )
            self._file.update_tags(**{f"CLASS_{number}": name for number, name in enumerate(what.names)})
        else:
            for band, name in enumerate(what.names, start=1):
                self._file.set_band_description(band, name)
        self._file.update_tags(**what.tags)

    def write(self, values: Array, top: int = 0, left: int = 0) -> None:
        """
        Args:
            values: (bands, height, width).

        Raises:
            FmsuiteError: if the disk is full.
        """
        import rasterio
        from rasterio.windows import Window

        try:
            with rasterio.Env(GDAL_CACHEMAX=CACHE):
                self._file.write(
                    values.astype(_DTYPES[self._what.kind], copy=False),
                    window=Window(left, top, values.shape[2], values.shape[1]),
                )
        except (rasterio.errors.RasterioError, OSError) as error:
            raise _unwritten(self.path, error) from error

    def finish(self) -> Path:
        """
        Raises:
            FmsuiteError: as ``write``.
        """
        import rasterio
        from rasterio.shutil import copy

        try:
            with _quiet(), rasterio.Env(GDAL_CACHEMAX=CACHE):
                self._file.close()
                copy(
                    self._rough,
                    self._partial,
                    driver="COG",
                    blocksize=TILE,
                    compress="DEFLATE",
                    predictor="YES",
                    overview_resampling="MODE" if self._what.kind == "classes" else "AVERAGE",
                    bigtiff="IF_SAFER",
                    statistics="NO",
                )
            os.replace(self._partial, self.path)
        except (rasterio.errors.RasterioError, OSError) as error:
            raise _unwritten(self.path, error) from error
        finally:
            self.discard()
        return self.path

    def discard(self) -> None:
        """Remove what has been written so far."""
        self._file.close()
        for path in (self._rough, self._partial):
            path.unlink(missing_ok=True)
            path.with_name(path.name + ".aux.xml").unlink(missing_ok=True)


def write_cog(path: Path, values: Array, ground: Ground, what: MapKind | None = None) -> Path:
    """A whole map at once.

    Args:
        values: (bands, height, width); 8 bits are classes unless ``what`` says something else, other values scores.

    Raises:
        FmsuiteError: as ``CogFile``.
    """
    file = CogFile(path, ground, what or MapKind("classes" if values.dtype == np.uint8 else "scores"), len(values))
    try:
        file.write(values)
        return file.finish()
    except BaseException:
        file.discard()
        raise


def _unwritten(path: Path, error: BaseException) -> FmsuiteError:
    said = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
    return FmsuiteError(f"{path}: the map cannot be written ({said}).", "Is the disk full? Choose another folder.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Rasters without a place on Earth are allowed."""
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield
