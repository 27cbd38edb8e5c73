"""Projection heads: perceptrons, and the prototypes of the DINO family."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional


class WeightNormLinear(nn.Module):
    """A linear map without bias whose rows are ``weight_g * weight_v / ||weight_v||`` (Salimans and Kingma 2016,
    equation 2).

    Args:
        in_features, out_features: D and K.
        train_gain: whether ``weight_g`` (K, 1), one at the start, is trained; DINO freezes it.
    """

    def __init__(self, in_features: int, out_features: int, train_gain: bool = False) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1), requires_grad=train_gain)
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.uniform_(self.weight_v, -(in_features**-0.5), in_features**-0.5)

    def forward(self, values: Tensor) -> Tensor:
        """(..., D) to (..., K)."""
        norm = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        return functional.linear(values, self.weight_v * (self.weight_g / norm))


def projector(in_dim: int, hidden: int, out_dim: int, layers: int = 2) -> nn.Sequential:
    """A perceptron with ReLU between its ``layers`` linear maps, (..., in_dim) to (..., out_dim)."""
    widths = [in_dim, *[hidden] * (layers - 1), out_dim]
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        parts += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


class DINOHead(nn.Module):
    """A multilayer perceptron, L2 normalisation, and prototypes of unit length (Caron et al. 2021, appendix C), so that
    logits are cosines. Parameter names are the public release's.

    Args:
        in_dim: width of the backbone.
        prototypes: K, number of outputs.
        hidden, bottleneck, layers: shape of the perceptron, GELU between its layers.
        train_gain: see ``WeightNormLinear``.
    """

    def __init__(
        self,
        in_dim: int,
        prototypes: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        train_gain: bool = False,
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden] * (layers - 1), bottleneck]
        parts: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            linear = nn.Linear(before, after)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            parts += [linear, nn.GELU()]
        self.mlp = nn.Sequential(*parts[:-1])
        self.last_layer = WeightNormLinear(bottleneck, prototypes, train_gain)

    def embed(self, values: Tensor) -> Tensor:
        """(..., in_dim) to unit vectors (..., bottleneck)."""
        return functional.normalize(self.mlp(values), dim=-1)

    def forward(self, values: Tensor) -> Tensor:
        """(..., in_dim) to logits (..., prototypes)."""
        return self.last_layer(self.embed(values))
