"""TIFF files that OpenSlide does not take: flat ones in strips, OME-TIFF pyramids. Read segment by segment."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import Any, cast

import numpy as np
import tifffile

from fmsuite.domains.pathology.slides import Level, PixelSource, unreadable
from fmsuite.errors import ReadFailure

MAX_SEGMENT = 512 * 2**20
"""Bytes of one decoded strip or tile; a compressed TIFF with larger ones cannot be read in bounded memory."""
CACHE = 128 * 2**20
_UM = {"µm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "nm": 1e-3, "m": 1e6}


class TiffSource(PixelSource):
    """An RGB TIFF of 8 bits a sample, with or without a pyramid. Memory stays bounded whatever its size."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._cached = 0
        # The errors of a hostile TIFF are many (struct.error, KeyError, IndexError, zlib.error ...): all mean damage.
        try:
            self._file = tifffile.TiffFile(path)
        except Exception as error:
            raise ReadFailure(path, "open", f"damaged TIFF ({error}).", "Copy or download it again.") from error
        try:
            self._describe()
        except ReadFailure:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise ReadFailure(path, "open", f"damaged TIFF ({error}).", "Copy or download it again.") from error

    def _describe(self) -> None:
        series = self._file.series[0]
        page = series.keyframe
        if series.axes != "YXS" or series.shape[2] not in (3, 4) or series.dtype != np.uint8 or page.planarconfig != 1:
            raise ReadFailure(
                self.path,
                "open",
                f"an image of axes {series.axes}, shape {tuple(series.shape)} and type {series.dtype}: "
                "not 8-bit RGB as bright-field slides are.",
                "Fluorescence and 16-bit images are not supported; convert it to 8-bit RGB if it is bright-field.",
            )
        self._pages: list[Any] = [cast(Any, level.pages[0]).aspage() for level in series.levels]
        height, width = self._pages[0].shape[:2]
        self.levels = tuple(
            Level((p.shape[0], p.shape[1]), (height / p.shape[0], width / p.shape[1])) for p in self._pages
        )
        for p in self._pages:
            end = max((o + c for o, c in zip(p.dataoffsets, p.databytecounts, strict=True)), default=0)
            if end > self._file.filehandle.size:
                raise ReadFailure(
                    self.path,
                    "open",
                    f"damaged or incomplete TIFF: it ends {end - self._file.filehandle.size} bytes too early.",
                    "Copy or download it again.",
                )
            if not p.is_memmappable and int(np.prod(p.chunks)) > MAX_SEGMENT:
                raise ReadFailure(
                    self.path,
                    "open",
                    f"compressed in pieces of {'x'.join(map(str, p.chunks))}, too large to read in parts.",
                    "Convert it to a tiled, pyramidal TIFF (for instance with vips tiffsave --tile --pyramid).",
                )
        self.vendor = "ome-tiff" if self._file.is_ome else "tiff"
        self.bounds = (0.0, 0.0, float(height), float(width))
        self.striped = not page.is_tiled and width > 0
        self.mpp = _ome_mpp(self._file) or _tag_mpp(page)

    def read(self, level: int, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, tuple[float, float]]:
        page = self._pages[level]
        out = np.zeros((height, width, 4), np.uint8)
        out[..., 3] = 255
        channels = page.shape[2]
        try:
            if page.is_memmappable:
                pixels = np.memmap(self.path, np.uint8, "r", page.dataoffsets[0], tuple(page.shape))
                out[..., :channels] = pixels[top : top + height, left : left + width]
            else:
                rows, columns = page.chunks[:2]
                across = -(-page.shape[1] // columns)
                for row in range(top // rows, -(-(top + height) // rows)):
                    for column in range(left // columns, -(-(left + width) // columns)):
                        segment = self._segment(level, row * across + column)
                        y, x = row * rows - top, column * columns - left
                        target = out[max(y, 0) : y + segment.shape[0], max(x, 0) : x + segment.shape[1], :channels]
                        source = segment[max(-y, 0) :, max(-x, 0) :]
                        target[...] = source[: target.shape[0], : target.shape[1]]
        except Exception as error:
            raise unreadable(self.path, error) from error
        return out, (float(top), float(left))

    def _segment(self, level: int, index: int) -> np.ndarray:
        """One decoded strip or tile, cut to the image, (rows, columns, samples)."""
        key = (level, index)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        page = self._pages[level]
        handle = self._file.filehandle
        handle.seek(page.dataoffsets[index])
        count = page.databytecounts[index]
        data = handle.read(count)
        if len(data) < count or not count:
            raise OSError(f"strip or tile {index} is missing or cut short")
        decoded, _, _ = page.decode(data, index, jpegtables=page.jpegtables)
        if decoded is None:
            raise OSError(f"strip or tile {index} holds nothing")
        segment = np.asarray(decoded).reshape(decoded.shape[-3:])
        self._cache[key] = segment
        self._cached += segment.nbytes
        while self._cached > CACHE and len(self._cache) > 1:
            self._cached -= self._cache.popitem(last=False)[1].nbytes
        return segment

    def close(self) -> None:
        self._cache.clear()
        self._file.close()


def _tag_mpp(page: Any) -> tuple[float, float] | None:
    unit = {2: 25400.0, 3: 1e4}.get(int(page.tags["ResolutionUnit"].value) if "ResolutionUnit" in page.tags else 0)
    if unit is None or "XResolution" not in page.tags or "YResolution" not in page.tags:
        return None
    (x, x_by), (y, y_by) = page.tags["XResolution"].value, page.tags["YResolution"].value
    if not (x and x_by and y and y_by):
        return None
    return (unit * y_by / y, unit * x_by / x)


def _ome_mpp(file: tifffile.TiffFile) -> tuple[float, float] | None:
    if not file.is_ome or not file.ome_metadata:
        return None
    with contextlib.suppress(KeyError, TypeError, ValueError, IndexError):
        image = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]
        pixels = (image[0] if isinstance(image, list) else image)["Pixels"]
        sizes = []
        for axis in "YX":
            scale = _UM[str(pixels.get(f"PhysicalSize{axis}Unit", "µm"))]
            sizes.append(float(pixels[f"PhysicalSize{axis}"]) * scale)
        return (sizes[0], sizes[1])
    return None
