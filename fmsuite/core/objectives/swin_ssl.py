"""The pretraining of Swin UNETR (Tang et al. 2022, "Self-supervised pre-training of Swin transformers for 3D medical
image analysis"): rotation, contrast and inpainting together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fmsuite.core.backbones.base import Backbone, Features
from fmsuite.core.data.sample import Batch, View
from fmsuite.core.distributed import mean_over, world_size
from fmsuite.core.objectives.base import Card, ObjectiveConfig, StepContext, check_company, register
from fmsuite.core.objectives.simclr import nt_xent
from fmsuite.core.objectives.single_view import VIEW, SingleView, ViewOptions
from fmsuite.core.seeding import uniform_from_keys
from fmsuite.errors import UsageError

TURNS = 4
_STRIDE = 0x9E3779B97F4A7C15 - (1 << 64)
"""The golden ratio of 64 bits: keeps the keys of one sample's draws apart from those of other samples."""
_CONVOLUTIONS = {2: (nn.Conv2d, nn.InstanceNorm2d, "bilinear"), 3: (nn.Conv3d, nn.InstanceNorm3d, "trilinear")}


class SwinSSLConfig(ViewOptions):
    """The options of ``ViewOptions``, and:

    Attributes:
        rotation_weight, contrast_weight, inpainting_weight: of the three terms.
        temperature: of the contrast.
        contrast_width: of the vectors that are contrasted.
        read: ``tokens``: the first token tells the rotation and the second is contrasted, as published; ``mean``: the
            mean of all valid tokens does both.
        max_cut: largest share of a view that is cut out, and again swapped; the share is uniform from 0.
        min_block, max_block: sides of the blocks, as shares of the view's.
    """

    rotation_weight: float = Field(default=1.0, ge=0)
    contrast_weight: float = Field(default=1.0, ge=0)
    inpainting_weight: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=0.5, gt=0)
    contrast_width: int = Field(default=512, ge=1)
    read: Literal["tokens", "mean"] = "tokens"
    max_cut: float = Field(default=0.3, gt=0, lt=1)
    min_block: float = Field(default=0.05, gt=0, lt=1)
    max_block: float = Field(default=0.25, gt=0, lt=1)


def turn(values: Tensor, turns: Tensor) -> Tensor:
    """Quarter turns of each sample in the plane of its last two axes, from the first of them towards the second.

    Args:
        values: (B, C, ..., L, L).
        turns: (B,) int64 from 0 to 3.
    """
    result = values
    for number in range(1, TURNS):
        chosen = (turns == number).view(-1, *[1] * (values.dim() - 1))
        result = torch.where(chosen, values.rot90(number, (-2, -1)), result)
    return result


def blocks_needed(max_cut: float, min_block: float, max_block: float, axes: int) -> int:
    """How many blocks of mean size reach the largest share, twice, as blocks are cut off at the edges."""
    return math.ceil(2 * max_cut / ((min_block + max_block) / 2) ** axes)


def block_mask(draws: Tensor, size: Sequence[int], max_cut: float, min_block: float, max_block: float) -> Tensor:
    """Blocks at random places, one after another until their volumes, overlaps counted twice, reach a random share.

    Args:
        draws: (B, 1 + M * 2 * A) uniform numbers: the share, and M blocks' corners and sides along A axes.
        size: the view's length along each axis.
        max_cut, min_block, max_block: see ``SwinSSLConfig``.

    Returns:
        (B, *size) bool, True inside a block.
    """
    share = draws[:, 0] * max_cut
    corners, sides = draws[:, 1:].unflatten(1, (-1, 2, len(size))).unbind(2)
    volume = torch.ones_like(corners[..., 0])
    inside = []
    for axis, length in enumerate(size):
        shortest, longest = max(1, int(min_block * length)), max(1, int(max_block * length))
        first = (corners[..., axis] * (length - shortest + 1)).floor()
        last = (first + shortest + (sides[..., axis] * (longest - shortest + 1)).floor()).clamp(max=length)
        volume = volume * (last - first) / length
        places = torch.arange(length, device=draws.device)
        inside.append((places >= first[..., None]) & (places < last[..., None]))
    counts = volume.cumsum(1) - volume < share[:, None]
    # The union of boxes: how many of them hold a place, as a product of what each axis says.
    inside[0] = inside[0] & counts[..., None]
    letters = "zyxwv"[: len(size)]
    terms = ",".join(f"bm{letter}" for letter in letters)
    return torch.einsum(f"{terms}->b{letters}", *(each.to(torch.float32) for each in inside)) > 0.5


