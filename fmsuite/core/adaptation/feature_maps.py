"""A backbone's output as feature maps on the spatial axes of its input: what dense decoders read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmsuite.core.backbones.base import Backbone
from fmsuite.core.backbones.datewise import Datewise
from fmsuite.core.backbones.swin_unetr import SwinUNETR
from fmsuite.core.backbones.timm_backbone import TimmBackbone
from fmsuite.core.data.sample import View
from fmsuite.core.inputs import SPATIAL_AXES
from fmsuite.core.tokens import PatchGrid, TokenLayout
from fmsuite.errors import UsageError


@dataclass(frozen=True)
class Level:
    """One of the maps that a decoder is built for.

    Attributes:
        width: channels.
        stride: input samples that a cell measures along each spatial axis.
    """

    width: int
    stride: tuple[float, ...]


@dataclass
class FeatureMaps:
    """
    Attributes:
        levels: (B, D, *shape) each: a transformer's layers, the first one first and all of one shape, or a hierarchical
            backbone's maps, the finest first. Zero where no valid token is.
        size: of the input along its spatial axes, a multiple of the strides.
        pixels: (B, C, *size), normalised, zero where invalid.
        vectors: (B, D) class token of each level; empty where there is none.
    """

    levels: tuple[Tensor, ...]
    size: tuple[int, ...]
    pixels: Tensor
    vectors: tuple[Tensor, ...] = ()


class Decoder(nn.Module, ABC):
    """Feature maps to one number for each class and input sample.

    Built for the levels that it will be given and the channels of the input.
    """

    @classmethod
    @abstractmethod
    def wanted(cls, stride: tuple[float, ...]) -> int:
        """How many layers it takes from a transformer with patches of that size."""

    @abstractmethod
    def forward(self, maps: FeatureMaps) -> list[Tensor]:
        """(B, K, *size) logits, followed by coarser ones of deep supervision, the finest first."""


@runtime_checkable
class Hierarchical(Protocol):
    """A backbone with maps of several resolutions.

    Attributes:
        levels: of its maps, the finest first.
    """

    levels: tuple[Level, ...]

    def maps(self, view: View) -> tuple[Tensor, ...]:
        """(B, D, *shape) each, of a normalised view."""


def spread(depth: int, number: int) -> tuple[int, ...]:
    """Numbers of blocks that end ``number`` equal parts of a depth: 2, 5, 8, 11 of 12 for four. A backbone with fewer
    blocks gives some of them twice."""
    return tuple(math.ceil((part + 1) * depth / number) - 1 for part in range(number))


def spatial_axes(axes: Sequence[str]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis in SPATIAL_AXES)


def token_map(tokens: Tensor, layout: TokenLayout, axes: Sequence[str]) -> Tensor:
    """Tokens on a regular grid as a map on some of its axes: the mean over the valid tokens along the others (dates,
    channel groups), zero where there is none.

    Args:
        tokens: (B, N, D). layout: of the N tokens, regular.
        axes: of the map, in the layout's order.

    Returns:
        (B, D, *shape).

    Raises:
        UsageError: if the tokens fill no grid, or it lacks an axis.
    """
    if layout.shape is None:
        raise UsageError("These tokens fill no regular grid, so they make no feature map.", "Use all tokens of a grid.")
    missing = [axis for axis in axes if axis not in layout.axes]
    if missing:
        raise UsageError(f"These tokens have no axis '{missing[0]}'.", f"Their axes are {', '.join(layout.axes)}.")
    grid = tokens.unflatten(1, layout.shape)
    others = [1 + number for number, axis in enumerate(layout.axes) if axis not in axes]
    if layout.valid is None:
        return (grid.mean(others) if others else grid).movedim(-1, 1)
    valid = layout.valid.unflatten(1, layout.shape)[..., None]
    grid = torch.where(valid, grid, 0.0)
    if others:
        grid = grid.sum(others) / valid.sum(others).clamp(min=1).to(grid.dtype)
    return grid.movedim(-1, 1)


def flat_pixels(pixels: Tensor, axes: Sequence[str], valid: Tensor | None = None) -> Tensor:
    """(B, C, *all axes) to (B, C, *spatial axes), the mean over what is valid along the others, zero where nothing is.

    Args:
        valid: bool, (B, 1 or C, *all axes); ``None`` means all.
    """
    if valid is not None:
        pixels = torch.where(valid, pixels, 0.0)
    others = [2 + number for number, axis in enumerate(axes) if axis not in SPATIAL_AXES]
    if not others:
        return pixels
    if valid is None:
        return pixels.mean(others)
    return pixels.sum(others) / valid.sum(others).clamp(min=1).to(pixels.dtype)


def padded_to_patches(view: View, grid: PatchGrid) -> View:
    """A view with zeros at the end of each axis up to a whole number of patches, marked as invalid. The same view where
    nothing has to be added."""
    size = view.pixels.shape[2:]
    extra = [-n % patch for n, patch in zip(size, grid.patch_size, strict=True)]
    if not any(extra):
        return view
    pad = [amount for added in reversed(extra) for amount in (0, added)]
    valid = view.valid if view.valid is not None else view.pixels.new_ones((len(view), 1, *size), dtype=torch.bool)
    coords = {
        axis: F.pad(values[:, None], (0, extra[grid.axes.index(axis)]), mode="replicate")[:, 0]
        for axis, values in view.coords.items()
    }
    return replace(view, pixels=F.pad(view.pixels, pad), valid=F.pad(valid, pad), coords=coords, mask=None, maps={})


class MapSource(nn.Module):
    """Feature maps of any backbone: layers of a transformer, or a hierarchical one's own maps.

    Args:
        backbone: a transformer on a grid, a ``Hierarchical`` one, Swin UNETR's encoder, or a timm model with feature
            maps.
        layers: of a transformer, in this order.
        norm_layers: put these through its final norm, so that all are of one scale.

    Attributes:
        levels: what it gives.
        in_chans: of the pixels that it gives.

    Raises:
        UsageError: for a bag of vectors.
    """

    def __init__(self, backbone: Backbone, layers: Sequence[int] = (-1,), norm_layers: bool = True) -> None:
        super().__init__()
        if backbone.grid is None:
            raise UsageError("A bag of vectors has no feature map.", "Give the task images or volumes.")
        self.backbone = backbone
        self.grid: PatchGrid = backbone.grid
        self.axes = spatial_axes(self.grid.axes)
        self.layers, self.norm_layers = tuple(layers), norm_layers
        self.in_chans = backbone.spec.in_chans
        self.levels = _own_levels(backbone)
        if not self.levels:
            self.levels = (Level(backbone.width, patch_stride(self.grid)),) * len(self.layers)

    def forward(self, view: View) -> FeatureMaps:
        """Maps of a normalised view of any size. Sizes that are no multiple of the patches are padded; ``size`` is then
        the padded one, and logits are to be cut to the view's."""
        view = padded_to_patches(view, self.grid)
        pixels = flat_pixels(view.pixels, self.grid.axes, view.valid)
        size = tuple(pixels.shape[2:])
        if is_hierarchical(self.backbone):
            return FeatureMaps(own_maps(self.backbone, view), size, pixels)
        features = self.backbone(view, layers=self.layers, norm_layers=self.norm_layers)
        levels = tuple(token_map(tokens, features.layout, self.axes) for tokens in features.intermediate)
        vectors: tuple[Tensor, ...] = ()
        if self.backbone.has_cls:
            prefixes = features.intermediate_prefix
            vectors = tuple(prefix[:, 0] for prefix in prefixes) if prefixes else ()
        return FeatureMaps(levels, size, pixels, vectors)


