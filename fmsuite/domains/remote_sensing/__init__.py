"""Multispectral and SAR rasters: GeoTIFF, COG, VRT, JPEG 2000; single dates and time series."""

from __future__ import annotations

from fmsuite.domains.remote_sensing.domain import RemoteSensingDomain

__all__ = ["RemoteSensingDomain"]
