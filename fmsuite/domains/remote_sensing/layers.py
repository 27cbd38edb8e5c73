"""Sensors of a run: one, or several whose files lie over each other."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from fmsuite.core.inputs import Quantification
from fmsuite.domains.remote_sensing.sensors import SENSORS, Kind, Sensor, find_sensor
from fmsuite.errors import UsageError, nearest


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
        sensor: one of ``fmsuite list sensors``, or a YAML file that describes another; it names the bands and knows how
            stored values become physical ones. What a file says is kept in the index.
        file_bands: the bands of a file in the order in which it stores them, for files that do not describe them.
        band_pattern: regular expression with the group ``band``, searched for in the names of files of one band each;
            what it matches is no part of the scene's name. Without it, a band of the sensor that stands between
            separators in a name is understood where several files differ in nothing else.
        nodata: a value that means "no data" even where the file does not declare it (a declared one always counts).
        values: ``counts`` are stored values that the sensor's scale and offset make physical. ``reflectance`` (or
            temperature, in bands that have one) has been made already, and is taken as it is. Scale and offset tags of
            a file count in either case. A file whose values contradict it by orders of magnitude is skipped.
        scale, offset, clip: how stored values become physical ones, where the sensor's own are wrong; in bands that
            have none of their own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sensor: str | Sensor = "generic"
    file_bands: tuple[str, ...] | None = None
    band_pattern: str | None = None
    nodata: float | None = None
    values: Literal["counts", "reflectance"] = "counts"
    scale: float | None = None
    offset: float | None = None
    clip: tuple[float, float] | None = None

    @field_validator("sensor", mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        sensor = find_sensor(given)
        # A file may change or be elsewhere when the index is read.
        return given if given in SENSORS else sensor

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
        if self.values != "counts":
            if self.spectral.kind != "optical" or not self.spectral.bands:
                raise ValueError(f"values: {self.values} has no meaning for {self.spectral.name}")
            if (self.scale, self.offset) != (None, None):
                raise ValueError(f"values: {self.values} beside scale and offset: leave one of them out")
        refuse_names("file_bands", self.file_bands)
        known = self.spectral.band_names
        for name in self.file_bands or ():
            if known and name not in known:
                raise ValueError(f"{self.spectral.name} has no band '{name}' in file_bands. {nearest(name, known)}")
        return self

    @property
    def spectral(self) -> Sensor:
        """The sensor's facts."""
        return self.sensor if isinstance(self.sensor, Sensor) else find_sensor(self.sensor)

    def quantification_of(self, band: str) -> Quantification:
        """Of one band; the sensor's own clip only with its own scale and offset."""
        sensor = self.spectral
        own = sensor.quantification_of(band)
        if self.values == "reflectance":
            return Quantification(clip=self.clip or own.clip)
        if band in sensor.band_names and sensor.band(band).own_values:
            return own
        if self.scale is None and self.offset is None:
            return own.model_copy(update={"clip": self.clip or own.clip})
        scale = own.scale if self.scale is None else self.scale
        return Quantification(scale=scale, offset=own.offset if self.offset is None else self.offset, clip=self.clip)


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
        return self.name or self.spectral.name


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

    def published(self, channel: str) -> tuple[float, float]:
        """Mean and standard deviation of a band in the sensor's specification.

        Raises:
            UsageError: if there are none.
        """
        layer, band = self.layer_of(channel)
        sensor = self.layout[layer].spectral
        known = sensor.band(band) if band in sensor.band_names else None
        if known is None or known.mean is None or known.std is None:
            raise UsageError(
                f"data.statistics: {sensor.name} has no published mean and std of {band}.", "Set statistics: data."
            )
        return known.mean, known.std

    def kind_of(self, channel: str) -> Kind:
        """What may vary in its values."""
        layer, band = self.layer_of(channel)
        return self.layout[layer].spectral.kind_of(band)

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