def patch_stride(grid: PatchGrid) -> tuple[float, ...]:
    """The patch size along the spatial axes."""
    return tuple(float(p) for axis, p in zip(grid.axes, grid.patch_size, strict=True) if axis in SPATIAL_AXES)


def is_hierarchical(backbone: Backbone) -> bool:
    """Whether a backbone has maps of several resolutions of its own."""
    return bool(_own_levels(backbone))


def _own_levels(backbone: Backbone) -> tuple[Level, ...]:
    if isinstance(backbone, Datewise):
        return _own_levels(backbone.single)
    if isinstance(backbone, Hierarchical):
        return backbone.levels
    if isinstance(backbone, SwinUNETR):
        # The coarsest map is that of the tokens; each before it has twice the resolution.
        coarsest, number = patch_stride(backbone.grid), len(backbone.map_widths)
        return tuple(
            Level(width, tuple(length / 2 ** (number - 1 - place) for length in coarsest))
            for place, width in enumerate(backbone.map_widths)
        )
    if isinstance(backbone, TimmBackbone) and not backbone._is_transformer:
        info = backbone.model.feature_info
        return tuple(Level(entry["num_chs"], (float(entry["reduction"]),) * 2) for entry in info)
    return ()


def own_maps(backbone: Backbone, view: View) -> tuple[Tensor, ...]:
    """(B, D, *shape) maps of a hierarchical backbone, of a series the means over its dates."""
    if isinstance(backbone, Datewise):
        dates = backbone.dates(view)
        return tuple(dates.mean(found) for found in own_maps(backbone.single, dates.view))
    if isinstance(backbone, Hierarchical):
        return backbone.maps(view)
    if isinstance(backbone, SwinUNETR):
        return backbone(view).maps
    assert isinstance(backbone, TimmBackbone)
    return tuple(backbone.model.forward_intermediates(view.pixels, output_fmt="NCHW", intermediates_only=True))
