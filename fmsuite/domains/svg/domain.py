"""The svg plugin: drawings found, tried, indexed, read and varied."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from pydantic import Field, field_validator

from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.reader import Augmentation, Reader
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.inputs import IMAGENET_MEAN, IMAGENET_STD, InputSpec, rgb_channels
from fmsuite.domains.base import Domain, DomainOptions, Overview, Units
from fmsuite.domains.svg.augmentation import SvgAugmentation
from fmsuite.domains.svg.example import write_example
from fmsuite.domains.svg.render import Rgba, colour
from fmsuite.domains.svg.safety import Limits
from fmsuite.domains.svg.sample import SvgReader
from fmsuite.domains.svg.worker import RenderWorker
from fmsuite.errors import UsageError
from fmsuite.tiling.labels import LabelOptions
from fmsuite.tiling.preview import contact_sheet
from fmsuite.tiling.table import spread_rows
from fmsuite.tiling.tasks import SourceFacts, SourceRows, Sources, SourceTask, labelled_sources

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
        workers: processes that try the drawings, where one process looks at them; -1 chooses from the cores.
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
    free_options: ClassVar[frozenset[str]] = frozenset({"workers"})

    options: SvgOptions

    def __init__(self, options: DomainOptions) -> None:
        super().__init__(options)
        self._idle: list[RenderWorker] = []

    @property
    def at_once(self) -> int:
        return self.options.workers if self.options.workers > 0 else min(os.cpu_count() or 1, 8)

    def find_sources(self, paths: Sequence[Path], skipped: SkippedLog) -> Sources:
        return labelled_sources(self.options, paths, SUFFIXES, "SVG drawings", skipped)

    def index_source(self, task: SourceTask) -> SourceRows:
        """The one window of a drawing that renders within the limits, (y, x) in its root's user units.

        ``content`` is the share of pixels that differ from the background.
        """
        worker = self._worker()
        try:
            drawn = worker.try_file(task.path)
        finally:
            self._idle.append(worker)
        canvas = drawn.canvas
        rows = task.rows(np.array([canvas.corner]), (canvas.side, canvas.side), content=drawn.content)
        return SourceRows(rows, {"not_drawn": sorted(drawn.not_drawn)})

    def _worker(self) -> RenderWorker:
        """One that no other thread uses."""
        try:
            return self._idle.pop()
        except IndexError:
            options = self.options
            return RenderWorker(options.size, options.background_rgba, options.limits, options.timeout_s)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def index_metadata(self, index: SampleIndex, found: Sequence[SourceFacts], skipped: SkippedLog) -> dict[str, Any]:
        """``not_drawn``: the number of drawings that use each element which CairoSVG leaves out."""
        left_out = Counter(name for source in found for name in source.facts["not_drawn"])
        return {"not_drawn": dict(sorted(left_out.items()))}

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
