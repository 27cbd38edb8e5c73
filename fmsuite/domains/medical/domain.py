"""The medical domain: volumes and X-rays to windows, arrays and valid variations of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.reader import Augmentation, Reader
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.domains.base import Domain, Overview, Units
from fmsuite.domains.medical import xray
from fmsuite.domains.medical.intensity import Intensity, foreground, mean_and_std, volume_facts
from fmsuite.domains.medical.maps import check_folders, read_map
from fmsuite.domains.medical.options import MedicalOptions
from fmsuite.domains.medical.sources import FOLDER, find_volumes, look_into, pieces_of, settle
from fmsuite.domains.medical.volumes import load_volume, monai_transforms, resampling
from fmsuite.domains.medical.windows import bounding_box, resampled_box, windows_over
from fmsuite.errors import ReadFailure, UsageError
from fmsuite.tiling.labels import refuse_shared_groups
from fmsuite.tiling.tasks import SourceFacts, SourceRows, Sources, SourceTask

if TYPE_CHECKING:
    from fmsuite.domains.medical.reader import VolumeReader
    from fmsuite.domains.medical.scene import VolumeScene

GEOMETRY = (
    "modality",
    "intensity",
    "percentiles",
    "spacing",
    "size",
    "hu_window",
    "image_size",
    "framing",
    "channels",
    "unknown_orientation",
    "margin",
    "maps",
)
"""Options that an index fixes: its windows and statistics would not fit others."""


class MedicalDomain(Domain):
    """3D volumes, and X-rays (``xray``), whose windows are boxes of an image's own pixels along (y, x).

    A window's position and extent count voxel edges along (z, y, x) of the volume after it has been oriented to RAS
    and before it is resampled (see ``volumes``); its spacing is that of those voxels in millimetres.

    CT usually keeps Hounsfield units as raw values; the window of ``data.hu_window`` and the index's statistics are in
    the ``InputSpec``. The other plans of ``data.intensity`` are done by the reader, to a volume by what the index
    recorded of it (``intensity.Intensity``), to an X-ray as it is read.
    """

    name: ClassVar[str] = "medical"
    title: ClassVar[str] = "3D volumes (NIfTI, DICOM series, MetaImage, NRRD), X-rays (DICOM, PNG, JPEG, TIFF)"
    Options: ClassVar[type[MedicalOptions]] = MedicalOptions
    default_recipe: ClassVar[str] = "medical-mae"
    units: ClassVar[Units] = Units(source="image", group="patient")
    free_options: ClassVar[frozenset[str]] = frozenset({"flip_left_right", "cached_volumes"})
    truth_options: ClassVar[frozenset[str]] = frozenset({"maps"})

    options: MedicalOptions

    @classmethod
    def options_like(cls, spec: InputSpec) -> dict[str, Any]:
        return MedicalOptions.like(spec)

    def find_sources(self, paths: Sequence[Path], skipped: SkippedLog) -> Sources:
        if self._xray:
            return xray.find_images(paths, self.options, skipped)
        check_folders(self.options.maps)
        sources = find_volumes(paths, self.options, skipped)
        monai_transforms()
        return sources

    def index_source(self, task: SourceTask) -> SourceRows:
        if isinstance(task.details, dict) and FOLDER in task.details:
            return look_into(task)
        path = task.path
        if self._xray:
            return xray.index_image(task, self.options)
        volume = load_volume(path, None, len(self.options.channel_names), self._assume, pieces_of(task))
        mask = foreground(path, volume, self.options.modality)
        ratio, shape = resampling(volume.shape, volume.spacing, self.options.full_spacing)
        for name, template in self.options.maps.items():
            read_map(path, volume.native, name, template)
        box = bounding_box(mask)
        covered = resampled_box(box, volume.spacing, ratio, shape, self.options.margin)
        positions, content = windows_over(mask, ratio, shape, covered, self.options.full_size, self.options.full_stride)
        enough = content >= self.options.min_foreground
        if not enough.any():
            raise ReadFailure(
                path,
                "tissue",
                f"no window is foreground to {self.options.min_foreground:.0%}; the best reaches {content.max():.1%}.",
                "Lower data.min_foreground, or take smaller windows with data.size.",
            )
        extent = [size * r for size, r in zip(self.options.full_size, ratio, strict=True)]
        facts = {"box": box, **volume_facts(path, volume, mask, self.options)}
        return SourceRows(task.rows(positions[enough], extent, volume.spacing, content[enough]), facts)

    def settle_sources(self, found: Sequence[SourceFacts], skipped: SkippedLog) -> Sequence[SourceTask] | None:
        return settle(found)

    def index_metadata(self, index: SampleIndex, found: Sequence[SourceFacts], skipped: SkippedLog) -> dict[str, Any]:
        metadata: dict[str, Any] = {"options": self._fixed()}
        series = {source.task.path: pieces for source in found if (pieces := pieces_of(source.task)) is not None}
        metadata |= {"series": series} if series else {}
        for kept, fact in (("boxes", "box"), ("intensities", "intensity")):
            facts = {source.task.path: source.facts[fact] for source in found if fact in source.facts}
            metadata |= {kept: facts} if facts else {}
        groups, sides = (index.table.column(name).to_pylist() for name in ("group", "split"))
        refuse_shared_groups(zip(groups, sides, strict=True), "The images, grouped by the patients of their files")
        return {**metadata, **mean_and_std(source.facts["moments"] for source in found if "moments" in source.facts)}

    def _fixed(self) -> dict[str, Any]:
        options = self.options.model_dump(mode="json")
        return {key: options[key] for key in GEOMETRY} | {"intensity": self.options.plan}

    @property
    def _xray(self) -> bool:
        return self.options.modality == "xray"

    @property
    def _assume(self) -> bool:
        return self.options.unknown_orientation == "assume"

    def _check(self, index: SampleIndex) -> None:
        made_with = index.metadata.get("options")
        if index.metadata.get("domain") != self.name or not isinstance(made_with, dict):
            raise UsageError(
                "This index was not made by the domain 'medical'.",
                "Make it with `fmsuite tile --domain medical`.",
            )
        # An index may be older than an option.
        usual = MedicalOptions(modality=made_with["modality"])
        before = {**usual.model_dump(mode="json"), "intensity": usual.plan, **made_with}
        for key, mine in self._fixed().items():
            if before[key] != mine:
                raise UsageError(
                    f"The index was made with data.{key}={before[key]}, and data.{key}={mine} is asked.",
                    "Tile again, or set the option to the index's value.",
                )

    def input_spec(self, index: SampleIndex) -> InputSpec:
        """
        Raises:
            UsageError: if the index was made by another domain or with other options that fix its windows.
        """
        self._check(index)
        options, names = self.options, self.options.channel_names
        common: dict[str, Any] = {"reading": options.reading}
        if self._xray:
            common |= {"axes": ("y", "x"), "size": (options.image_size,) * 2}
        else:
            common |= {"axes": ("z", "y", "x"), "size": options.full_size, "orientation": "RAS"}
            common |= {"spacing": options.full_spacing, "spacing_unit": "mm"}
        if options.plan == "zscore":
            return InputSpec(channels=tuple(Channel(name=name) for name in names), **common)
        mean = index.metadata.get("mean", [0.5] * len(names))
        std = index.metadata.get("std", [0.25] * len(names))
        channels = tuple(Channel(name=n, mean=m, std=s) for n, m, s in zip(names, mean, std, strict=True))
        if options.plan == "window":
            low, high = options.hu_window
            common |= {"scale": 1 / (high - low), "offset": -low / (high - low)}
        return InputSpec(channels=channels, clip=(0.0, 1.0), **common)

    def reader(self, index: SampleIndex) -> Reader:
        """
        Raises:
            UsageError: as ``input_spec``, or if MONAI is missing.
        """
        self._check(index)
        if self._xray:
            return xray.XrayReader(self.options.image_size, self.options.plan, self.options.percentiles)
        return self._volume_reader(index)

    def _volume_reader(self, index: SampleIndex) -> VolumeReader:
        from fmsuite.domains.medical.reader import VolumeReader

        self._check(index)
        monai_transforms()
        stored = index.metadata.get("intensities", {})
        return VolumeReader(
            spacing=self.options.full_spacing,
            channels=len(self.options.channel_names),
            assume_orientation=self._assume,
            fill=self.options.hu_window[0] if self.options.plan == "window" else 0.0,
            intensities=None
            if self.options.plan == "window"
            else {path: Intensity.from_json(raw) for path, raw in stored.items()},
            cached=self.options.cached_volumes,
            maps=self.options.maps,
            series={
                path: [(name, frame) for name, frame in pieces]
                for path, pieces in index.metadata.get("series", {}).items()
            },
        )

    def scene(self, index: SampleIndex, source: str) -> VolumeScene:
        """The box around the foreground and ``data.margin``; its native axes are those of the file.

        Raises:
            UsageError: as ``reader``, or if the source is not in the index.
            ReadFailure: if it cannot be read.
        """
        from fmsuite.domains.medical.scene import VolumeScene

        if self._xray:
            raise UsageError("There are no dense predictions over X-rays.", "They are for data.modality=ct and mr.")
        reader = self._volume_reader(index)
        box = index.metadata.get("boxes", {}).get(source)
        if box is None:
            raise UsageError(f"{source}: not a source of this index.", "Give one that its column 'source' names.")
        volume = reader.volume(source)
        own = [length / ratio for length, ratio in zip(volume.spacing, volume.ratio, strict=True)]
        start, size = resampled_box(box, own, volume.ratio, volume.shape, self.options.margin)
        return VolumeScene(source, volume, start, size, reader.fill, self.options.maps)

    def augmentation(self, spec: InputSpec) -> Augmentation:
        from fmsuite.domains.medical.augment import VolumeAugmentation, XrayAugmentation

        monai_transforms()
        return (XrayAugmentation if self._xray else VolumeAugmentation)(spec, self.options.flip_left_right)

    def to_rgb(self, values: np.ndarray, spec: InputSpec) -> np.ndarray:
        """An X-ray as it is. Of a volume the mid-slices side by side: axial, coronal, sagittal; the patient's left is
        on the left, anterior and superior are up (in the sagittal slice anterior is on the right). The first channel,
        grey.

        Args:
            values: (C, z, y, x), or (1, y, x) of an X-ray, raw values.
        """
        from fmsuite.domains.medical.pictures import grey_picture, montage

        if self._xray:
            return grey_picture(values[0], spec)
        return montage(values, spec)

    def example_data(self, folder: Path, seed: int = 0) -> Path:
        from fmsuite.domains.medical.example import make_example
        from fmsuite.domains.medical.xray_example import make_xrays

        if self._xray:
            return make_xrays(folder / "xrays", seed)
        return make_example(folder, seed)

    def preview(self, index: SampleIndex, folder: Path) -> list[Path]:
        """One PNG a volume: its mid-slices, with the windows that these cut. Of X-rays one contact sheet."""
        if self._xray:
            return xray.contact_sheet_of(index, self.reader(index), self.input_spec(index), folder)
        from fmsuite.domains.medical.pictures import draw_windows

        return draw_windows(index, self._volume_reader(index), self.input_spec(index), folder)

    def overview(self, index: SampleIndex, source: str) -> Overview:
        """An X-ray, at most ``xray.OVERVIEW_SIZE`` pixels on its shorter side."""
        if not self._xray:
            return super().overview(index, source)
        return xray.overview(index, source, self.options, self.input_spec(index))
