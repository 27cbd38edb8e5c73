"""X-rays as windows: a window is a box of an image's own pixels, read at ``data.image_size``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.reader import Reader
from fmsuite.core.data.sample import ArraySample
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.inputs import InputSpec, Plan
from fmsuite.domains.base import Overview
from fmsuite.domains.medical.formats.dicom import is_candidate
from fmsuite.domains.medical.intensity import measure, moments
from fmsuite.domains.medical.options import MedicalOptions
from fmsuite.domains.medical.pictures import grey_picture
from fmsuite.domains.medical.xray_files import SUFFIXES, XrayImage, load_xray
from fmsuite.errors import ReadFailure, UsageError
from fmsuite.tiling.labels import assign_labels
from fmsuite.tiling.preview import contact_sheet
from fmsuite.tiling.sources import find_files
from fmsuite.tiling.table import spread_rows
from fmsuite.tiling.tasks import SourceRows, Sources, SourceTask

SHEET_IMAGES = 64
SHEET_CELL = 192
OVERVIEW_SIZE = 512


def find_images(paths: Sequence[Path], options: MedicalOptions, skipped: SkippedLog) -> Sources:
    """A task for each picture, and each file that may be DICOM by its name.

    Raises:
        UsageError: as ``sources.find_files`` and ``labels.assign_labels``.
    """
    files = find_files(paths, SUFFIXES, "X-ray images (DICOM, PNG, JPEG or TIFF)", is_candidate)
    labels = assign_labels(options, paths, files, skipped)
    return Sources([SourceTask.of(file, labels.of(file)) for file in files], {"labels": labels.summary()})


def index_image(task: SourceTask, options: MedicalOptions) -> SourceRows:
    """The one window of an image. Where no labels file names its group, a DICOM file's patient is.

    Raises:
        ReadFailure: if it cannot be used.
    """
    image = load_xray(task.path)
    values = planned(task.path, image, options.plan, options.percentiles)
    lengths = np.array(image.values.shape, dtype=np.float64)
    extent = lengths
    if options.framing == "centre":
        pitch = relative_pitch(image)
        extent = (lengths * pitch).min() / pitch
    position = (lengths - extent) / 2
    facts = {} if options.plan == "zscore" else {"moments": moments([values.reshape(-1)]).tolist()}
    group = task.known.group or image.patient
    return SourceRows(task.rows(position[None], extent.tolist(), image.spacing or (), group=group), facts)


def planned(path: str, image: XrayImage, plan: Plan, percentiles: tuple[float, float]) -> np.ndarray:
    """(1, H, W) float32, the image's intensities as the plan has them."""
    intensity = measure(path, [image.measured], plan, percentiles)
    return intensity.apply(image.values[None].astype(np.float32, copy=False))


def relative_pitch(image: XrayImage) -> np.ndarray:
    """(2,) lengths of a pixel along (y, x), the shorter one 1."""
    pitch = np.array(image.spacing or (1.0, 1.0))
    return pitch / pitch.min()


class XrayReader:
    """Windows as (1, y, x) float32, intensities as the plan has them: from 0 to 1, or in standard deviations.

    An image whose shorter side is longer than ``size`` is reduced to it, antialiased, straight from its own pixels and
    with square pixels; one that is smaller is left as it is. Statistics are those of the whole image at its own pixels.

    Args:
        size: pixels of the shorter side.
        plan, percentiles: see ``intensity.measure``.
    """

    def __init__(self, size: int, plan: Plan, percentiles: tuple[float, float]) -> None:
        self.size = size
        self.plan = plan
        self.percentiles = percentiles

    def read(self, window: Window) -> ArraySample:
        image = load_xray(window.source)
        lengths = np.array(image.values.shape)
        start, extent = np.asarray(window.position), np.asarray(window.extent)
        if (start < -1e-6).any() or (start + extent > lengths + 1e-6).any():
            raise ReadFailure(
                window.source, "read", "a window lies outside the image: the file has changed.", "Tile again."
            )
        values = planned(window.source, image, self.plan, self.percentiles)
        pitch = relative_pitch(image)
        factor = min(1.0, self.size / float((lengths * pitch).min())) * pitch
        size = tuple(max(1, math.floor(length + 0.5)) for length in extent * factor)
        return ArraySample(values, spacing=image.spacing).crop(tuple(start), tuple(extent), size)


def contact_sheet_of(index: SampleIndex, reader: Reader, spec: InputSpec, folder: Path) -> list[Path]:
    """One sheet of up to ``SHEET_IMAGES`` images, taken evenly from the index, with their files' names.

    Raises:
        UsageError: if there is none.
        ReadFailure: if one cannot be read any more.
    """
    if len(index) == 0:
        raise UsageError("The index has no image to show.")
    folder.mkdir(parents=True, exist_ok=True)
    windows = [index[int(row)] for row in spread_rows(len(index), SHEET_IMAGES)]
    pictures = []
    for window in windows:
        sample = reader.read(window)
        assert isinstance(sample, ArraySample)
        picture = Image.fromarray(grey_picture(sample.values[0], spec))
        larger = max(1, (SHEET_CELL - 4) // max(picture.size))
        pictures.append(picture.resize((picture.width * larger, picture.height * larger), Image.Resampling.NEAREST))
    path = folder / "contact_sheet.png"
    columns = math.ceil(math.sqrt(len(pictures)))
    contact_sheet(pictures, [Path(window.source).name for window in windows], columns, SHEET_CELL).save(path)
    return [path]


def overview(index: SampleIndex, source: str, options: MedicalOptions, spec: InputSpec) -> Overview:
    """The whole image; see ``Domain.overview``."""
    if len(index.where("source", source)) == 0:
        raise UsageError(f"{source}: not a source of this index.")
    image = load_xray(source)
    height, width = image.values.shape
    reader = XrayReader(OVERVIEW_SIZE, options.plan, options.percentiles)
    sample = reader.read(Window(source, source, (0.0, 0.0), (float(height), float(width))))
    rgb = grey_picture(sample.values[0], spec)
    return Overview(rgb, (0.0, 0.0), (height / rgb.shape[0], width / rgb.shape[1]))
