"""What objectives with one view of each sample share: the view, masks on it, and what an encoder makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fmsuite.core.backbones.base import Backbone, Features
from fmsuite.core.data.sample import MaskSampler, View, ViewRequest
from fmsuite.core.masking import keep_ids
from fmsuite.core.objectives.base import AspectRange, Objective, ObjectiveConfig, Share, crop_size
from fmsuite.core.objectives.group_heads import groups_of, project
from fmsuite.core.objectives.masks import MaskOptions, attend, ratio_sampler
from fmsuite.core.tokens import PatchGrid, TokenLayout, take

VIEW = "image"


class ViewOptions(ObjectiveConfig):
    """
    Attributes:
        size: crop size; the model's own if not given.
        scale, ratio: range of the crop's share of the sample and of its aspect ratio.
        augment: strength of the domain's augmentation.
    """

    size: int | tuple[int, ...] | None = None
    scale: Share = (0.2, 1.0)
    ratio: AspectRange = (3 / 4, 4 / 3)
    augment: Literal["none", "weak", "strong"] = "weak"

    def request(self, name: str, size: tuple[int, ...], mask: MaskSampler | None = None) -> ViewRequest:
        """A view of these options, of a size that was checked by ``crop_size``."""
        return ViewRequest(name, size, scale=self.scale, ratio=self.ratio, augment=self.augment, mask=mask)


class SingleView(Objective):
    """Base of the objectives that ask for one view of each sample.

    Attributes:
        grid: how the view is cut.
        size: of the view.

    Raises:
        UsageError: for a bag of vectors, a size that the patches do not divide, or a backbone that cannot take it.
    """

    config: ViewOptions

    def __init__(self, config: ViewOptions, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.size = crop_size(self, "size", config.size, backbone.spec.size)
        assert backbone.grid is not None
        self.grid: PatchGrid = backbone.grid

    @property
    def pooling(self) -> str:
        """The mean of the patches: no loss acts on the class token."""
        return "mean"

    def mask_sampler(self) -> MaskSampler | None:
        """Draws the view's mask, or masks; ``None`` masks nothing."""
        return None

    def view_requests(self) -> tuple[ViewRequest, ...]:
        return (self.config.request(VIEW, self.size, self.mask_sampler()),)

    def whole_layout(self) -> TokenLayout:
        """Of a view without invalid tokens, at the input's own spacing: the constructor tries positions on it. Where
        each sample brings its own, it is 1."""
        spec = self.backbone.spec
        spacing = spec.spacing
        if spacing is None and spec.spacing_unit != "px":
            spacing = (1.0,) * len(spec.axes)
        return self.grid.layout(self.size, spacing=None if spacing is None else torch.tensor(spacing))


class MaskedViewConfig(MaskOptions, ViewOptions):
    """The options of ``MaskOptions`` and of ``ViewOptions``."""


class MaskedView(SingleView):
    """Base of the objectives that ask for one view of each sample, with a mask.

    Raises:
        UsageError: as ``SingleView``; for masks that do not fit the tokens (see ``ratio_sampler``).
    """

    teaches_masks: ClassVar[bool] = False
    """It has a teacher that sees the whole view and whose attention masks may follow. Such an objective makes sure that
    the teacher can show it, and gives the teacher's features to ``masked``."""
    config: MaskedViewConfig

    def __init__(self, config: MaskedViewConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.sampler = self.make_sampler()

    def make_sampler(self) -> MaskSampler:
        """What draws the masks; of the constructor."""
        return ratio_sampler(self, self.config, self.size, attention=self.teaches_masks)

    def mask_sampler(self) -> MaskSampler:
        return self.sampler

    def masked(self, view: View, taught: Features | None = None) -> tuple[Tensor, TokenLayout]:
        """
        Args:
            view: normalised pixels with a mask.
            taught: of the teacher on the whole view, whose attention the mask follows if it is there. Tokens that are
                invalid to it are invalid.

        Returns:
            The (B, N) bool mask of the view without invalid tokens, and the layout of its N tokens.
        """
        if view.mask is None:
            raise ValueError(f"the view of objective '{self.name}' has no mask")
        layout, mask = self.backbone.layout(view), view.mask
        if taught is not None:
            layout = replace(layout, valid=taught.layout.valid)
            if taught.attention is not None:
                mask = attend(mask, taught.attention, self.config, layout.valid)
        return mask if layout.valid is None else mask & layout.valid, layout


def masked_ids(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The masked tokens of a batch, for heads that predict nothing else.

    Args:
        mask: (B, N) bool.

    Returns:
        ids: (B, M) int64 in rising order, M the largest number of a sample and at least 1. Shorter rows are filled with
            other tokens' numbers; no number appears twice in a row.
        counted: (B, M) bool, False at the filling.
    """
    ids, counted = keep_ids(~mask)
    return ids, torch.ones_like(ids, dtype=torch.bool) if counted is None else counted


class MaskTokenEncoder(MaskedView):
    """Base of the objectives whose encoder sees mask tokens in the place of hidden ones.

    Raises:
        UsageError: as ``MaskedView``; for a backbone that cannot mask tokens.
    """

    head: nn.Linear | nn.ModuleList
    """See ``group_heads``."""

    def __init__(self, config: MaskedViewConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.need(can_mask_tokens=True)

    def predict(self, view: View, taught: Features | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:
            view, taught: see ``masked``.

        Returns:
            (B, N, P) predictions of ``head`` for every token and the (B, N) bool mask without invalid tokens.
        """
        mask, _ = self.masked(view, taught)
        return project(self.head, self.backbone(view, mask=mask).patches), mask

    def predict_masked(self, view: View, taught: Features | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            view, taught: see ``masked``.

        Returns:
            (B, M, P) predictions for the masked tokens alone, and which those are; see ``masked_ids``.
        """
        mask, layout = self.masked(view, taught)
        ids, counted = masked_ids(mask)
        tokens = take(self.backbone(view, mask=mask).patches, ids)
        return project(self.head, tokens, groups_of(self.head, ids, layout.num_tokens)), ids, counted


@dataclass
class Visible:
    """What an encoder made of the tokens that it saw.

    Attributes:
        features: of the K visible tokens.
        ids, keep_valid: which they are, (B, K); see ``keep_ids``.
        mask: (B, N) bool, hidden and valid tokens.
        layout: of all N tokens.
    """

    features: Features
    ids: Tensor
    keep_valid: Tensor | None
    mask: Tensor
    layout: TokenLayout


class VisibleEncoder(MaskedView):
    """Base of the objectives whose encoder sees the unmasked tokens only.

    Raises:
        UsageError: as ``MaskedView``; for a backbone that cannot drop tokens.
    """

    def __init__(self, config: MaskedViewConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.need(can_drop_tokens=True)

    def encode(self, view: View, layers: Sequence[int] = (), norm_layers: bool = True) -> Visible:
        """The features of the visible tokens of a normalised view with a mask; for the layers see
        ``Backbone.forward``."""
        mask, layout = self.masked(view)
        ids, keep_valid = keep_ids(mask, layout.valid)
        features = self.backbone(view, keep=ids, keep_valid=keep_valid, layers=layers, norm_layers=norm_layers)
        return Visible(features, ids, keep_valid, mask, layout)
