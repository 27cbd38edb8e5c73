"""The ``data:`` options of the medical domain."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fmsuite.domains.base import DomainOptions
from fmsuite.domains.medical.maps import absolute_template
from fmsuite.tiling.labels import LabelOptions

Millimetres = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Voxels = Annotated[int, Field(ge=1)]


class MedicalOptions(DomainOptions, LabelOptions):
    """How volumes become windows, and what is known about the volumes (``LabelOptions``; a group is a patient).

    Tuples are in the order of the array's axes, (z, y, x).

    Attributes:
        modality: ``mr`` (arbitrary units, standardised volume by volume within the foreground) or ``ct`` (Hounsfield
            units, one window for all). It cannot be told from a file, so it is never guessed.
        spacing: millimetres between voxels after resampling, one number or one an axis; ``None`` keeps each volume's
            own voxels.
        size: voxels of a window after resampling.
        stride: voxels between windows; the window's size if not given.
        margin: millimetres around the box of the foreground that windows and dense predictions cover too; ``null``
            covers the whole volume. What lies further out is never seen, and background in what is predicted.
        maps: label maps, voxel by voxel, by name: a folder that holds a file of the same name for each volume, or a
            path with ``{name}`` (the volume's file name), ``{stem}`` (without suffix) or ``{folder}`` (where it lies).
        min_foreground: share of a window (of its part inside the volume) that must be foreground.
        hu_window: Hounsfield units that become 0 and 1; values outside are clipped. CT only.
        channels: names of the channels. A 4D file is read as channels only if this names each of its volumes; without
            it a 3D file has one channel, named after the modality.
        unknown_orientation: a file whose sform and qform codes are both 0 does not say how it lies in the patient.
            ``skip`` leaves it out; ``assume`` takes NIfTI's fallback, in which the first axis grows to the patient's
            left, the second to anterior and the third to superior.
        flip_left_right: let augmentation mirror a patient's sides; off, since organs and reports have sides.
        cached_volumes: resampled volumes that each loader process keeps in memory.
    """

    modality: Literal["mr", "ct"] = "mr"
    spacing: Millimetres | tuple[Millimetres, Millimetres, Millimetres] | None = 1.0
    size: Voxels | tuple[Voxels, Voxels, Voxels] = 32
    stride: Voxels | tuple[Voxels, Voxels, Voxels] | None = None
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = 5.0
    maps: dict[str, str] = Field(default_factory=dict)
    min_foreground: float = Field(default=0.1, ge=0, le=1)
    hu_window: tuple[float, float] = (-1000.0, 1000.0)
    channels: tuple[str, ...] | None = None
    unknown_orientation: Literal["skip", "assume"] = "skip"
    flip_left_right: bool = False
    cached_volumes: int = Field(default=4, ge=1)

    @field_validator("maps")
    @classmethod
    def _templates(cls, maps: dict[str, str]) -> dict[str, str]:
        return {name: absolute_template(name, template) for name, template in maps.items()}

    @model_validator(mode="after")
    def _consistent(self) -> MedicalOptions:
        if not self.hu_window[0] < self.hu_window[1]:
            raise ValueError(f"hu_window {self.hu_window} is empty")
        if self.channels is not None and (not self.channels or len(set(self.channels)) < len(self.channels)):
            raise ValueError("channels must be different names, at least one")
        return self

    @property
    def full_spacing(self) -> tuple[float, float, float] | None:
        """(z, y, x) millimetres, or ``None`` to keep each volume's own."""
        if self.spacing is None or isinstance(self.spacing, tuple):
            return self.spacing
        return (self.spacing,) * 3

    @property
    def full_size(self) -> tuple[int, int, int]:
        """(z, y, x) voxels of a window."""
        return self.size if isinstance(self.size, tuple) else (self.size,) * 3

    @property
    def full_stride(self) -> tuple[int, int, int]:
        """(z, y, x) voxels between windows."""
        if self.stride is None:
            return self.full_size
        return self.stride if isinstance(self.stride, tuple) else (self.stride,) * 3

    @property
    def channel_names(self) -> tuple[str, ...]:
        return self.channels or (self.modality,)
