"""The ``data:`` options of the medical domain."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fmsuite.core.inputs import InputSpec, Plan, Reading
from fmsuite.domains.base import DomainOptions
from fmsuite.domains.medical.maps import FIELDS
from fmsuite.errors import UsageError
from fmsuite.tiling.labels import LabelOptions
from fmsuite.tiling.templates import absolute_template

Millimetres = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Voxels = Annotated[int, Field(ge=1)]
Pixels = Annotated[int, Field(ge=8, le=8192)]
Percent = Annotated[float, Field(ge=0, le=100)]

USUAL_PLANS: dict[str, Plan] = {"mr": "zscore", "ct": "window", "xray": "minmax"}
_VOLUMES_ONLY = (
    "spacing",
    "size",
    "stride",
    "margin",
    "maps",
    "min_foreground",
    "unknown_orientation",
    "cached_volumes",
)
_XRAYS_ONLY = ("image_size", "framing")
_PLANS_ONLY = {"hu_window": ("window",), "percentiles": ("zscore", "percentile")}


class MedicalOptions(DomainOptions, LabelOptions):
    """How volumes become windows, and what is known about the volumes (``LabelOptions``; a group is a patient).

    Tuples are in the order of the array's axes, (z, y, x).

    Attributes:
        modality: ``mr`` (volumes of arbitrary units), ``ct`` (volumes of Hounsfield units) or ``xray`` (single images).
            It cannot be told from a file, so it is never guessed.
        intensity: how intensities become comparable (``core.inputs.Plan``). ``auto`` is ``zscore`` for MR, ``window``
            for CT, the only one of them with a unit, and ``minmax`` for X-rays. ``zscore`` and ``percentile`` look at a
            volume's foreground and at the whole of an X-ray.
        percentiles: that ``zscore`` clips to and ``percentile`` makes 0 and 1; 0 and 100 for none.
        spacing: millimetres between voxels after resampling, one number or one an axis; ``None`` keeps each volume's
            own voxels.
        size: voxels of a window after resampling. Like all that counts voxels or millimetres, it is for volumes.
        stride: voxels between windows; the window's size if not given.
        margin: millimetres around the box of the foreground that windows and dense predictions cover too; ``null``
            covers the whole volume. What lies further out is never seen, and background in what is predicted.
        maps: label maps, voxel by voxel, by name: a folder that holds a file of the same name for each volume, or a
            path with ``{name}`` (the volume's file name), ``{stem}`` (without suffix) or ``{folder}`` (where it lies).
        min_foreground: share of a window (of its part inside the volume) that must be foreground.
        hu_window: Hounsfield units that become 0 and 1; values outside are clipped. For the plan ``window``.
        image_size: pixels of an X-ray's shorter side as it is read; a smaller one is not enlarged. Crops are cut from
            it at its own aspect ratio.
        framing: the window of an X-ray is the ``whole`` of it, or the square at its ``centre``. Without a crop, a
            window is resized to the square that the encoder takes, whatever its aspect ratio.
        channels: names of the channels. A 4D file is read as channels only if this names each of its volumes; without
            it a 3D file has one channel, named after the modality.
        unknown_orientation: a file whose sform and qform codes are both 0 does not say how it lies in the patient.
            ``skip`` leaves it out; ``assume`` takes NIfTI's fallback, in which the first axis grows to the patient's
            left, the second to anterior and the third to superior.
        flip_left_right: let augmentation mirror a patient's sides; off, since organs and reports have sides.
        cached_volumes: resampled volumes that each loader process keeps in memory.
    """

    modality: Literal["mr", "ct", "xray"] = "mr"
    intensity: Literal["auto"] | Plan = "auto"
    percentiles: tuple[Percent, Percent] = (0.5, 99.5)
    spacing: Millimetres | tuple[Millimetres, Millimetres, Millimetres] | None = 1.0
    size: Voxels | tuple[Voxels, Voxels, Voxels] = 32
    stride: Voxels | tuple[Voxels, Voxels, Voxels] | None = None
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = 5.0
    maps: dict[str, str] = Field(default_factory=dict)
    min_foreground: float = Field(default=0.1, ge=0, le=1)
    hu_window: tuple[float, float] = (-1000.0, 1000.0)
    image_size: Pixels = 224
    framing: Literal["whole", "centre"] = "whole"
    channels: tuple[str, ...] | None = None
    unknown_orientation: Literal["skip", "assume"] = "skip"
    flip_left_right: bool = False
    cached_volumes: int = Field(default=4, ge=1)

    @field_validator("maps")
    @classmethod
    def _templates(cls, maps: dict[str, str]) -> dict[str, str]:
        return {name: absolute_template(f"maps.{name}", template, FIELDS) for name, template in maps.items()}

    @model_validator(mode="after")
    def _consistent(self) -> MedicalOptions:
        if not self.hu_window[0] < self.hu_window[1]:
            raise ValueError(f"hu_window {self.hu_window} is empty")
        if not self.percentiles[0] < self.percentiles[1]:
            raise ValueError(f"percentiles {self.percentiles} are empty")
        if self.intensity == "window" and self.modality != "ct":
            raise ValueError(
                f"intensity 'window' is for values that have a unit, which those of modality '{self.modality}' have not"
            )
        self._refuse_of_others()
        if self.channels is not None and (not self.channels or len(set(self.channels)) < len(self.channels)):
            raise ValueError("channels must be different names, at least one")
        return self

    def _refuse_of_others(self) -> None:
        """Options that would be ignored. What they are at their defaults cannot be told from what was not given."""
        wrong = _VOLUMES_ONLY if self.modality == "xray" else _XRAYS_ONLY
        for name in wrong:
            default = type(self).model_fields[name].get_default(call_default_factory=True)
            if getattr(self, name) != default:
                raise ValueError(f"{name} is not for modality '{self.modality}': leave it at {default}")
        if self.modality == "xray" and self.channels is not None and len(self.channels) > 1:
            raise ValueError("an X-ray has one channel")
        for name, plans in _PLANS_ONLY.items():
            default = type(self).model_fields[name].get_default(call_default_factory=True)
            if self.plan not in plans and getattr(self, name) != default:
                raise ValueError(f"{name} is not for intensity '{self.plan}': leave it at {default}")

    @property
    def plan(self) -> Plan:
        """``intensity`` with ``auto`` made out."""
        return USUAL_PLANS[self.modality] if self.intensity == "auto" else self.intensity

    @property
    def of_foreground(self) -> bool:
        """Whether the plan looks at the foreground alone: the extremes of an image are those of all of it, and an X-ray
        has no foreground."""
        return self.plan in ("zscore", "percentile") and self.modality != "xray"

    @property
    def reading(self) -> Reading:
        """What of these options travels with an encoder, beside its channels, spacing and window."""
        xray = self.modality == "xray"
        return Reading(
            domain="medical",
            modality=self.modality,
            plan=self.plan,
            percentiles=self.percentiles if self.plan in _PLANS_ONLY["percentiles"] else None,
            foreground=self.of_foreground,
            size=(self.image_size,) * 2 if xray else self.full_size,
            framing=self.framing if xray else None,
        )

    @classmethod
    def like(cls, spec: InputSpec) -> dict[str, Any]:
        """The inverse of ``reading``: the options, as plain values, that give this input.

        Raises:
            UsageError: if the input is of another domain, or does not say how it is read.
        """
        reading = spec.reading
        if reading is None or reading.domain != "medical":
            raise UsageError("This input is not one of the domain 'medical', or does not say how its files are read.")
        found: dict[str, Any] = {"modality": reading.modality, "intensity": reading.plan}
        if reading.percentiles is not None:
            found["percentiles"] = reading.percentiles
        if reading.plan == "window":
            found["hu_window"] = tuple(round(end, 6) for end in spec.window)
        if spec.channel_names != (reading.modality,):
            found["channels"] = spec.channel_names
        if reading.modality == "xray":
            return {**found, "image_size": reading.size[0], "framing": reading.framing}
        found["size"] = reading.size
        if spec.spacing is None:
            return {**found, "spacing": None}
        lengths = (length * now for length, now in zip(spec.spacing, spec.size, strict=True))
        found["spacing"] = tuple(round(length / read, 6) for length, read in zip(lengths, reading.size, strict=True))
        return found

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
