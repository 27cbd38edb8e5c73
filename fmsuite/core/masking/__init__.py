"""Which tokens of a view are hidden: patterns of an exact count, policies that choose the count, and what is visible.

A *pattern* is a frozen dataclass that hides a given number of places of a view (``patterns.py``, ``noise.py``); a
*policy* chooses that number and is the mask sampler of a ``ViewRequest`` (``policies.py``). Masks that follow a
teacher's attention are made on the device (``attention.py``).

Every pattern counts *places*. Without ``alike`` axes a place is a token; with them it is a position on the remaining
axes, and its tokens along the alike axes are hidden or shown together: ``alike=("time",)`` makes tubes (Tong et al.
2022, section 3.3), ``alike=("group",)`` hides the same places in every channel group (SatMAE's consistent masks, Cong
et al. 2022, section 3.3). A place is available if any of its tokens is valid; only available places are drawn and
counted, and an invalid token is never masked, whatever happens to its place.
"""

from fmsuite.core.masking.attention import attention_mask
from fmsuite.core.masking.dirichlet import DirichletMasking
from fmsuite.core.masking.noise import NoisePattern, coloured_noise
from fmsuite.core.masking.patterns import (
    BlockPattern,
    GroupPattern,
    InverseBlockPattern,
    Pattern,
    RandomPattern,
)
from fmsuite.core.masking.places import check_ratio, check_ratio_range, count_places, keep_ids, kept_count
from fmsuite.core.masking.policies import (
    OddsMasking,
    RatioMasking,
    SpreadMasking,
)

__all__ = [
    "BlockPattern",
    "DirichletMasking",
    "GroupPattern",
    "InverseBlockPattern",
    "NoisePattern",
    "OddsMasking",
    "Pattern",
    "RandomPattern",
    "RatioMasking",
    "SpreadMasking",
    "attention_mask",
    "check_ratio",
    "check_ratio_range",
    "coloured_noise",
    "count_places",
    "keep_ids",
    "kept_count",
]
