"""The medical domain: volumes to windows, arrays and valid variations of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.reader import Augmentation
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.domains.base import Domain, Units
from fmsuite.domains.medical.intensity import Intensity, foreground, standardisation
from fmsuite.domains.medical.maps import check_folders, read_map
from fmsuite.domains.medical.options import MedicalOptions
from fmsuite.domains.medical.sources import FOLDER, find_volumes, look_into, pieces_of, settle
from fmsuite.domains.medical.volumes import Volume, load_volume, monai_transforms, resampling
from fmsuite.domains.medical.windows import bounding_box, resampled_box, windows_over
from fmsuite.errors import ReadFailure, UsageError
from fmsuite.tiling.tasks import SourceFacts, SourceRows, Sources, SourceTask

if TYPE_CHECKING:
    from fmsuite.domains.medical.reader import VolumeReader
    from fmsuite.domains.medical.scene import VolumeScene

GEOMETRY = ("modality", "spacing", "size", "hu_window", "channels", "unknown_orientation", "margin", "maps")
"""Options that an index fixes: its windows and statistics would not fit others."""


class MedicalDomain(Domain):
    """3D volumes.

    A window's position and extent count voxel edges along (z, y, x) of the volume after it has been oriented to RAS
    and before it is resampled (see ``volumes``); its spacing is that of those voxels in millimetres.

    CT keeps Hounsfield units as raw values; the window of ``data.hu_window`` and the index's statistics are in the
    ``InputSpec``. MR has no unit, so each volume is clipped and standardised by what the index recorded of its
    foreground (``intensity.Intensity``), and the raw values that the core sees are standard deviations.
    """

    name: ClassVar[str] = "medical"
    title: ClassVar[str] = "3D volumes (NIfTI, DICOM series, MetaImage, NRRD): MR and CT"
    Options: ClassVar[type[MedicalOptions]] = MedicalOptions
    default_recipe: ClassVar[str] = "medical-mae"
    units: ClassVar[Units] = Units(source="volume", group="patient")
    free_options: ClassVar[frozenset[str]] = frozenset({"flip_left_right", "cached_volumes"})

    options: MedicalOptions

    def find_sources(self, paths: Sequence[Path], skipped: SkippedLog) -> Sources:
        check_folders(self.options.maps)
        sources = find_volumes(paths, self.options, skipped)
        monai_transforms()
        return sources

    def index_source(self, task: SourceTask) -> SourceRows:
        if isinstance(task.details, dict) and FOLDER in task.details:
            return look_into(task)
        path = task.path
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
        facts: dict[str, Any] = {"box": box}
        if self.options.modality == "mr":
            facts["intensity"] = standardisation(path, volume, mask).to_json()
        else:
            facts["moments"] = self._moments(volume, mask).tolist()
        return SourceRows(task.rows(positions[enough], extent, volume.spacing, content[enough]), facts)

    def settle_sources(self, found: Sequence[SourceFacts], skipped: SkippedLog) -> Sequence[SourceTask] | None:
        return settle(found)

    def index_metadata(self, index: SampleIndex, found: Sequence[SourceFacts], skipped: SkippedLog) -> dict[str, Any]:
        options = self.options.model_dump(mode="json")
        metadata: dict[str, Any] = {
            "options": {key: options[key] for key in GEOMETRY},
            "series": {source.task.path: pieces for source in found if (pieces := pieces_of(source.task)) is not None},
            "boxes": {source.task.path: source.facts["box"] for source in found},
        }
        if self.options.modality == "mr":
            metadata["intensities"] = {source.task.path: source.facts["intensity"] for source in found}
        elif found:
            moments = np.zeros((3, len(self.options.channel_names)))
            for source in found:
                moments += source.facts["moments"]
            count, total, squares = moments
            mean = total / count
            metadata["mean"] = mean.tolist()
            metadata["std"] = np.sqrt(np.maximum(squares / count - mean**2, 1e-6)).tolist()
        return metadata

    def _moments(self, volume: Volume, mask: np.ndarray) -> np.ndarray:
        """(3, C): count, sum and sum of squares of the foreground, after the Hounsfield window."""
        low, high = self.options.hu_window
        inside = (np.clip(volume.values[:, mask].astype(np.float64), low, high) - low) / (high - low)
        return np.stack([np.full(len(inside), inside.shape[1]), inside.sum(1), (inside**2).sum(1)])

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
        mine = self.options.model_dump(mode="json")
        for key in GEOMETRY:
            if made_with.get(key) != mine[key]:
                raise UsageError(
                    f"The index was made with data.{key}={made_with.get(key)}, and data.{key}={mine[key]} is asked.",
                    "Tile again, or set the option to the index's value.",
                )

    def input_spec(self, index: SampleIndex) -> InputSpec:
        """
        Raises:
            UsageError: if the index was made by another domain or with other options that fix its windows.
        """
        self._check(index)
        names = self.options.channel_names
        common: dict[str, Any] = {
            "axes": ("z", "y", "x"),
            "size": self.options.full_size,
            "spacing": self.options.full_spacing,
            "spacing_unit": "mm",
            "orientation": "RAS",
        }
        if self.options.modality == "mr":
            return InputSpec(channels=tuple(Channel(name=name) for name in names), **common)
        low, high = self.options.hu_window
        mean = index.metadata.get("mean", [0.5] * len(names))
        std = index.metadata.get("std", [0.25] * len(names))
        channels = tuple(Channel(name=n, mean=m, std=s) for n, m, s in zip(names, mean, std, strict=True))
        return InputSpec(
            channels=channels, scale=1 / (high - low), offset=-low / (high - low), clip=(0.0, 1.0), **common
        )

    def reader(self, index: SampleIndex) -> VolumeReader:
        """
        Raises:
            UsageError: as ``input_spec``, or if MONAI is missing.
        """
        from fmsuite.domains.medical.reader import VolumeReader

        self._check(index)
        monai_transforms()
        stored = index.metadata.get("intensities", {})
        return VolumeReader(
            spacing=self.options.full_spacing,
            channels=len(self.options.channel_names),
            assume_orientation=self._assume,
            fill=0.0 if self.options.modality == "mr" else self.options.hu_window[0],
            intensities={path: Intensity.from_json(raw) for path, raw in stored.items()}
            if self.options.modality == "mr"
            else None,
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

        reader = self.reader(index)
        box = index.metadata.get("boxes", {}).get(source)
        if box is None:
            raise UsageError(f"{source}: not a source of this index.", "Give one that its column 'source' names.")
        volume = reader.volume(source)
        own = [length / ratio for length, ratio in zip(volume.spacing, volume.ratio, strict=True)]
        start, size = resampled_box(box, own, volume.ratio, volume.shape, self.options.margin)
        return VolumeScene(source, volume, start, size, reader.fill, self.options.maps)

    def augmentation(self, spec: InputSpec) -> Augmentation:
        from fmsuite.domains.medical.augment import VolumeAugmentation

        monai_transforms()
        return VolumeAugmentation(spec, self.options.flip_left_right)

    def to_rgb(self, values: np.ndarray, spec: InputSpec) -> np.ndarray:
        """Mid-slices side by side: axial, coronal, sagittal; the patient's left is on the left, anterior and superior
        are up (in the sagittal slice anterior is on the right). The first channel, grey.

        Args:
            values: (C, z, y, x) raw values.
        """
        from fmsuite.domains.medical.pictures import montage

        return montage(values, spec)

    def example_data(self, folder: Path, seed: int = 0) -> Path:
        from fmsuite.domains.medical.example import make_example

        return make_example(folder, seed)

    def preview(self, index: SampleIndex, folder: Path) -> list[Path]:
        """One PNG a source: its mid-slices, with the windows that these cut."""
        from fmsuite.domains.medical.pictures import draw_windows

        return draw_windows(index, self.reader(index), self.input_spec(index), folder)
