"""Bottleneck adapters after each sub-layer (Houlsby et al. 2019, "Parameter-efficient transfer learning for NLP",
arXiv 1902.00751)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmsuite.core.adaptation.linear_layers import block_linears, replace_linears
from fmsuite.core.backbones.base import Backbone
from fmsuite.errors import UsageError

PLACES = ("proj", "fc2")
"""The layers that project a sub-layer's output back to the width of the sequence."""


class Bottleneck(nn.Module):
    """``x + up(gelu(down(x)))`` (section 2.1). ``up`` starts at zero, so that the module starts as the identity (the
    paper starts near it, from a normal of standard deviation 0.01)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        nn.init.trunc_normal_(self.down.weight, std=0.01)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return x + self.up(F.gelu(self.down(x)))


class AdaptedLinear(nn.Linear):
    """A linear layer with a bottleneck behind it: before LayerScale and before the residual sum, as in figure 2.

    ``weight`` and ``bias`` are those of the layer that it takes the place of; ``insert_adapters`` stops their training.
    """

    def __init__(self, layer: nn.Linear, hidden: int) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight = layer.weight
        self.bias = layer.bias
        self.adapter = Bottleneck(layer.out_features, hidden).to(layer.weight.device, layer.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return self.adapter(F.linear(x, self.weight, self.bias))  # type: ignore[no-any-return]


def insert_adapters(backbone: Backbone, hidden: int = 64) -> None:
    """Put a bottleneck behind the attention and the MLP of every block, in place. It computes what it did until they
    train.

    Args:
        hidden: width of the bottlenecks.

    Raises:
        UsageError: for a width below 1, blocks without ``proj`` and ``fc2``, or if there are adapters already.
    """
    if hidden < 1:
        raise UsageError(f"An adapter cannot have a bottleneck of {hidden}.", "Use 1 or more; 64 is common.")
    layers = block_linears(backbone, PLACES)
    if adapted_layers(backbone):
        raise UsageError("This backbone has adapters already.", "Insert them once.")
    if any(type(layer) is not nn.Linear for layer in layers.values()):
        raise UsageError("The layers that adapters follow are adapted in another way.", "Use one kind of adapter.")
    replace_linears(backbone, layers, lambda _, layer: AdaptedLinear(layer, hidden))


def adapted_layers(backbone: nn.Module) -> dict[str, AdaptedLinear]:
    """The layers with an adapter by name."""
    return {name: module for name, module in backbone.named_modules() if isinstance(module, AdaptedLinear)}


def adapter_state(backbone: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors alone, by their name in the backbone."""
    return {
        f"{name}.adapter.{part}": tensor
        for name, layer in adapted_layers(backbone).items()
        for part, tensor in layer.adapter.state_dict().items()
    }


@torch.no_grad()
def load_adapter_state(backbone: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what ``adapter_state`` gave into adapters of the same places and width.

    Raises:
        UsageError: naming what does not fit; nothing is then copied.
    """
    own = adapter_state(backbone)
    wrong = sorted(own.keys() ^ state.keys()) + [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if wrong:
        raise UsageError(f"These adapters do not fit: {', '.join(wrong[:5])}.", "Insert them with the same width.")
    for name, tensor in own.items():
        tensor.copy_(state[name])
