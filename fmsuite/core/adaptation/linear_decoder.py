"""A linear classifier of every token, interpolated to the input's size: the dense linear probe."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmsuite.core.adaptation.conv_blocks import check_axes, classifier, resize
from fmsuite.core.adaptation.feature_maps import Decoder, FeatureMaps, Level


class LinearDecoder(Decoder):
    """Logits of each cell are linear in its features; between cells they are interpolated.

    Several levels (DINOv2's "ms" protocol, Oquab et al. 2023, section 7.4) are brought to the finest one's shape and
    concatenated.

    Args:
        levels: of the maps. in_chans: not looked at: the decoder sees no pixels.
        classes: K.
    """

    def __init__(self, levels: Sequence[Level], in_chans: int, classes: int) -> None:
        super().__init__()
        dims = check_axes(len(levels[0].stride))
        self.classify = classifier(dims, sum(level.width for level in levels), classes)

    @classmethod
    def wanted(cls, stride: tuple[float, ...]) -> int:
        return 1

    def forward(self, maps: FeatureMaps) -> list[Tensor]:
        shape = maps.levels[0].shape[2:]
        joined = torch.cat([resize(level, shape) for level in maps.levels], dim=1)
        return [resize(self.classify(joined), maps.size)]
