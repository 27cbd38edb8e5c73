"""Pictures for people: true colour where the bands allow it, false colour or grey elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fmsuite.core.inputs import Channel, InputSpec

VISIBLE = {"red": (600.0, 700.0, 660.0), "green": (520.0, 600.0, 560.0), "blue": (430.0, 520.0, 485.0)}
"""Shortest and longest wavelength in nanometres that counts as a colour, and the one that is preferred."""
INVALID = ((255, 0, 255), (96, 0, 96))
"""The two colours of the chequered pattern that stands for nodata."""
MAX_DATES = 4
_STRETCH = (2.0, 98.0)


def colour_bands(channels: Sequence[Channel]) -> tuple[int, int, int] | None:
    """Positions of red, green and blue of one sensor, by name or by wavelength; ``None`` where one is missing."""
    for sensor in dict.fromkeys(_sensor(channel) for channel in channels):
        own = [(i, channel) for i, channel in enumerate(channels) if _sensor(channel) == sensor]
        found = []
        for colour, (low, high, best) in VISIBLE.items():
            named = [i for i, channel in own if channel.name.lower() in (colour, colour[0])]
            seen = [(abs(c.wavelength - best), i) for i, c in own if c.wavelength and low <= c.wavelength < high]
            if named or seen:
                found.append(named[0] if named else min(seen)[1])
        if len(found) == 3:
            return found[0], found[1], found[2]
    return None


def radar_bands(channels: Sequence[Channel]) -> tuple[int, int] | None:
    """Positions of VV and VH of one sensor."""
    names = [channel.name for channel in channels]
    for prefix in dict.fromkeys(name.rpartition(":")[0] for name in names):
        pair = [f"{prefix}:{band}" if prefix else band for band in ("VV", "VH")]
        if set(pair) <= set(names):
            return names.index(pair[0]), names.index(pair[1])
    return None


def _sensor(channel: Channel) -> tuple[str, str]:
    """Equal for channels that can be one sensor's."""
    return channel.name.rpartition(":")[0], str(channel.quantification)


def draw(values: np.ndarray, spec: InputSpec, nodata: float | None = None) -> np.ndarray:
    """One sample as a picture.

    Red, green and blue bands make true colour; VV and VH make the usual radar false colour (VV, VH, their difference in
    decibels) where there is no true colour, or nothing in it; otherwise the first band is grey. Contrast is stretched
    between the 2nd and 98th percentile of what is valid: jointly for true colour, so that hues stay, and separately for
    radar. Of a time series the first ``MAX_DATES`` dates stand side by side. Pixels that are zero, ``nodata`` or not
    finite in all bands of the sensor that is shown are chequered in magenta: readers write zeros where there is no
    data.

    Args:
        values: (C, H, W) or (C, T, H, W) raw.

    Returns:
        (H, W, 3) uint8; for a series (H, T * W + gaps, 3).
    """
    if values.ndim == 4:
        dates = values.shape[1]
        shown = values[:, : min(dates, MAX_DATES)]
        flat = np.concatenate([shown[:, t] for t in range(shown.shape[1])], axis=-1)
        picture = _draw_plane(flat, spec, nodata)
        parts = np.split(picture, shown.shape[1], axis=1)
        gap = np.full((picture.shape[0], 2, 3), 255, np.uint8)
        return np.concatenate([piece for part in parts for piece in (part, gap)][:-1], axis=1)
    return _draw_plane(values, spec, nodata)


def _draw_plane(values: np.ndarray, spec: InputSpec, nodata: float | None) -> np.ndarray:
    of = spec.quantifications
    shape = (-1, 1, 1)
    scale, offset = (np.array(column).reshape(shape) for column in ([q.scale for q in of], [q.offset for q in of]))
    physical = offset + scale * values.astype(np.float64)
    empty = ~np.isfinite(values) | (values == 0)
    if nodata is not None:
        empty |= values == nodata
    colours, radar = colour_bands(spec.channels), radar_bands(spec.channels)
    if colours is not None and radar is not None and empty[list(colours)].all():
        colours = None
    joint = True
    if colours is not None:
        planes, shown = physical[list(colours)], colours[0]
    elif radar is not None:
        vv, vh = physical[list(radar)]
        planes, shown, joint = np.stack([vv, vh, vv - vh]), radar[0], False
    else:
        planes, shown = np.repeat(physical[:1], 3, axis=0), 0
    sensor = _sensor(spec.channels[shown])
    missing = empty[[i for i, channel in enumerate(spec.channels) if _sensor(channel) == sensor]].all(axis=0)
    seen = np.isfinite(planes).all(axis=0) & ~missing
    groups = [slice(0, 3)] if joint else [slice(i, i + 1) for i in range(3)]
    stretched = np.zeros(planes.shape)
    for group in groups:
        if seen.any():
            low, high = np.percentile(planes[group][:, seen], _STRETCH)
            stretched[group] = np.nan_to_num((planes[group] - low) / max(high - low, 1e-12))
    picture = (stretched.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    rows, columns = np.indices(missing.shape)
    pattern = np.array(INVALID, dtype=np.uint8)[(rows // 4 + columns // 4) % 2]
    return np.where(missing[..., None], pattern, picture)
