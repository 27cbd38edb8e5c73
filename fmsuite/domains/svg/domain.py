"""The svg plugin: drawings found, tried, indexed, read and varied."""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import ClassVar

import numpy as np
from PIL import Image
from pydantic import Field, field_validator

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.core.data.reader import Augmentation, Reader
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.inputs import IMAGENET_MEAN, IMAGENET_STD, InputSpec, rgb_channels
from fmsuite.domains.base import Domain, DomainOptions, Overview, Progress, Units, no_progress
from fmsuite.domains.svg.augmentation import SvgAugmentation
from fmsuite.domains.svg.example import write_example
from fmsuite.domains.svg.render import Rgba, colour
from fmsuite.domains.svg.safety import Limits
from fmsuite.domains.svg.sample import SvgReader
from fmsuite.domains.svg.worker import Drawn, RenderWorker
from fmsuite.errors import ReadFailure, UsageError
from fmsuite.tiling.labels import LabelOptions, assign_labels
from fmsuite.tiling.preview import contact_sheet
from fmsuite.tiling.sources import find_files
from fmsuite.tiling.table import spread_rows

SUFFIXES = (".svg", ".svgz")
SHEET_DRAWINGS = 144
SHEET_TILE = 96
OVERVIEW_SIZE = 512
SHEET_COLOUR = (128, 128, 128)
"""Between the drawings, most of which are on white."""


class SvgOptions(DomainOptions, LabelOptions):
    """The ``data:`` section for drawings; what is known about them is in the options of ``LabelOptions``.

    Attributes:
        size: pixels along each side of the rendered window.
        background: an opaque CSS colour.
        mirror: drawings may be mirrored by augmentation; leave it off for letters, flags and directions.
        mean, std: channel statistics on a 0-1 scale; ImageNet's, so that public encoders see what they expect.
        timeout_s: seconds that one drawing may take to render.
        workers: processes that try the drawings; -1 chooses from the cores.
        max_bytes, max_elements, max_drawn, max_depth, max_side, max_image_pixels: see ``safety.Limits``.
    """

    size: int = Field(default=64, ge=8, le=4096)
    background: str = "white"
    mirror: bool = False
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    timeout_s: float = Field(default=10.0, gt=0)
    workers: int = Field(default=-1, ge=-1)
    max_bytes: int = Field(default=Limits.max_bytes, ge=1)
    max_elements: int = Field(default=Limits.max_elements, ge=1)
    max_drawn: int = Field(default=Limits.max_drawn, ge=1)
    max_depth: int = Field(default=Limits.max_depth, ge=1, le=150)
    max_side: float = Field(default=Limits.max_side, gt=0)
    max_image_pixels: int = Field(default=Limits.max_image_pixels, ge=1)

    @field_validator("background")
    @classmethod
    def _opaque(cls, value: str) -> str:
        if colour(value)[3] != 1.0:
            raise ValueError(f"the background '{value}' is not opaque")
        return value

    @field_validator("workers")
    @classmethod
    def _some_workers(cls, value: int) -> int:
        if value == 0:
            raise ValueError("drawings are tried in processes of their own: at least one is needed")
        return value

    @property
    def limits(self) -> Limits:
        return Limits(**{name: getattr(self, name) for name in Limits.__dataclass_fields__})

    @property
    def background_rgba(self) -> Rgba:
        return colour(self.background)


