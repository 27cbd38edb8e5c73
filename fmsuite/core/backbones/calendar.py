"""Year, month and hour of dates that are days since 2000-01-01: what SatMAE's temporal positions encode."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_YEAR = 2002
"""SatMAE counts years from here, the first of fMoW's images."""
_SLACK = 1 / 400
"""In days, 3.6 minutes. float32 is off by up to 2.8 minutes (half of 1/256 day) between 1820 and 2179, so that a whole
hour may come a little early; readers hand out dates in steps of ten minutes, none of which then reaches the next."""
_ERA = 146_097
"""Days of 400 years, after which the calendar repeats itself."""


def calendar(days: Tensor) -> Tensor:
    """Year since 2002, month from 0 and hour from 0, as SatMAE counts them (Cong et al. 2022, section 3.2).

    The proleptic Gregorian calendar without leap seconds, in the time zone of the dates. Years are those of March to
    February while they are taken apart, so that the leap day is the last (Richards 2013, "Calendars", section 15.11).

    Args:
        days: since 2000-01-01, the time of day as the fraction; any shape. From 1820 to 2179 float32 gives the hour
            of every date that is a multiple of ten minutes.

    Returns:
        (..., 3) float32 whole numbers.
    """
    days = days.to(torch.float64) + _SLACK
    whole = days.floor()
    hour = ((days - whole) * 24).floor()
    # Counted from 2000-03-01, with which a leap cycle of 400 years begins.
    count = whole.to(torch.int64) - 60
    era = count.div(_ERA, rounding_mode="floor")
    day = count - era * _ERA
    # A century's, a leap year's and an era's last days do not begin another year.
    year = (day - day // 1460 + day // 36_524 - day // (_ERA - 1)) // 365
    of_year = day - (365 * year + year // 4 - year // 100)
    month = (5 * of_year + 2) // 153
    early = (month >= 10).to(torch.int64)
    parts = (2000 + 400 * era + year + early - FIRST_YEAR, month + 2 - 12 * early, hour)
    return torch.stack([part.to(torch.float32) for part in parts], dim=-1)
