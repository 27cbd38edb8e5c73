"""Dates as SatMAE encodes them, against Python's and numpy's calendars."""

from __future__ import annotations

import datetime
import math

import numpy as np
import pytest
import torch

from fmsuite.core.backbones.calendar import calendar
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.positions import sincos_positions
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import View
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.core.objectives.mae import MAE
from fmsuite.core.tokens import PatchGrid
from fmsuite.errors import UsageError

EPOCH = datetime.datetime(2000, 1, 1)
SERIES = InputSpec(axes=("time", "y", "x"), size=(3, 4, 4), channels=(Channel(name="red"),))


def _days(date: datetime.datetime) -> float:
    return (date - EPOCH) / datetime.timedelta(days=1)


def test_year_month_and_hour_are_pythons_for_any_date() -> None:
    draw = np.random.default_rng(0)
    dates = [EPOCH + datetime.timedelta(minutes=10 * int(n)) for n in draw.integers(-9_400_000, 9_400_000, size=2000)]
    dates += [
        datetime.datetime(*day) for day in ((1900, 2, 28), (1900, 3, 1), (2000, 2, 29), (2100, 3, 1), (2024, 12, 31))
    ]
    found = calendar(torch.tensor([_days(date) for date in dates], dtype=torch.float32))
    assert found.tolist() == [[date.year - 2002, date.month - 1, date.hour] for date in dates]


def test_float32_days_flip_no_hour_of_any_day() -> None:
    hours = np.arange("1990-01-01T00", "2179-01-01T00", dtype="datetime64[h]")
    days = ((hours - np.datetime64("2000-01-01T00")).astype(np.float64) / 24).astype(np.float32)
    late = (days.astype(np.float64) + 50 / 1440).astype(np.float32)
    years = hours.astype("datetime64[Y]").astype(int) + 1970
    months = hours.astype("datetime64[M]").astype(int) % 12
    expected = np.stack([years - 2002, months, hours.astype(int) % 24], axis=1)
    # Ten to every hour is the latest that readers hand out.
    for counted in (days, late):
        np.testing.assert_array_equal(calendar(torch.from_numpy(counted)).numpy(), expected)


def _one_axis(position: float, width: int) -> list[float]:
    angles = [position / 10_000 ** (2 * i / width) for i in range(width // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def test_the_code_is_satmaes_place_and_year_and_month_and_hour() -> None:
    dates = [[datetime.datetime(2016, 2, 7, 11), datetime.datetime(2002, 12, 31, 23), datetime.datetime(1999, 1, 1)]]
    days = torch.tensor([[_days(date) for date in row] for row in dates])
    layout = PatchGrid.build(SERIES, 2).layout(SERIES.size, {"time": days})
    found = sincos_positions(layout, 64, widths={"time": 48}, time="calendar")
    expected = [
        _one_axis(x, 8)
        + _one_axis(y, 8)
        + _one_axis(date.year - 2002, 16)
        + _one_axis(date.month - 1, 16)
        + _one_axis(date.hour, 16)
        for date in dates[0]
        for y in range(2)
        for x in range(2)
    ]
    np.testing.assert_allclose(found[0].numpy(), np.array(expected), atol=2e-6)
    # Ten features: three parts of two, and four left over.
    narrow = sincos_positions(layout, 30, time="calendar")[0]
    first = [value for number in (14, 1, 11) for value in _one_axis(number, 2)]
    np.testing.assert_allclose(narrow[0, 20:26].numpy(), first, atol=2e-6)
    assert not narrow[:, 26:].any()


def test_a_calendar_without_time_or_sincos_or_dates_is_refused() -> None:
    flat = InputSpec(axes=("y", "x"), size=(4, 4), channels=SERIES.channels)
    config = ModelConfig(width=24, heads=2, depth=1, patch_size=2, positions="sincos", time_encoding="calendar")
    with pytest.raises(UsageError, match="time_encoding is calendar, and the tokens' axes are y, x"):
        VisionTransformer(config, flat)
    with pytest.raises(ValueError, match="time_encoding has no effect without positions: sincos"):
        ModelConfig(positions="rotary", time_encoding="calendar")
    with pytest.raises(UsageError, match="4 features cannot hold year, month and hour"):
        VisionTransformer(config.model_copy(update={"position_widths": {"time": 4}}), SERIES)
    model = VisionTransformer(config, SERIES).eval()
    with pytest.raises(UsageError, match="bring no dates"):
        model(View(torch.zeros(1, 1, 3, 4, 4)))
    plain = VisionTransformer(config.model_copy(update={"time_encoding": "days"}), flat)
    decoder = {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2, "decoder_time_encoding": "calendar"}
    with pytest.raises(UsageError, match=r"objective\.decoder_time_encoding"):
        MAE(MAE.Config.model_validate(decoder), plain)
    assert MAE(MAE.Config.model_validate(decoder), model).config.decoder_time_encoding == "calendar"
