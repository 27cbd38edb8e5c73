"""What is shown of one segmented case: a slice along each axis, or the whole of a picture, with its label maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from fmsuite.core.data.sample import Array
from fmsuite.errors import UsageError

PERCENTILES = (0.5, 99.5)
"""Of the image's finite values: drawn black and white."""
LONGEST = 384
"""Samples along a picture's longer side; larger pictures are thinned."""


@dataclass(frozen=True)
class Slice:
    """
    Attributes:
        name: such as "axial".
        place: number of the slice along the axis that it cuts, and how many there are; ``None`` for a whole picture.
        image: (H, W) or (H, W, 3) uint8, as it is to be seen: its first row is on top.
        truth, prediction: (H, W) integers; ``None`` where there is no truth.
        pitch: physical length of a sample down and across.
    """

    name: str
    image: Array
    truth: Array | None
    prediction: Array
    pitch: tuple[float, float]
    place: tuple[int, int] | None = None


@dataclass(frozen=True)
class CaseSlices:
    """
    Attributes:
        dice: of each label of the whole case, NaN where neither truth nor prediction has it; empty without truth.
    """

    slices: list[Slice]
    dice: list[float] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        image: Array,
        truth: Array | None,
        prediction: Array,
        spacing: Sequence[float],
        labels: int,
        planes: Sequence[str] = ("axial", "coronal", "sagittal"),
        ignore: int = -1,
    ) -> CaseSlices:
        """Slices of a volume through the truth's voxel that is nearest to its centre of mass (the prediction's where
        there is no truth, or an empty one; else the middle), each with its second axis up; or a picture as it is.

        Args:
            image: (z, y, x), or (y, x), or (y, x, 3) uint8, which is shown unchanged.
            truth, prediction: integers, (z, y, x) or (y, x); 0 is the background.
            spacing: physical length of a sample along each axis.
            labels: how many there are, the background included.
            planes: names of the slices that cut the first, second and third axis.
            ignore: the truth's value where it is not known.

        Raises:
            ValueError: if shapes or the number of axes do not fit.
        """
        axes = prediction.ndim
        colour = image.ndim == axes + 1 and image.shape[-1] == 3 and image.dtype == np.uint8
        if axes not in (2, 3) or not (colour or image.ndim == axes) or image.shape[:axes] != prediction.shape:
            raise ValueError(f"an image {image.shape} does not fit a prediction {prediction.shape}")
        if len(spacing) != axes or (truth is not None and truth.shape != prediction.shape):
            raise ValueError(f"truth or spacing {tuple(spacing)} does not fit a prediction {prediction.shape}")
        shown = image if colour else grey(image)
        if axes == 2:
            whole = _thinned("image", shown, truth, prediction, (spacing[0], spacing[1]), None)
            return cls([whole], _dice(truth, prediction, labels, ignore))
        centre = _centre(truth, prediction, ignore)
        slices = []
        for cut, name in enumerate(planes):
            up, right = (axis for axis in range(3) if axis != cut)

            def plane(values: Array, cut: int = cut) -> Array:
                return np.take(values, centre[cut], axis=cut)[::-1]

            slices.append(
                _thinned(
                    name,
                    plane(shown),
                    None if truth is None else plane(truth),
                    plane(prediction),
                    (spacing[up], spacing[right]),
                    (centre[cut], prediction.shape[cut]),
                )
            )
        return cls(slices, _dice(truth, prediction, labels, ignore))

    def save(self, path: Path) -> None:
        """As a compressed ``.npz`` without Python objects."""
        arrays: dict[str, Array] = {"dice": np.asarray(self.dice, np.float64)}
        for number, shown in enumerate(self.slices):
            arrays[f"{number}/name"] = np.asarray(shown.name)
            arrays[f"{number}/image"], arrays[f"{number}/prediction"] = shown.image, shown.prediction
            if shown.truth is not None:
                arrays[f"{number}/truth"] = shown.truth
            arrays[f"{number}/pitch"] = np.asarray(shown.pitch, np.float64)
            arrays[f"{number}/place"] = np.asarray(shown.place or (), np.int64)
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> CaseSlices:
        """
        Raises:
            UsageError: if the file is missing or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                count = sum(name.endswith("/name") for name in file.files)
                slices = [_slice(file, number) for number in range(count)]
                dice = file["dice"].tolist()
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise UsageError(f"{path}: the slices of a case cannot be read ({error}).", "Make them again.") from error
        if not slices:
            raise UsageError(f"{path}: holds no slices of a case.", "Make them again.")
        return cls(slices, dice)


def _slice(file: np.lib.npyio.NpzFile, number: int) -> Slice:
    place = file[f"{number}/place"].tolist()
    down, across = file[f"{number}/pitch"].tolist()
    truth = file[f"{number}/truth"] if f"{number}/truth" in file.files else None
    image, prediction = file[f"{number}/image"], file[f"{number}/prediction"]
    if image.dtype != np.uint8 or image.shape[:2] != prediction.shape or prediction.ndim != 2:
        raise ValueError(f"slice {number}: {image.dtype} {image.shape} and {prediction.shape}")
    if truth is not None and truth.shape != prediction.shape:
        raise ValueError(f"slice {number}: truth {truth.shape} and {prediction.shape}")
    name = str(file[f"{number}/name"])
    return Slice(name, image, truth, prediction, (down, across), (place[0], place[1]) if place else None)


def grey(image: Array, percentiles: tuple[float, float] = PERCENTILES) -> Array:
    """Any real values to uint8: those between the percentiles of the finite ones from black to white; others, and a
    constant image, black."""
    values = image.astype(np.float32)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(image.shape, np.uint8)
    low, high = np.percentile(values[finite], percentiles)
    if high <= low:
        low, high = float(values[finite].min()), float(values[finite].max())
    if high <= low:
        return np.zeros(image.shape, np.uint8)
    scaled = (np.where(finite, values, low) - low) / (high - low)
    return (np.clip(scaled, 0, 1) * 255).round().astype(np.uint8)


def _centre(truth: Array | None, prediction: Array, ignore: int) -> tuple[int, ...]:
    for labels in (truth, prediction):
        if labels is None:
            continue
        inside = np.argwhere((labels > 0) & (labels != ignore))
        if len(inside):
            # The centre itself may lie outside of what it is the centre of: two kidneys, a ring.
            nearest = ((inside - inside.mean(0)) ** 2).sum(1).argmin()
            return tuple(inside[nearest].tolist())
    return tuple(length // 2 for length in prediction.shape)


def _thinned(
    name: str,
    image: Array,
    truth: Array | None,
    prediction: Array,
    pitch: tuple[float, float],
    place: tuple[int, int] | None,
) -> Slice:
    step = math.ceil(max(prediction.shape) / LONGEST)
    small = (slice(step // 2, None, step),) * 2

    def labels(values: Array) -> Array:
        return np.ascontiguousarray(values[small])

    kept = None if truth is None else labels(truth)
    pitch = (pitch[0] * step, pitch[1] * step)
    return Slice(name, np.ascontiguousarray(image[small]), kept, labels(prediction), pitch, place)


def _dice(truth: Array | None, prediction: Array, labels: int, ignore: int) -> list[float]:
    if truth is None:
        return []
    known = truth != ignore
    found = []
    for label in range(labels):
        true, said = (truth == label) & known, (prediction == label) & known
        size = int(true.sum()) + int(said.sum())
        found.append(2 * int((true & said).sum()) / size if size else math.nan)
    return found
