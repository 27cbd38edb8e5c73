"""What may vary in stained tissue: the side it is seen from, the stain, the scanner. Not its structure."""

from __future__ import annotations

import numpy as np

from fmsuite.core.data.adjust import Adjustment, affine
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


def stain_map(gain: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The change of absorbance that makes each stain's amount ``s`` into ``gain * s + shift`` (Tellez et al. 2018,
    "Whole-slide mitosis detection", sec. III-C).

    Args:
        gain, shift: (3,).

    Returns:
        (3, 4) float32, ``Adjustment.absorbance``.
    """
    mixing = (_HED_FROM_RGB * gain) @ _RGB_FROM_HED
    return np.column_stack([mixing.T, shift @ _RGB_FROM_HED]).astype(np.float32)


def brightness(factor: float) -> np.ndarray:
    """(3, 7), the map ``factor * v``."""
    return affine(factor * np.eye(3))


def contrast(factor: float) -> np.ndarray:
    """(3, 7), away from the crop's mean grey, or towards it."""
    return affine(factor * np.eye(3), (1 - factor) * _TO_GREY)


def saturation(factor: float) -> np.ndarray:
    """(3, 7), away from each pixel's own grey, or towards it; 0 drops colour."""
    return affine(factor * np.eye(3) + (1 - factor) * _TO_GREY)


_TO_GREY = np.tile([0.299, 0.587, 0.114], (3, 1))
"""Luma of ITU-R BT.601."""
_NOTHING = affine(np.eye(3))
_COLOUR_SHARE = 0.8
"""Share of strong views whose brightness, contrast and saturation change."""


class StainedTissueAugmentation:
    """Valid variations of bright-field tissue.

    weak: right-angle turns and flips; tissue has no upright side. A view that is not square only turns by 180 degrees.
    strong: these, then the stain, then brightness, contrast and saturation in any order, then blur; hue stays the
    stain's. No solarisation: an inverted stain is no stain. Scale comes from the objective's crops. All but the turns
    is done on the device, within what 8 bits can show.

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
        self.colour = colour
        self.blur = blur
        self.blur_sigma = blur_sigma
        self.greyscale = greyscale

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
        maps = self._colours(generator)
        blurs = generator.random() < self.blur[second]
        sigma = generator.uniform(*self.blur_sigma)
        return sample.replace(
            adjust=Adjustment(
                absorbance=stain_map(gain, shift),
                maps=maps,
                limits=np.tile(np.array([0, 255], dtype=np.float32), (len(maps) + 1, 1)),
                blur=np.full(2, sigma if blurs else 0.0, dtype=np.float32),
            )
        )

    def _colours(self, generator: np.random.Generator) -> np.ndarray:
        """(4, 3, 7): brightness, contrast and saturation in the order drawn, and the change to grey."""
        factors = generator.uniform(1 - self.colour, 1 + self.colour, 3)
        made = [make(float(factor)) for make, factor in zip((brightness, contrast, saturation), factors)]
        order = generator.permutation(3)
        changes = generator.random() < _COLOUR_SHARE
        grey = generator.random() < self.greyscale
        maps = [made[number] if changes else _NOTHING for number in order]
        return np.stack([*maps, saturation(0.0) if grey else _NOTHING])
