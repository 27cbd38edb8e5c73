"""The dense prediction transformer's decoder (Ranftl et al. 2021, arXiv 2103.13413), along any spatial axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmsuite.core.adaptation.conv_blocks import check_axes, classifier, conv, deconv, resize
from fmsuite.core.adaptation.feature_maps import Decoder, FeatureMaps, Level
from fmsuite.core.adaptation.pyramid import SCALES
from fmsuite.errors import UsageError

Readout = Literal["ignore", "add", "project"]


class Dpt(Decoder):
    """Layers of a transformer become images of several resolutions, which are fused from the coarsest on.

    Reassemble (section 3): the class token is ignored, added to every token, or concatenated to it and projected by
    a linear layer and a GELU; a 1 x 1 convolution; 4, 2, 1 or 1/2 times the resolution by a transposed or a strided
    convolution, the earlier the layer the finer; a 3 x 3 convolution to ``width``. Fusion: residual convolution units
    (Lin et al. 2017) and interpolation to the next finer shape. A hierarchical backbone's maps have their resolutions
    already.

    Args:
        levels: a transformer's layers, as many as ``wanted``, or two or more maps of a hierarchical backbone, finest
            first.
        in_chans: not looked at: the decoder sees no pixels.
        classes: K.
        width: channels of the fusion.
        readout: what becomes of the class token. Maps of a hierarchical backbone have none.
        deep: how many outputs of deep supervision, at the second finest map and so on.

    Raises:
        UsageError: for another number of layers, or more outputs than maps.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        in_chans: int,
        classes: int,
        width: int = 256,
        readout: Readout = "ignore",
        deep: int = 0,
    ) -> None:
        super().__init__()
        stride = levels[0].stride
        dims = check_axes(len(stride))
        plain = len({level.stride for level in levels}) == 1
        wanted = self.wanted(stride)
        if plain and len(levels) != wanted:
            raise UsageError(
                f"A DPT decoder for patches of {stride} takes {wanted} layers, not {len(levels)}.", "Ask for as many."
            )
        if not plain and readout != "ignore":
            raise UsageError(
                "A hierarchical backbone's maps have no class token to read out.", "Set readout to ignore."
            )
        if not 0 <= deep < len(levels):
            raise UsageError(
                f"{deep} outputs of deep supervision cannot be had of {len(levels)} maps.",
                f"Use up to {len(levels) - 1}.",
            )
        self.readout = readout
        project = [nn.Sequential(nn.Linear(2 * level.width, level.width), nn.GELU()) for level in levels]
        self.read = nn.ModuleList(project if readout == "project" else [])
        scales = [scale for scale in SCALES if min(stride) >= scale] if plain else [1.0] * len(levels)
        self.reassemble = nn.ModuleList(
            _reassemble(dims, level.width, width, scale) for level, scale in zip(levels, scales, strict=True)
        )
        self.skips = nn.ModuleList(_ResidualUnit(dims, width) for _ in levels)
        self.fusions = nn.ModuleList(_ResidualUnit(dims, width) for _ in levels)
        self.projects = nn.ModuleList(conv(dims, width, width, 1) for _ in levels)
        self.head = nn.Sequential(conv(dims, width, width // 2), nn.ReLU(), classifier(dims, width // 2, classes))
        self.deep = nn.ModuleList(classifier(dims, width, classes) for _ in range(deep))

    @classmethod
    def wanted(cls, stride: tuple[float, ...]) -> int:
        return sum(min(stride) >= scale for scale in SCALES)

    def forward(self, maps: FeatureMaps) -> list[Tensor]:
        """
        Raises:
            UsageError: if class tokens are to be read out and the maps have none.
        """
        levels = [layer(level) for layer, level in zip(self.reassemble, self._read(maps), strict=True)]
        paths: list[Tensor] = []
        x: Tensor | None = None
        for number in range(len(levels) - 1, -1, -1):
            skip = self.skips[number](levels[number])
            x = self.fusions[number](skip if x is None else skip + resize(x, skip.shape[2:]))
            x = self.projects[number](x)
            paths.insert(0, x)
        deeper = [classify(path) for classify, path in zip(self.deep, paths[1:], strict=False)]
        return [resize(self.head(paths[0]), maps.size), *deeper]

    def _read(self, maps: FeatureMaps) -> Sequence[Tensor]:
        if self.readout == "ignore":
            return maps.levels
        if not maps.vectors:
            raise UsageError("This backbone shows no class token to read out.", "Set readout to ignore.")
        places = [
            vector.reshape(*vector.shape, *(1,) * (level.dim() - 2)).expand_as(level)
            for level, vector in zip(maps.levels, maps.vectors, strict=True)
        ]
        if self.readout == "add":
            return [level + place for level, place in zip(maps.levels, places, strict=True)]
        return [
            read(torch.cat([level, place], dim=1).movedim(1, -1)).movedim(-1, 1)
            for read, level, place in zip(self.read, maps.levels, places, strict=True)
        ]


class _ResidualUnit(nn.Module):
    """``x + conv(relu(conv(relu(x))))``."""

    def __init__(self, dims: int, width: int) -> None:
        super().__init__()
        self.conv1 = conv(dims, width, width)
        self.conv2 = conv(dims, width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def _reassemble(dims: int, width: int, out: int, scale: float) -> nn.Sequential:
    resample: list[nn.Module] = []
    if scale > 1:
        resample = [deconv(out, out, (int(scale),) * dims)]
    elif scale < 1:
        resample = [conv(dims, out, out, stride=2)]
    return nn.Sequential(conv(dims, width, out, 1), *resample, conv(dims, out, out, bias=False))
