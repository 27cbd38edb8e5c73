"""views.png: what the model really sees, on one page, before any time is spent on training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fmsuite.core.data.adjust import adjusted
from fmsuite.core.data.sample import Batch, View
from fmsuite.core.tokens import PatchGrid
from fmsuite.errors import UsageError

_PAGE, _INK, _FAINT = (255, 255, 255), (30, 30, 30), (115, 115, 115)
_MARGIN, _GAP, _HEADER, _NOTE, _LEGEND, _GUTTER = 16, 12, 44, 20, 34, 78
_WIDE_CELL, _NARROW_CELL, _MANY_COLUMNS, _WIDEST = 224, 150, 5, 3
_VEIL, _VEIL_OPACITY, _GRID_OPACITY, _SMALLEST_TOKEN = (90, 94, 104), 0.86, 0.45, 5
_NARROWEST_PAGE = 470
_STRIPES, _STRIPE_WIDTH = ((214, 64, 58), (250, 226, 222)), 5


def draw_views(
    batch: Batch,
    grid: PatchGrid | None,
    to_rgb: Callable[[np.ndarray], np.ndarray],
    path: Path,
    samples: int = 6,
) -> None:
    """One PNG: a row for each sample, a column for each view, or for each mask of a view that has several.

    Masked tokens lie under a dark veil on which the token grid is drawn; invalid values are hatched in red. Tokens may
    have more axes than a picture, so masks and validity are projected on (y, x): the opacity is the share, over
    groups, dates, slices and channels, that is masked or invalid there. Where the domain's picture is not one (y, x)
    plane (three orthogonal slices, a row of dates), the projection stands in a panel of its own to its right.

    Args:
        batch: raw pixels, as the loader yields them, on any device; they are adjusted here, as training does it.
        grid: how the pixels are cut into tokens; ``None`` where they are not, which draws no masks.
        to_rgb: a picture of one view, (C, *size) raw values to (H, W, 3) uint8. Invalid values are set to their
            channel's mean first, so that nodata does not decide how the picture is stretched.
        path: the PNG; its folder is made.
        samples: rows, at most.

    Raises:
        UsageError: if the batch has no views, or ``samples`` is below 1.
        ValueError: if ``to_rgb`` returns anything but (H, W, 3) uint8.
    """
    batch = batch.map_views(adjusted)
    columns = [
        column
        for name, group in batch.views.items()
        for number, view in enumerate(group)
        for column in _columns(f"{name} {number + 1}/{len(group)}" if len(group) > 1 else name, view)
    ]
    rows = min(samples, len(batch))
    if not columns or rows < 1:
        raise UsageError("There are no views to draw.", "Ask for at least one sample and one view.")
    height = _WIDE_CELL if len(columns) <= _MANY_COLUMNS else _NARROW_CELL
    cells = [[_draw_cell(view, row, grid, to_rgb, height) for _, view in columns] for row in range(rows)]
    widths = [max(cells[row][column].image.width for row in range(rows)) for column in range(len(columns))]
    heights = [max(cell.image.height for cell in line) for line in cells]

    legend = _legend(cells)
    width = max(2 * _MARGIN + _GUTTER + sum(widths) + _GAP * len(widths), _NARROWEST_PAGE if legend else 0)
    page = Image.new("RGB", (width, 2 * _MARGIN + _HEADER + sum(heights) + (_NOTE + _GAP) * rows + legend), _PAGE)
    pen = ImageDraw.Draw(page)
    title, small = ImageFont.load_default(15), ImageFont.load_default(12)
    left = _MARGIN + _GUTTER
    for (name, view), column_width in zip(columns, widths, strict=True):
        pen.text((left, _MARGIN), _fit(pen, name, title, column_width), fill=_INK, font=title)
        size = " x ".join(str(length) for length in view.pixels.shape[2:])
        text = f"{size}, {view.pixels.shape[1]} ch"
        pen.text((left, _MARGIN + 21), _fit(pen, text, small, column_width), fill=_FAINT, font=small)
        left += column_width + _GAP
    top = _MARGIN + _HEADER
    for row, line in enumerate(cells):
        pen.text((_MARGIN, top), f"row {int(batch.indices[row])}", fill=_INK, font=small)
        label = int(batch.labels[row])
        pen.text((_MARGIN, top + 17), f"label {label}" if label >= 0 else "no label", fill=_FAINT, font=small)
        left = _MARGIN + _GUTTER
        for cell, column_width in zip(line, widths, strict=True):
            page.paste(cell.image, (left, top))
            pen.text((left, top + cell.image.height + 3), cell.note, fill=_FAINT, font=small)
            left += column_width + _GAP
        top += heights[row] + _NOTE + _GAP
    if legend:
        _draw_legend(page, pen, cells, top, small)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A quarter of the time of the default level, for an eighth more bytes.
    page.save(path, compress_level=3)


def _columns(name: str, view: View) -> list[tuple[str, View]]:
    if view.mask is None or view.mask.dim() == 2:
        return [(name, view)]
    masks = view.mask.unbind(1)
    return [(f"{name}, mask {number}/{len(masks)}", replace(view, mask=mask)) for number, mask in enumerate(masks, 1)]


@dataclass
class _Cell:
    image: Image.Image
    note: str
    masked: bool
    invalid: bool


def _draw_cell(
    view: View, row: int, grid: PatchGrid | None, to_rgb: Callable[[np.ndarray], np.ndarray], height: int
) -> _Cell:
    values = view.pixels[row].cpu().numpy()
    valid = None if view.valid is None else view.valid[row].cpu().numpy()
    mask = None if view.mask is None else view.mask[row].cpu().numpy()
    if valid is not None and valid.all():
        valid = None
    rgb = np.asarray(to_rgb(values if valid is None else _filled(values, valid)))
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"to_rgb returned {rgb.dtype} {rgb.shape} instead of uint8 (H, W, 3)")

    masked, invalid = _projected(values.shape[1:], mask, valid, grid)
    picture, aside = _scaled(rgb, height), ""
    plane = grid is not None and _is_plane(rgb, values.shape[1:], grid)
    if plane:
        picture = _overlaid(picture, masked, invalid)
    elif masked is not None or invalid is not None:
        shares = masked if masked is not None else invalid
        assert shares is not None
        panel = _overlaid(_scaled(np.full((*shares.shape, 3), 225, dtype=np.uint8), picture.height), masked, invalid)
        both = Image.new("RGB", (picture.width + 4 + panel.width, max(picture.height, panel.height)), _PAGE)
        both.paste(picture, (0, 0))
        both.paste(panel, (picture.width + 4, 0))
        picture = both
        others = [axis for axis in grid.token_axes if axis not in ("y", "x")] if grid is not None else []
        aside = f" (right: share over {', '.join(others)})"
    notes = []
    if mask is not None:
        notes.append(f"{mask.mean():.0%} masked")
    if valid is not None:
        notes.append(f"{1 - valid.mean():.0%} invalid")
    return _Cell(picture, ", ".join(notes) + aside, bool(mask is not None and mask.any()), valid is not None)


def _filled(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """(C, *size) with each channel's invalid values at the mean of its valid ones."""
    filled = values.copy()
    for channel, keep in zip(filled, np.broadcast_to(valid.reshape(*_wide(valid, values)), values.shape)):
        mean = channel[keep].mean(dtype=np.float64) if keep.any() else 0
        channel[~keep] = np.asarray(mean).astype(values.dtype)
    return filled


