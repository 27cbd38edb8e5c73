"""Volumes as pictures for people: mid-slices of the three planes, and where the windows are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fmsuite.core.data.index import SampleIndex
from fmsuite.core.inputs import InputSpec
from fmsuite.domains.medical.maps import stem
from fmsuite.domains.medical.reader import VolumeReader, voxel_box
from fmsuite.tiling.preview import picture_path

MR_WINDOW = (-2.5, 2.5)
"""Standard deviations of the foreground that are drawn black and white."""
GAP = 2
PLANES = ((0, 1, 2), (1, 0, 2), (2, 0, 1))
"""(cut, up, right) axes among (z, y, x) for the axial, coronal and sagittal slice."""
BOX_COLOUR = (255, 200, 0)
LONG_SIDE = 256


def montage(values: np.ndarray, spec: InputSpec, spacing: Sequence[float] | None = None) -> np.ndarray:
    """(C, z, y, x) raw values to (H, W, 3) uint8, see ``MedicalDomain.to_rgb``.

    Args:
        values: the first channel is drawn.
        spec: says the intensity window.
        spacing: (z, y, x) millimetres of a voxel; the spec's if not given. Planes are stretched so that a millimetre
            is as long along every axis.
    """
    grey = _grey(values[0], spec)
    scale = _stretch(spacing or spec.spacing)
    panels = [_plane(grey, plane, grey.shape[plane[0]] // 2, scale) for plane in PLANES]
    return _side_by_side([panel[..., None] for panel in panels])


def grey_picture(values: np.ndarray, spec: InputSpec) -> np.ndarray:
    """(H, W) raw values to (H, W, 3) uint8, black and white where the spec's intensity window ends."""
    return np.repeat(_grey(values, spec)[..., None], 3, axis=2)


def draw_windows(index: SampleIndex, reader: VolumeReader, spec: InputSpec, folder: Path) -> list[Path]:
    """One PNG a source; windows that contain the drawn slice are boxes. Returns the files written.

    Raises:
        ReadFailure: if a source cannot be read any more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, source in enumerate(index.sources):
        volume = reader.volume(source)
        rows = index.where("source", source)
        boxes = [voxel_box(rows[row], volume) for row in range(len(rows))]
        grey = _grey(volume.values[0], spec)
        scale = np.asarray(_stretch(volume.spacing))
        scale = scale * max(1, LONG_SIDE // int(max(np.asarray(grey.shape) * scale)))
        panels = []
        for plane in PLANES:
            cut, up, right = plane
            middle = grey.shape[cut] // 2
            panel = Image.fromarray(_plane(grey, plane, middle, scale)).convert("RGB")
            draw = ImageDraw.Draw(panel)
            for start, size in boxes:
                if start[cut] <= middle < start[cut] + size[cut]:
                    x0, x1 = start[right] * scale[right], (start[right] + size[right]) * scale[right]
                    y1, y0 = ((grey.shape[up] - edge) * scale[up] for edge in (start[up], start[up] + size[up]))
                    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, panel.width), min(y1, panel.height)
                    draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=BOX_COLOUR)
            panels.append(np.asarray(panel))
        path = picture_path(folder, number, stem(Path(source).name))
        Image.fromarray(_side_by_side(panels)).save(path)
        written.append(path)
    return written


def _side_by_side(panels: Sequence[np.ndarray]) -> np.ndarray:
    """(H, W, 1 or 3) uint8 each; black below the lower ones."""
    height = max(len(panel) for panel in panels)
    width = sum(panel.shape[1] for panel in panels) + GAP * (len(panels) - 1)
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    left = 0
    for panel in panels:
        picture[: len(panel), left : left + panel.shape[1]] = panel
        left += panel.shape[1] + GAP
    return picture


def _grey(volume: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Raw values to uint8 within the intensity window, shape kept."""
    scaled = volume.astype(np.float32) * spec.scale + spec.offset
    low, high = spec.clip or MR_WINDOW
    return (np.clip((scaled - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)


def _plane(
    grey: np.ndarray, plane: tuple[int, int, int], position: int, scale: Sequence[float] | np.ndarray
) -> np.ndarray:
    """A slice with its ``up`` axis growing upwards, each voxel drawn ``scale`` pixels long (nearest neighbour)."""
    cut, up, right = plane
    image = np.take(grey, position, axis=cut)
    rows = (np.arange(max(1, round(len(image) * scale[up]))) / scale[up]).astype(int).clip(max=len(image) - 1)
    columns = (np.arange(max(1, round(image.shape[1] * scale[right]))) / scale[right]).astype(int)
    return image[rows[::-1]][:, columns.clip(max=image.shape[1] - 1)]


def _stretch(spacing: Sequence[float] | None) -> tuple[float, ...]:
    if spacing is None:
        return (1.0, 1.0, 1.0)
    finest = min(spacing)
    return tuple(length / finest for length in spacing)
