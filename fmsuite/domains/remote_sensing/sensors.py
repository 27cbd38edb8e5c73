"""What is known of a sensor before a file is opened: bands, wavelengths, ground sampling distance, quantification."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from fmsuite.errors import UsageError, nearest


@dataclass(frozen=True)
class Band:
    """One band of a sensor.

    Attributes:
        name: as the sensor's users write it.
        wavelength: centre in nanometres; ``None`` for radar.
        gsd: ground sampling distance in metres.
        aliases: other ways in which files describe it; case, separators and leading zeros do not matter.
    """

    name: str
    wavelength: float | None
    gsd: float
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sensor:
    """A sensor or a product of one.

    Attributes:
        bands: all bands it can have; none for ``generic``, whose bands are what a file says.
        layouts: band orders in which files without band descriptions are written, told apart by their length.
        scale, offset: stored value ``v`` is the physical quantity ``offset + scale * v``.
        clip: range outside which a physical value is an artefact.
        kind: ``optical`` (reflectance, multiplicative disturbances) or ``decibel`` (backscatter, additive ones).
        linear: stored as linear power; the reader turns it into decibels and treats values <= 0 as nodata.
    """

    name: str
    title: str
    bands: tuple[Band, ...]
    layouts: tuple[tuple[str, ...], ...] = ()
    scale: float = 1.0
    offset: float = 0.0
    clip: tuple[float, float] | None = None
    kind: Literal["optical", "decibel"] = "optical"
    linear: bool = False

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


def _plain(text: str) -> str:
    """``"B01"``, ``"b1"`` and ``"B_1"`` are the same band; ``"B8A"`` and ``"B8"`` are not."""
    return re.sub(r"0+(?=\d)", "", re.sub(r"[^0-9a-z]", "", text.lower()))


_SENTINEL2 = (
    Band("B1", 442.7, 60, ("coastal", "coastal aerosol")),
    Band("B2", 492.4, 10, ("blue",)),
    Band("B3", 559.8, 10, ("green",)),
    Band("B4", 664.6, 10, ("red",)),
    Band("B5", 704.1, 20, ("red edge 1", "rededge1", "re1")),
    Band("B6", 740.5, 20, ("red edge 2", "rededge2", "re2")),
    Band("B7", 782.8, 20, ("red edge 3", "rededge3", "re3")),
    Band("B8", 832.8, 10, ("nir", "near infrared")),
    Band("B8A", 864.7, 20, ("narrow nir", "nir narrow", "nir08", "red edge 4", "rededge4")),
    Band("B9", 945.1, 60, ("water vapour", "water vapor", "nir09")),
    Band("B10", 1373.5, 60, ("cirrus",)),
    Band("B11", 1613.7, 20, ("swir 1", "swir16")),
    Band("B12", 2202.4, 20, ("swir 2", "swir22")),
)
_SENTINEL2_NAMES = tuple(band.name for band in _SENTINEL2)
_SENTINEL2_L2A = tuple(band for band in _SENTINEL2 if band.name != "B10")
_SATMAE_NAMES = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")

_SENTINEL1 = (
    Band("VV", None, 10, ("Sigma0_VV", "Gamma0_VV", "Sigma0_VV_db", "Gamma0_VV_db", "VV_db")),
    Band("VH", None, 10, ("Sigma0_VH", "Gamma0_VH", "Sigma0_VH_db", "Gamma0_VH_db", "VH_db")),
)

_LANDSAT8 = (
    Band("B1", 443.0, 30, ("SR_B1", "coastal", "coastal aerosol")),
    Band("B2", 482.0, 30, ("SR_B2", "blue")),
    Band("B3", 561.4, 30, ("SR_B3", "green")),
    Band("B4", 654.6, 30, ("SR_B4", "red")),
    Band("B5", 864.7, 30, ("SR_B5", "nir", "nir08")),
    Band("B6", 1608.9, 30, ("SR_B6", "swir 1", "swir16")),
    Band("B7", 2200.7, 30, ("SR_B7", "swir 2", "swir22")),
    Band("B8", 589.5, 15, ("pan", "panchromatic")),
    Band("B9", 1373.4, 30, ("cirrus",)),
)
_LANDSAT8_SURFACE = ("B1", "B2", "B3", "B4", "B5", "B6", "B7")

SENSORS: dict[str, Sensor] = {
    sensor.name: sensor
    for sensor in (
        Sensor(
            "sentinel2-l1c",
            "Sentinel-2 MSI, top-of-atmosphere reflectance",
            _SENTINEL2,
            (_SENTINEL2_NAMES,),
            scale=1e-4,
            clip=(0.0, 2.0),
        ),
        Sensor(
            "sentinel2-l2a",
            "Sentinel-2 MSI, surface reflectance",
            _SENTINEL2_L2A,
            (tuple(band.name for band in _SENTINEL2_L2A), _SATMAE_NAMES),
            scale=1e-4,
            clip=(0.0, 2.0),
        ),
        Sensor(
            "sentinel1",
            "Sentinel-1 C-band backscatter, stored in decibels",
            _SENTINEL1,
            (("VV", "VH"),),
            clip=(-60.0, 40.0),
            kind="decibel",
        ),
        Sensor(
            "sentinel1-linear",
            "Sentinel-1 C-band backscatter, stored as linear power",
            _SENTINEL1,
            (("VV", "VH"),),
            clip=(-60.0, 40.0),
            kind="decibel",
            linear=True,
        ),
        Sensor(
            "landsat8",
            "Landsat 8 OLI, Collection 2 Level-2 surface reflectance",
            _LANDSAT8,
            (_LANDSAT8_SURFACE,),
            scale=2.75e-5,
            offset=-0.2,
            clip=(-0.2, 2.0),
        ),
        Sensor(
            "naip",
            "NAIP aerial imagery, 8 bit",
            (
                Band("red", 635.0, 1, ("R",)),
                Band("green", 555.0, 1, ("G",)),
                Band("blue", 465.0, 1, ("B",)),
                Band("nir", 845.0, 1, ("N", "near infrared", "NIR")),
            ),
            (("red", "green", "blue", "nir"), ("red", "green", "blue")),
            scale=1 / 255,
        ),
        Sensor("generic", "any raster; bands are named as the file describes them", ()),
    )
}
"""Sentinel-2: MSI spectral responses of Sentinel-2A. Landsat 8: OLI. Values of Level-1 Landsat products follow another
quantification: set ``data.scale`` and ``data.offset``."""

BAND_GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "satmae": {
        "visible-nir": ("B2", "B3", "B4", "B8"),
        "red-edge": ("B5", "B6", "B7", "B8A"),
        "swir": ("B11", "B12"),
    }
}
"""Named groupings of bands into tokens. ``satmae``: Cong et al. 2022, section 4.2; B1, B9 and B10 are left out."""


def find_sensor(name: str) -> Sensor:
    """
    Raises:
        UsageError: for an unknown name, with the nearest known one.
    """
    if name not in SENSORS:
        raise UsageError(f"data.sensor: there is no sensor '{name}'.", nearest(name, SENSORS))
    return SENSORS[name]
