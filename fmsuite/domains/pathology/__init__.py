"""Histopathology: whole-slide images and tiles of stained, bright-field tissue."""

from fmsuite.domains.pathology.domain import PathologyDomain
from fmsuite.domains.pathology.options import PathologyOptions

__all__ = ["PathologyDomain", "PathologyOptions"]
