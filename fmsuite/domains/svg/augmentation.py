"""What may vary in a drawing: its pose, strokes and colours before it is rendered, noise and blur after."""

from __future__ import annotations

import math
import os

import numpy as np

# Albumentations asks a server for its newest version when it is imported, unless this is set.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations

from fmsuite.core.data.sample import ArraySample, Sample
from fmsuite.domains.svg.render import Matrix, Rgba
from fmsuite.domains.svg.sample import ColourMap, VectorSample

MAX_ROTATION = 15.0
"""Degrees either way: a 6 must not become a 9."""

SCALE = (0.8, 1.1)
MAX_SHEAR = 8.0
STROKE = (0.7, 1.5)
SATURATION = (0.5, 1.3)
BRIGHTNESS = (0.8, 1.15)
BACKGROUND_SHIFT = 0.12
COLOUR_SHARE = 0.8
"""Share of strong views whose colours change."""

BLUR = (0.5, 0.1)
"""Share of first and second views that are blurred."""

_GREY = (0.299, 0.587, 0.114)


class SvgAugmentation:
    """Variations that keep what a drawing shows.

    ``weak`` mirrors, and only if that is allowed: letters and arrows do not survive it. ``strong`` also turns, scales
    and shears a little, changes stroke widths, colours and background, and adds slight noise and blur.

    Args:
        mirror: left and right may be exchanged.
    """

    def __init__(self, mirror: bool = False) -> None:
        self.mirror = mirror
        self._photometric = tuple(
            albumentations.Compose(
                [
                    albumentations.GaussianBlur(sigma_limit=(0.1, 1.0), p=share),
                    albumentations.GaussNoise(std_range=(0.01, 0.04), p=0.5),
                ]
            )
            for share in BLUR
        )

    def before_crop(self, sample: Sample, strength: str, generator: np.random.Generator) -> Sample:
        """A drawing in another pose, with other strokes and colours (``strong`` only)."""
        if strength != "strong" or not isinstance(sample, VectorSample):
            return sample
        transform = _affine(sample, generator)
        stroke = math.exp(generator.uniform(math.log(STROKE[0]), math.log(STROKE[1])))
        colours, background = None, sample.background
        if generator.random() < COLOUR_SHARE:
            colours = _colours(generator)
            background = _near(colours(background), generator)
        return sample.vary(transform=transform, stroke_factor=stroke, colours=colours, background=background)

    def after_crop(
        self, sample: ArraySample, strength: str, second: bool, generator: np.random.Generator
    ) -> ArraySample:
        """Mirror, if allowed, with probability one half; slight noise and blur (``strong``)."""
        if strength == "none":
            return sample
        if self.mirror and generator.random() < 0.5:
            sample = sample.replace(
                values=sample.values[..., ::-1].copy(),
                valid=None if sample.valid is None else sample.valid[..., ::-1].copy(),
                maps={name: labels[..., ::-1].copy() for name, labels in sample.maps.items()},
            )
        if strength == "strong":
            compose = self._photometric[int(second)]
            compose.set_random_seed(int(generator.integers(1 << 31)))
            image = np.ascontiguousarray(sample.values.transpose(1, 2, 0))
            varied = compose(image=image)["image"]
            sample = sample.replace(values=np.ascontiguousarray(varied.transpose(2, 0, 1)))
        return sample


def _affine(sample: VectorSample, generator: np.random.Generator) -> Matrix:
    """A small rotation, scale and shear about the canvas's centre."""
    canvas = sample.canvas
    centre_x, centre_y = canvas.x + canvas.width / 2, canvas.y + canvas.height / 2
    angle = math.radians(generator.uniform(-MAX_ROTATION, MAX_ROTATION))
    shear = math.tan(math.radians(generator.uniform(-MAX_SHEAR, MAX_SHEAR)))
    scale = generator.uniform(*SCALE)
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    # Shear first, then turn and scale.
    a, b = cosine, sine
    c, d = cosine * shear - sine, sine * shear + cosine
    return a, b, c, d, centre_x - a * centre_x - c * centre_y, centre_y - b * centre_x - d * centre_y


def _colours(generator: np.random.Generator) -> ColourMap:
    """A turn of the hue circle about the grey axis, a change of saturation and of brightness.

    White and grey keep their hue; colours that differ still differ, up to clipping.
    """
    angle = generator.uniform(0, 2 * math.pi)
    # Rodrigues' rotation about (1, 1, 1) / sqrt(3).
    cosine, sine = math.cos(angle), math.sin(angle) / math.sqrt(3)
    third = (1 - cosine) / 3
    turn = np.full((3, 3), third) + np.eye(3) * cosine + sine * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    saturation = generator.uniform(*SATURATION)
    mix = saturation * np.eye(3) + (1 - saturation) * np.tile(_GREY, (3, 1))
    matrix = generator.uniform(*BRIGHTNESS) * mix @ turn
    # Black drawings would stay black: lift them a little.
    lift = generator.uniform(0, 0.15)
    return ColourMap(tuple(float(v) for v in ((1 - lift) * matrix).ravel()), (float(lift),) * 3)


def _near(colour: Rgba, generator: np.random.Generator) -> Rgba:
    red, green, blue = (
        float(np.clip(value + shift, 0, 1))
        for value, shift in zip(colour[:3], generator.uniform(-BACKGROUND_SHIFT, BACKGROUND_SHIFT, 3), strict=True)
    )
    return red, green, blue, colour[3]
