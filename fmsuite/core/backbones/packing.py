"""Sequences of several lengths in one run of tokens, and attention that stays within each of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from fmsuite.core.backbones.drop_path import Kept
from fmsuite.core.backbones.positions import Rotary, rotate

HALF = (torch.float16, torch.bfloat16)


class Group(NamedTuple):
    """Sequences of one length, one after the other in a run of tokens.

    Attributes:
        samples, tokens: how many sequences, and of how many tokens each.
        rotary: rotation of queries and keys, for all tokens of a sequence.
        key_mask: (B, N) bool, False at tokens that nothing may attend to. Every row needs a True.
        position_bias: (heads, N, N) or (B, heads, N, N), added to the logits.
        shape: the grid that the last tokens of a sequence fill in row-major order, where they fill one.
    """

    samples: int
    tokens: int
    rotary: Rotary | None = None
    key_mask: Tensor | None = None
    position_bias: Tensor | None = None
    shape: tuple[int, ...] | None = None


def starts_of(groups: Sequence[Group]) -> list[int]:
    """Where each group begins in the run of tokens, and where the last one ends."""
    return list(accumulate((group.samples * group.tokens for group in groups), initial=0))


def select_groups(groups: Sequence[Group], kept: Kept) -> tuple[Group, ...]:
    """What attention needs to know of the kept samples."""
    return tuple(_select(group, rows) for group, rows in zip(groups, kept.rows, strict=True))


def _select(group: Group, rows: Tensor) -> Group:
    turn, mask, bias = group.rotary, group.key_mask, group.position_bias
    if turn is not None and turn.cos.shape[0] > 1:
        turn = Rotary(turn.cos.index_select(0, rows), turn.sin.index_select(0, rows))
    if mask is not None:
        mask = mask.index_select(0, rows)
    if bias is not None and bias.dim() == 4:
        bias = bias.index_select(0, rows)
    return Group(rows.shape[0], group.tokens, turn, mask, bias, group.shape)


def token_rows(groups: Sequence[Group], kept: Kept) -> tuple[Tensor, Tensor]:
    """The kept samples' tokens in a run of tokens: their numbers (T,) int32, and (T, 1) int32 whether they count."""
    numbers, counted = [], []
    for group, start, rows, counts in zip(groups, starts_of(groups), kept.rows, kept.counted):
        places = torch.arange(group.tokens, dtype=torch.int32, device=rows.device) + start
        numbers.append((rows[:, None] * group.tokens + places).flatten())
        counted.append(counts[:, None].expand(-1, group.tokens).flatten())
    return torch.cat(numbers), torch.cat(counted)[:, None]


def attend(qkv: Tensor, groups: Sequence[Group]) -> Tensor:
    """Scaled dot-product attention within each sequence.

    One call of variable-length attention for all groups, where ``fits_varlen`` says so; otherwise one call of
    ``scaled_dot_product_attention`` for each group.

    Args:
        qkv: (T, 3, heads, head_dim) queries, keys and values of all sequences, group after group.
        groups: T in all.

    Returns:
        (T, heads * head_dim).
    """
    if fits_varlen(qkv, groups):
        return attend_varlen(qkv, groups)
    starts = starts_of(groups)
    parts = [
        attend_group(qkv[start:stop], group) if len(groups) > 1 else attend_group(qkv, group)
        for group, start, stop in zip(groups, starts, starts[1:])
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def project_group(qkv: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """(B * N, 3, heads, head_dim) to turned queries, keys and values, (B, heads, N, head_dim) each."""
    q, k, v = qkv.unflatten(0, (group.samples, group.tokens)).permute(2, 0, 3, 1, 4).unbind(0)
    if group.rotary is not None:
        q, k = rotate(q, group.rotary), rotate(k, group.rotary)
    return q, k, v


def attend_group(qkv: Tensor, group: Group) -> Tensor:
    """``attend`` for one group."""
    q, k, v = project_group(qkv, group)
    mask = None if group.key_mask is None else group.key_mask[:, None, None, :]
    if group.position_bias is not None:
        bias = group.position_bias.to(q.dtype).expand(group.samples, -1, -1, -1)
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def fits_varlen(qkv: Tensor, groups: Sequence[Group]) -> bool:
    """Whether one call of variable-length attention can express what is asked.

    It can for sequences of several lengths, in half precision, on a GPU of compute capability 8 or above, with heads of
    a multiple of 8 and at most 256 features, where every token may be attended to and nothing is added to the logits:
    such a call takes neither a mask nor a bias, and to leave invalid keys out of the run their number would have to
    travel from the device to the host.
    """
    head_dim = qkv.shape[-1]
    return (
        len(groups) > 1
        and qkv.is_cuda
        and qkv.dtype in HALF
        and head_dim % 8 == 0
        and head_dim <= 256
        and all(group.key_mask is None and group.position_bias is None for group in groups)
        and _has_kernels(qkv.device.index)
    )


@lru_cache
@torch.compiler.assume_constant_result
def _has_kernels(device: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def attend_varlen(qkv: Tensor, groups: Sequence[Group]) -> Tensor:
    """``attend`` in one call for all groups."""
    q, k, v = qkv.unbind(1)
    if any(group.rotary is not None for group in groups):
        turn = _turn_of_tokens(groups, qkv)
        q, k = rotate(q, turn), rotate(k, turn)
    bounds = [
        torch.arange(group.samples, dtype=torch.int32, device=qkv.device) * group.tokens + start
        for group, start in zip(groups, starts_of(groups))
    ]
    end = torch.full((1,), len(qkv), dtype=torch.int32, device=qkv.device)
    cumulative = torch.cat([*bounds, end])
    longest = max(group.tokens for group in groups)
    out = varlen_attn(q, k, v, cumulative, cumulative, longest, longest)
    assert isinstance(out, Tensor)
    return out.flatten(1)


def _turn_of_tokens(groups: Sequence[Group], like: Tensor) -> Rotary:
    """(T, 1, head_dim / 2) cosines and sines of every token of the run."""

    def of_tokens(values: Tensor, group: Group) -> Tensor:
        return values[:, 0].expand(group.samples, -1, -1).flatten(0, 1)[:, None].to(like.dtype)

    turns = [(group.rotary, group) for group in groups if group.rotary is not None]
    return Rotary(
        torch.cat([of_tokens(turn.cos, group) for turn, group in turns]),
        torch.cat([of_tokens(turn.sin, group) for turn, group in turns]),
    )
