"""Randomness as a function of (seed, epoch, index): no hidden state, nothing to save, nothing to restore."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


def generator(*key: int | str) -> np.random.Generator:
    """An independent random generator for a key such as ``(seed, "views", epoch, index)``.

    The same key gives the same stream in every process and on every platform.
    """
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def derive(*key: int | str) -> int:
    """A 63-bit integer seed for a key, for libraries that take an integer."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permuted(position: int, length: int, key: int) -> int:
    """Element ``position`` of a pseudo-random permutation of ``range(length)``, in constant memory.

    A four-round Feistel network over the next even number of bits, walked until it lands inside the range, so an epoch
    over a hundred million windows needs no array (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").

    Raises:
        IndexError: if ``position`` is outside ``range(length)``.
    """
    if not 0 <= position < length:
        raise IndexError(f"position {position} is outside a permutation of {length}")
    half = max(1, (max(length - 1, 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    value = position
    while True:
        left, right = value >> half, value & low
        for turn in range(4):
            mixed = _mix64(right ^ _mix64(key * 4 + turn))
            left, right = right, left ^ (mixed & low)
        value = (left << half) | right
        if value < length:
            return value


def _mix64(value: int) -> int:
    """SplitMix64's finaliser."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def uniform_from_keys(keys: Tensor, salt: int | Sequence[int]) -> Tensor:
    """One number in [0, 1) for each integer key: counter-based, so it depends on nothing but (key, salt).

    Drop-path uses it with a key per sample, which makes it independent of how a batch is spread over ranks.

    Args:
        keys: (B,) int64.
        salt: what tells this draw from others (layer, step); several for as many draws at once.

    Returns:
        (B,) float32 on the keys' device, or (S, B) for S salts.
    """
    if isinstance(salt, int):
        state = keys ^ _signed(_mix64(salt & _MASK64))
    else:
        mixed = [_signed(_mix64(one & _MASK64)) for one in salt]
        state = keys ^ torch.tensor(mixed, dtype=torch.int64, device=keys.device)[:, None]
    for multiplier, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):
        state = (state ^ _logical_right(state, shift)) * _signed(multiplier)
    state = state ^ _logical_right(state, 31)
    return _logical_right(state, 40).to(torch.float32) * (1.0 / (1 << 24))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _logical_right(value: Tensor, shift: int) -> Tensor:
    return (value >> shift) & ((1 << (64 - shift)) - 1)
