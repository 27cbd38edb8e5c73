"""Small pictures of windows, read again where they lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.pipeline import IMAGE, NoAugmentation, ViewPipeline
from fmsuite.core.data.reader import Reader
from fmsuite.core.data.sample import SampleKey, ViewRequest
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.inputs import InputSpec
from fmsuite.errors import ReadFailure

ToRgb = Callable[[np.ndarray, InputSpec], np.ndarray]
"""``Domain.to_rgb``: (C, *size) raw values to (H, W, 3) uint8."""

Pictures = Callable[[Sequence[int]], dict[int, Image.Image]]
"""Pictures of index rows by row, without those that cannot be read: ``window_pictures`` with all but ``rows`` bound."""

WIDEST = 3


def window_pictures(
    index: SampleIndex,
    reader: Reader,
    to_rgb: ToRgb,
    spec: InputSpec,
    rows: Sequence[int],
    size: int = 128,
    *,
    skipped: SkippedLog,
) -> dict[int, Image.Image]:
    """Whole windows as people see them.

    Windows are read at their own size, as an encoder is given them, and only the pictures are reduced: where a picture
    shows several planes or dates side by side, each stays legible.

    Args:
        index, reader, spec: the windows, their reader and the input that it yields.
        to_rgb: the domain's.
        rows: which windows; one that is named twice is read once.
        size: largest height of a picture in pixels; its width may be ``WIDEST`` times as much. Pixels of a small window
            are drawn as squares of as many pixels as fit.
        skipped: a window that cannot be read is recorded here and left out.

    Returns:
        Row to picture, in the order of ``rows``.

    Raises:
        FmsuiteError: if ``skipped`` is strict and a window cannot be read.
    """
    request = ViewRequest(IMAGE, spec.size, augment="none")
    pipeline = ViewPipeline([request], NoAugmentation(), None, spec.axes, seed=0)
    pictures: dict[int, Image.Image] = {}
    for row in dict.fromkeys(map(int, rows)):
        try:
            [view] = pipeline(reader.read(index[row]), SampleKey(0, row))[IMAGE]
        except ReadFailure as failure:
            skipped.add_failure(failure)
            continue
        picture = Image.fromarray(to_rgb(view.values, spec))
        picture.thumbnail((WIDEST * size, size), Image.Resampling.LANCZOS)
        factor = max(1, min(size // picture.height, WIDEST * size // picture.width))
        pictures[row] = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return pictures
