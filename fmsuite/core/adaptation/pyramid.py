"""ViTDet's simple feature pyramid (Li et al. 2022, arXiv 2203.16527, section 3), along any spatial axes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fmsuite.core.adaptation.conv_blocks import ChannelNorm, check_axes, conv, deconv, max_pool
from fmsuite.core.adaptation.feature_maps import FeatureMaps, Level
from fmsuite.errors import UsageError

SCALES = (4.0, 2.0, 1.0, 0.5)


class Rescale(nn.Sequential):
    """A map at 4, 2, 1 or 1/2 times its resolution: two transposed convolutions with a norm and a GELU between, one,
    none, or max pooling.

    Attributes:
        width: channels that come out: a half or a quarter after transposed convolutions.
    """

    def __init__(self, dims: int, width: int, scale: float) -> None:
        two = (2,) * dims
        if scale == 4:
            layers = [
                deconv(width, width // 2, two),
                ChannelNorm(width // 2),
                nn.GELU(),
                deconv(width // 2, width // 4, two),
            ]
        else:
            layers = {2.0: [deconv(width, width // 2, two)], 1.0: [], 0.5: [max_pool(dims)]}[scale]
        super().__init__(*layers)
        self.width = width // {4.0: 4, 2.0: 2}.get(scale, 1)


class SimpleFeaturePyramid(nn.Module):
    """Maps of several resolutions from a plain transformer's.

    Each scale is made by ``Rescale``, a 1 x 1 convolution to ``width`` channels, and a 3 x 3 one, with a norm after
    both (as in its appendix A.2).

    Args:
        levels: one map, from which all scales are made (ViTDet takes the last), or one for each scale (the earlier
            the finer, as BEiT and MAE do for UPerNet).
        width: channels of every scale.
        scales: of ``SCALES``, finest first. Not given, those that are not finer than the input.

    Attributes:
        levels: what it gives, finest first.

    Raises:
        UsageError: for another number of maps, or unknown scales.
    """

    def __init__(self, levels: Sequence[Level], width: int = 256, scales: Sequence[float] | None = None) -> None:
        super().__init__()
        stride = levels[0].stride
        dims = check_axes(len(stride))
        if scales is None:
            scales = [scale for scale in SCALES if min(stride) >= scale]
        if not scales or any(scale not in SCALES for scale in scales) or sorted(scales, reverse=True) != list(scales):
            raise UsageError(f"The pyramid's scales cannot be {list(scales)}.", "Use some of 4, 2, 1, 0.5, in order.")
        if len({level.stride for level in levels}) > 1 or len(levels) not in (1, len(scales)):
            raise UsageError(
                f"A pyramid of {len(scales)} scales takes one map of a plain transformer or one for each scale, not "
                f"{len(levels)} of strides {[level.stride for level in levels]}.",
                "A hierarchical backbone's maps are a pyramid already.",
            )
        self.stages = nn.ModuleList()
        for number, scale in enumerate(scales):
            rescale = Rescale(dims, levels[number if len(levels) > 1 else 0].width, scale)
            self.stages.append(
                nn.Sequential(
                    rescale,
                    conv(dims, rescale.width, width, 1, bias=False),
                    ChannelNorm(width),
                    conv(dims, width, width, bias=False),
                    ChannelNorm(width),
                )
            )
        self.levels = tuple(Level(width, tuple(length / scale for length in stride)) for scale in scales)

    def forward(self, maps: FeatureMaps) -> FeatureMaps:
        single = len(maps.levels) == 1
        levels: list[Tensor] = []
        for number, stage in enumerate(self.stages):
            levels.append(stage(maps.levels[0 if single else number]))
        return FeatureMaps(tuple(levels), maps.size, maps.pixels)
