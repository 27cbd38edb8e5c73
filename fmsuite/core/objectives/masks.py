"""What objectives that mask tokens share: the options of a mask, and the sampler that they describe."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from fmsuite.core.data.sample import MaskSampler
from fmsuite.core.masking import (
    BlockPattern,
    GroupPattern,
    InverseBlockPattern,
    NoisePattern,
    Pattern,
    RandomPattern,
    RatioMasking,
    attention_mask,
)
from fmsuite.core.masking.attention import AttentionKind
from fmsuite.core.masking.noise import Colour
from fmsuite.core.masking.places import check_count, check_open
from fmsuite.core.objectives.base import Objective, ObjectiveConfig
from fmsuite.errors import UsageError

Masking = Literal[
    "random",
    "block",
    "inverse_block",
    "tube",
    "group",
    "noise",
    "attention_high",
    "attention_hint",
    "attention_low",
]
ATTENTION: dict[str, AttentionKind] = {"attention_high": "high", "attention_hint": "hint", "attention_low": "low"}
TIME = "time"
MASK_RATIO = "objective.mask_ratio"

USED_BY: dict[str, tuple[str, ...]] = {
    "within": ("group",),
    "min_block": ("block",),
    "lowest_aspect": ("block", "inverse_block"),
    "roll": ("inverse_block",),
    "mask_noise": ("noise",),
    "mask_noise_sigma": ("noise",),
    "mask_noise_wide": ("noise",),
    "hint_share": ("attention_hint",),
    "hint_reveal": ("attention_hint",),
}
"""Which kinds of masks read an option that not all of them read."""


class PatternOptions(ObjectiveConfig):
    """
    Attributes:
        masking: which tokens are hidden. ``random`` (MAE); ``block``: boxes (BEiT); ``inverse_block``: all but one box
            (CAPI); ``tube``: random, alike along ``time`` or the axes in ``alike`` (VideoMAE); ``group``: every channel
            group by a pattern of its own, the same count in each (SatMAE); ``noise``: where filtered noise is high
            (ColorMAE); ``attention_high``, ``attention_hint``, ``attention_low``: what a teacher attends to most, most
            but for some hints, or least (AttMask).
        alike: token axes along which the mask repeats: ``[time]`` for tubes, ``[group]`` for the same places in every
            channel group.
        within: the pattern of one channel group, for ``group``.
        min_block: smallest box of ``block`` in places; the method's own if not given.
        lowest_aspect: boxes have aspect ratios between this and its inverse; 0.3 for ``block`` and 0.5 for
            ``inverse_block``, as published, if not given.
        roll: the box of ``inverse_block`` goes on at the opposite edge.
        mask_noise: filter of ``noise``: ``red`` (low-pass), ``blue`` (high-pass), ``green`` (band-pass), ``purple``
            (band-stop).
        mask_noise_sigma, mask_noise_wide: standard deviations, in tokens, of the filter's Gaussian and, for ``green``
            and ``purple``, of its wider one.
        hint_share, hint_reveal: of this share of the tokens, the most attended ones, ``attention_hint`` reveals this
            share.
    """

    masking: Masking = "random"
    alike: tuple[str, ...] = ()
    within: Literal["random", "block", "inverse_block", "noise"] = "random"
    min_block: int | None = Field(default=None, ge=1)
    lowest_aspect: float | None = Field(default=None, gt=0, le=1)
    roll: bool = True
    mask_noise: Colour = "green"
    mask_noise_sigma: float = Field(default=1.0, gt=0)
    mask_noise_wide: float = Field(default=2.0, gt=0)
    hint_share: float = Field(default=0.1, gt=0, le=1)
    hint_reveal: float = Field(default=0.5, gt=0, le=1)

    @property
    def follows_attention(self) -> bool:
        """Whether the final mask is made of a teacher's attention, by ``attend``."""
        return self.masking in ATTENTION


class MaskOptions(PatternOptions):
    """
    Attributes:
        mask_ratio: share of tokens that are hidden.
    """

    mask_ratio: float = Field(default=0.75, gt=0, lt=1)


