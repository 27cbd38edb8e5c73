"""The ``data:`` section of a remote sensing run."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from fmsuite.domains.base import DomainOptions
from fmsuite.domains.remote_sensing.dropout import DropoutOptions
from fmsuite.domains.remote_sensing.sensors import BAND_GROUPS, SENSORS, Sensor, find_sensor
from fmsuite.errors import nearest
from fmsuite.tiling.labels import LabelOptions

DATE = r"(?<!\d)(?P<year>(?:19|20)\d\d)[-_]?(?P<month>0[1-9]|1[0-2])[-_]?(?P<day>0[1-9]|[12]\d|3[01])(?!\d)"
"""Finds 20240131, 2024-01-31 and 2024_01_31 in a file name."""


class RemoteSensingOptions(DomainOptions, DropoutOptions, LabelOptions):
    """How rasters become windows, and what is known about the rasters.

    The latter is in the options of ``LabelOptions``: a group is a scene, and a line of a labels file may also name a
    place (see ``place_pattern`` and ``series``). What is hidden in training is in those of ``DropoutOptions``.

    Attributes:
        sensor: one of ``SENSORS``; it names the bands and knows how stored values become physical ones.
        bands: which bands, in the wanted order; by default all that most of the files have. A file that lacks one of
            them is skipped.
        file_bands: the bands of a file in the order in which it stores them, for files that do not describe them.
        groups: how bands share tokens: ``none`` puts all of them into each token, ``satmae`` makes three tokens a
            place, a mapping of group names to band names makes its own.
        size: side of a window in pixels, after resampling.
        stride: distance between windows in the same pixels; the size if not given (no overlap).
        gsd: metres a pixel; ``None`` reads the pixels as they are stored.
        min_valid: share of valid values that a window needs. Rasters smaller than a window are padded with invalid
            pixels and are subject to it too.
        nodata: a value that means "no data" even where the file does not declare it (a declared one always counts).
        scale, offset, clip: how stored values become physical ones, where the sensor's own are wrong.
        percentiles: each band is clipped to these percentiles before its mean and standard deviation are taken, so
            that clouds, glint and dead pixels do not decide the normalisation.
        statistics_windows: how many windows, evenly spread over the index, the statistics are taken from.
        place_pattern: regular expression, searched for in the file name; what it matches (its first group, if it has
            one) names the place. Windows of one place belong to one group, and with ``series`` to one time series.
        series: files of one place become one time series, axes (time, y, x). Without a ``place_pattern`` the place
            is the file's path below the given folder, without the date, suffix and separators at its ends.
        date_pattern: regular expression with the groups ``year``, ``month`` and ``day``, for ``series``.
    """

    sensor: str = "generic"
    bands: tuple[str, ...] | None = None
    file_bands: tuple[str, ...] | None = None
    groups: Literal["none", "satmae"] | dict[str, tuple[str, ...]] = "none"
    size: int = Field(default=64, ge=8)
    stride: int | None = Field(default=None, ge=1)
    gsd: float | None = Field(default=None, gt=0)
    min_valid: float = Field(default=0.5, ge=0, le=1)
    nodata: float | None = None
    scale: float | None = None
    offset: float | None = None
    clip: tuple[float, float] | None = None
    percentiles: tuple[float, float] = (0.5, 99.5)
    statistics_windows: int = Field(default=256, ge=1)
    place_pattern: str | None = None
    series: bool = False
    date_pattern: str = DATE

    @field_validator("sensor")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in SENSORS:
            raise ValueError(f"there is no sensor '{name}'. {nearest(name, SENSORS)}")
        return name

    @field_validator("place_pattern", "date_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _consistent(self) -> RemoteSensingOptions:
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles {self.percentiles} are not an increasing pair within 0 to 100")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip {self.clip} is empty")
        if self.scale == 0:
            raise ValueError("a scale of 0 makes every value equal")
        if not {"year", "month", "day"} <= set(re.compile(self.date_pattern).groupindex):
            raise ValueError("date_pattern needs the named groups year, month and day: (?P<year>...)")
        if self.date_pattern != DATE and not self.series:
            raise ValueError("date_pattern has a meaning only with series: true")
        for option in ("bands", "file_bands"):
            names = getattr(self, option)
            if names is not None and (not names or len(set(names)) != len(names)):
                raise ValueError(f"{option} must name at least one band, and none twice")
            for name in names or ():
                if self.spectral.bands and name not in self.spectral.band_names:
                    raise ValueError(
                        f"{self.sensor} has no band '{name}' in {option}. {nearest(name, self.spectral.band_names)}"
                    )
        members = [band for group in self.band_groups.values() for band in group]
        if len(set(members)) != len(members):
            raise ValueError("groups put one band into two groups")
        if self.band_groups and self.bands is not None and set(members) != set(self.bands):
            raise ValueError(f"groups hold {', '.join(members)} but bands are {', '.join(self.bands)}")
        if self.groups == "satmae" and not {*members} <= {*self.spectral.band_names}:
            raise ValueError("groups: satmae needs a Sentinel-2 sensor")
        return self

    @property
    def spectral(self) -> Sensor:
        """The sensor's facts."""
        return find_sensor(self.sensor)

    @property
    def band_groups(self) -> dict[str, tuple[str, ...]]:
        """Group name to band names; empty for one group."""
        if isinstance(self.groups, dict):
            return self.groups
        return BAND_GROUPS.get(self.groups, {})

    @property
    def wanted_bands(self) -> tuple[str, ...] | None:
        """The bands asked for, by name or through the groups; ``None`` for whatever the files have."""
        if self.bands is not None:
            return self.bands
        members = {band for group in self.band_groups.values() for band in group}
        if not members:
            return None
        if self.spectral.bands:
            return tuple(name for name in self.spectral.band_names if name in members)
        return tuple(band for group in self.band_groups.values() for band in group)

    @property
    def quantification(self) -> tuple[float, float, tuple[float, float] | None]:
        """Scale, offset and clip; the sensor's own clip only with its own scale and offset."""
        sensor = self.spectral
        own = self.scale is None and self.offset is None
        scale = sensor.scale if self.scale is None else self.scale
        offset = sensor.offset if self.offset is None else self.offset
        return scale, offset, self.clip or (sensor.clip if own else None)
