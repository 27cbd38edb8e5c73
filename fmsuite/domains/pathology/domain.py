"""The pathology plugin."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import openslide

from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.inputs import InputSpec, rgb_channels
from fmsuite.domains.base import Domain, DomainOptions, Overview, Units
from fmsuite.domains.pathology.augment import StainedTissueAugmentation
from fmsuite.domains.pathology.example import make_example
from fmsuite.domains.pathology.options import AUGMENTATION, PathologyOptions
from fmsuite.domains.pathology.pictures import draw_overview, draw_previews
from fmsuite.domains.pathology.reading import SlideReader
from fmsuite.domains.pathology.windows import SOURCE_FACTS_LIMIT, choose_files, index_source
from fmsuite.errors import UsageError
from fmsuite.tiling.tasks import SourceFacts, SourceRows, Sources, SourceTask, labelled_sources


class PathologyDomain(Domain):
    """Whole-slide images and folders of tiles, stained and bright-field."""

    name: ClassVar[str] = "pathology"
    title: ClassVar[str] = "Whole-slide images (SVS, NDPI, MRXS, SCN, BIF, TIFF, OME-TIFF, DICOM) and tile images"
    Options: ClassVar[type[DomainOptions]] = PathologyOptions
    default_recipe: ClassVar[str] = "pathology-simclr"
    units: ClassVar[Units] = Units(window="tile", source="slide", group="patient")
    free_options: ClassVar[frozenset[str]] = AUGMENTATION
    options: PathologyOptions

    def find_sources(self, paths: Sequence[Path], skipped: SkippedLog) -> Sources:
        return labelled_sources(self.options, paths, self.options.suffixes, "slides or tile images", skipped)

    def index_source(self, task: SourceTask) -> SourceRows:
        return index_source(task, self.options)

    def settle_sources(self, found: Sequence[SourceFacts], skipped: SkippedLog) -> Sequence[SourceTask] | None:
        return choose_files(found)

    def index_metadata(self, index: SampleIndex, found: Sequence[SourceFacts], skipped: SkippedLog) -> dict[str, Any]:
        mpp = self.options.mpp
        # Of every source, so that every window really has the asked resolution.
        scaled = all(source.facts["mpp"] is not None for source in found)
        return {
            "versions": {
                "fmsuite": version("fmsuite"),
                "openslide": openslide.__library_version__,
                "openslide-python": openslide.__version__,
                "imagecodecs": version("imagecodecs"),
                "pillow": version("pillow"),
            },
            "size": self.options.size,
            "mpp": mpp,
            "spacing": [mpp, mpp] if scaled else None,
            "sources": {source.task.path: source.facts for source in found[:SOURCE_FACTS_LIMIT]},
        }

    def input_spec(self, index: SampleIndex) -> InputSpec:
        """RGB of 8 bits. Statistics are ImageNet's: UNI and most public tile encoders use them, and a network that
        starts from general weights expects them. Spacing is unknown where any tile image's resolution is.
        """
        size = int(index.metadata.get("size", self.options.size))
        spacing = index.metadata.get("spacing", [self.options.mpp, self.options.mpp])
        return InputSpec(
            axes=("y", "x"),
            size=(size, size),
            channels=rgb_channels(),
            scale=1 / 255,
            spacing=None if spacing is None else (float(spacing[0]), float(spacing[1])),
            spacing_unit="px" if spacing is None else "um",
        )

    def reader(self, index: SampleIndex) -> SlideReader:
        height, width = self.input_spec(index).size
        return SlideReader((height, width))

    def augmentation(self, spec: InputSpec) -> StainedTissueAugmentation:
        return StainedTissueAugmentation.jittered(self.options.stain_jitter, self.options.greyscale)

    def to_rgb(self, values: np.ndarray, spec: InputSpec) -> np.ndarray:
        if values.ndim != 3 or values.shape[0] != 3:
            raise UsageError(f"A pathology picture has 3 channels, (3, H, W); this one is {values.shape}.")
        return np.ascontiguousarray(np.moveaxis(np.clip(np.rint(values), 0, 255).astype(np.uint8), 0, -1))

    def example_data(self, folder: Path, seed: int = 0) -> Path:
        return make_example(folder, seed)

    def preview(self, index: SampleIndex, folder: Path) -> list[Path]:
        return draw_previews(index, folder, self.options)

    def overview(self, index: SampleIndex, source: str) -> Overview:
        return draw_overview(index, source, self.options)
