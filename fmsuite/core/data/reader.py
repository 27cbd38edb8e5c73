"""The two things that the data pipeline asks of a domain: to read a window, and to vary it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from fmsuite.core.data.index import Window
from fmsuite.core.data.sample import ArraySample, Sample


@runtime_checkable
class Reader(Protocol):
    """Reads windows. Picklable; keeps its files open in a ``HandleCache``.

    A class that says ``anywhere = True`` reads a window of the index's extent at any place of its grid within the
    source, and not only the index's own windows (``core.data.sampling``). Without it, windows stay where they are.
    One that also says ``piecewise = True`` reads windows of any extent, at the cost of that window alone, and gives
    those without a valid sample as they are; sources of any size can then be packed whole (``scene_packing``).
    """

    def read(self, window: Window) -> Sample:
        """
        Raises:
            ReadFailure: for whatever is wrong with the file or this part of it. Anything else is a bug.
        """
        ...


def is_piecewise(reader: Reader) -> bool:
    """See ``Reader``."""
    return bool(getattr(reader, "piecewise", False))


@runtime_checkable
class Augmentation(Protocol):
    """What may vary in a domain's images without changing what they show. Picklable."""

    def before_crop(self, sample: Sample, strength: str, generator: np.random.Generator) -> Sample:
        """Vary the source itself (a drawing's strokes, before it is rendered). Most domains return it unchanged."""
        ...

    def after_crop(
        self, sample: ArraySample, strength: str, second: bool, generator: np.random.Generator
    ) -> ArraySample:
        """Vary the cropped array. Keeps its size; moves ``valid`` and ``maps`` along with the values.

        Args:
            strength: one of ``sample.AUGMENT``; ``"none"`` returns the sample unchanged.
            second: the second view of an asymmetric pair.
            generator: the only source of randomness allowed.
        """
        ...
