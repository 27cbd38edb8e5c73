"""Stochastic depth that does not compute what it drops (Huang et al. 2016, section 3; Oquab et al. 2023, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fmsuite.core.seeding import uniform_from_keys

LEAST = 2
"""Samples that a branch computes at least, where there are as many: compilers make graphs of their own for empty
tensors and for those of length one."""


class Kept(NamedTuple):
    """The samples for which a residual branch is computed, group by group of equally long sequences.

    Attributes:
        rows: for each group (K,) int32, numbers of samples, each at most once.
        counted: for each group (K,) int32, 1, or 0 at a dropped sample that only fills up to ``LEAST``.
    """

    rows: tuple[Tensor, ...]
    counted: tuple[Tensor, ...]


class DropPath(nn.Module):
    """What a residual branch keeps in training: each sample with probability ``1 - rate``, divided by that.

    Args:
        rate: probability of dropping.
        salt: tells this draw from those of other branches where keys are used.
    """

    scale: Tensor

    def __init__(self, rate: float, salt: int) -> None:
        super().__init__()
        self.rate = rate
        self.salt = salt
        # A tensor: compiled code would be made anew for each block's number.
        self.register_buffer("scale", torch.tensor(1.0 / (1.0 - rate)), persistent=False)

    @property
    def drops(self) -> bool:
        """Whether it needs to be told what is kept."""
        return self.training and self.rate > 0.0

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


Branches = tuple[Kept | None, Kept | None]
"""What the attention and the MLP of a block keep; ``None`` is everything."""


def draw_kept(
    paths: Sequence[DropPath],
    groups: Sequence[tuple[int, Tensor | None]],
    device: torch.device,
    *,
    compiled: bool = False,
) -> list[Kept | None]:
    """What every branch of a forward pass keeps, drawn on the host all at once and sent to the device in one copy.

    Args:
        paths: of all branches.
        groups: for each group of sequences, how many samples it has, and (B,) int64 keys on the host, one for each
            sample and draw: what is kept then depends on the key alone, not on the batch, the rank or the generator.
            Without keys PyTorch's generator draws.
        device: where the branches are computed.
        compiled: tell the compiler that these lengths vary.

    Returns:
        For each branch what it keeps; ``None`` for one that drops nothing.
    """
    dropping = [path for path in paths if path.drops]
    if not dropping:
        return [None] * len(paths)
    rates = torch.tensor([path.rate for path in dropping])
    salts = [path.salt for path in dropping]
    filled = [_fill(_draws(samples, keys, salts) >= rates[:, None]) for samples, keys in groups]
    sizes = [number for _, lengths in filled for number in lengths]
    buffer = torch.cat([drawn for drawn, _ in filled], dim=1)
    if device.type == "cuda":
        buffer = buffer.pin_memory()
    rows, counted = (values.split(sizes) for values in buffer.to(device, non_blocking=True).unbind(0))
    if compiled:
        for part in (*rows, *counted):
            torch._dynamo.maybe_mark_dynamic(part, 0)
    step = len(dropping)
    made = iter([Kept(rows[number::step], counted[number::step]) for number in range(step)])
    return [next(made) if path.drops else None for path in paths]


def _draws(samples: int, keys: Tensor | None, salts: list[int]) -> Tensor:
    """(S, B) float32 in [0, 1)."""
    if keys is None:
        return torch.rand(len(salts), samples)
    return uniform_from_keys(keys.cpu(), salts)


def _fill(kept: Tensor) -> tuple[Tensor, list[int]]:
    """(2, ...) int32, rows and whether they count, draw after draw; and how many each draw has.

    Args:
        kept: (S, B) bool.
    """
    lengths = kept.sum(1).clamp(min=min(LEAST, kept.shape[1]))
    # Those that are kept in rising order, and dropped ones after them to fill up.
    order = kept.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    shown = torch.arange(kept.shape[1]) < lengths[:, None]
    return torch.stack([order[shown], kept.gather(1, order)[shown]]).to(torch.int32), lengths.tolist()