class SvgDomain(Domain):
    """Vector graphics. One window a drawing: the square around its canvas, rendered by CairoSVG.

    Text is set in the fonts that the machine has, so drawings with text differ between machines.
    """

    name: ClassVar[str] = "svg"
    title: ClassVar[str] = "Vector graphics (SVG), rendered at the resolution each view asks for"
    Options: ClassVar[type[DomainOptions]] = SvgOptions
    default_recipe: ClassVar[str] = "svg-mae"
    units: ClassVar[Units] = Units(window="drawing", source="drawing")

    options: SvgOptions

    def build_index(self, paths: Sequence[Path], skipped: SkippedLog, progress: Progress = no_progress) -> SampleIndex:
        """Every drawing that renders within the limits, each a window (y, x) in its root's user units.

        ``content`` is the share of pixels that differ from the background. Metadata: ``options``, and ``not_drawn``,
        the number of drawings that use each element which CairoSVG leaves out.
        """
        files = find_files(paths, SUFFIXES, "SVG drawings")
        labels = assign_labels(self.options, paths, files, skipped)
        windows, left_out = [], Counter[str]()
        results = self._try_all([str(file.path) for file in files])
        with contextlib.closing(results):
            for file, result in zip(files, progress(results, len(files), "rendering drawings"), strict=True):
                if isinstance(result, ReadFailure):
                    skipped.add_failure(result)
                    continue
                left_out.update(result.not_drawn.keys())
                row = labels.of(file)
                side = result.canvas.side
                windows.append(
                    Window(
                        source=str(file.path),
                        group=row.group or file.group,
                        position=result.canvas.corner,
                        extent=(side, side),
                        content=result.content,
                        label=row.label,
                        split=row.split,
                    )
                )
        metadata = {
            "domain": self.name,
            "options": self.options.model_dump(mode="json"),
            "not_drawn": dict(sorted(left_out.items())),
            "labels": labels.summary(),
        }
        return SampleIndex.from_windows(windows, metadata)

    def _try_all(self, paths: list[str]) -> Generator[Drawn | ReadFailure, None, None]:
        """The outcome for each path, in order."""
        options = self.options
        count = options.workers if options.workers > 0 else min(os.cpu_count() or 1, 8)
        count = max(1, min(count, len(paths)))
        workers = [
            RenderWorker(options.size, options.background_rgba, options.limits, options.timeout_s) for _ in range(count)
        ]
        idle: SimpleQueue[RenderWorker] = SimpleQueue()
        for worker in workers:
            idle.put(worker)

        def attempt(path: str) -> Drawn | ReadFailure:
            worker = idle.get()
            try:
                return worker.try_file(path)
            except ReadFailure as failure:
                return failure
            finally:
                idle.put(worker)

        pool = ThreadPoolExecutor(count)
        try:
            yield from pool.map(attempt, paths)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for worker in workers:
                worker.close()

    def input_spec(self, index: SampleIndex) -> InputSpec:
        """RGB, 8 bits, scaled by 1/255, then ``mean`` and ``std``. Spacing is not physical, and is left out."""
        size = (self.options.size, self.options.size)
        return InputSpec(
            axes=("y", "x"), size=size, channels=rgb_channels(self.options.mean, self.options.std), scale=1 / 255
        )

    def reader(self, index: SampleIndex) -> Reader:
        return SvgReader(self.options.background_rgba, self.options.limits)

    def augmentation(self, spec: InputSpec) -> Augmentation:
        return SvgAugmentation(self.options.mirror)

    def to_rgb(self, values: np.ndarray, spec: InputSpec) -> np.ndarray:
        return np.ascontiguousarray(np.clip(values, 0, 255).astype(np.uint8).transpose(1, 2, 0))

    def example_data(self, folder: Path, seed: int = 0) -> Path:
        """160 drawings of stars, gears, arrows, spirals and houses; colour and stroke say nothing about the class."""
        write_example(folder, seed)
        return folder

    def preview(self, index: SampleIndex, folder: Path) -> list[Path]:
        """One contact sheet of up to 144 drawings, taken evenly from the index."""
        if len(index) == 0:
            raise UsageError("The index has no drawing to show.")
        folder.mkdir(parents=True, exist_ok=True)
        reader = self.reader(index)
        pictures = []
        for row in spread_rows(len(index), SHEET_DRAWINGS):
            sample = reader.read(index[int(row)])
            tile = sample.crop((0.0, 0.0), sample.size, (SHEET_TILE, SHEET_TILE))
            pictures.append(Image.fromarray(tile.values.transpose(1, 2, 0)))
        columns = math.ceil(math.sqrt(len(pictures)))
        path = folder / "contact_sheet.png"
        contact_sheet(pictures, None, columns, SHEET_TILE + 4, SHEET_COLOUR).save(path)
        return [path]

    def overview(self, index: SampleIndex, source: str) -> Overview:
        """The drawing's square window, rendered at ``OVERVIEW_SIZE``."""
        rows = index.where("source", source)
        if len(rows) == 0:
            raise UsageError(f"{source}: not a source of this index.")
        window = rows[0]
        sample = self.reader(index).read(window)
        drawn = sample.crop((0.0, 0.0), sample.size, (OVERVIEW_SIZE, OVERVIEW_SIZE))
        down, across = (length / OVERVIEW_SIZE for length in window.extent)
        top, left = window.position
        return Overview(np.ascontiguousarray(drawn.values.transpose(1, 2, 0)), (top, left), (down, across))
