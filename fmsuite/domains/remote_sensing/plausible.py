"""Whether a file's values can be what its sensor's specification says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fmsuite.core.inputs import Quantification
from fmsuite.domains.remote_sensing.layers import FilesOptions
from fmsuite.domains.remote_sensing.raster import Raster
from fmsuite.errors import ReadFailure

SIDE = 64
"""Values are taken from a box of so many pixels in the middle of a file."""
DARK = 0.002
"""Reflectance that the brightest hundredth of a scene is never below; counts read as reflectance divided again are."""
BRIGHT = 5.0
"""Reflectance that half of a scene is never above; counts that are taken for reflectance are."""


def refuse_implausible(raster: Raster) -> None:
    """
    Raises:
        ReadFailure: if values contradict the specification by orders of magnitude.
    """
    own, sensor = raster.own, raster.own.spectral
    if not sensor.bands or (own.scale, own.offset) != (None, None) or raster.palette is not None:
        return
    optical = tuple(name for name in raster.bands if raster.kinds[name] == "optical")
    if raster.dtype == "uint8" and raster.tagged is None and optical and own.values == "counts":
        highest = max(255 * raster.quantifications[name].scale for name in optical)
        if highest < 0.1:
            raise ReadFailure(
                raster.path,
                "metadata",
                f"its values are bytes, which would be a reflectance of at most {highest:.2g} for {sensor.name}.",
                f"Say what they are with data.scale, such as {1 / 255:.6f} if 255 stands for 1.",
            )
    top, left = (max(0, (length - SIDE) // 2) for length in (raster.height, raster.width))
    names = optical if sensor.kind == "optical" else tuple(raster.bands)
    if not names:
        return
    try:
        values, valid = raster.read(names, top, left, min(SIDE, raster.height), min(SIDE, raster.width))
    except ReadFailure:
        # A damaged middle costs the windows there, which are reported when they are read, and not the whole file.
        return
    if not valid.any():
        return
    if sensor.kind == "decibel":
        _refuse_other_power(raster, values[valid])
        return
    quantifications = [raster.quantifications[name] for name in names]
    refuse_reflectance(raster.path, values, valid, quantifications, own)


def refuse_reflectance(
    path: str, values: np.ndarray, valid: np.ndarray, quantifications: Sequence[Quantification], own: FilesOptions
) -> None:
    """
    Args:
        values, valid: (C, y, x) of bands that are a reflectance, and somewhere valid. quantifications: of each.
        own: what is known about the file.

    Raises:
        ReadFailure: if the values contradict the specification by orders of magnitude.
    """
    scales = np.array([each.scale for each in quantifications])[:, None, None]
    offsets = np.array([each.offset for each in quantifications])[:, None, None]
    bright = float(np.percentile((values * scales)[valid], 99))
    if bright < DARK and own.values == "counts":
        raise ReadFailure(
            path,
            "metadata",
            f"its values reach {bright / scales.max():.3g}, which would be a reflectance of {bright:.2g} for "
            f"{own.spectral.name}.",
            "If they are reflectance already, set data.values=reflectance; otherwise data.scale.",
        )
    middle = float(np.median((values * scales + offsets)[valid]))
    if middle > BRIGHT:
        raise ReadFailure(
            path,
            "metadata",
            f"half of its values would be a reflectance above {middle:.3g}.",
            "If they are the sensor's counts, set data.values=counts; otherwise data.scale.",
        )


def _refuse_other_power(raster: Raster, values: np.ndarray) -> None:
    if raster.own.spectral.linear:
        # Linear power has been made decibels, and what was below zero is invalid.
        return
    if values.min() >= 0 and np.median(values) < 5:
        raise ReadFailure(
            raster.path,
            "metadata",
            f"none of its values is below 0, and backscatter in decibels mostly is; half are below "
            f"{np.median(values):.2g}.",
            "If it is linear power, set data.sensor=sentinel1-linear.",
        )
