"""What may vary in a volume without changing what it shows."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from fmsuite.core.data.adjust import Adjustment, affine
from fmsuite.core.data.sample import AUGMENT, ArraySample, Sample
from fmsuite.core.inputs import InputSpec
from fmsuite.domains.medical.volumes import monai_transforms
from fmsuite.errors import UsageError

TURN = math.radians(10)
ZOOM = 0.1
BLUR = (0.5, 1.0)
"""Range of the blur's standard deviation along each axis, in voxels, before what a voxel's own extent adds."""
BLUR_PROBABILITY = (0.5, 0.1)
"""For an ordinary view, and for the second of an asymmetric pair."""
VOXEL_VARIANCE = 1 / 12
"""Of a voxel as wide as one: MONAI's kernels, whose strength these are, integrate the Gaussian over each voxel."""
NOISE, NOISE_PROBABILITY = 0.1, 0.3
GAIN, SHIFT, INTENSITY_PROBABILITY = 0.2, 0.2, 0.5
GAMMA, GAMMA_PROBABILITY = (0.7, 1.5), 0.3
"""Intensities are in network units."""
EQUAL_SPACING = 1.1
"""A plane may be rotated if its two spacings differ by less than this factor: otherwise a rotation in voxels would
shear the anatomy."""


class VolumeAugmentation:
    """MONAI's flips and affine maps, seeded for each sample; intensities are varied on the device.

    weak: mirror images along z and y, and along x (left-right) only on request. strong: also a rotation by up to
    10 degrees and a zoom by up to 10 % along each axis, blur, noise, scale, shift and gamma. There are no right-angle
    turns: a body has an up, and slices are often thicker than they are wide. Intensities are varied in network units
    (``core.inputs.Normalize``), so that one strength fits Hounsfield units and standardised MR. The second view of an
    asymmetric pair is blurred less often.

    Args:
        spec: the input.
        flip_left_right: mirror the patient's sides as well.
    """

    left_right: ClassVar[int] = 2
    """Position of the left-right axis among the input's."""
    mirrored: ClassVar[tuple[int, ...]] = (0, 1)
    """Positions of the axes that are mirrored unasked."""

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
        strong = strength == "strong"
        if strength == "none" or not (strong or self._flips):
            return sample
        import torch

        seed = int(generator.integers(2**32))
        valid = sample.valid
        if valid is None and strong:
            valid = np.ones((1, *sample.size), dtype=bool)
        values = sample.values.astype(np.float32) if strong else sample.values
        data = {"values": torch.from_numpy(np.ascontiguousarray(values))}
        if valid is not None:
            data["valid"] = torch.from_numpy(valid.astype(np.float32))
        for name, labels in sample.maps.items():
            data[f"map:{name}"] = torch.from_numpy(labels[None].astype(np.float32))
        pipeline = self._pipeline(strong, tuple(data), self._turns(sample) if strong else ())
        pipeline.set_random_state(seed=seed)
        done = {key: np.ascontiguousarray(np.asarray(tensor)) for key, tensor in pipeline(data).items()}
        moved = done["valid"] > 0.99 if "valid" in done else None
        if moved is not None and sample.valid is None and moved.all():
            moved = None
        maps = {
            name: np.rint(done[f"map:{name}"][0]).astype(labels.dtype, copy=False)
            for name, labels in sample.maps.items()
        }
        return sample.replace(
            values=done["values"].astype(sample.values.dtype, copy=False),
            valid=moved,
            maps=maps,
            adjust=self._intensities(second, generator) if strong else None,
        )

    def _intensities(self, second: bool, generator: np.random.Generator) -> Adjustment:
        """Blur, noise, scale, shift and gamma of network values, in terms of raw ones."""
        sigma = np.sqrt(generator.uniform(*BLUR, size=len(self.spec.axes)) ** 2 + VOXEL_VARIANCE)
        blurs, noisy, scales, shifts, curves = generator.random(5) < (
            BLUR_PROBABILITY[second],
            NOISE_PROBABILITY,
            INTENSITY_PROBABILITY,
            INTENSITY_PROBABILITY,
            GAMMA_PROBABILITY,
        )
        noise, seed = generator.uniform(0, NOISE), int(generator.integers(2**62))
        gain, shift, gamma = generator.uniform(-GAIN, GAIN), generator.uniform(-SHIFT, SHIFT), generator.uniform(*GAMMA)
        factor = 1 + gain if scales else 1.0
        mean, std = (np.array([getattr(channel, name) for channel in self.spec.channels]) for name in ("mean", "std"))
        # v' = (factor * (scale * v + offset - mean) + shift * std + mean - offset) / scale
        constant = ((factor - 1) * (self.spec.offset - mean) + (shift * std if shifts else 0)) / self.spec.scale
        return Adjustment(
            maps=affine(factor * np.eye(len(mean)), offset=constant)[None],
            limits=self._limits(),
            blur=(sigma * blurs).astype(np.float32),
            # It follows the change of scale, which would have scaled it too.
            noise=(noisy * noise * factor * std / abs(self.spec.scale)).astype(np.float32),
            seed=seed,
            gamma=gamma if curves else 1.0,
        )

    def _limits(self) -> np.ndarray | None:
        """(2, 2): the window of raw values before the change of scale, and none after it: ``Normalize`` clips."""
        if self.spec.clip is None:
            return None
        window = sorted((end - self.spec.offset) / self.spec.scale for end in self.spec.clip)
        return np.array([window, [-np.inf, np.inf]], dtype=np.float32)

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

    @property
    def _flips(self) -> list[int]:
        return [*self.mirrored, *([self.left_right] if self.flip_left_right else [])]

    def _pipeline(self, strong: bool, keys: tuple[str, ...], turns: tuple[float, ...]) -> Any:
        known = (strong, keys, turns)
        if known not in self._pipelines:
            self._pipelines[known] = self._build(*known)
        return self._pipelines[known]

    def _build(self, strong: bool, keys: tuple[str, ...], turns: tuple[float, ...]) -> Any:
        monai = monai_transforms()
        steps = [monai.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in self._flips]
        if strong:
            steps += [
                monai.RandAffined(
                    keys,
                    prob=0.5,
                    rotate_range=turns,
                    scale_range=(ZOOM,) * len(self.spec.axes),
                    mode=["nearest" if key.startswith("map:") else "bilinear" for key in keys],
                    padding_mode=["border" if key == "values" else "zeros" for key in keys],
                )
            ]
        return monai.Compose(steps)


class XrayAugmentation(VolumeAugmentation):
    """The same for X-rays.

    weak: nothing, unless ``flip_left_right`` asks for mirror images: the heart is on one side, and a projection has no
    other plane in which a body is alike. strong: a rotation by up to 10 degrees, a zoom by up to 10 % along each axis,
    blur, noise, scale, shift and gamma, as for volumes.
    """

    left_right: ClassVar[int] = 1
    mirrored: ClassVar[tuple[int, ...]] = ()

    def _turns(self, sample: ArraySample) -> tuple[float, ...]:
        """An X-ray is read with square pixels, and a crop's change of aspect ratio is small."""
        return (TURN,)
