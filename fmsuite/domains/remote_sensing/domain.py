"""The remote sensing plugin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.domains.base import Domain, DomainOptions, Overview, Units
from fmsuite.domains.remote_sensing.augment import RasterAugmentation
from fmsuite.domains.remote_sensing.blocks import BlockOptions
from fmsuite.domains.remote_sensing.example import make_example
from fmsuite.domains.remote_sensing.indexing import find_rasters, index_raster, settle
from fmsuite.domains.remote_sensing.maps import MapOptions
from fmsuite.domains.remote_sensing.metadata import describe, reader_of
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.domains.remote_sensing.pictures import draw
from fmsuite.domains.remote_sensing.places import PlaceOptions
from fmsuite.domains.remote_sensing.reader import RasterReader, open_date
from fmsuite.domains.remote_sensing.scene import RasterScene, raster_scene
from fmsuite.errors import UsageError
from fmsuite.tiling.preview import draw_windows, picture_path
from fmsuite.tiling.table import windows_by_source
from fmsuite.tiling.tasks import SourceFacts, SourceRows, Sources, SourceTask

PREVIEW_SIZE = 1024
"""Longest side of an overview, pixels."""


class RemoteSensingDomain(Domain):
    """Satellite and aerial rasters. An index carries the options it was made with; reading follows those."""

    name: ClassVar[str] = "remote_sensing"
    title: ClassVar[str] = "multispectral and SAR rasters: GeoTIFF, COG, VRT, JPEG 2000; single dates and time series"
    Options: ClassVar[type[DomainOptions]] = RemoteSensingOptions
    default_recipe: ClassVar[str] = "remote-sensing-mae"
    units: ClassVar[Units] = Units(source="raster", group="scene")
    truth_options: ClassVar[frozenset[str]] = frozenset(
        name for kind in (MapOptions, PlaceOptions, BlockOptions) for name in kind.model_fields
    )

    options: RemoteSensingOptions

    def __init__(self, options: DomainOptions | None = None) -> None:
        super().__init__(RemoteSensingOptions() if options is None else options)

    def find_sources(self, paths: Sequence[Path], skipped: SkippedLog) -> Sources:
        return find_rasters(paths, self.options, skipped)

    def index_source(self, task: SourceTask) -> SourceRows:
        return index_raster(task, self.options)

    def settle_sources(self, found: Sequence[SourceFacts], skipped: SkippedLog) -> Sequence[SourceTask]:
        return settle(found, self.options, skipped)

    def index_metadata(self, index: SampleIndex, found: Sequence[SourceFacts], skipped: SkippedLog) -> dict[str, Any]:
        return describe(index, found, self.options, skipped)

    def input_spec(self, index: SampleIndex) -> InputSpec:
        """
        Raises:
            UsageError: if the index has no windows, or is another domain's.
        """
        options = _options_of(index)
        if not len(index):
            raise UsageError("The index has no windows.", "See skipped.csv for what was wrong with each file.")
        facts = index.metadata
        found = [options.quantification_of_channel(name) for name in facts["bands"]]
        usual = found[0]
        channels = tuple(
            Channel(
                name=name,
                wavelength=options.wavelength_of(name),
                group=options.group_of(name),
                mean=mean,
                std=std,
                quantification=None if own == usual else own,
            )
            for name, own, (mean, std) in zip(facts["bands"], found, facts["statistics"], strict=True)
        )
        axes: tuple[str, ...] = ("y", "x")
        size: tuple[int, ...] = (options.size, options.size)
        spacing = None if facts["spacing"] is None else tuple(facts["spacing"])
        if options.series:
            axes, size = ("time", *axes), (facts["dates"], *size)
            spacing = None if spacing is None else (1.0, *spacing)
        return InputSpec(
            axes=axes,
            size=size,
            channels=channels,
            scale=usual.scale,
            offset=usual.offset,
            clip=usual.clip,
            spacing=spacing,
            spacing_unit="m" if facts["spaced"] or spacing is not None else "px",
        )

    def reader(self, index: SampleIndex) -> RasterReader:
        return reader_of(index, _options_of(index))

    def scene(self, index: SampleIndex, source: str) -> RasterScene:
        """All of a raster, at ``data.gsd`` if that is given; of a series, all dates.

        Raises:
            UsageError: if the source is not in the index.
            ReadFailure: if it cannot be opened.
        """
        if source not in index.sources:
            raise UsageError(f"{source}: not a source of this index.", "Give one that its column 'source' names.")
        return raster_scene(self.reader(index), source)

    def augmentation(self, spec: InputSpec) -> RasterAugmentation:
        options = self.options
        kinds = tuple(options.kind_of(name) for name in spec.channel_names)
        scales, offsets = zip(*((q.scale, q.offset) for q in spec.quantifications), strict=True)
        return RasterAugmentation(kinds, scales, offsets, options.dropout(spec), options.dates_per_sample)

    def to_rgb(self, values: np.ndarray, spec: InputSpec) -> np.ndarray:
        """True colour, radar false colour or grey; dates of a series side by side; nodata chequered in magenta."""
        return draw(values, spec, self.options.nodata)

    def example_data(self, folder: Path, seed: int = 0) -> Path:
        return make_example(Path(folder), seed)

    def preview(self, index: SampleIndex, folder: Path) -> list[Path]:
        """One reduced picture a source (of a series, its first date) with the outlines of its windows.

        Raises:
            ReadFailure: if a source can no longer be read.
        """
        folder.mkdir(parents=True, exist_ok=True)
        pictures: list[Path] = []
        for number, windows in enumerate(windows_by_source(index)):
            view = self._quicklook(index, windows.first.source)
            pitch = np.array(view.pitch)
            starts, extent = windows.positions[:, -2:] / pitch, np.array(windows.first.extent[-2:]) / pitch
            path = picture_path(folder, number, windows.first.group)
            draw_windows(view.rgb, starts, extent, longest=max(view.rgb.shape)).save(path)
            pictures.append(path)
        return pictures

    def overview(self, index: SampleIndex, source: str) -> Overview:
        """The raster reduced to ``PREVIEW_SIZE``; of a series, its first date."""
        if source not in index.sources:
            raise UsageError(f"{source}: not a source of this index.")
        return self._quicklook(index, source)

    def _quicklook(self, index: SampleIndex, source: str) -> Overview:
        options, spec = _options_of(index), self.input_spec(index)
        flat = spec.model_copy(update={"axes": ("y", "x"), "size": spec.size[-2:], "spacing": None})
        stack = open_date(reader_of(index, options).files_of(source)[0][1], options)
        try:
            values = stack.overview(spec.channel_names, PREVIEW_SIZE)
            pitch = (stack.height / values.shape[1], stack.width / values.shape[2])
        finally:
            stack.close()
        return Overview(draw(values, flat, options.nodata), (0.0, 0.0), pitch)


def _options_of(index: SampleIndex) -> RemoteSensingOptions:
    """The options that an index was made with.

    Raises:
        UsageError: if it is another domain's index.
    """
    domain = index.metadata.get("domain")
    if domain != RemoteSensingDomain.name:
        raise UsageError(f"This index belongs to the domain '{domain}', not to remote_sensing.", "Use its own domain.")
    return RemoteSensingOptions.model_validate(index.metadata["options"])
