"""Multispectral and SAR rasters: GeoTIFF, COG, VRT, JPEG 2000; single dates and time series."""

from __future__ import annotations

from fmsuite.domains.remote_sensing.domain import RemoteSensingDomain
from fmsuite.domains.remote_sensing.patch import Patch, read_raster

__all__ = ["Patch", "RemoteSensingDomain", "read_raster"]
