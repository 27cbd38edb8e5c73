"""A work that reads through a loader's process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset


class _Reading(Dataset):
    def __getitem__(self, unit: int) -> tuple[int, torch.Tensor]:
        return os.getpid(), torch.zeros(1000)


class Loading:
    """Yields its process and that of its loader."""

    def __call__(self, units: Iterator[int]) -> Iterator[tuple[int, int]]:
        for reader, _ in DataLoader(_Reading(), batch_size=None, sampler=units, num_workers=1):
            yield os.getpid(), int(reader)
