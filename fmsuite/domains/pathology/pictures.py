"""Previews: every slide with its tissue and windows, tile images on contact sheets; and pictures of whole sources."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fmsuite.core.data.index import SampleIndex
from fmsuite.domains.base import Overview
from fmsuite.domains.pathology.options import PathologyOptions
from fmsuite.domains.pathology.reading import read_region, read_thumbnail, thumbnail_pitch
from fmsuite.domains.pathology.slides import PixelSource, open_source, true_mpp
from fmsuite.domains.pathology.tiff import TiffSource
from fmsuite.domains.pathology.tiles import ImageSource
from fmsuite.domains.pathology.windows import look_at_slide
from fmsuite.errors import ReadFailure, UsageError
from fmsuite.tiling.preview import contact_sheet, draw_windows, picture_path
from fmsuite.tiling.table import spread_rows, windows_by_source

SHEET = 64
"""Tile images on one contact sheet; more than one sheet would show nothing new."""


def draw_previews(index: SampleIndex, folder: Path, options: PathologyOptions) -> list[Path]:
    """One PNG a slide, and one contact sheet for tile images (evenly spread over all of them).

    The tissue is found again with the options that the index was made with.

    Raises:
        UsageError: if the index has no rows.
        ReadFailure: if a slide cannot be read any more; after the others have been drawn.
    """
    if not len(index):
        raise UsageError("The index has no windows, so there is nothing to draw.")
    options = _made_with(index, options)
    folder.mkdir(parents=True, exist_ok=True)
    facts = index.metadata.get("sources", {})
    written: list[Path] = []
    images: list[str] = []
    failure: ReadFailure | None = None
    for number, windows in enumerate(windows_by_source(index)):
        path, label = windows.first.source, windows.first.label
        if facts.get(path, {}).get("kind") == "image":
            images.append(path)
            continue
        try:
            source = open_source(path)
            try:
                if _is_tile(source, options):
                    images.append(path)
                    continue
                look = look_at_slide(source, options)
            finally:
                source.close()
        except ReadFailure as error:
            failure = failure or error
            continue
        pitch = np.asarray(look.thumbnail.pitch)
        name = facts.get(path, {}).get("slide", Path(path).stem)
        title = f"{name} ({label})" if label else name
        caption = (
            f"{title}: {len(windows.positions)} windows of {options.size} px at {options.mpp:g} um, "
            f"scanned at {look.mpp[1]:.4g} um; tissue {look.tissue.shares['tissue']:.0%}, "
            f"ink {look.tissue.shares['ink']:.0%}, dark {look.tissue.shares['dark']:.0%}"
        )
        starts = (windows.positions - look.thumbnail.origin) / pitch
        extent = np.asarray(windows.first.extent) / pitch
        picture = draw_windows(look.thumbnail.rgb, starts, extent, look.tissue.mask, caption)
        target = picture_path(folder, number, name)
        # A quarter of the time of the default level, for an eighth more bytes.
        picture.save(target, compress_level=3)
        written.append(target)
    if images:
        target = folder / "tiles.png"
        _sheet(images, options).save(target)
        written.append(target)
    if failure is not None:
        raise failure
    return written


def draw_overview(index: SampleIndex, path: str, options: PathologyOptions) -> Overview:
    """The thumbnail in which a slide's tissue was looked for; of a tile image, the image itself.

    Raises:
        UsageError: if the index has no such source.
        ReadFailure: if it cannot be read any more.
    """
    if path not in index.sources:
        raise UsageError(f"{path}: not a source of this index.")
    options = _made_with(index, options)
    source = open_source(path)
    try:
        # Tile images need no resolution, and the fallback takes those of up to 1024 pixels as they are.
        mpp = None if _is_tile(source, options) else true_mpp(source, options.mpp_override)
        pitch = thumbnail_pitch(source, mpp, options.thumbnail_mpp)
    finally:
        source.close()
    thumbnail = read_thumbnail(path, pitch)
    return Overview(thumbnail.rgb, thumbnail.origin, thumbnail.pitch)


def _made_with(index: SampleIndex, options: PathologyOptions) -> PathologyOptions:
    """The options of the index, or the given ones for an index that carries none."""
    return PathologyOptions.model_validate(index.metadata["options"]) if "options" in index.metadata else options


def _sheet(images: list[str], options: PathologyOptions) -> Image.Image:
    pictures, captions = [], []
    for path in (images[place] for place in spread_rows(len(images), SHEET)):
        source = open_source(path)
        try:
            shape = source.levels[0].shape
            zoom = min(1.0, 256 / max(shape))
            size = (max(1, round(shape[0] * zoom)), max(1, round(shape[1] * zoom)))
            rgb, _ = read_region(source, (0.0, 0.0), (float(shape[0]), float(shape[1])), size)
        finally:
            source.close()
        pictures.append(Image.fromarray(rgb))
        captions.append(f"{Path(path).parent.name}/{Path(path).name}")
    return contact_sheet(pictures, captions)


def _is_tile(source: PixelSource, options: PathologyOptions) -> bool:
    if isinstance(source, ImageSource):
        return True
    small = len(source.levels) == 1 and max(source.levels[0].shape) <= options.largest_tile
    return isinstance(source, TiffSource) and small