@register
class SwinSSL(SingleView):
    """Three tasks on two turned and damaged copies of one crop.

    Each copy is turned by 0 to 3 quarters in the plane (y, x), about the body's axis; blocks of it are replaced by
    normal noise, and others by what another sample of the batch shows there (section 3.2). With logits r, vectors c
    and a decoded crop d for each of both copies,

    - rotation: cross-entropy of r and the turns;
    - contrast: ``nt_xent(c_1, c_2)`` at temperature 0.5, all other copies of the batch being negatives;
    - inpainting: ``mean |d - x|`` to the turned crop before it was damaged, over valid values.

    ``loss`` is their weighted sum. Noise is of the input's normalised spread, where the public code, whose input lies
    between 0 and 1, rescales it to that. A sample's draws follow from its key; the other sample that it swaps with is
    one of the same micro-batch on the same rank.

    Raises:
        UsageError: as ``SingleView``; for channel groups, a view that is not square in (y, x) or has a single token,
            more axes than convolutions have, or blocks whose range is empty; in ``check_batch``, for a batch of one.
    """

    name: ClassVar[str] = "swin_ssl"
    Config: ClassVar[type[ObjectiveConfig]] = SwinSSLConfig
    card: ClassVar[Card] = Card(
        family="embedding",
        paper="Tang et al. 2022, arXiv:2111.14791",
        predicts="a crop's turn, its other copy in the batch, and what was cut out of it",
        masks="blocks of up to 30%, replaced by noise, and up to 30% by another sample",
        checked="the public contrast and NT-Xent; loops over blocks, turns and pixels",
    )
    batch_statistic: ClassVar[str | None] = "negatives, and the samples that are swapped in,"
    config: SwinSSLConfig

    def __init__(self, config: SwinSSLConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        axes = backbone.spec.axes
        if len(self.grid.groups) > 1:
            raise UsageError("Objective 'swin_ssl' decodes one map of tokens; this input has channel groups.")
        if axes[-2:] != ("y", "x") or self.size[-2] != self.size[-1] or len(axes) not in _CONVOLUTIONS:
            raise UsageError(
                f"Objective 'swin_ssl' turns square views in the plane (y, x), with one axis before it at most; these "
                f"are ({', '.join(axes)}) of {self.size}.",
                "Set objective.size to a square.",
            )
        if config.min_block > config.max_block:
            raise UsageError(
                f"objective.min_block {config.min_block} exceeds objective.max_block {config.max_block}.",
                "Exchange them.",
            )
        if math.prod(self.grid.shape(self.size)) < 2:
            raise UsageError(
                f"Objective 'swin_ssl' needs two tokens, and a view of {self.size} is one patch.",
                "Raise objective.size or the input's size.",
            )
        self.rotation_head = nn.Linear(backbone.width, TURNS)
        self.contrast_head = nn.Linear(backbone.width, config.contrast_width)
        self.decoder = _decoder(backbone.width, backbone.spec.in_chans, self.grid.patch_size)

    def check_batch(self, samples: int) -> None:
        check_company(self, samples)

    def forward(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        self.check_batch(len(batch) * world_size())
        view = batch.views[VIEW][0]
        copies = [self.damage(view, number) for number in range(2)]
        features = self.backbone.forward_crops([damaged for damaged, _, _ in copies])
        usable = features[0].usable & features[1].usable
        heard = usable & self._heard(features[0]) & self._heard(features[1])
        (first_logits, first), (second_logits, second) = (self.read(each) for each in features)
        logits = torch.cat([first_logits, second_logits])
        both = torch.cat([heard, heard])
        turns = torch.cat([turned for _, _, turned in copies])
        entropy = functional.cross_entropy(logits.to(torch.float32), turns, reduction="none")
        errors = [self.inpainting(each, whole) for each, (_, whole, _) in zip(features, copies, strict=True)]
        terms = {
            "rotation": mean_over(entropy, both),
            "contrast": nt_xent(first, second, self.config.temperature, heard),
            "inpainting": mean_over(torch.cat(errors), torch.cat([usable, usable])),
        }
        config = self.config
        weights = (config.rotation_weight, config.contrast_weight, config.inpainting_weight)
        total = torch.stack([weight * term for weight, term in zip(weights, terms.values(), strict=True)]).sum()
        return {"loss": total, **terms}

    def damage(self, view: View, number: int) -> tuple[View, View, Tensor]:
        """A copy of a view, turned and damaged; the same before it was damaged; and its quarter turns, (B,) int64.

        Args:
            view: normalised pixels.
            number: of the copy.
        """
        config, size = self.config, tuple(view.pixels.shape[2:])
        blocks = blocks_needed(config.max_cut, config.min_block, config.max_block, len(size))
        amount = 1 + blocks * 2 * len(size)
        draws = self._draws(view, 2 * number, 2 + 2 * amount)
        turns = (draws[:, 0] * TURNS).long()
        valid = None if view.valid is None else turn(view.valid, turns)
        spacing = view.spacing
        if spacing is not None:
            crosswise = torch.cat([spacing[:, :-2], spacing[:, -2:].flip(1)], dim=1)
            spacing = torch.where((turns % 2 == 1)[:, None], crosswise, spacing)
        keys = None if view.keys is None else view.keys + number
        whole = replace(view, pixels=turn(view.pixels, turns), valid=valid, spacing=spacing, keys=keys)

        limits = (config.max_cut, config.min_block, config.max_block)
        here = torch.ones_like(whole.pixels[:, :1], dtype=torch.bool) if valid is None else valid
        cut = block_mask(draws[:, 2 : 2 + amount], size, *limits)[:, None] & here
        noise = self._normal(view, 2 * number + 1)
        pixels = torch.where(cut, noise.to(whole.pixels.dtype), whole.pixels)

        # Only samples with data are swapped in, so that one without changes nothing.
        rows = here.flatten(1).any(1).nonzero().flatten()
        if len(rows):
            others = rows[(draws[:, 1] * len(rows)).long().clamp(max=len(rows) - 1)]
            swap = block_mask(draws[:, 2 + amount :], size, *limits)[:, None] & here & here[others]
            pixels = torch.where(swap, pixels[others], pixels)
        return replace(whole, pixels=pixels), whole, turns

    def read(self, features: Features) -> tuple[Tensor, Tensor]:
        """(B, 4) logits of the turns and (B, ``contrast_width``) vectors."""
        if self.config.read == "tokens":
            first, second = features.patches[:, 0], features.patches[:, 1]
        else:
            first = second = features.mean()
        return self.rotation_head(first), self.contrast_head(second)

    def inpainting(self, features: Features, whole: View) -> Tensor:
        """(B,) mean absolute difference of each decoded view and its undamaged pixels, over valid values."""
        grid = features.layout.shape or ()
        decoded = self.decoder(features.patches.transpose(1, 2).unflatten(2, grid)).to(torch.float32)
        difference = (decoded - whole.pixels.to(torch.float32)).abs()
        if whole.valid is None:
            return difference.flatten(1).mean(1)
        weight = whole.valid.expand_as(difference).to(torch.float32)
        return (difference * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1)

    def _heard(self, features: Features) -> Tensor:
        """(B,) bool: the tokens that the heads read carry data."""
        if self.config.read == "tokens" and features.layout.valid is not None:
            return features.layout.valid[:, :2].all(1)
        return features.usable

    def _draws(self, view: View, salt: int, count: int) -> Tensor:
        """(B, count) uniform numbers."""
        device = view.pixels.device
        if view.keys is None:
            return torch.rand(len(view), count, device=device)
        keys = view.keys.to(device)[:, None] + torch.arange(count, device=device) * _STRIDE
        return uniform_from_keys(keys, salt)

    def _normal(self, view: View, salt: int) -> Tensor:
        """Standard normal noise of the shape of a view's pixels."""
        uniform = self._draws(view, salt, view.pixels[0].numel()).view(view.pixels.shape)
        return torch.special.ndtri(uniform.clamp(min=2**-25))


def _decoder(width: int, channels: int, patch_size: tuple[int, ...]) -> nn.Sequential:
    """(B, D, *tokens) to (B, C, *pixels): convolution, instance norm, leaky ReLU and a linear upsampling by one prime
    factor of the patch at a time, the width halved each time, and a last convolution of single pixels."""
    convolution, norm, mode = _CONVOLUTIONS[len(patch_size)]
    factors = [_factors(length) for length in patch_size]
    steps = max(1, max(map(len, factors)))
    parts: list[nn.Module] = []
    for step in range(steps):
        narrower = max(width // 2, 8)
        scale = tuple(float(each[step]) if step < len(each) else 1.0 for each in factors)
        parts += [convolution(width, narrower, 3, padding=1), norm(narrower), nn.LeakyReLU()]
        parts.append(nn.Upsample(scale_factor=scale, mode=mode, align_corners=False))
        width = narrower
    return nn.Sequential(*parts, convolution(width, channels, 1))


def _factors(number: int) -> list[int]:
    found, prime = [], 2
    while number > 1:
        while number % prime == 0:
            found.append(prime)
            number //= prime
        prime += 1
    return found
