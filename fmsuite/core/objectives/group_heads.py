"""One prediction head for each channel group (Cong et al. 2022, "SatMAE", section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def group_heads(width: int, outputs: Sequence[int]) -> nn.Linear | nn.ModuleList:
    """A linear head for each channel group (Cong et al. 2022, section 3.3); with one group it stands alone, as in MAE.

    Args:
        width: of the tokens.
        outputs: number of values that each group's head predicts.
    """
    heads = [nn.Linear(width, values) for values in outputs]
    return heads[0] if len(heads) == 1 else nn.ModuleList(heads)


def groups_of(heads: nn.Linear | nn.ModuleList, ids: Tensor, tokens: int) -> Tensor:
    """(B, M) int64 group of each of some tokens of a layout of so many ``tokens``, by their numbers."""
    return ids // (tokens // (1 if isinstance(heads, nn.Linear) else len(heads)))


def project(heads: nn.Linear | nn.ModuleList, tokens: Tensor, groups: Tensor | None = None) -> Tensor:
    """Every token through the head of its group.

    Args:
        heads: see ``group_heads``.
        tokens: (B, M, D).
        groups: (B, M) int64 group of each token; ``None`` means all tokens of a layout, group by group.

    Returns:
        (B, M, P), P the largest number of outputs; zero beyond a smaller head's.
    """
    if isinstance(heads, nn.Linear):
        return heads(tokens)
    linears = [head for head in heads if isinstance(head, nn.Linear)]
    width = max(head.out_features for head in linears)

    def through(head: nn.Linear, values: Tensor) -> Tensor:
        return functional.pad(head(values), (0, width - head.out_features))

    if groups is None:
        parts = tokens.unflatten(1, (len(linears), -1)).unbind(1)
        return torch.cat([through(head, part) for head, part in zip(linears, parts, strict=True)], dim=1)
    chosen = [groups == number for number in range(len(linears))]
    outputs = [through(head, tokens[mine]) for head, mine in zip(linears, chosen, strict=True)]
    result = outputs[0].new_zeros(*tokens.shape[:2], width)
    for mine, output in zip(chosen, outputs, strict=True):
        result = result.masked_scatter(mine[..., None], output)
    return result
