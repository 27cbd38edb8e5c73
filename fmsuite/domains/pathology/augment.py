"""What may vary in stained tissue: the side it is seen from, the stain, the scanner. Not its structure."""

from __future__ import annotations

import os

import numpy as np

# Albumentations asks a package index for its newest version when it is imported, unless told not to.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations

from fmsuite.core.data.sample import ArraySample, Sample
from fmsuite.tiling.symmetry import turned

STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Absorbance of haematoxylin, eosin and DAB in red, green and blue (Ruifrok and Johnston 2001, table 1)."""
_RGB_FROM_HED = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
_HED_FROM_RGB = np.linalg.inv(_RGB_FROM_HED)


def rgb_to_hed(rgb: np.ndarray) -> np.ndarray:
    """Amounts of haematoxylin, eosin and DAB (colour deconvolution, Ruifrok and Johnston 2001, eq. 5).

    Absorbance is ``-ln((v + 1) / 256)``: finite at 0, and inverted exactly.

    Args:
        rgb: (..., 3), 0 to 255.

    Returns:
        (..., 3) float64.
    """
    return -np.log((np.asarray(rgb, np.float64) + 1.0) / 256.0) @ _HED_FROM_RGB


def hed_to_rgb(hed: np.ndarray) -> np.ndarray:
    """The inverse of ``rgb_to_hed``: (..., 3) float64, neither rounded nor clipped."""
    return 256.0 * np.exp(-(np.asarray(hed, np.float64) @ _RGB_FROM_HED)) - 1.0


def stain_jitter(rgb: np.ndarray, gain: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Each stain's amount ``s`` becomes ``gain * s + shift`` (Tellez et al. 2018, "Whole-slide mitosis detection",
    sec. III-C), within what 8 bits can show.

    Args:
        rgb: (H, W, 3) uint8.
        gain, shift: (3,).

    Returns:
        (H, W, 3) uint8. Gain 1 and shift 0 return the input exactly.
    """
    # The change is linear in absorbance, so the two 3 x 3 products fold into one.
    absorbance = _ABSORBANCE[rgb]
    mixing = (_HED_FROM_RGB * gain) @ _RGB_FROM_HED
    changed = absorbance @ mixing.astype(np.float32) + (shift @ _RGB_FROM_HED).astype(np.float32)
    return np.clip(np.rint(256.0 * np.exp(-changed) - 1.0), 0, 255).astype(np.uint8)


_ABSORBANCE = (-np.log((np.arange(256) + 1.0) / 256.0)).astype(np.float32)


class StainedTissueAugmentation:
    """Valid variations of bright-field tissue.

    weak: right-angle turns and flips; tissue has no upright side. A view that is not square only turns by 180 degrees.
    strong: these, then the stain, then brightness, contrast and saturation, then blur; hue stays the stain's. No
    solarisation: an inverted stain is no stain. Scale comes from the objective's crops.

    Args:
        stain_gain, stain_shift: half-widths of the uniform draws for each stain.
        colour: half-width of brightness, contrast and saturation factors around 1.
        blur: probability of a Gaussian blur, in the first and second view of a pair.
        blur_sigma: its range in pixels.
        greyscale: probability of dropping colour altogether.
    """

    def __init__(
        self,
        stain_gain: float = 0.15,
        stain_shift: float = 0.02,
        colour: float = 0.1,
        blur: tuple[float, float] = (0.5, 0.1),
        blur_sigma: tuple[float, float] = (0.1, 1.0),
        greyscale: float = 0.0,
    ) -> None:
        self.stain_gain = stain_gain
        self.stain_shift = stain_shift
        factors = (1 - colour, 1 + colour)
        self._appearance = tuple(
            albumentations.Compose(
                [
                    albumentations.ColorJitter(
                        brightness=factors, contrast=factors, saturation=factors, hue=(0.0, 0.0), p=0.8
                    ),
                    albumentations.GaussianBlur(blur_limit=0, sigma_limit=blur_sigma, p=probability),
                    albumentations.ToGray(p=greyscale),
                ]
            )
            for probability in blur
        )

    @classmethod
    def jittered(cls, factor: float, greyscale: float = 0.0) -> StainedTissueAugmentation:
        """The default ranges of stain, brightness, contrast and saturation, times a factor; factors of brightness
        and the like stay above 0.1."""
        return cls(0.15 * factor, 0.02 * factor, min(0.1 * factor, 0.9), greyscale=greyscale)

    def before_crop(self, sample: Sample, strength: str, generator: np.random.Generator) -> Sample:
        return sample

    def after_crop(
        self, sample: ArraySample, strength: str, second: bool, generator: np.random.Generator
    ) -> ArraySample:
        if strength == "none":
            return sample
        symmetry = int(generator.integers(8))
        sample = turned(sample, symmetry % 4, symmetry >= 4)
        if strength == "weak":
            return sample
        gain = 1 + generator.uniform(-self.stain_gain, self.stain_gain, 3)
        shift = generator.uniform(-self.stain_shift, self.stain_shift, 3)
        picture = stain_jitter(np.moveaxis(sample.values, 0, -1), gain, shift)
        appearance = self._appearance[int(second)]
        appearance.set_random_seed(int(generator.integers(2**31)))
        picture = appearance(image=np.ascontiguousarray(picture))["image"]
        return sample.replace(values=np.ascontiguousarray(np.moveaxis(picture, -1, 0)))
