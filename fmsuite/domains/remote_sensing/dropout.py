"""Bands and sensors that are hidden in training, so that an encoder gets used to scenes that lack some."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, Field

from fmsuite.core.data.sample import Array, ArraySample
from fmsuite.core.inputs import InputSpec
from fmsuite.errors import UsageError


class DropoutOptions(BaseModel):
    """
    Attributes:
        band_dropout: probability that a band is marked missing in a view, at most half of a group's bands at a time.
        sensor_dropout: probability that a whole channel group is (a sensor, with ``groups: sensors``); one stays.
            Both act on views of the strengths ``weak`` and ``strong``.
    """

    band_dropout: float = Field(default=0.0, ge=0, lt=1)
    sensor_dropout: float = Field(default=0.0, ge=0, lt=1)

    def dropout(self, spec: InputSpec) -> Dropout:
        """
        Raises:
            UsageError: for ``sensor_dropout`` where there is a single group.
        """
        groups = tuple(members for _, members in spec.groups)
        if self.sensor_dropout and len(groups) == 1:
            raise UsageError(
                "data.sensor_dropout hides whole channel groups, and all bands are in one.",
                "Set data.groups, or use data.band_dropout.",
            )
        return Dropout(self.band_dropout, self.sensor_dropout, groups)


@dataclass(frozen=True)
class Dropout:
    """Marks bands as missing: invalid, and thus neither seen nor asked for. A band is gone on all dates of a series.

    A group keeps at least half of its bands, since a token with few valid values is none (``model.min_valid``), unless
    it goes as a whole: its tokens are invalid then. What a sample does not have anyway counts as gone: the group that
    stays is one with data.

    Attributes:
        bands, groups: probabilities of a band and of a whole group.
        members: bands of each group; all in one where there are none.
    """

    bands: float = 0.0
    groups: float = 0.0
    members: tuple[tuple[int, ...], ...] = ()

    def __call__(self, sample: ArraySample, generator: np.random.Generator) -> ArraySample:
        """A sample with some bands marked invalid, their values 0; the same one where nothing can be dropped."""
        if not self.bands and not self.groups:
            return sample
        count = len(sample.values)
        valid = np.ones(sample.values.shape, dtype=bool) if sample.valid is None else sample.valid
        valid = np.broadcast_to(valid, sample.values.shape)
        there: Array = np.array([band.any() for band in valid])
        members = [list(group) for group in self.members] or [list(range(count))]
        dropped = np.zeros(count, dtype=bool)
        if self.groups:
            present = np.array([bool(there[group].any()) for group in members])
            for number in np.flatnonzero(_chosen(generator, self.groups, present, keep=1)):
                dropped[members[number]] = True
        if self.bands:
            for group in members:
                chosen = _chosen(generator, self.bands, there[group], keep=(len(group) + 1) // 2)
                dropped[np.array(group)[chosen]] = True
        if not dropped.any():
            return sample
        valid = valid.copy()
        valid[dropped] = False
        values = sample.values.copy()
        values[dropped] = 0
        return sample.replace(values=values, valid=valid)


def _chosen(generator: np.random.Generator, probability: float, present: Array, keep: int) -> Array:
    """(n,) bool: each of what is present with that probability, but so many stay, those with the largest draws."""
    draws = np.where(present, generator.random(len(present)), -1.0)
    chosen = present & (draws < probability)
    chosen[np.argsort(-draws)[:keep]] = False
    return chosen
