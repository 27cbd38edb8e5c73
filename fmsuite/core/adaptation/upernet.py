"""UPerNet's decoder (Xiao et al. 2018, arXiv 1807.10221, section 3.1), along any spatial axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmsuite.core.adaptation.conv_blocks import ConvNormAct, check_axes, classifier, resize
from fmsuite.core.adaptation.feature_maps import Decoder, FeatureMaps, Level
from fmsuite.core.adaptation.pyramid import SCALES, SimpleFeaturePyramid
from fmsuite.errors import UsageError

_POOLS: tuple[Callable[..., Tensor], ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


class UperNet(Decoder):
    """A feature pyramid with pooled context at its top.

    The coarsest map is joined with its averages over 1, 2, 3 and 6 parts along each axis (Zhao et al. 2017); from
    there, each finer map is added to the coarser one; all of them, brought to the finest one's shape, are fused and
    classified. A plain transformer's layers first become a pyramid of 4, 2, 1 and 1/2 times their resolution (as Bao
    et al. 2021 do for BEiT).

    Args:
        levels: a transformer's layers, all of one stride (one, or as many as ``wanted``), or two or more maps of a
            hierarchical backbone, finest first.
        in_chans: not looked at: the decoder sees no pixels.
        classes: K.
        width: channels of the pyramid.
        parts: of the pooled context.
        deep: how many outputs of deep supervision, at the second finest map and so on.

    Raises:
        UsageError: for levels that make no pyramid, or more outputs than maps.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        in_chans: int,
        classes: int,
        width: int = 256,
        parts: Sequence[int] = (1, 2, 3, 6),
        deep: int = 0,
    ) -> None:
        super().__init__()
        dims = check_axes(len(levels[0].stride))
        plain = len({level.stride for level in levels}) == 1
        self.pyramid = SimpleFeaturePyramid(levels, width) if plain else None
        inputs = self.pyramid.levels if self.pyramid is not None else tuple(levels)
        if not 0 <= deep < len(inputs):
            raise UsageError(
                f"{deep} outputs of deep supervision cannot be had of {len(inputs)} maps.",
                f"Use up to {len(inputs) - 1}.",
            )
        self.parts = tuple(parts)
        top = inputs[-1].width
        self.context = nn.ModuleList(ConvNormAct(dims, top, width, 1) for _ in self.parts)
        self.bottleneck = ConvNormAct(dims, top + len(self.parts) * width, width)
        self.lateral = nn.ModuleList(ConvNormAct(dims, level.width, width, 1) for level in inputs[:-1])
        self.smooth = nn.ModuleList(ConvNormAct(dims, width, width) for _ in inputs[:-1])
        self.fuse = ConvNormAct(dims, len(inputs) * width, width)
        self.classify = nn.ModuleList(classifier(dims, width, classes) for _ in range(deep + 1))

    @classmethod
    def wanted(cls, stride: tuple[float, ...]) -> int:
        return sum(min(stride) >= scale for scale in SCALES)

    def forward(self, maps: FeatureMaps) -> list[Tensor]:
        size = maps.size
        inputs = maps.levels if self.pyramid is None else self.pyramid(maps).levels
        pyramid = [self._top(inputs[-1])]
        for lateral, level in zip(reversed(self.lateral), reversed(inputs[:-1]), strict=True):
            pyramid.insert(0, lateral(level) + resize(pyramid[0], level.shape[2:]))
        pyramid = [*(smooth(level) for smooth, level in zip(self.smooth, pyramid[:-1], strict=True)), pyramid[-1]]
        shape = pyramid[0].shape[2:]
        fused = self.fuse(torch.cat([resize(level, shape) for level in pyramid], dim=1))
        deeper = [classify(level) for classify, level in zip(self.classify[1:], pyramid[1:], strict=False)]
        return [resize(self.classify[0](fused), size), *deeper]

    def _top(self, x: Tensor) -> Tensor:
        shape = x.shape[2:]
        pool = _POOLS[len(shape) - 1]
        pooled = [resize(layer(pool(x, (part,) * len(shape))), shape) for part, layer in zip(self.parts, self.context)]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))  # type: ignore[no-any-return]