def pattern_for(
    objective: Objective,
    options: PatternOptions,
    size: tuple[int, ...],
    attention: bool = False,
    min_block: int | None = 4,
    one_group: bool = False,
) -> Pattern:
    """The pattern that the loader draws. For the attention kinds, of which only the count matters, it is random.

    Args:
        objective: whose backbone cuts the view.
        options: checked here.
        size: of the view.
        attention: the objective has a teacher that sees the whole view, whose attention it gives to ``attend``, and
            makes sure that this teacher can show it.
        min_block: smallest box where ``options.min_block`` is not given.
        one_group: the pattern is drawn on the tokens of one channel group.

    Raises:
        UsageError: for options that do not fit each other, or the tokens.
    """
    _check_used(options)
    alike = options.alike
    pattern: Pattern
    if options.follows_attention:
        if not attention:
            raise UsageError(
                f"Objective '{objective.name}' has no teacher that sees the whole view, so its masks cannot follow its "
                f"attention (objective.masking is {options.masking}).",
                "Choose another objective.masking.",
            )
        if alike:
            raise UsageError(
                f"Masks that follow attention cannot be alike along {', '.join(alike)}.", "Remove objective.alike."
            )
        pattern = RandomPattern()
    elif options.masking == "tube":
        alike = alike or (TIME,)
        pattern = RandomPattern(alike)
    elif options.masking == "group":
        pattern = GroupPattern(within=_plain(options.within, alike, options, min_block))
    else:
        pattern = _plain(options.masking, alike, options, min_block)
    grid = objective.backbone.grid
    if grid is None:
        if options.masking not in ("random", *ATTENTION):
            raise UsageError(
                f"objective.masking {options.masking} needs a grid, and a bag of vectors has none.", "Use random."
            )
        return pattern
    axes, shape = grid.token_axes, grid.shape(size)
    if one_group and len(grid.groups) > 1:
        axes, shape = axes[1:], shape[1:]
    try:
        pattern.places(axes, shape, np.ones(math.prod(shape), dtype=bool))
    except UsageError as error:
        key = "alike" if options.alike else "masking"
        hint = error.hint
        if options.masking == "tube" and not options.alike:
            hint = f"Tubes run along '{TIME}'; name another axis in objective.alike. The tokens' are {', '.join(axes)}."
        raise UsageError(f"objective.{key}: {error.message}", hint) from error
    return pattern


def _check_used(options: PatternOptions) -> None:
    """An option that nothing would read is a misunderstanding."""
    kind = options.within if options.masking == "group" else options.masking
    fields = type(options).model_fields
    for key, kinds in USED_BY.items():
        if getattr(options, key) != fields[key].default and not {kind, options.masking} & set(kinds):
            raise UsageError(
                f"objective.{key} has no effect without masking: {' or '.join(kinds)}.", "Remove it, or change masking."
            )
    if kind == "noise" and options.mask_noise in ("red", "blue"):
        if options.mask_noise_wide != fields["mask_noise_wide"].default:
            raise UsageError(
                f"objective.mask_noise_wide has no effect on {options.mask_noise} noise.",
                "Remove it, or use green or purple.",
            )
    elif kind == "noise" and options.mask_noise_wide <= options.mask_noise_sigma:
        raise UsageError(
            f"objective.mask_noise_wide {options.mask_noise_wide} is not above objective.mask_noise_sigma "
            f"{options.mask_noise_sigma}.",
            "Give the wider Gaussian the larger number.",
        )


def _plain(kind: str, alike: tuple[str, ...], options: PatternOptions, min_block: int | None) -> Pattern:
    if kind == "random":
        return RandomPattern(alike)
    if kind == "noise":
        return NoisePattern(alike, options.mask_noise, options.mask_noise_sigma, options.mask_noise_wide)
    if kind == "block":
        return BlockPattern(alike, options.min_block or min_block, options.lowest_aspect or 0.3)
    return InverseBlockPattern(alike, options.lowest_aspect or 0.5, options.roll)


def whole_places(objective: Objective, pattern: Pattern, size: tuple[int, ...]) -> int:
    """The number of places of a view without invalid tokens.

    Raises:
        UsageError: if the pattern does not fit the tokens.
    """
    grid = objective.backbone.grid
    assert grid is not None
    shape = grid.shape(size)
    return pattern.places(grid.token_axes, shape, np.ones(math.prod(shape), dtype=bool))


def ratio_sampler(
    objective: Objective, options: MaskOptions, size: tuple[int, ...], attention: bool = False
) -> MaskSampler:
    """Masks with MAE's count (``kept_count``) in the pattern that the options describe.

    Args:
        objective: whose backbone cuts the view.
        options: checked here.
        size: of the view; ``()`` for a bag of vectors.
        attention: see ``pattern_for``.

    Raises:
        UsageError: for options that do not fit each other or the tokens, or a ratio that hides none or all of them.
    """
    pattern = pattern_for(objective, options, size, attention)
    if objective.backbone.grid is None:
        check_open(options.mask_ratio, MASK_RATIO)
    else:
        check_count(options.mask_ratio, whole_places(objective, pattern, size), MASK_RATIO)
    return RatioMasking(options.mask_ratio, pattern)


def attend(mask: Tensor, attention: Tensor, options: PatternOptions, valid: Tensor | None) -> Tensor:
    """The final mask of an objective that calls ``ratio_sampler`` with ``attention``.

    Args:
        mask: (B, N) bool of the loader.
        attention: (B, heads, N) of the teacher, ``Features.attention``.
        options: the objective's.
        valid: (B, N) bool; ``None`` means all.

    Returns:
        (B, N) bool with each sample's count at valid tokens; ``mask`` itself for kinds that do not follow attention.
    """
    if not options.follows_attention:
        return mask
    kind = ATTENTION[options.masking]
    return attention_mask(mask, attention, kind, valid, options.hint_share, options.hint_reveal)