def _wide(valid: np.ndarray, values: np.ndarray) -> tuple[int, ...]:
    return (*valid.shape, *(1,) * (values.ndim - valid.ndim))


def _projected(
    size: tuple[int, ...], mask: np.ndarray | None, valid: np.ndarray | None, grid: PatchGrid | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Shares masked (token rows, token columns) and invalid (y, x), or ``None`` where there is nothing to show."""
    if grid is None or not {"y", "x"} <= set(grid.axes):
        return None, None
    masked = None if mask is None else _plane_mean(mask.reshape(grid.shape(size)), grid.token_axes)
    invalid = None if valid is None else _plane_mean(~valid, ("channel", *grid.axes))
    return masked, invalid


def _plane_mean(values: np.ndarray, axes: tuple[str, ...]) -> np.ndarray:
    others = tuple(number for number, axis in enumerate(axes) if axis not in ("y", "x"))
    mean = values.astype(np.float32).mean(axis=others)
    kept = [axis for axis in axes if axis in ("y", "x")]
    return mean if kept == ["y", "x"] else mean.T


def _is_plane(rgb: np.ndarray, size: tuple[int, ...], grid: PatchGrid) -> bool:
    """Whether the picture is the (y, x) plane, pixel by pixel or, for inputs of just these axes, at any scale."""
    if not {"y", "x"} <= set(grid.axes):
        return False
    plane = (size[grid.axes.index("y")], size[grid.axes.index("x")])
    if len(size) == 2:
        return abs(rgb.shape[0] * plane[1] - rgb.shape[1] * plane[0]) <= max(plane)
    return rgb.shape[:2] == plane


def _scaled(rgb: np.ndarray, height: int) -> Image.Image:
    """At that height, unless it would become very wide."""
    image = Image.fromarray(rgb)
    factor = min(height / image.height, _WIDEST * height / image.width)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.NEAREST if factor >= 3 else Image.Resampling.BICUBIC)


def _overlaid(picture: Image.Image, masked: np.ndarray | None, invalid: np.ndarray | None) -> Image.Image:
    canvas: np.ndarray = np.asarray(picture, dtype=np.float32)
    if invalid is not None:
        opacity = _stretched(invalid, picture)[..., None]
        down, across = np.indices(canvas.shape[:2])
        stripes = np.array(_STRIPES, dtype=np.float32)[((down + across) // _STRIPE_WIDTH) % 2]
        canvas = canvas + (stripes - canvas) * opacity
    if masked is not None:
        opacity = _stretched(masked, picture)[..., None]
        canvas = canvas + (np.array(_VEIL, dtype=np.float32) - canvas) * (opacity * _VEIL_OPACITY)
        lines = _token_lines(masked.shape, picture)[..., None]
        canvas = canvas + (255 - canvas) * (lines * (opacity > 0) * _GRID_OPACITY)
    return Image.fromarray(np.rint(canvas).clip(0, 255).astype(np.uint8))


def _cells_of(length: int, tokens: int) -> np.ndarray:
    return ((np.arange(length) + 0.5) * (tokens / length)).astype(np.int64).clip(0, tokens - 1)


def _stretched(shares: np.ndarray, picture: Image.Image) -> np.ndarray:
    return shares[np.ix_(_cells_of(picture.height, shares.shape[0]), _cells_of(picture.width, shares.shape[1]))]


def _token_lines(tokens: tuple[int, ...], picture: Image.Image) -> np.ndarray:
    """1 on the first pixel of every token, unless tokens are too small for lines to help."""
    lines = np.zeros((picture.height, picture.width), dtype=np.float32)
    if min(picture.height / tokens[0], picture.width / tokens[1]) < _SMALLEST_TOKEN:
        return lines
    lines[np.diff(_cells_of(picture.height, tokens[0]), prepend=-1) > 0] = 1
    lines[:, np.diff(_cells_of(picture.width, tokens[1]), prepend=-1) > 0] = 1
    return lines


def _fit(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    while len(text) > 1 and pen.textlength(text, font=font) > width:
        text = text[:-2] + "…"
    return text


def _legend(cells: list[list[_Cell]]) -> int:
    return _LEGEND if any(cell.masked or cell.invalid for line in cells for cell in line) else 0


def _draw_legend(
    page: Image.Image,
    pen: ImageDraw.ImageDraw,
    cells: list[list[_Cell]],
    top: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    flat = [cell for line in cells for cell in line]
    whole = np.ones((1, 1), dtype=np.float32)
    left = _MARGIN + _GUTTER
    for shown, masked, invalid, text in (
        (any(cell.masked for cell in flat), whole, None, "masked token"),
        (any(cell.invalid for cell in flat), None, whole, "invalid: nodata, outside, padding"),
    ):
        if not shown:
            continue
        swatch = _overlaid(Image.new("RGB", (18, 18), (200, 200, 200)), masked, invalid)
        page.paste(swatch, (left, top + 6))
        pen.text((left + 26, top + 7), text, fill=_INK, font=font)
        left += 26 + round(pen.textlength(text, font=font)) + 24
