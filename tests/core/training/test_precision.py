from __future__ import annotations

import pytest
import torch

from fmsuite.core.training import precision
from fmsuite.core.training.precision import autocast, choose_device, choose_precision
from fmsuite.errors import UsageError

CPU = torch.device("cpu")


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_float32_on_every_cpu(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(precision, "has_native_bf16", lambda device: native)
    assert choose_precision("auto", CPU) == "float32"
    assert choose_precision("auto", torch.device("cuda")) == ("bf16" if native else "float32")


def test_bf16_is_refused_where_it_would_be_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_native_bf16", lambda device: False)
    with pytest.raises(UsageError, match="neither AVX512-BF16 nor AMX"):
        choose_precision("bf16", CPU)
    with pytest.raises(UsageError, match="this GPU is older than Ampere"):
        choose_precision("bf16", torch.device("cuda"))
    monkeypatch.setattr(precision, "has_native_bf16", lambda device: True)
    assert choose_precision("bf16", CPU) == "bf16"


def test_autocast_computes_products_in_the_chosen_format() -> None:
    a = torch.ones(2, 2)
    with autocast("bf16", CPU):
        assert (a @ a).dtype == torch.bfloat16
    with autocast("float32", CPU):
        assert (a @ a).dtype == torch.float32


def test_devices_are_chosen_and_missing_ones_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == CPU
    with pytest.raises(UsageError, match=r"training\.device is 'cuda'"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match="Process 2 of this node has no GPU"):
        choose_device("auto")
