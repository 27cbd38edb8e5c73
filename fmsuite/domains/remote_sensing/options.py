"""The ``data:`` section of a remote sensing run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from fmsuite.domains.base import DomainOptions
from fmsuite.domains.remote_sensing.blocks import BlockOptions
from fmsuite.domains.remote_sensing.clouds import CloudOptions
from fmsuite.domains.remote_sensing.dates import DateOptions
from fmsuite.domains.remote_sensing.dropout import DropoutOptions
from fmsuite.domains.remote_sensing.layers import LayerOptions, compiles, refuse_names
from fmsuite.domains.remote_sensing.maps import MapOptions
from fmsuite.domains.remote_sensing.places import PlaceOptions
from fmsuite.domains.remote_sensing.region import RegionOptions
from fmsuite.domains.remote_sensing.sensors import BAND_GROUPS
from fmsuite.errors import nearest
from fmsuite.tiling.labels import LabelOptions


class RemoteSensingOptions(
    DomainOptions,
    LayerOptions,
    RegionOptions,
    DateOptions,
    CloudOptions,
    MapOptions,
    LabelOptions,
    PlaceOptions,
    BlockOptions,
    DropoutOptions,
):
    """How rasters become windows, and what is known about the rasters.

    The latter is in the options of ``LayerOptions`` (sensors), ``RegionOptions`` (which part of them), ``DateOptions``,
    ``CloudOptions``, ``MapOptions`` and ``LabelOptions``: a group is a scene, and a line of a labels file may also name
    a place (see ``place_pattern`` and ``series``). ``PlaceOptions`` have windows around labelled places instead of a
    grid, ``BlockOptions`` make groups of the ground, ``DropoutOptions`` say what is hidden in training.

    Attributes:
        bands: which bands, in the wanted order; by default all that most of the files have. A file that lacks one of
            them is skipped.
        groups: how bands share tokens: ``none`` puts all of them into each token, ``satmae`` makes three tokens a
            place, ``sensors`` one for each layer, a mapping of group names to band names makes its own.
        palette: of files whose values are entries of a colour table: ``rgb`` reads three bands, red, green and blue,
            through the table; ``index`` reads the entries. Without it they are refused, as entries are no measurements.
        statistics: mean and standard deviation of each band: ``data`` computes them from these windows, ``sensor``
            takes the published ones of the sensor.
        size: side of a window in pixels, after resampling.
        stride: distance between windows in the same pixels; the size if not given (no overlap).
        gsd: metres a pixel; ``None`` reads the pixels as they are stored.
        min_valid: share of valid values that a window needs. Rasters smaller than a window are padded with invalid
            pixels and are subject to it too.
        percentiles: each band is clipped to these percentiles before its mean and standard deviation are taken, so
            that clouds, glint and dead pixels do not decide the normalisation.
        statistics_windows: how many windows, evenly spread over the index, the statistics are taken from.
        place_pattern: regular expression, searched for in the file name; what it matches (its first group, if it has
            one) names the place. Windows of one place belong to one group, and with ``series`` to one time series.
    """

    bands: tuple[str, ...] | None = None
    groups: Literal["none", "satmae", "sensors"] | dict[str, tuple[str, ...]] = "none"
    palette: Literal["rgb", "index"] | None = None
    statistics: Literal["data", "sensor"] = "data"
    size: int = Field(default=64, ge=8)
    stride: int | None = Field(default=None, ge=1)
    gsd: float | None = Field(default=None, gt=0)
    min_valid: float = Field(default=0.5, ge=0, le=1)
    percentiles: tuple[float, float] = (0.5, 99.5)
    statistics_windows: int = Field(default=256, ge=1)
    place_pattern: str | None = None

    @field_validator("place_pattern")
    @classmethod
    def _is_an_expression(cls, pattern: str | None) -> str | None:
        return compiles(pattern)

    @model_validator(mode="after")
    def _consistent(self) -> RemoteSensingOptions:
        if self.places is not None and self.labels not in (None, "none"):
            raise ValueError("labels and places both say what windows show; leave one of them out")
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles {self.percentiles} are not an increasing pair within 0 to 100")
        refuse_names("bands", self.bands)
        for name in self.bands or ():
            self._need_channel(name)
        members = [band for group in self.band_groups.values() for band in group]
        if len(set(members)) != len(members):
            raise ValueError("groups put one band into two groups")
        if self.band_groups and self.bands is not None and set(members) != set(self.bands):
            raise ValueError(f"groups hold {', '.join(members)} but bands are {', '.join(self.bands)}")
        if self.groups == "satmae" and not {*members} <= {*self.known_channels}:
            raise ValueError("groups: satmae needs a Sentinel-2 sensor")
        if self.statistics == "sensor":
            for name in self.bands or self.known_channels or ("",):
                self.published(name)
        if self.groups == "sensors" and self.layers is None:
            raise ValueError("groups: sensors needs several layers")
        return self

    def _need_channel(self, name: str) -> None:
        try:
            layer, band = self.layer_of(name)
        except KeyError:
            titles = ", ".join(layer.title for layer in self.layout)
            raise ValueError(f"none of {titles} has '{name}' in bands. {nearest(name, self.known_channels)}") from None
        sensor = self.layout[layer].spectral
        if sensor.bands and band not in sensor.band_names:
            raise ValueError(f"{sensor.name} has no band '{name}' in bands. {nearest(name, sensor.band_names)}")

    @property
    def band_groups(self) -> dict[str, tuple[str, ...]]:
        """Group name to band names, as asked for; empty for one group, and where each sensor is one."""
        if isinstance(self.groups, dict):
            return self.groups
        return BAND_GROUPS.get(self.groups, {})

    def group_of(self, channel: str) -> str | None:
        """The group whose tokens hold a channel."""
        if self.groups == "sensors":
            return self.layout[self.layer_of(channel)[0]].title
        return next((group for group, members in self.band_groups.items() if channel in members), None)

    @property
    def wanted_bands(self) -> tuple[str, ...] | None:
        """The bands asked for, by name or through the groups; ``None`` for whatever the files have."""
        if self.bands is not None:
            return self.bands
        members = [band for group in self.band_groups.values() for band in group]
        if not members:
            return None
        known = self.known_channels
        return tuple(name for name in known if name in members) if {*members} <= {*known} else tuple(members)
