"""What a model's input is: axes, size, channels, spacing, normalisation. It travels with every encoder."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from torch import Tensor, nn

from fmsuite.core.data.adjust import adjusted
from fmsuite.core.data.sample import View
from fmsuite.errors import UsageError

SPATIAL_AXES = ("z", "y", "x")
"""Axes along which a view may be cropped and resampled; the others (``time``) are kept whole."""


class Quantification(BaseModel):
    """From raw values to physical ones: ``clip(offset + scale * raw)``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: float = 1.0
    offset: float = 0.0
    clip: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Quantification:
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip {self.clip} is empty")
        return self


class Channel(BaseModel):
    """One channel of the input.

    Attributes:
        name: as the field writes it: ``"red"``, ``"B8A"``, ``"VV"``, ``"T1"``.
        wavelength: centre wavelength in nanometres, where the channel has one.
        group: channels of one group share a patch embedding and a token; ``None`` puts all of them together.
        mean, std: statistics after ``offset + scale * raw`` and clipping, in those units.
        quantification: in place of the input's, for a channel in another unit than the others (radar beside
            reflectance, a thermal band).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    wavelength: float | None = None
    group: str | None = None
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)
    quantification: Quantification | None = None

    @model_serializer(mode="wrap")
    def _described(self, usual: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a quantification of its own, a channel is described as it was before there was any."""
        found = usual(self)
        if self.quantification is None:
            found.pop("quantification", None)
        return found


Plan = Literal["window", "zscore", "percentile", "minmax"]
"""How intensities of different images become comparable; see ``Reading``."""


