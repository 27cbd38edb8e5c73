"""Sensors of a run: one, or several whose files lie over each other."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from fmsuite.core.inputs import Quantification
from fmsuite.domains.remote_sensing.sensors import SENSORS, Sensor, find_sensor
from fmsuite.errors import nearest


def compiles(pattern: str | None) -> str | None:
    """
    Raises:
        ValueError: for what is no regular expression.
    """
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


class FilesOptions(BaseModel):
    """What is known about files of one sensor.

    Attributes:
        sensor: one of ``SENSORS``; it names the bands and knows how stored values become physical ones.
        file_bands: the bands of a file in the order in which it stores them, for files that do not describe them.
        band_pattern: regular expression with the group ``band``, searched for in the names of files of one band each;
            what it matches is no part of the scene's name. Without it, a band of the sensor that stands between
            separators in a name is understood where several files differ in nothing else.
        nodata: a value that means "no data" even where the file does not declare it (a declared one always counts).
        scale, offset, clip: how stored values become physical ones, where the sensor's own are wrong.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sensor: str = "generic"
    file_bands: tuple[str, ...] | None = None
    band_pattern: str | None = None
    nodata: float | None = None
    scale: float | None = None
    offset: float | None = None
    clip: tuple[float, float] | None = None

    @field_validator("sensor")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in SENSORS:
            raise ValueError(f"there is no sensor '{name}'. {nearest(name, SENSORS)}")
        return name

    @field_validator("band_pattern")
    @classmethod
    def _names_a_band(cls, pattern: str | None) -> str | None:
        if pattern is not None and "band" not in re.compile(compiles(pattern) or "").groupindex:
            raise ValueError("band_pattern needs the named group band: (?P<band>...)")
        return pattern

    @model_validator(mode="after")
    def _of_the_sensor(self) -> FilesOptions:
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip {self.clip} is empty")
        if self.scale == 0:
            raise ValueError("a scale of 0 makes every value equal")
        refuse_names("file_bands", self.file_bands)
        for name in self.file_bands or ():
            if self.spectral.bands and name not in self.spectral.band_names:
                raise ValueError(
                    f"{self.sensor} has no band '{name}' in file_bands. {nearest(name, self.spectral.band_names)}"
                )
        return self

    @property
    def spectral(self) -> Sensor:
        """The sensor's facts."""
        return find_sensor(self.sensor)

    @property
    def quantification(self) -> Quantification:
        """Of bands that have no other; the sensor's own clip only with its own scale and offset."""
        sensor = self.spectral
        own = self.scale is None and self.offset is None
        scale = sensor.scale if self.scale is None else self.scale
        offset = sensor.offset if self.offset is None else self.offset
        return Quantification(scale=scale, offset=offset, clip=self.clip or (sensor.clip if own else None))

    def quantification_of(self, band: str) -> Quantification:
        """Of one band."""
        return self.quantification


class Layer(FilesOptions):
    """One of several sensors.

    Attributes:
        pattern: regular expression that tells its files: searched for in the file's name, then in the name of its
            folder. What it matches is no part of the scene's name.
        name: in messages and, where several layers have bands of one name, before these (``landsat8:B1``); the
            sensor's if not given.
        required: without it there is no scene; otherwise it then reads as invalid.
    """

    pattern: str = ""
    name: str = ""
    required: bool = True

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        return compiles(pattern) or ""

    @property
    def title(self) -> str:
        return self.name or self.sensor


class LayerOptions(FilesOptions):
    """One sensor, whose options are these, or several.

    Attributes:
        layers: the sensors of files that make one scene together; each may have the options above, which then are not
            given beside.
    """

    layers: tuple[Layer, ...] | None = None

    @model_validator(mode="after")
    def _one_or_several(self) -> LayerOptions:
        if self.layers is None:
            return self
        beside = sorted(self.model_fields_set & (set(FilesOptions.model_fields)) - _unset(self))
        if beside:
            raise ValueError(f"{', '.join(beside)} beside layers: give each layer its own")
        if not self.layers:
            raise ValueError("layers is empty: leave it out for one sensor")
        for layer in self.layers:
            if not layer.pattern:
                raise ValueError(f"layers: {layer.title} has no pattern that tells its files")
        titles = [layer.title for layer in self.layers]
        twice = [title for title in titles if titles.count(title) > 1]
        if twice:
            raise ValueError(f"layers: two are called {twice[0]}; give each a name")
        return self

    @property
    def layout(self) -> tuple[Layer, ...]:
        """The layers; of one sensor one, with all files."""
        if self.layers is not None:
            return self.layers
        return (Layer.model_construct(**{name: getattr(self, name) for name in FilesOptions.model_fields}),)

    def channel_name(self, layer: int, band: str) -> str:
        """Of a band in the index: as its sensor says, with the layer's name before it where that is ambiguous. Bands of
        a layer whose sensor has none of its own are always ambiguous."""
        if self.layers is None:
            return band
        own = self.layers[layer]
        others = [other.spectral for number, other in enumerate(self.layers) if number != layer]
        if own.spectral.bands and not any(band in other.band_names for other in others):
            return band
        return f"{own.title}:{band}" if others else band

    def layer_of(self, channel: str) -> tuple[int, str]:
        """The layer and the band's own name of a channel.

        Raises:
            KeyError: if no layer can have it.
        """
        if self.layers is None:
            return 0, channel
        for number, layer in enumerate(self.layers):
            band = channel.removeprefix(f"{layer.title}:")
            known = layer.spectral.band_names
            if (band in known if known else True) and self.channel_name(number, band) == channel:
                return number, band
        raise KeyError(channel)

    def quantification_of_channel(self, channel: str) -> Quantification:
        """
        Raises:
            KeyError: as ``layer_of``.
        """
        layer, band = self.layer_of(channel)
        return self.layout[layer].quantification_of(band)

    def wavelength_of(self, channel: str) -> float | None:
        """Its centre in nanometres, where the sensor says so."""
        layer, band = self.layer_of(channel)
        sensor = self.layout[layer].spectral
        return sensor.band(band).wavelength if band in sensor.band_names else None

    @property
    def known_channels(self) -> tuple[str, ...]:
        """All that the sensors can have."""
        return tuple(
            self.channel_name(number, band)
            for number, layer in enumerate(self.layout)
            for band in layer.spectral.band_names
        )


def refuse_names(option: str, names: tuple[str, ...] | None) -> None:
    """
    Raises:
        ValueError: if there are none, or one twice.
    """
    if names is not None and (not names or len(set(names)) != len(names)):
        raise ValueError(f"{option} must name at least one band, and none twice")


def _unset(options: BaseModel) -> set[str]:
    """Fields at their defaults, whether or not they were given: options that were written down and read again."""

    def default(name: str) -> Any:
        return FilesOptions.model_fields[name].default

    return {name for name in FilesOptions.model_fields if getattr(options, name) == default(name)}
