"""Low-rank adapters of linear layers (Hu et al. 2021, "LoRA", arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmsuite.core.adaptation.linear_layers import block_linears, replace_linears
from fmsuite.core.backbones.base import Backbone
from fmsuite.errors import UsageError

THIRDS = {"q": 0, "k": 1, "v": 2}
"""Targets that are a third of the rows of the fused ``qkv`` layer."""
TARGETS = ("qkv", "q", "k", "v", "proj", "fc1", "fc2")
_NAMES = ("lora_down", "lora_up")


class LoraLinear(nn.Linear):
    """A linear layer W x + b with W + (alpha / r) B A in the place of W (section 4.1).

    ``weight`` and ``bias`` are those of the layer that it takes the place of, the same tensors under the same names;
    ``insert_lora`` stops their training. B starts at zero, so that the layer starts as it was; A starts as a linear
    layer's weights do.

    Args:
        layer: it takes the place of this one.
        rank: r.
        alpha: of the scale alpha / r.
        dropout: probability of dropping a value of the adapter's input, in training.
        thirds: adapt only these thirds of the rows, each with matrices of its own (of ``qkv``: 0 q, 1 k, 2 v);
            ``None`` adapts all rows with one pair of matrices.
    """

    def __init__(
        self, layer: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, thirds: Sequence[int] | None = None
    ) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight = layer.weight
        self.bias = layer.bias
        self.rank, self.scale = rank, alpha / rank
        self.thirds = None if thirds is None else tuple(sorted(thirds))
        parts = 1 if self.thirds is None else len(self.thirds)
        rows = layer.out_features if self.thirds is None else layer.out_features // 3
        like = layer.weight.detach()
        self.lora_down = nn.Parameter(like.new_empty(parts * rank, layer.in_features))
        self.lora_up = nn.Parameter(like.new_zeros(parts, rows, rank))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)
        self._before: Tensor | None = None

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds the adapter's product."""
        return self._before is not None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out).

        Raises:
            RuntimeError: if it is trained while merged: what the adapter learns would have no effect.
        """
        out = F.linear(x, self.weight, self.bias)
        if self.merged:
            if self.training:
                raise RuntimeError("a merged adapter cannot be trained; unmerge it first")
            return out
        return out + self.scale * F.linear(F.linear(self.dropout(x), self.lora_down), self._up())

    def delta(self) -> Tensor:
        """(out, in) what the adapter adds to the weight."""
        return self.scale * (self._up() @ self.lora_down)

    def _up(self) -> Tensor:
        """(out, parts * rank) B, with the blocks of thirds at their rows."""
        if self.thirds is None:
            return self.lora_up[0]
        rows = self.out_features // 3
        place = self.lora_up.new_zeros(3, rows, len(self.thirds), self.rank)
        for number, third in enumerate(self.thirds):
            place[third, :, number] = self.lora_up[number]
        return place.flatten(2).flatten(0, 1)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the product to the weight, so that the layer costs what it did. Does nothing if it is merged."""
        if self._before is None:
            self._before = self.weight.clone()
            self.weight += self.delta()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the weight back as it was before, bit for bit."""
        if self._before is not None:
            self.weight.copy_(self._before)
            self._before = None

    def folded(self) -> nn.Linear:
        """A plain layer of the merged weight."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = self.weight.detach() if self.merged else self.weight.detach() + self.delta().detach()
        plain.weight = nn.Parameter(weight)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach())
        return plain

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}, thirds={self.thirds}"


def insert_lora(
    backbone: Backbone,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = ("q", "v"),
    dropout: float = 0.0,
) -> None:
    """Put adapters into the linear layers of a backbone's blocks, in place. It computes what it did until they train.

    Adapted layers stop training; what else trains is decided by ``freezing.train_only``.

    Args:
        rank: r.
        alpha: of the scale alpha / r; ``None`` is r (a scale of one).
        targets: of ``TARGETS``. ``q`` and ``v`` alone are the paper's (section 7.1); ``qkv`` is one pair of matrices
            for the whole fused layer.
        dropout: of the adapters' inputs.

    Raises:
        UsageError: for unknown targets or none, ``qkv`` together with a part of it, a rank that no weight can have, or
            blocks without such layers.
    """
    unknown = [target for target in targets if target not in TARGETS]
    if unknown or not targets:
        problem = f"no target {', '.join(unknown)}" if unknown else "at least one target is needed"
        raise UsageError(f"targets {list(targets)}: {problem}.", f"Use {', '.join(TARGETS)}.")
    thirds = [THIRDS[target] for target in dict.fromkeys(targets) if target in THIRDS]
    if thirds and "qkv" in targets:
        raise UsageError("targets name qkv and a part of it.", "Name qkv, or some of q, k and v.")
    leaves = {target for target in targets if target not in THIRDS} | ({"qkv"} if thirds else set())
    layers = block_linears(backbone, leaves)
    if any(isinstance(layer, LoraLinear) for layer in layers.values()):
        raise UsageError("This backbone has low-rank adapters already.", "Fold them first.")
    rows = {name: layer.out_features // (3 if thirds and name.endswith("qkv") else 1) for name, layer in layers.items()}
    largest = min(min(rows[name], layer.in_features) for name, layer in layers.items())
    if not 1 <= rank <= largest or not 0 <= dropout < 1 or (alpha is not None and alpha <= 0):
        raise UsageError(
            f"rank {rank}, alpha {alpha}, dropout {dropout}: out of range for layers of which the smallest has rank "
            f"{largest}.",
            "Use a rank from 1 to that, an alpha above 0 and a dropout from 0 to less than 1.",
        )

    def make(leaf: str, layer: nn.Linear) -> nn.Module:
        return LoraLinear(
            layer, rank, rank if alpha is None else alpha, dropout, thirds if leaf == "qkv" and thirds else None
        )

    replace_linears(backbone, layers, make)


def lora_layers(backbone: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers by name."""
    return {name: module for name, module in backbone.named_modules() if isinstance(module, LoraLinear)}


def merge_lora(backbone: nn.Module) -> None:
    """``LoraLinear.merge`` of every adapter."""
    for layer in lora_layers(backbone).values():
        layer.merge()


def unmerge_lora(backbone: nn.Module) -> None:
    """``LoraLinear.unmerge`` of every adapter."""
    for layer in lora_layers(backbone).values():
        layer.unmerge()


def fold_lora(backbone: nn.Module) -> None:
    """Put plain layers of the merged weights in the place of adapted ones: the backbone has then the parameters that
    it had before ``insert_lora``, all of which train, and can be saved as an encoder."""
    for name, layer in lora_layers(backbone).items():
        parent, _, leaf = name.rpartition(".")
        setattr(backbone.get_submodule(parent), leaf, layer.folded())


def lora_state(backbone: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors alone, by their name in the backbone."""
    return {
        f"{name}.{part}": getattr(layer, part).detach()
        for name, layer in lora_layers(backbone).items()
        for part in _NAMES
    }


@torch.no_grad()
def load_lora_state(backbone: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what ``lora_state`` gave into adapters of the same places and shapes.

    Raises:
        UsageError: naming what does not fit; nothing is then copied. If an adapter is merged.
    """
    own = lora_state(backbone)
    wrong = sorted(own.keys() ^ state.keys()) + [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if wrong:
        raise UsageError(f"These adapters do not fit: {', '.join(wrong[:5])}.", "Insert the same targets and rank.")
    if any(layer.merged for layer in lora_layers(backbone).values()):
        raise UsageError("The adapters are merged into the weights.", "Unmerge them first.")
    for name, tensor in own.items():
        tensor.copy_(state[name])
