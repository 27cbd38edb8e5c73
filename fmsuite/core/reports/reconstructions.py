"""Pictures of what a masked objective fills in, beside a run's checkpoints."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from fmsuite.core.data.sample import Array
from fmsuite.core.inputs import Normalize
from fmsuite.core.objectives.reconstruction import Reconstruction
from fmsuite.core.reports.files import json_object
from fmsuite.errors import UsageError

FOLDER = "reconstructions"
FACTS = "reconstructions.json"
STAGES = ("input", "what the encoder sees", "filled in")
GAP, SMALLEST, LARGEST = 4, 160, 320
"""Pixels between pictures, and of the shorter side that a small and a large picture are drawn with."""
WIDE = 1.8
"""Width to height from which on pictures stand below each other."""


class Sample(BaseModel):
    """
    Attributes:
        file: a PNG, relative to the run folder: the stages from left to right, or from top to bottom.
        source: the window's file.
        error: root mean squared error of the hidden values, in standard deviations of the input; ``None`` without any.
    """

    model_config = ConfigDict(extra="forbid")

    file: str
    source: str
    error: float | None


class Reconstructions(BaseModel):
    """
    Attributes:
        step: after which step.
        held_out: the windows were not trained on.
        given_statistics: see ``Reconstruction``.
        upright: the stages stand below each other.
    """

    model_config = ConfigDict(extra="forbid")

    step: int
    held_out: bool
    given_statistics: bool
    upright: bool
    samples: list[Sample]

    @classmethod
    def read(cls, folder: Path) -> Reconstructions | None:
        """``None`` where there are none.

        Raises:
            UsageError: if they are damaged.
        """
        path = folder / FOLDER / FACTS
        if not path.exists():
            return None
        try:
            found = cls.model_validate(json_object(path))
        except ValidationError as error:
            raise UsageError(f"{path}: damaged ({error}).", "Remove it to go on without it.") from error
        if any(Path(sample.file).parent != Path(FOLDER) for sample in found.samples):
            raise UsageError(f"{path}: names a picture that lies elsewhere.", "Remove it to go on without it.")
        return found


def write_reconstructions(
    found: Reconstruction,
    normalize: Normalize,
    to_rgb: Callable[[Array], Array],
    sources: Sequence[str],
    folder: Path,
    *,
    step: int,
    held_out: bool,
) -> Reconstructions:
    """A PNG for each sample, and what they are.

    Hidden values are drawn as the channel's mean in what the encoder sees. Pictures of one (y, x) plane are drawn in
    one, so that a domain that stretches the contrast of each picture does so alike.

    Args:
        normalize: what made the views' values.
        to_rgb: a picture of one view, (C, *size) raw values to (H, W, 3) uint8.
        sources: file of each sample's window.
        folder: the run folder.
    """
    seen = found.pixels.masked_fill(found.hidden, 0.0)
    stages = [normalize.invert(values).cpu().numpy() for values in (found.pixels, seen, found.filled)]
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    samples, upright = [], False
    for number, (source, error) in enumerate(zip(sources, found.error.tolist(), strict=True)):
        pictures = _pictures([values[number] for values in stages], to_rgb)
        height, width = pictures[0].shape[:2]
        upright = width > WIDE * height
        file = f"{FOLDER}/{number}.png"
        _composed([_enlarged(picture) for picture in pictures], upright).save(folder / file, compress_level=3)
        samples.append(Sample(file=file, source=source, error=error if math.isfinite(error) else None))
    facts = Reconstructions(
        step=step, held_out=held_out, given_statistics=found.given_statistics, upright=upright, samples=samples
    )
    path = folder / FOLDER / FACTS
    partial = path.with_name(f".{FACTS}.partial")
    partial.write_text(facts.model_dump_json(indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return facts


def _pictures(stages: Sequence[Array], to_rgb: Callable[[Array], Array]) -> list[Array]:
    if stages[0].ndim == 3:
        return np.array_split(to_rgb(np.concatenate(stages, axis=-1)), len(stages), axis=1)
    return [to_rgb(values) for values in stages]


def _enlarged(rgb: Array) -> Image.Image:
    picture = Image.fromarray(rgb)
    shorter = min(picture.size)
    factor = max(1.0, float(SMALLEST // shorter)) if shorter < LARGEST else LARGEST / shorter
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BICUBIC)


def _composed(pictures: Sequence[Image.Image], upright: bool) -> Image.Image:
    """Side by side, or one below the other, with gaps that are transparent."""
    count = len(pictures) - 1
    if upright:
        size = (max(p.width for p in pictures), sum(p.height for p in pictures) + GAP * count)
    else:
        size = (sum(p.width for p in pictures) + GAP * count, max(p.height for p in pictures))
    whole, place = Image.new("RGBA", size, (0, 0, 0, 0)), 0
    for picture in pictures:
        whole.paste(picture, (0, place) if upright else (place, 0))
        place += (picture.height if upright else picture.width) + GAP
    return whole
