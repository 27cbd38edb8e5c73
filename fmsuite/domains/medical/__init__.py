"""Volumes: NIfTI images of any orientation and spacing, read as (channel, z, y, x) in RAS."""

from fmsuite.domains.medical.domain import MedicalDomain
from fmsuite.domains.medical.options import MedicalOptions

__all__ = ["MedicalDomain", "MedicalOptions"]
