"""UNETR's decoder (Hatamizadeh et al. 2021, arXiv 2103.10504), along any spatial axes and from any patch size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fmsuite.core.adaptation.conv_blocks import (
    ResidualBlock,
    Upsample,
    cells,
    check_axes,
    classifier,
)
from fmsuite.core.adaptation.feature_maps import Decoder, FeatureMaps, Level
from fmsuite.errors import UsageError

Stride = tuple[float, ...]


def rungs(stride: Stride) -> list[Stride]:
    """Strides from one input sample up to a patch, doubling along each axis until the patch's own length is reached:
    1, 2, 4, 8, 16 for patches of 16; 1, 2, 4, 8, 14 for 14; (1, 1), (2, 2), (2, 4), (2, 8) for 2 x 8."""
    found, step = [(1.0,) * len(stride)], 1.0
    while found[-1] != tuple(stride):
        step *= 2
        found.append(tuple(min(step, length) for length in stride))
    return found


class Unetr(Decoder):
    """A U-shaped decoder over a transformer's layers, or over a hierarchical backbone's maps (Swin UNETR's manner).

    Rung j of the ladder of resolutions (``rungs``) has ``base * 2**j`` channels. The last map stands on the lowest
    rung; at each rung above, the map from below is doubled by a transposed convolution, joined with the rung's skip and
    mixed by a residual block. The skip of rung 0 is the image through a residual block. That of another rung is the
    map of this resolution, of a hierarchical backbone, or a layer of the transformer, the earlier the finer, which
    climbs from the lowest rung by transposed convolutions and residual blocks (figure 1). Where a patch is no power
    of two, a doubled map is interpolated to its rung's shape.

    Args:
        levels: of the maps. A transformer gives as many layers as the ladder has steps (``wanted``).
        in_chans: of the image.
        classes: K.
        base: channels at full resolution.
        deep: how many outputs of deep supervision, at rungs 1, 2 and so on.

    Raises:
        UsageError: for a wrong number of layers, maps of strides that are on no rung, or more outputs than rungs.
    """

    def __init__(self, levels: Sequence[Level], in_chans: int, classes: int, base: int = 16, deep: int = 0) -> None:
        super().__init__()
        lowest = levels[-1]
        dims = check_axes(len(lowest.stride))
        self.ladder = rungs(lowest.stride)
        steps = len(self.ladder) - 1
        if not 0 <= deep <= max(0, steps - 1):
            raise UsageError(
                f"{deep} outputs of deep supervision cannot be had: patches of {_text(lowest.stride)} leave "
                f"{max(0, steps - 1)} rungs between the image and the tokens.",
                "Ask for fewer.",
            )
        self.source = _skip_sources(levels, self.ladder)
        widths = [base * 2**j for j in range(steps)]
        self.image = ResidualBlock(dims, in_chans, base)
        self.climbs, self.ups, self.mixes = nn.ModuleDict(), nn.ModuleList(), nn.ModuleList()
        for j in range(steps):
            below = widths[j + 1] if j + 1 < steps else lowest.width
            self.ups.append(Upsample(below, widths[j], _factors(self.ladder, j)))
            joined = widths[j] * (2 if j == 0 or j in self.source else 1)
            self.mixes.append(ResidualBlock(dims, joined, widths[j]))
            if j in self.source:
                level = levels[self.source[j]]
                start = self.ladder.index(level.stride)
                self.climbs[str(j)] = _Climb(dims, level.width, widths[j], self.ladder, start, j)
        if steps == 0:
            self.mixes.append(ResidualBlock(dims, base + lowest.width, base))
        self.classify = nn.ModuleList(classifier(dims, [*widths, base][j], classes) for j in range(deep + 1))

    @classmethod
    def wanted(cls, stride: Stride) -> int:
        return max(1, len(rungs(stride)) - 1)

    def forward(self, maps: FeatureMaps) -> list[Tensor]:
        sizes = [cells(maps.size, stride) for stride in self.ladder]
        x = maps.levels[-1]
        outputs: list[Tensor] = []
        if len(self.ladder) == 1:
            x = self.mixes[0](torch.cat([self.image(maps.pixels), x], dim=1))
            return [self.classify[0](x)]
        for j in range(len(self.ladder) - 2, -1, -1):
            parts = [self.ups[j](x, sizes[j])]
            if j == 0:
                parts.append(self.image(maps.pixels))
            elif j in self.source:
                parts.append(self.climbs[str(j)](maps.levels[self.source[j]], sizes))
            x = self.mixes[j](torch.cat(parts, dim=1))
            if j < len(self.classify):
                outputs.insert(0, self.classify[j](x))
        return outputs


class _Climb(nn.Module):
    """A map from its rung to a finer one; a residual block where it is there already."""

    def __init__(self, dims: int, width: int, out: int, ladder: list[Stride], start: int, end: int) -> None:
        super().__init__()
        self.rungs = list(range(start - 1, end - 1, -1))
        self.ups, self.mixes = nn.ModuleList(), nn.ModuleList()
        for number, rung in enumerate(self.rungs):
            self.ups.append(Upsample(width if number == 0 else out, out, _factors(ladder, rung)))
            self.mixes.append(nn.Identity() if number == 0 else ResidualBlock(dims, out, out))
        self.stay = ResidualBlock(dims, width, out) if not self.rungs else None

    def forward(self, x: Tensor, sizes: list[tuple[int, ...]]) -> Tensor:
        if self.stay is not None:
            return self.stay(x)  # type: ignore[no-any-return]
        for rung, up, mix in zip(self.rungs, self.ups, self.mixes, strict=True):
            x = mix(up(x, sizes[rung]))
        return x


def _factors(ladder: list[Stride], rung: int) -> list[float]:
    return [coarse / fine for coarse, fine in zip(ladder[rung + 1], ladder[rung], strict=True)]


def _skip_sources(levels: Sequence[Level], ladder: list[Stride]) -> dict[int, int]:
    """From a rung (not 0, not the lowest) to the number of the level that is its skip."""
    steps = len(ladder) - 1
    if len({level.stride for level in levels}) == 1:
        if len(levels) != max(1, steps):
            raise UsageError(
                f"A UNETR decoder for patches of {_text(levels[0].stride)} takes {max(1, steps)} layers, not "
                f"{len(levels)}.",
                "Ask for as many.",
            )
        return {j: j - 1 for j in range(1, steps)}
    off = [level.stride for level in levels if level.stride not in ladder]
    if off:
        raise UsageError(
            f"A map of stride {_text(off[0])} lies on no rung of {', '.join(map(_text, ladder))}.",
            "Leave that map out, or use another decoder.",
        )
    return {j: n for n, level in enumerate(levels) for j in [ladder.index(level.stride)] if 0 < j < steps}


def _text(stride: Stride) -> str:
    return " x ".join(f"{length:g}" for length in stride)
