"""Which device, and which number format: chosen from what the machine can do, never assumed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from fmsuite.core.distributed import local_rank
from fmsuite.errors import UsageError

Precision = Literal["float32", "bf16"]


def choose_device(setting: Literal["auto", "cpu", "cuda"] = "auto") -> torch.device:
    """This process's device: under torchrun each process of a node has a GPU of its own.

    Raises:
        UsageError: if a GPU is asked for and there is none, or there are more processes than GPUs.
    """
    available = torch.cuda.is_available()
    if setting == "cpu" or (setting == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise UsageError(
            "training.device is 'cuda' and PyTorch sees no GPU here.",
            "Set training.device=cpu, or install a PyTorch build for this machine's GPU driver.",
        )
    if local_rank() >= torch.cuda.device_count():
        raise UsageError(
            f"Process {local_rank()} of this node has no GPU: PyTorch sees {torch.cuda.device_count()}.",
            "Start at most as many processes a node as it has GPUs (torchrun --nproc-per-node).",
        )
    return torch.device("cuda", local_rank())


def has_native_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices: GPUs from Ampere on; CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_precision(setting: Literal["auto", "float32", "bf16"], device: torch.device) -> Precision:
    """``auto`` is bf16 on a GPU that computes it natively, and float32 everywhere else, on every CPU too: a run on a
    CPU then gives the same numbers whatever the CPU is.

    Raises:
        UsageError: if bf16 is asked for on a device that would emulate it, which is hundreds of times slower.
    """
    native = has_native_bf16(device)
    if setting == "auto":
        return "bf16" if device.type == "cuda" and native else "float32"
    if setting == "bf16" and not native:
        lacks = "has neither AVX512-BF16 nor AMX" if device.type == "cpu" else "is older than Ampere"
        raise UsageError(
            f"training.precision is 'bf16', but this {device.type.upper().replace('CUDA', 'GPU')} {lacks} "
            "and would emulate it hundreds of times slower than float32.",
            "Set training.precision=auto.",
        )
    return setting


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager:
    """Runs what is inside in that precision; parameters and optimiser state stay float32."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
