"""The linear layers of a backbone's blocks, found by name and replaced in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from fmsuite.core.backbones.base import Backbone
from fmsuite.errors import UsageError


def block_linears(backbone: Backbone, leaves: Iterable[str]) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by their name in the backbone, in its order.

    Args:
        leaves: last parts of the names: ``qkv`` and ``proj`` of the attention, ``fc1`` and ``fc2`` of the MLP, as our
            transformer and timm's name them.

    Raises:
        UsageError: for a name that no linear layer of a block has.
    """
    wanted = set(leaves)
    found: dict[str, nn.Linear] = {}
    for name, module in backbone.named_modules():
        path = name.split(".")
        if "blocks" in path and path[-1] in wanted and isinstance(module, nn.Linear):
            found[name] = module
    missing = wanted - {name.rpartition(".")[2] for name in found}
    if missing:
        raise UsageError(
            f"The blocks of this {type(backbone).__name__} have no linear layer {', '.join(sorted(missing))}.",
            "Adapt a transformer whose blocks have qkv, proj, fc1 and fc2, or tune in another way.",
        )
    return found


def replace_linears(
    backbone: Backbone, layers: dict[str, nn.Linear], make: Callable[[str, nn.Linear], nn.Module]
) -> None:
    """Put other modules in the place of linear layers, whose own parameters stop training.

    Args:
        layers: as ``block_linears`` gave them.
        make: from the last part of its name and a layer to what takes its place. Its parameters may have names of
            their own as long as the backbone can tell their layer.

    Raises:
        UsageError: if the backbone cannot tell the layer of a new parameter; it is then as it was.
    """
    done: dict[str, nn.Linear] = {}
    for name, layer in layers.items():
        new = make(name.rpartition(".")[2], layer).train(layer.training)
        _put(backbone, name, new)
        done[name] = layer
        try:
            for inner, _ in new.named_parameters():
                backbone.layer_of(f"{name}.{inner}")
        except KeyError as error:
            for place, old in done.items():
                _put(backbone, place, old)
            raise UsageError(
                f"This {type(backbone).__name__} cannot tell which layer a new parameter of {name} is in.",
                "Use a vit_* model.",
            ) from error
    for layer in layers.values():
        layer.requires_grad_(False)


def _put(backbone: Backbone, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(backbone.get_submodule(parent), leaf, module)
