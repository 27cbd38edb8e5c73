"""What is known of a sensor before a file is opened: bands, wavelengths, ground sampling distance, quantification.

A sensor is a YAML file; those in the folder ``sensors`` are known by their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fmsuite.core.config import read_yaml
from fmsuite.core.inputs import Quantification
from fmsuite.errors import UsageError, nearest

Kind = Literal["optical", "decibel", "kelvin"]
"""``optical``: reflectance, disturbed by factors. ``decibel``: backscatter, and ``kelvin``: temperature, disturbed by
shifts."""


class Band(BaseModel):
    """One band of a sensor.

    Attributes:
        name: as the sensor's users write it.
        wavelength: centre in nanometres; ``None`` for radar.
        gsd: ground sampling distance in metres.
        aliases: other ways in which files describe it; case, separators and leading zeros do not matter.
        scale, offset, clip, kind: where they are not the sensor's.
        mean, std: of physical values in a published large collection, where there is one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    wavelength: float | None = Field(default=None, gt=0)
    gsd: float = Field(gt=0)
    aliases: tuple[str, ...] = ()
    scale: float | None = None
    offset: float | None = None
    clip: tuple[float, float] | None = None
    kind: Kind | None = None
    mean: float | None = None
    std: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> Band:
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"band '{self.name}' has a mean or a std, and not the other")
        if self.scale == 0:
            raise ValueError(f"band '{self.name}' has a scale of 0, which makes every value equal")
        return self

    @property
    def own_values(self) -> bool:
        """Whether its values become physical in a way of their own."""
        return (self.scale, self.offset) != (None, None)


class Sensor(BaseModel):
    """A sensor or a product of one.

    Attributes:
        source: where the numbers are from.
        bands: all bands it can have; none for ``generic``, whose bands are what a file says.
        layouts: band orders in which files without band descriptions are written, told apart by their length.
        scale, offset: stored value ``v`` is the physical quantity ``offset + scale * v``.
        clip: range outside which a physical value is an artefact.
        kind: what may vary in its values.
        linear: stored as linear power; the reader turns it into decibels and treats values <= 0 as nodata.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    title: str
    source: str = ""
    bands: tuple[Band, ...] = ()
    layouts: tuple[tuple[str, ...], ...] = ()
    scale: float = 1.0
    offset: float = 0.0
    clip: tuple[float, float] | None = None
    kind: Kind = "optical"
    linear: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Sensor:
        names = [band.name for band in self.bands]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"two bands are called '{twice[0]}'")
        for layout in self.layouts:
            for name in layout:
                if name not in names:
                    raise ValueError(f"layouts name the band '{name}'. {nearest(name, names)}")
        if len({len(layout) for layout in self.layouts}) != len(self.layouts):
            raise ValueError("two layouts have the same length, and files are told apart by it")
        if self.scale == 0:
            raise ValueError("a scale of 0 makes every value equal")
        said: dict[str, str] = {}
        for band in self.bands:
            for text in (band.name, *band.aliases):
                if said.setdefault(_plain(text), band.name) != band.name:
                    raise ValueError(f"'{text}' is a name of both {said[_plain(text)]} and {band.name}")
        return self

    @property
    def band_names(self) -> tuple[str, ...]:
        return tuple(band.name for band in self.bands)

    def band(self, name: str) -> Band:
        """
        Raises:
            KeyError: for a name that the sensor does not have.
        """
        return {band.name: band for band in self.bands}[name]

    def recognise(self, description: str) -> str | None:
        """The name of the band that a description in a file means, or ``None``."""
        wanted = _plain(description)
        for band in self.bands:
            if wanted in (_plain(band.name), *(_plain(alias) for alias in band.aliases)):
                return band.name
        return None

    def quantification_of(self, name: str) -> Quantification:
        """Of one band; the sensor's for a name that it does not have."""
        band = self.band(name) if name in self.band_names else None
        if band is None or not band.own_values:
            clip = self.clip if band is None or band.clip is None else band.clip
            return Quantification(scale=self.scale, offset=self.offset, clip=clip)
        scale = self.scale if band.scale is None else band.scale
        return Quantification(scale=scale, offset=0.0 if band.offset is None else band.offset, clip=band.clip)

    def kind_of(self, name: str) -> Kind:
        """Of one band."""
        own = self.band(name).kind if name in self.band_names else None
        return own or self.kind


def _plain(text: str) -> str:
    """``"B01"``, ``"b1"`` and ``"B_1"`` are the same band; ``"B8A"`` and ``"B8"`` are not."""
    return re.sub(r"0+(?=\d)", "", re.sub(r"[^0-9a-z]", "", text.lower()))


def read_sensor(path: str | Path) -> Sensor:
    """A sensor from a YAML file. ``like`` names a known sensor, whose keys it has where it gives no others.

    Raises:
        UsageError: naming the file, the key, and what is wrong with it.
    """
    raw: dict[str, Any] = read_yaml(Path(path))
    like = raw.pop("like", None)
    if like is not None:
        if like not in SENSORS:
            raise UsageError(f"{path}: like: there is no sensor '{like}'.", nearest(str(like), SENSORS))
        raw = {**SENSORS[like].model_dump(exclude_defaults=True), "source": "", **raw}
    try:
        return Sensor.model_validate(raw)
    except ValidationError as error:
        raise UsageError(f"{path}: {' '.join(_sentence(problem, raw) for problem in error.errors())}") from error


def _sentence(problem: Any, raw: dict[str, Any]) -> str:
    """Bands are named instead of counted."""
    place = list(problem["loc"])
    model: type[BaseModel] = Sensor
    if place[:1] == ["bands"] and len(place) > 1:
        model, band = Band, raw["bands"][place[1]]
        place[1] = band.get("name", place[1]) if isinstance(band, dict) else place[1]
    key = ".".join(map(str, place))
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'. {nearest(str(place[-1]), model.model_fields)}"
    if problem["type"] == "missing":
        return f"'{key}' is missing."
    said = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {said} (got {problem['input']!r})." if key else f"{said}."


class _Known(Mapping[str, Sensor]):
    """The sensors of the folder, read when they are asked for."""

    def __getitem__(self, name: str) -> Sensor:
        if name not in _files():
            raise KeyError(name)
        return _read_known(name)

    def __iter__(self) -> Iterator[str]:
        return iter(_files())

    def __len__(self) -> int:
        return len(_files())


@lru_cache(maxsize=1)
def _files() -> dict[str, Path]:
    files = Path(__file__).with_name("sensors").glob("*.yaml")
    return {path.stem: path for path in sorted(files, key=lambda path: path.stem)}


@lru_cache(maxsize=64)
def _read_known(name: str) -> Sensor:
    return read_sensor(_files()[name])


SENSORS: Mapping[str, Sensor] = _Known()
"""The sensors that come with the package."""

BAND_GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "satmae": {
        "visible-nir": ("B2", "B3", "B4", "B8"),
        "red-edge": ("B5", "B6", "B7", "B8A"),
        "swir": ("B11", "B12"),
    }
}
"""Named groupings of bands into tokens. ``satmae``: Cong et al. 2022, section 4.2; B1, B9 and B10 are left out."""


def find_sensor(name: str) -> Sensor:
    """A known sensor, or that of a YAML file.

    Raises:
        UsageError: for an unknown name, with the nearest known one; as ``read_sensor``.
    """
    if name.lower().endswith((".yaml", ".yml")):
        return read_sensor(name)
    if name not in SENSORS:
        raise UsageError(f"data.sensor: there is no sensor '{name}'.", f"{nearest(name, SENSORS)} Or name a YAML file.")
    return SENSORS[name]
