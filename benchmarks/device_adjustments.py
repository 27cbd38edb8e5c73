"""What strong augmentation costs a worker, and the process that trains, now that it is applied on the device.

    OMP_NUM_THREADS=1 python benchmarks/device_adjustments.py [--rounds 7] [--device cpu]

For each domain: time of one sample's ``after_crop`` as it was (everything in the worker) and as it is (the worker turns
and draws), and time of a batch's adjustment on the device, a sample. Rounds are taken in turns; medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import numpy as np
import torch

from fmsuite.core.data.adjust import adjusted
from fmsuite.core.data.pipeline import Item, SampleView, collate
from fmsuite.core.data.reader import Augmentation
from fmsuite.core.data.sample import ArraySample
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.core.seeding import generator
from fmsuite.tiling.symmetry import turned


class TissueInWorker:
    """Stain in floats, then albumentations in 8 bits."""

    def __init__(self) -> None:
        import albumentations

        from fmsuite.domains.pathology.augment import STAINS

        self.stains = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
        self.inverse = np.linalg.inv(self.stains)
        self.absorbance = (-np.log((np.arange(256) + 1.0) / 256.0)).astype(np.float32)
        factors = {"brightness": (0.9, 1.1), "contrast": (0.9, 1.1), "saturation": (0.9, 1.1), "hue": (0.0, 0.0)}
        self.appearance = albumentations.Compose(
            [
                albumentations.ColorJitter(**factors, p=0.8),
                albumentations.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 1.0), p=0.5),
                albumentations.ToGray(p=0.0),
            ]
        )

    def after_crop(
        self, sample: ArraySample, strength: str, second: bool, generator: np.random.Generator
    ) -> ArraySample:
        symmetry = int(generator.integers(8))
        sample = turned(sample, symmetry % 4, symmetry >= 4)
        gain, shift = 1 + generator.uniform(-0.15, 0.15, 3), generator.uniform(-0.02, 0.02, 3)
        mixing = ((self.inverse * gain) @ self.stains).astype(np.float32)
        changed = self.absorbance[np.moveaxis(sample.values, 0, -1)] @ mixing
        changed += (shift @ self.stains).astype(np.float32)
        picture = np.clip(np.rint(256.0 * np.exp(-changed) - 1.0), 0, 255).astype(np.uint8)
        self.appearance.set_random_seed(int(generator.integers(2**31)))
        picture = self.appearance(image=np.ascontiguousarray(picture))["image"]
        return sample.replace(values=np.ascontiguousarray(np.moveaxis(picture, -1, 0)))


class BandsInWorker:
    """Gains, shifts and blur of reflectance in numpy."""

    def after_crop(
        self, sample: ArraySample, strength: str, second: bool, generator: np.random.Generator
    ) -> ArraySample:
        sample = turned(sample, int(generator.integers(4)), bool(generator.integers(2)))
        assert sample.valid is not None
        physical = sample.values.astype(np.float32) * 1e-4
        bands = len(physical)
        shared, own, shift = generator.normal(), generator.normal(size=bands), generator.normal(size=bands)
        weight = np.broadcast_to(sample.valid, physical.shape).astype(np.float32)
        mean = (physical * weight).sum((1, 2), keepdims=True) / np.maximum(weight.sum((1, 2), keepdims=True), 1)
        factor = np.exp(0.1 * (shared + own)).reshape(-1, 1, 1).astype(np.float32)
        physical = physical * factor + (0.02 * shift).reshape(-1, 1, 1).astype(np.float32) * mean
        blurs, sigma = generator.random() < 0.5, float(generator.uniform(0.3, 1.2))
        if blurs:
            spread = self.convolved(physical * weight, sigma)
            physical = spread / np.maximum(self.convolved(weight, sigma), np.float32(1e-6))
        return sample.replace(values=np.where(sample.valid, physical / np.float32(1e-4), np.float32(0)))

    @staticmethod
    def convolved(array: np.ndarray, sigma: float) -> np.ndarray:
        radius = max(1, int(np.ceil(3 * sigma)))
        kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
        kernel = (kernel / kernel.sum()).astype(np.float32)
        for axis in (-2, -1):
            margin = [(0, 0)] * array.ndim
            margin[axis] = (radius, radius)
            padded, total = np.pad(array, margin), np.zeros_like(array)
            for place, weight in enumerate(kernel):
                part = [slice(None)] * array.ndim
                part[axis] = slice(place, place + array.shape[axis])
                total += weight * padded[tuple(part)]
            array = total
        return array


class VolumesInWorker:
    """Everything by MONAI."""

    def __init__(self, spec: InputSpec) -> None:
        from monai import transforms as monai

        from fmsuite.domains.medical.augment import TURN

        both = ("values", "valid")
        self.pipeline = monai.Compose(
            [
                *(monai.RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in (0, 1)),
                monai.RandAffined(
                    both,
                    prob=0.5,
                    rotate_range=(TURN,) * 3,
                    scale_range=(0.1,) * 3,
                    mode=["bilinear"] * 2,
                    padding_mode=["border", "zeros"],
                ),
                monai.BorderPadd("values", 4, mode="edge"),
                monai.RandGaussianSmoothd("values", (0.5, 1.0), (0.5, 1.0), (0.5, 1.0), prob=0.5),
                monai.CenterSpatialCropd("values", spec.size),
                monai.RandGaussianNoised("values", prob=0.3, std=0.1),
                monai.RandScaleIntensityd("values", factors=0.2, prob=0.5),
                monai.RandShiftIntensityd("values", offsets=0.2, prob=0.5),
                monai.RandAdjustContrastd("values", prob=0.3, gamma=(0.7, 1.5)),
            ]
        )

    def after_crop(
        self, sample: ArraySample, strength: str, second: bool, generator: np.random.Generator
    ) -> ArraySample:
        self.pipeline.set_random_state(seed=int(generator.integers(2**32)))
        data = {"values": torch.from_numpy(sample.values), "valid": torch.ones(1, *sample.size)}
        done = self.pipeline(data)
        return sample.replace(values=np.asarray(done["values"]), valid=np.asarray(done["valid"]) > 0.99)


def fields(random: np.random.Generator) -> dict[str, tuple[ArraySample, Augmentation, object]]:
    """A sample, what varies it now, and what varied it before."""
    from fmsuite.domains.medical.augment import VolumeAugmentation
    from fmsuite.domains.pathology.augment import StainedTissueAugmentation
    from fmsuite.domains.remote_sensing.augment import RasterAugmentation

    tile = ArraySample(random.integers(60, 240, (3, 224, 224)).astype(np.uint8))
    bands = random.integers(1, 5000, (12, 128, 128)).astype(np.uint16)
    scene = ArraySample(bands, np.ones((12, 128, 128), bool))
    spec = InputSpec(axes=("z", "y", "x"), size=(64, 64, 64), channels=(Channel(name="mr"),), spacing=(1, 1, 1))
    volume = ArraySample(random.normal(size=(1, 64, 64, 64)).astype(np.float32))
    return {
        "pathology, 3 x 224 x 224 uint8": (tile, StainedTissueAugmentation(), TissueInWorker()),
        "remote sensing, 12 x 128 x 128 uint16": (scene, RasterAugmentation(scale=1e-4), BandsInWorker()),
        "medical, 1 x 64 x 64 x 64 float32": (volume, VolumeAugmentation(spec), VolumesInWorker(spec)),
    }


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Of this process's CPU time, which others on the machine do not change; of the clock's for a GPU."""
    if device.type == "cpu":
        begun = time.process_time()
        work()
        return 1000 * (time.process_time() - begun)
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=32, help="in a round, and in a batch")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    cpu = torch.device("cpu")
    torch.set_num_threads(1)
    print(f"| ms a sample, {device.type} | worker before | worker now | ratio | device | bytes sent, before / now |")
    print("|---|---|---|---|---|---|")
    for name, (sample, now, before) in fields(np.random.default_rng(0)).items():

        def vary(augmentation: object, sample: ArraySample = sample) -> list[ArraySample]:
            draws = (generator(0, "benchmark", number) for number in range(options.samples))
            return [augmentation.after_crop(sample, "strong", False, draw) for draw in draws]  # type: ignore[attr-defined]

        drawn, old = vary(now), vary(before)
        views = [SampleView(s.values, s.valid, adjust=s.adjust) for s in drawn]
        view = collate([Item({"a": [each]}, 0, -1) for each in views]).views["a"][0].to(device)
        works = (lambda: vary(before), lambda: vary(now), lambda: adjusted(view))  # noqa: B023 - called in this turn
        milliseconds(works[2], device)
        rounds = [
            [milliseconds(work, place) / options.samples for work, place in zip(works, (cpu, cpu, device))]
            for _ in range(options.rounds)
        ]
        first, second, third = (statistics.median(column) for column in zip(*rounds))
        ratio = statistics.median(row[0] / row[1] for row in rounds)
        sent = f"{old[0].values.nbytes:,} / {drawn[0].values.nbytes:,}"
        print(f"| {name} | {first:.2f} | {second:.3f} | {ratio:.1f} | {third:.2f} | {sent} |", flush=True)


if __name__ == "__main__":
    main()
