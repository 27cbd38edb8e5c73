"""Convolutions, norms and resizing along one, two or three axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fmsuite.errors import UsageError

_CONV: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DECONV: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_POOL: tuple[type[nn.Module], ...] = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_NORM: tuple[type[nn.Module], ...] = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_LINEAR = ("linear", "bilinear", "trilinear")


def check_axes(dims: int) -> int:
    """
    Raises:
        UsageError: if dense outputs along so many axes cannot be made.
    """
    if not 1 <= dims <= 3:
        raise UsageError(f"Dense decoders work along one to three spatial axes, not {dims}.")
    return dims


def conv(dims: int, width: int, out: int, kernel: int = 3, stride: int = 1, bias: bool = True) -> nn.Module:
    """A convolution that keeps the size, or divides it by the stride and rounds up."""
    return _CONV[dims - 1](width, out, kernel, stride=stride, padding=kernel // 2, bias=bias)


def deconv(width: int, out: int, factors: Sequence[int], bias: bool = True) -> nn.Module:
    """A transposed convolution whose kernel is its stride: each cell becomes a block of ``factors``."""
    factors = tuple(factors)
    return _DECONV[len(factors) - 1](width, out, factors, stride=factors, bias=bias)


def max_pool(dims: int) -> nn.Module:
    """Halves the size and rounds up."""
    return _POOL[dims - 1](2, ceil_mode=True)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, D, *shape) to (B, D, *size) by linear interpolation between cell centres."""
    size = tuple(size)
    if tuple(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size, mode=_LINEAR[len(size) - 1], align_corners=False)


def group_count(width: int, most: int = 32) -> int:
    """Groups of a group normalisation: the largest number up to ``most`` that leaves two channels or more in each, so
    that a map of one cell can be normalised too."""
    return max(count for count in range(1, most + 1) if width % count == 0 and (count == 1 or 2 * count <= width))


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of (B, D, *shape)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ConvNormAct(nn.Sequential):
    """Convolution, group normalisation, ReLU. The papers have batch normalisation, whose statistics are poor for the
    few samples that fit where outputs are dense (Wu and He 2018)."""

    def __init__(self, dims: int, width: int, out: int, kernel: int = 3) -> None:
        super().__init__(
            conv(dims, width, out, kernel, bias=False), nn.GroupNorm(group_count(out), out), nn.ReLU(inplace=True)
        )


class ResidualBlock(nn.Module):
    """Two convolutions with instance normalisation and leaky ReLU around a skip (nnU-Net's and UNETR's block)."""

    def __init__(self, dims: int, width: int, out: int) -> None:
        super().__init__()
        norm = _NORM[dims - 1]
        self.conv1 = conv(dims, width, out, bias=False)
        self.norm1 = norm(out, affine=True)
        self.conv2 = conv(dims, out, out, bias=False)
        self.norm2 = norm(out, affine=True)
        self.skip = nn.Identity() if width == out else nn.Sequential(conv(dims, width, out, 1), norm(out, affine=True))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, *shape) to (B, out, *shape); more than one cell."""
        y = F.leaky_relu(self.norm1(self.conv1(x)), 0.01)
        return F.leaky_relu(self.norm2(self.conv2(y)) + self.skip(x), 0.01)


class Upsample(nn.Module):
    """A transposed convolution by whole factors, then interpolation to the asked size where that is another."""

    def __init__(self, width: int, out: int, factors: Sequence[float]) -> None:
        super().__init__()
        self.up = deconv(width, out, [math.ceil(factor) for factor in factors], bias=False)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return resize(self.up(x), size)


def cells(size: Sequence[int], stride: Sequence[float]) -> tuple[int, ...]:
    """How many cells of a stride cover a size."""
    return tuple(math.ceil(n / s - 1e-6) for n, s in zip(size, stride, strict=True))


def classifier(dims: int, width: int, classes: int) -> nn.Module:
    """A 1 x 1 convolution whose logits start small and alike whatever the width, so that no class is favoured at first.

    Of features with a deviation of 1 they have one of 0.4. Weights that start at nearly nothing need hundreds of steps
    of Adam to grow, which all layers below wait for.
    """
    layer = conv(dims, width, classes, 1)
    assert isinstance(layer.weight, Tensor)
    assert isinstance(layer.bias, Tensor)
    nn.init.trunc_normal_(layer.weight, std=0.4 / math.sqrt(width))
    nn.init.zeros_(layer.bias)
    return layer