class Reading(BaseModel):
    """What a domain's reader does to each image, before its values are the raw ones that an encoder takes.

    Attributes:
        domain: whose reader it is.
        modality: what kind of image it is, as the domain calls it: ``"ct"``, ``"mr"``, ``"xray"``.
        plan: ``window``: nothing, as values have a unit and ``InputSpec.clip`` is a window of it. ``zscore``: values
            are clipped to ``percentiles`` of the image; minus their mean, divided by their standard deviation.
            ``percentile``: these percentiles become 0 and 1, what is outside is clipped. ``minmax``: the smallest and
            the largest value become 0 and 1.
        percentiles: for plans that use them.
        foreground: statistics of the image are those of its foreground, as the domain finds it; otherwise of all of it.
        size: samples of a window along each axis as it is read, before it is resized to ``InputSpec.size``.
        framing: which part of an image a window shows, where the domain has a choice.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    domain: str
    modality: str
    plan: Plan
    percentiles: tuple[float, float] | None = None
    foreground: bool = False
    size: tuple[int, ...]
    framing: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Reading:
        if (self.plan in ("zscore", "percentile")) != (self.percentiles is not None):
            raise ValueError(f"the plan '{self.plan}' and percentiles {self.percentiles} do not go together")
        return self

    def said(self) -> str:
        """The plan in words."""
        if self.percentiles is None:
            return self.plan
        low, high = self.percentiles
        place = "the foreground" if self.foreground else "the whole image"
        return f"{self.plan} (percentiles {low:g} and {high:g} of {place})"

    def differences(self, other: Reading) -> list[str]:
        """Sentences naming what differs in meaning; not ``size``, to which an image is only resized."""
        found = []
        if self.domain != other.domain:
            found.append(f"domain {self.domain} against {other.domain}")
        if self.modality != other.modality:
            found.append(f"modality {self.modality} against {other.modality}")
        if self.said() != other.said():
            found.append(f"intensity {self.said()} against {other.said()}")
        if self.framing != other.framing:
            found.append(f"framing {self.framing} against {other.framing}")
        return found


class InputSpec(BaseModel):
    """The contract between a reader and a backbone, saved in ``encoder.json`` with every encoder.

    Attributes:
        axes: names of the array's axes after the channel axis, in order: ``("y", "x")``, ``("z", "y", "x")``,
            ``("time", "y", "x")``. A bag of feature vectors, with ``bag=True``, names its coordinates' axes instead.
        size: length along each axis that the model is built for; other sizes are allowed at run time.
        channels: in array order.
        scale, offset, clip: raw value ``v`` becomes ``clip(offset + scale * v)`` before mean and std apply
            (``1/255`` for 8-bit images; a Hounsfield window; a reflectance quantification), in channels that have no
            quantification of their own.
        spacing: physical length of a sample along each axis of ``size``, in ``spacing_unit``; ``None`` where unknown,
            or, with a unit other than ``px``, where each sample has its own (``View.spacing``).
        orientation: the directions in which voxel axes grow, for volumes (``"RAS"``).
        bag: the input is (N, D) vectors at ``axes`` coordinates rather than a grid; ``size`` is then empty.
        reading: what is done to an image before its values are raw; ``None`` where nothing is, or it is not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    axes: tuple[str, ...]
    size: tuple[int, ...]
    channels: tuple[Channel, ...]
    scale: float = 1.0
    offset: float = 0.0
    clip: tuple[float, float] | None = None
    spacing: tuple[float, ...] | None = None
    spacing_unit: Literal["um", "mm", "m", "px"] = "px"
    orientation: str | None = None
    bag: bool = False
    reading: Reading | None = None

    @model_validator(mode="after")
    def _consistent(self) -> InputSpec:
        if not self.channels:
            raise ValueError("an input needs at least one channel")
        if self.bag != (self.size == ()):
            raise ValueError("size is empty for a bag of vectors and only for one")
        if not self.bag and len(self.size) != len(self.axes):
            raise ValueError(f"size {self.size} does not match axes {self.axes}")
        if self.spacing is not None and len(self.spacing) != len(self.axes):
            raise ValueError(f"spacing {self.spacing} does not match axes {self.axes}")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip {self.clip} is empty")
        return self

    @model_serializer(mode="wrap")
    def _described(self, usual: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Inputs without a reading are described as they were before there was any, and so keep their identity."""
        found = usual(self)
        if self.reading is None:
            found.pop("reading", None)
        return found

    @property
    def in_chans(self) -> int:
        return len(self.channels)

    @property
    def channel_names(self) -> tuple[str, ...]:
        return tuple(channel.name for channel in self.channels)

    @property
    def quantifications(self) -> tuple[Quantification, ...]:
        """Of each channel: its own, or the input's."""
        return tuple(channel.quantification or self._usual for channel in self.channels)

    @property
    def _usual(self) -> Quantification:
        return Quantification(scale=self.scale, offset=self.offset, clip=self.clip)

    def _by_name(self) -> dict[str, Quantification]:
        return dict(zip(self.channel_names, self.quantifications, strict=True))

    @property
    def eight_bit(self) -> bool:
        """Whether raw values are bytes that stand for 0 to 1."""
        return all(q.clip is None and q.offset == 0 and abs(q.scale * 255 - 1) < 1e-6 for q in self.quantifications)

    @property
    def groups(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """``(group name, channel indices)`` in order of first appearance; one group named ``""`` without grouping."""
        found: dict[str, list[int]] = {}
        for position, channel in enumerate(self.channels):
            found.setdefault(channel.group or "", []).append(position)
        return tuple((name, tuple(members)) for name, members in found.items())

    @property
    def spatial(self) -> tuple[int, ...]:
        """Positions in ``axes`` of the axes that views crop and resample."""
        return tuple(i for i, axis in enumerate(self.axes) if axis in SPATIAL_AXES)

    def resized(self, size: int | tuple[int, ...]) -> InputSpec:
        """The same input at another size; an integer applies to every spatial axis. The field of view is kept, so
        the spacing changes in proportion."""
        new = self.expand(size)
        spacing = self.spacing
        if spacing is not None:
            spacing = tuple(s * old / now for s, old, now in zip(spacing, self.size, new, strict=True))
        return self.model_copy(update={"size": new, "spacing": spacing})

    def expand(self, size: int | tuple[int, ...]) -> tuple[int, ...]:
        """A full size from an integer (all spatial axes) or a tuple for the spatial axes or for all axes.

        Raises:
            UsageError: if the length fits neither.
        """
        if isinstance(size, int):
            size = (size,) * len(self.spatial)
        if len(size) == len(self.axes):
            return tuple(size)
        if len(size) == len(self.spatial):
            full = list(self.size)
            for axis, length in zip(self.spatial, size, strict=True):
                full[axis] = length
            return tuple(full)
        raise UsageError(f"size {size} does not fit the axes {self.axes}.", "Give one number, or one for each axis.")

    def differences(self, other: InputSpec) -> list[str]:
        """Sentences naming what differs in meaning: how images are read (where both say so), channels, axes, spacing
        (by more than 5%), orientation, and what raw values mean (scale, offset, clip). Not size, and not mean and std,
        which belong to whoever normalises."""
        found = self.reading.differences(other.reading) if self.reading and other.reading else []
        if self.axes != other.axes:
            found.append(f"axes {self.axes} against {other.axes}")
        if self.channel_names != other.channel_names:
            missing = [name for name in self.channel_names if name not in other.channel_names]
            without = f" ({', '.join(missing)} missing)" if missing else ""
            found.append(f"channels {self.channel_names} against {other.channel_names}{without}")
        if self.orientation != other.orientation:
            found.append(f"orientation {self.orientation} against {other.orientation}")
        if self.spacing and other.spacing and self.axes == other.axes:
            pairs = list(zip(self.spacing, other.spacing, strict=True))
            if self.spacing_unit != other.spacing_unit or any(not math.isclose(a, b, rel_tol=0.05) for a, b in pairs):
                found.append(f"spacing {self.spacing} {self.spacing_unit} against {other.spacing} {other.spacing_unit}")
        return found + self._other_values(other)

    def _other_values(self, other: InputSpec) -> list[str]:
        """Channels of one name are compared; the inputs' own quantifications where there are none."""
        theirs = other._by_name()
        pairs = {name: (mine, theirs[name]) for name, mine in self._by_name().items() if name in theirs}
        changed: dict[str, list[str]] = {}
        for name, (mine, others) in (pairs or {"": (self._usual, other._usual)}).items():
            if not _same_values(mine, others):
                changed.setdefault(f"intensity {_said(mine)} against {_said(others)}", []).append(name)
        whole = max(1, len(pairs))
        return [said if len(names) == whole else f"{said} in {', '.join(names)}" for said, names in changed.items()]

    @property
    def window(self) -> tuple[float, float]:
        """The raw values that ``clip`` leaves as they are, from the lowest to the highest; infinite without one."""
        return _window(self._usual)


def _same_values(one: Quantification, other: Quantification) -> bool:
    """Whether raw values become the same, but for what rounding makes of a window."""
    if one.clip != other.clip or not math.isclose(one.scale, other.scale, rel_tol=1e-5):
        return False
    return math.isclose(one.offset, other.offset, rel_tol=1e-5, abs_tol=1e-5)


def _window(of: Quantification) -> tuple[float, float]:
    if of.clip is None:
        return -math.inf, math.inf
    low, high = sorted((end - of.offset) / of.scale for end in of.clip)
    return low, high


def _said(of: Quantification) -> str:
    if of.clip is None:
        return f"scale {of.scale:g} and offset {of.offset:g}"
    low, high = _window(of)
    return f"window {low:g} to {high:g} (becoming {of.clip[0]:g} to {of.clip[1]:g})"


class Normalize(nn.Module):
    """Raw values to network values, once, on the device: ``(clip(offset + scale * v) - mean) / std``.

    Invalid positions become zero (the channel's mean), so that a convolution over a half-valid patch is not driven by
    a nodata value.
    """

    mean: Tensor
    std: Tensor
    scale: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        self.spec = spec
        # (B, C, *size) for a grid; (B, N, D) for a bag.
        shape = (1, 1, -1) if spec.bag else (1, -1, *(1,) * len(spec.axes))
        found = spec.quantifications
        ends = [(-math.inf, math.inf) if q.clip is None else q.clip for q in found]
        for name, values in {
            "mean": [c.mean for c in spec.channels],
            "std": [c.std for c in spec.channels],
            "scale": [q.scale for q in found],
            "offset": [q.offset for q in found],
            "low": [low for low, _ in ends],
            "high": [high for _, high in ends],
        }.items():
            self.register_buffer(name, torch.tensor(values).view(shape), persistent=False)
        self.scaled = any(q.scale != 1.0 for q in found)
        self.shifted = any(q.offset != 0.0 for q in found)
        self.clipped = any(q.clip is not None for q in found)

    def forward(self, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """
        Args:
            values: (B, C, *size), any dtype; (B, N, D) for a bag.
            valid: bool, broadcastable to ``values``; ``None`` means all valid.

        Returns:
            float32, same shape.
        """
        # One copy, and the rest in place: on a CPU, fresh memory costs more than the arithmetic.
        out = values.to(torch.float32, copy=True)
        if self.scaled:
            out.mul_(self.scale)
        if self.shifted:
            out.add_(self.offset)
        if self.clipped:
            out.clamp_(self.low, self.high)
        out.sub_(self.mean).div_(self.std)
        if valid is not None:
            out = torch.where(valid, out, torch.zeros((), device=out.device))
        return out

    def view(self, view: View) -> View:
        """A view as the network takes it: raw pixels adjusted (``core.data.adjust``), then normalised."""
        view = adjusted(view)
        valid = view.valid
        if valid is not None and self.spec.bag:
            valid = valid[..., None]
        return replace(view, pixels=self(view.pixels, valid))

    def invert(self, values: Tensor) -> Tensor:
        """Network values back to raw ones (where no clipping took place). Shape and device are kept."""
        return ((values * self.std + self.mean) - self.offset) / self.scale


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def rgb_channels(mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD) -> tuple[Channel, ...]:
    """Red, green, blue with the given statistics on a 0-1 scale."""
    names = ("red", "green", "blue")
    return tuple(Channel(name=n, mean=m, std=s) for n, m, s in zip(names, mean, std, strict=True))
