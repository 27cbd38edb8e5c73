"""What may vary in a volume without changing what it shows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fmsuite.core.data.sample import AUGMENT, ArraySample, Sample
from fmsuite.core.inputs import InputSpec
from fmsuite.domains.medical.volumes import monai_transforms
from fmsuite.errors import UsageError

LEFT_RIGHT = 2
"""Position of the left-right axis in (z, y, x) of a RAS volume."""
TURN = math.radians(10)
ZOOM = 0.1
BLUR = (0.5, 1.0)
BLUR_REACH = 4
"""Voxels; MONAI's kernels end at four standard deviations."""
EQUAL_SPACING = 1.1
"""A plane may be rotated if its two spacings differ by less than this factor: otherwise a rotation in voxels would
shear the anatomy."""


class VolumeAugmentation:
    """MONAI's transforms, seeded for each sample.

    weak: mirror images along z and y, and along x (left-right) only on request. strong: also a rotation by up to
    10 degrees and a zoom by up to 10 % along each axis, blur, noise, scale, shift and gamma. There are no right-angle
    turns: a body has an up, and slices are often thicker than they are wide. Intensities are varied in network units
    (``core.inputs.Normalize``), so that one strength fits Hounsfield units and standardised MR. The second view of an
    asymmetric pair is blurred less often.

    Args:
        spec: the input.
        flip_left_right: mirror the patient's sides as well.
    """

    def __init__(self, spec: InputSpec, flip_left_right: bool = False) -> None:
        self.spec = spec
        self.flip_left_right = flip_left_right
        self._pipelines: dict[tuple, Any] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pipelines": {}}

    def before_crop(self, sample: Sample, strength: str, generator: np.random.Generator) -> Sample:
        """Unchanged: a volume is read at one resolution."""
        return sample

    def after_crop(
        self, sample: ArraySample, strength: str, second: bool, generator: np.random.Generator
    ) -> ArraySample:
        if strength not in AUGMENT:
            raise UsageError(f"There is no augmentation '{strength}'.", f"Known: {', '.join(AUGMENT)}.")
        if strength == "none":
            return sample
        import torch

        strong = strength == "strong"
        seed = int(generator.integers(2**32))
        valid = sample.valid
        if valid is None and strong:
            valid = np.ones((1, *sample.size), dtype=bool)
        values = self._to_network(sample.values) if strong else np.asarray(sample.values)
        data = {"values": torch.from_numpy(np.ascontiguousarray(values))}
        if valid is not None:
            data["valid"] = torch.from_numpy(valid.astype(np.float32))
        for name, labels in sample.maps.items():
            data[f"map:{name}"] = torch.from_numpy(labels[None].astype(np.float32))
        pipeline = self._pipeline(strong, second, tuple(data), sample.size, self._turns(sample) if strong else ())
        pipeline.set_random_state(seed=seed)
        done = {key: np.ascontiguousarray(np.asarray(tensor)) for key, tensor in pipeline(data).items()}
        values = self._from_network(done["values"]) if strong else done["values"]
        moved = done["valid"] > 0.99 if "valid" in done else None
        if moved is not None and sample.valid is None and moved.all():
            moved = None
        maps = {
            name: np.rint(done[f"map:{name}"][0]).astype(labels.dtype, copy=False)
            for name, labels in sample.maps.items()
        }
        return sample.replace(values=values.astype(sample.values.dtype, copy=False), valid=moved, maps=maps)

    def _turns(self, sample: ArraySample) -> tuple[float, ...]:
        """Largest rotation about each axis; zero where it would mix axes of different spacing."""
        spacing = sample.spacing or self.spec.spacing
        if spacing is None:
            return (0.0, 0.0, 0.0)
        turns = []
        for axis in range(3):
            first, other = (spacing[i] for i in range(3) if i != axis)
            turns.append(TURN if max(first, other) < EQUAL_SPACING * min(first, other) else 0.0)
        return tuple(turns)

    def _pipeline(
        self, strong: bool, second: bool, keys: tuple[str, ...], size: tuple[int, ...], turns: tuple[float, ...]
    ) -> Any:
        known = (strong, second, keys, size, turns)
        if known not in self._pipelines:
            self._pipelines[known] = self._build(*known)
        return self._pipelines[known]

    def _build(
        self, strong: bool, second: bool, keys: tuple[str, ...], size: tuple[int, ...], turns: tuple[float, ...]
    ) -> Any:
        monai = monai_transforms()
        axes = [axis for axis in range(3) if axis != LEFT_RIGHT or self.flip_left_right]
        steps = [monai.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in axes]
        if strong:
            steps += [
                monai.RandAffined(
                    keys,
                    prob=0.5,
                    rotate_range=turns,
                    scale_range=(ZOOM,) * 3,
                    mode=["nearest" if key.startswith("map:") else "bilinear" for key in keys],
                    padding_mode=["border" if key == "values" else "zeros" for key in keys],
                ),
                # MONAI's filter takes zeros beyond the edge, which would draw a frame around the view.
                monai.BorderPadd("values", BLUR_REACH, mode="edge"),
                monai.RandGaussianSmoothd("values", BLUR, BLUR, BLUR, prob=0.1 if second else 0.5),
                monai.CenterSpatialCropd("values", size),
                monai.RandGaussianNoised("values", prob=0.3, std=0.1),
                monai.RandScaleIntensityd("values", factors=0.2, prob=0.5),
                monai.RandShiftIntensityd("values", offsets=0.2, prob=0.5),
                monai.RandAdjustContrastd("values", prob=0.3, gamma=(0.7, 1.5)),
            ]
        return monai.Compose(steps)

    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        mean = np.array([channel.mean for channel in self.spec.channels], dtype=np.float32)
        std = np.array([channel.std for channel in self.spec.channels], dtype=np.float32)
        return mean.reshape(-1, 1, 1, 1), std.reshape(-1, 1, 1, 1)

    def _to_network(self, values: np.ndarray) -> np.ndarray:
        mean, std = self._statistics()
        scaled = values.astype(np.float32) * np.float32(self.spec.scale) + np.float32(self.spec.offset)
        if self.spec.clip is not None:
            scaled = np.clip(scaled, *self.spec.clip)
        return (scaled - mean) / std

    def _from_network(self, values: np.ndarray) -> np.ndarray:
        mean, std = self._statistics()
        return (values * std + mean - np.float32(self.spec.offset)) / np.float32(self.spec.scale)
