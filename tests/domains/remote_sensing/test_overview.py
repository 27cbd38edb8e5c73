"""Quicklooks of whole rasters, on which windows find their place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fmsuite.errors import ReadFailure, UsageError


def test_windows_lie_where_their_pixels_are(write_raster: Callable[..., Path], make_index: Callable) -> None:
    values = np.full((1, 2304, 3072), 100, np.uint16)
    values[0, 512:1024, 1536:2560] = 900
    path = write_raster("scene.tif", values)
    domain, index, skipped = make_index(path, size=256)
    assert not skipped.entries
    view = domain.overview(index, str(path))
    assert max(view.rgb.shape) == 1024
    assert (view.origin, view.pitch) == ((0, 0), (3, 3))
    grey = view.rgb.astype(int).mean(axis=2)
    for row in range(len(index)):
        window = index[row]
        bright = values[0, int(window.position[0]) + 128, int(window.position[1]) + 128] == 900
        middle = [
            int((window.position[axis] + window.extent[axis] / 2 - view.origin[axis]) / view.pitch[axis])
            for axis in (0, 1)
        ]
        assert (grey[middle[0], middle[1]] > 128) == bright


def test_a_small_raster_is_shown_pixel_by_pixel(
    write_raster: Callable[..., Path], make_index: Callable, noise: Callable[..., np.ndarray]
) -> None:
    values = noise(1, 96, 64)
    path = write_raster("scene.tif", values)
    domain, index, _ = make_index(path, size=32)
    view = domain.overview(index, str(path))
    assert view.rgb.shape == (96, 64, 3)
    assert view.pitch == (1, 1)
    order = np.argsort(values[0], axis=None)
    assert (np.diff(view.rgb[..., 0].reshape(-1)[order].astype(int)) >= 0).all()


def test_sources_that_are_unknown_or_gone_are_named(
    write_raster: Callable[..., Path], make_index: Callable, noise: Callable[..., np.ndarray]
) -> None:
    path = write_raster("scene.tif", noise(1, 96, 64))
    domain, index, _ = make_index(path, size=32)
    with pytest.raises(UsageError, match=r"other\.tif: not a source of this index"):
        domain.overview(index, "other.tif")
    path.unlink()
    with pytest.raises(ReadFailure, match=r"scene\.tif"):
        domain.overview(index, str(path))
