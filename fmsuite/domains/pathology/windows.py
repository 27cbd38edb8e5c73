"""From files to index rows: what can be read, where its tissue is, and which windows are worth looking at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.seeding import generator
from fmsuite.domains.pathology.options import PathologyOptions
from fmsuite.domains.pathology.reading import Thumbnail, read_region, read_thumbnail, thumbnail_pitch
from fmsuite.domains.pathology.slides import PixelSource, open_source, true_mpp
from fmsuite.domains.pathology.tiff import TiffSource
from fmsuite.domains.pathology.tiles import ImageSource, tile_windows
from fmsuite.errors import ReadFailure
from fmsuite.tiling.grid import box_shares, window_grid
from fmsuite.tiling.labels import Assigned, SourceLabel
from fmsuite.tiling.parts import PartStore
from fmsuite.tiling.sources import SourceFile
from fmsuite.tiling.table import window_table
from fmsuite.tiling.tissue import TissueMask, find_tissue

SOURCE_FACTS_LIMIT = 10_000
"""Facts of each source go into the index's metadata up to so many sources."""


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source, and what is worth remembering of it."""

    table: pa.Table
    facts: dict[str, Any]


@dataclass(frozen=True)
class SlideTissue:
    """A slide's thumbnail with its tissue.

    Attributes:
        thumbnail: the picture.
        tissue: the mask on it.
        mpp: (y, x) um per level-0 pixel.
    """

    thumbnail: Thumbnail
    tissue: TissueMask
    mpp: tuple[float, float]


def look_at_slide(source: PixelSource, options: PathologyOptions) -> SlideTissue:
    """Read a slide's thumbnail and find its tissue. The source itself is not read from.

    Raises:
        ReadFailure: if its resolution is unknown or implausible, or nothing on it can be read.
    """
    mpp = true_mpp(source, options.mpp_override)
    pitch = thumbnail_pitch(source, mpp, options.thumbnail_mpp)
    thumbnail = read_thumbnail(source.path, pitch)
    tissue = find_tissue(thumbnail.rgb, (pitch[0] * mpp[0], pitch[1] * mpp[1]), thumbnail.valid, options.tissue)
    return SlideTissue(thumbnail, tissue, mpp)


def slide_rows(
    source: PixelSource, file: SourceFile, note: SourceLabel, options: PathologyOptions, skipped: SkippedLog
) -> SourceRows:
    """The windows of one slide. Places on it that cannot be read are left out and recorded.

    Raises:
        ReadFailure: if the slide cannot be used: naming the reason and the way out.
    """
    path = str(file.path)
    mpp = true_mpp(source, options.mpp_override)
    coarse = max(mpp) / options.mpp
    if coarse > options.max_upsampling:
        raise ReadFailure(
            path,
            "metadata",
            f"scanned at {max(mpp):.4g} um per pixel, {coarse:.3g} times coarser than the asked {options.mpp:g}.",
            "Ask for a coarser mpp, or raise max_upsampling.",
        )
    look = look_at_slide(source, options)
    if look.thumbnail.failure is not None:
        skipped.add(
            path,
            "tissue",
            f"{look.thumbnail.unreadable:.1%} of the slide cannot be read and is left out: "
            f"{look.thumbnail.failure.reason}",
        )
    if not look.tissue:
        raise ReadFailure(path, "tissue", look.tissue.reason)
    extent = (options.size * options.mpp / mpp[0], options.size * options.mpp / mpp[1])
    stride = (options.step * options.mpp / mpp[0], options.step * options.mpp / mpp[1])
    top, left, height, width = source.bounds
    positions = window_grid((height, width), extent, stride, origin=(top, left), edges=options.edges)
    if not len(positions):
        raise ReadFailure(
            path,
            "tissue",
            f"{height:.0f} x {width:.0f} pixels hold no window of {extent[0]:.0f} x {extent[1]:.0f}.",
            "Set edges=cover to let windows reach beyond the slide, or ask for a smaller size or finer mpp.",
        )
    pitch = np.asarray(look.thumbnail.pitch)
    content = box_shares(look.tissue.mask, (positions - look.thumbnail.origin) / pitch, np.asarray(extent) / pitch)
    enough = (content >= options.min_tissue) & (content > 0)
    if not enough.any():
        raise ReadFailure(
            path,
            "tissue",
            f"tissue covers {look.tissue.shares['tissue']:.1%} of the slide, but no window holds "
            f"{options.min_tissue:.0%} of it; the fullest holds {content.max():.1%}.",
            "Lower min_tissue, or ask for smaller windows.",
        )
    positions, content = positions[enough], content[enough]
    chosen = choose(len(positions), options.max_windows, options.seed, file.group)
    positions, content = positions[chosen], content[chosen]
    probe(path, positions, extent, options.size)
    group = note.group or file.group
    table = window_table(path, group, positions, extent, mpp, content, note.label, note.split)
    facts = {
        "kind": "slide",
        "mpp": [round(value, 6) for value in mpp],
        "vendor": source.vendor,
        "levels": len(source.levels),
        "shape": list(source.levels[0].shape),
        "slide": file.group,
    }
    return SourceRows(table, facts)


def image_rows(source: PixelSource, file: SourceFile, note: SourceLabel, options: PathologyOptions) -> SourceRows:
    """The windows of one tile image: all of them, since whoever cut it out has already chosen.

    Raises:
        ReadFailure: if its stated resolution is implausible.
    """
    mpp = None
    if options.mpp_override is not None or source.mpp is not None:
        mpp = true_mpp(source, options.mpp_override)
    shape = source.levels[0].shape
    scale = None if mpp is None else options.mpp / max(mpp)
    positions, extent = tile_windows(shape, options.size, options.step, scale)
    chosen = choose(len(positions), options.max_windows, options.seed, file.group)
    folder = file.group.rpartition("/")[0] or file.path.parent.name
    table = window_table(
        str(file.path), note.group or folder, positions[chosen], extent, mpp or (), 1.0, note.label, note.split
    )
    facts = {"kind": "image", "mpp": None if mpp is None else list(mpp), "shape": list(shape)}
    return SourceRows(table, facts)


def choose(count: int, limit: int | None, seed: int, group: str) -> np.ndarray:
    """Which of ``count`` windows to keep: ascending, the same for the same seed and slide."""
    if limit is None or count <= limit:
        return np.arange(count)
    return np.sort(generator(seed, "windows", group).choice(count, limit, replace=False))


def probe(path: str, positions: np.ndarray, extent: tuple[float, float], size: int) -> None:
    """Read a few windows at the resolution they will be used at: thumbnails come from another level.

    Raises:
        ReadFailure: if none of them can be read.
    """
    places = dict.fromkeys((0, len(positions) // 2, len(positions) - 1))
    failures: list[ReadFailure] = []
    for place in places:
        source = open_source(path)
        try:
            read_region(source, (float(positions[place][0]), float(positions[place][1])), extent, (size, size))
            return
        except ReadFailure as failure:
            failures.append(failure)
        finally:
            source.close()
    raise ReadFailure(path, "read", f"it opens, but its windows cannot be read: {failures[0].reason}", failures[0].hint)


def rows_of_files(
    files: Iterable[SourceFile],
    labels: Assigned,
    options: PathologyOptions,
    skipped: SkippedLog,
    parts: PartStore,
) -> Iterator[SourceRows]:
    """The rows of each file that can be used, one file open at a time; the others are recorded.

    Files whose rows are in ``parts`` are not opened again.
    """
    seen: dict[tuple[str, str], Path] = {}
    for file in files:
        note = labels.of(file)
        known = (file.group, *astuple(note))
        kept = parts.load(file.path, known)
        if kept is not None:
            table, facts = kept
            identity = facts.pop("identity")
            if identity:
                seen.setdefault((identity, str(file.path.parent)), file.path)
            yield SourceRows(table, facts)
            continue
        try:
            source = open_source(str(file.path))
            try:
                if source.identity:
                    # Any one file of a DICOM series opens the whole slide.
                    key = (source.identity, str(file.path.parent))
                    if seen.setdefault(key, file.path) != file.path:
                        continue
                rows = _rows(source, file, note, options, skipped)
            finally:
                source.close()
        except ReadFailure as failure:
            skipped.add_failure(failure)
            continue
        if not isinstance(source, ImageSource):
            # A tile image is looked at in less time than its rows are written.
            parts.save(file.path, known, rows.table, {**rows.facts, "identity": source.identity})
        yield rows


def _rows(
    source: PixelSource, file: SourceFile, note: SourceLabel, options: PathologyOptions, skipped: SkippedLog
) -> SourceRows:
    small = max(source.levels[0].shape) <= options.largest_tile
    if isinstance(source, ImageSource) or (isinstance(source, TiffSource) and len(source.levels) == 1 and small):
        return image_rows(source, file, note, options)
    return slide_rows(source, file, note, options, skipped)
