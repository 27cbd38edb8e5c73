"""Small rasters made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from fmsuite.commands.indexing import build_index
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.remote_sensing import RemoteSensingDomain
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions

UTM = from_origin(500_000, 5_300_000, 10, 10)


@pytest.fixture
def write_raster(tmp_path: Path) -> Callable[..., Path]:
    """``write_raster(name, values, ...)``: a GeoTIFF of (C, H, W) values; UTM at 10 m unless told otherwise."""

    def write(
        name: str,
        values: np.ndarray,
        crs: str | None = "EPSG:32632",
        transform: Any = UTM,
        descriptions: tuple[str, ...] | None = None,
        mask: np.ndarray | None = None,
        scales: tuple[float, ...] | None = None,
        offsets: tuple[float, ...] | None = None,
        **profile: Any,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = {"width": values.shape[2], "height": values.shape[1], "count": values.shape[0]}
        with rasterio.open(
            path, "w", driver="GTiff", dtype=values.dtype, crs=crs, transform=transform, **shape, **profile
        ) as dataset:
            dataset.write(values)
            if descriptions is not None:
                dataset.descriptions = descriptions
            if scales is not None:
                dataset.scales = scales
            if offsets is not None:
                dataset.offsets = offsets
            if mask is not None:
                dataset.write_mask(mask)
        return path

    return write


@pytest.fixture
def make_index() -> Callable[..., tuple[RemoteSensingDomain, SampleIndex, SkippedLog]]:
    """``make_index(path, ..., option=value)``: the domain, the index of the paths, and what was skipped."""

    def make(*paths: Path, **options: Any) -> tuple[RemoteSensingDomain, SampleIndex, SkippedLog]:
        domain = RemoteSensingDomain(RemoteSensingOptions(**options))
        skipped = SkippedLog()
        return domain, build_index(domain, paths, skipped), skipped

    return make


@pytest.fixture
def noise() -> Callable[..., np.ndarray]:
    """``noise(C, H, W, seed=0)``: uint16 values from 1 to 9999, so that 0 can mean no data."""

    def make(*shape: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(1, 10_000, size=shape).astype(np.uint16)

    return make
