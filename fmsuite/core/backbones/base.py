"""What a backbone is to objectives, encoders and probes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fmsuite.core.data.sample import View
from fmsuite.core.inputs import InputSpec
from fmsuite.core.tokens import PatchGrid, TokenLayout
from fmsuite.errors import UsageError

MISSING = {"has_cls": "has no class token"}
"""What a backbone is said to lack, where the name of the capability does not tell."""


@dataclass
class Features:
    """A backbone's output.

    Attributes:
        patches: (B, N, D) patch tokens after the final norm.
        layout: where they are; ``layout.valid`` tells which of them carry data.
        cls: (B, D) class token after the final norm, or ``None``.
        registers: (B, R, D), or ``None``.
        intermediate: one (B, N, D) tensor for each layer that was asked for, in that order, patch tokens only,
            through the final norm if that was asked for.
        intermediate_prefix: what stands before the patches of each of those layers, (B, P, D): class token and
            registers. Empty where the backbone does not show them.
        attention: (B, heads, N) float32, what the class token attends to among the patches in the last block (the mean
            over the valid patches' attention where there is no class token), if it was asked for. Rows sum to one, less
            what goes to class token and registers; invalid patches get none, unless no token is valid.
        maps: (B, width, *size) feature maps of several resolutions, the finest first, of a backbone that has them
            (``SwinUNETR``), for a decoder. Empty otherwise.
    """

    patches: Tensor
    layout: TokenLayout
    cls: Tensor | None = None
    registers: Tensor | None = None
    intermediate: tuple[Tensor, ...] = ()
    attention: Tensor | None = None
    intermediate_prefix: tuple[Tensor, ...] = ()
    maps: tuple[Tensor, ...] = ()

    @property
    def sequence(self) -> Tensor:
        """(B, S, D) all tokens there are, in order: class token, registers, patches."""
        prefix = [] if self.cls is None else [self.cls[:, None]]
        if self.registers is not None:
            prefix.append(self.registers)
        return torch.cat([*prefix, self.patches], dim=1)

    @property
    def usable(self) -> Tensor:
        """(B,) bool, samples with at least one valid token."""
        if self.layout.valid is None:
            return torch.ones(len(self.patches), dtype=torch.bool, device=self.patches.device)
        return self.layout.valid.any(1)

    def mean(self) -> Tensor:
        """(B, D) mean over the valid patch tokens; zero where a sample has none."""
        if self.layout.valid is None:
            return self.patches.mean(1)
        # In float32: half precision cannot count beyond a few hundred tokens.
        weight = self.layout.valid.to(torch.float32)[..., None]
        return ((self.patches * weight).sum(1) / weight.sum(1).clamp(min=1)).to(self.patches.dtype)

    def pooled(self, pooling: str) -> Tensor:
        """(B, D) or (B, 2D) by convention.

        Args:
            pooling: ``"cls"``, ``"mean"`` or ``"cls+mean"`` (concatenated, as DINOv2's linear probe does).

        Raises:
            UsageError: for another name, or ``cls`` of a backbone that has no class token.
        """
        if pooling == "mean":
            return self.mean()
        if pooling not in ("cls", "cls+mean"):
            raise UsageError(f"There is no pooling '{pooling}'.", "Use cls, mean or cls+mean.")
        if self.cls is None:
            raise UsageError(f"Pooling '{pooling}' needs a class token and this backbone has none.", "Use mean.")
        return self.cls if pooling == "cls" else torch.cat([self.cls, self.mean()], dim=-1)


class Backbone(nn.Module, ABC):
    """Maps views to tokens.

    A subclass declares what it cannot do, and an objective that needs it refuses the backbone by name.

    Attributes:
        spec: the input it was built for.
        grid: how it cuts that input; ``None`` for bags.
        width: D.
        depth: number of blocks, for layer-wise learning-rate decay.
        can_drop_tokens: runs on a subset of tokens (``keep``).
        can_mask_tokens: replaces tokens by a learned mask token (``mask``).
        can_resize: accepts sizes other than ``spec.size``.
        can_show_attention: returns ``Features.attention``.
    """

    can_drop_tokens: bool = False
    can_mask_tokens: bool = False
    can_resize: bool = False
    can_show_attention: bool = False

    spec: InputSpec
    grid: PatchGrid | None
    width: int
    depth: int

    def lacks(self, capability: str) -> str | None:
        """``None`` if the backbone has a capability (``has_cls`` or one that begins with ``can_``), else what it lacks,
        as a sentence that begins with its name goes on: "cannot drop tokens"."""
        if getattr(self, capability):
            return None
        return MISSING.get(capability, f"cannot {capability.removeprefix('can_').replace('_', ' ')}")

    @property
    @abstractmethod
    def has_cls(self) -> bool:
        """Whether ``Features.cls`` is present."""

    @abstractmethod
    def forward(
        self,
        view: View,
        *,
        keep: Tensor | None = None,
        keep_valid: Tensor | None = None,
        mask: Tensor | None = None,
        layers: Sequence[int] = (),
        norm_layers: bool = True,
        attention: bool = False,
    ) -> Features:
        """
        Args:
            view: normalised pixels, (B, C, *size) or (B, N, D).
            keep: (B, K) int64, the only tokens to run on; masked encoders never see the others. ``Features`` then
                has K patch tokens, in this order.
            keep_valid: (B, K) bool, False at padding in ``keep``.
            mask: (B, N) bool, tokens whose embedding is replaced by the mask token before positions are added.
            layers: numbers of blocks (0-based, negative from the end) whose patch tokens to return as well.
            norm_layers: put those through the final norm.
            attention: return the last block's attention as well.
        """

    def forward_crops(
        self,
        views: Sequence[View],
        masks: Sequence[Tensor | None] | None = None,
        keep: Sequence[Tensor | None] | None = None,
        keep_valid: Sequence[Tensor | None] | None = None,
    ) -> list[Features]:
        """Several crops, of several sizes, in one call: crops of equal size go through together.

        Args:
            views: any number of views; each may have its own batch size.
            masks: for each view the tokens to replace by the mask token, or ``None``.
            keep, keep_valid: for each view the only tokens to run on, or ``None``; see ``forward``.

        Returns:
            Features of each view, in the same order; equal to separate calls.
        """
        crops = bundle_crops(views, masks, keep, keep_valid, self)
        return crops.apart(
            [self(view, keep=kept, keep_valid=valid, mask=mask) for view, kept, valid, mask in crops.bundles]
        )

    def transformer_blocks(self) -> Sequence[nn.Module]:
        """Its blocks in order, each a module that is called once a pass: what FSDP2 gathers one at a time. None, by
        default."""
        return ()

    @abstractmethod
    def layer_of(self, parameter: str) -> int:
        """The layer of a parameter by its name in this module: 0 for embeddings and positions, i + 1 for block i,
        ``depth + 1`` for what comes after the blocks. Layer-wise decay uses it."""

    def layout(self, view: View) -> TokenLayout:
        """Where the tokens of a view are, with validity taken from its pixels."""
        spacing = view.spacing
        if self.grid is None:
            coords = torch.stack([view.coords[axis] for axis in self.spec.axes], dim=-1).to(torch.float32)
            pitch = torch.ones(len(self.spec.axes), device=coords.device)
            return TokenLayout(self.spec.axes, coords, None, pitch, view.valid)
        size = tuple(view.pixels.shape[2:])
        if spacing is None and self.spec.spacing is not None:
            # Filled on the device: for a copy from the host the host would wait.
            device = view.pixels.device
            spacing = torch.stack([torch.full((), step, device=device) for step in self.spec.spacing])
        valid = None if view.valid is None else self.grid.valid_tokens(view.valid)
        return self.grid.layout(size, view.coords, spacing, valid, view.pixels.device)


Bundle = tuple[View, Tensor | None, Tensor | None, Tensor | None]
"""A view, and its ``keep``, ``keep_valid`` and ``mask``."""


@dataclass
class Crops:
    """Views that go through a backbone together.

    Attributes:
        bundles: views of one size after another, without the masks that they carry.
        members: for each bundle the numbers of the views in it, in order, and how many samples each has.
    """

    bundles: list[Bundle]
    members: list[list[tuple[int, int]]]

    def apart(self, features: Sequence[Features]) -> list[Features]:
        """The features of the bundles as those of each view, in the views' order."""
        results: dict[int, Features] = {}
        for joined, members in zip(features, self.members, strict=True):
            start = 0
            for number, samples in members:
                results[number] = _rows(joined, start, start + samples)
                start += samples
        return [results[number] for number in range(len(results))]


def bundle_crops(
    views: Sequence[View],
    masks: Sequence[Tensor | None] | None,
    keep: Sequence[Tensor | None] | None,
    keep_valid: Sequence[Tensor | None] | None,
    backbone: Backbone,
) -> Crops:
    """Join views of equal size; one of which only some tokens are kept stays alone. For the arguments see
    ``Backbone.forward_crops``."""
    given, kept, kept_valid = (list(each) if each else [None] * len(views) for each in (masks, keep, keep_valid))
    for what, each in (("masks", given), ("keep", kept), ("keep_valid", kept_valid)):
        if len(each) != len(views):
            raise ValueError(f"{len(each)} {what} for {len(views)} views")
    places: dict[tuple, list[int]] = {}
    for number, view in enumerate(views):
        extras = (view.spacing is None, view.keys is None, tuple(sorted(view.coords)))
        alone = None if kept[number] is None else number
        places.setdefault((tuple(view.pixels.shape[1:]), extras, alone), []).append(number)
    bundles: list[Bundle] = []
    for members in places.values():
        joined = View.cat([replace(views[number], mask=None) for number in members])
        mask = None
        if any(given[number] is not None for number in members):
            mask = torch.cat([_mask_or_none(backbone, views[number], given[number]) for number in members])
        bundles.append((joined, kept[members[0]], kept_valid[members[0]], mask))
    return Crops(bundles, [[(number, len(views[number])) for number in members] for members in places.values()])


def _mask_or_none(backbone: Backbone, view: View, mask: Tensor | None) -> Tensor:
    if mask is not None:
        return mask
    return torch.zeros(len(view), backbone.layout(view).num_tokens, dtype=torch.bool, device=view.pixels.device)


def _rows(features: Features, start: int, stop: int) -> Features:
    """The features of some samples of a batch."""

    def cut(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[start:stop]

    layout = features.layout
    layout = replace(
        layout,
        coords=layout.coords[start:stop] if layout.coords.dim() == 3 else layout.coords,
        pitch=cut(layout.pitch) if layout.pitch is not None and layout.pitch.dim() == 2 else layout.pitch,
        valid=cut(layout.valid),
    )
    return Features(
        features.patches[start:stop],
        layout,
        cut(features.cls),
        cut(features.registers),
        tuple(output[start:stop] for output in features.intermediate),
        cut(features.attention),
        tuple(output[start:stop] for output in features.intermediate_prefix),
        tuple(output[start:stop] for output in features.maps),
    )
