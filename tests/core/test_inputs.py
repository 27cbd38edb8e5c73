"""InputSpec: what it refuses, how it resizes; Normalize against its formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fmsuite.core.inputs import IMAGENET_MEAN, Channel, InputSpec, Normalize, Quantification, rgb_channels
from fmsuite.errors import UsageError

CT = InputSpec(
    axes=("z", "y", "x"),
    size=(32, 96, 96),
    channels=(Channel(name="CT", mean=0.5, std=0.25),),
    scale=1 / 2000,
    offset=0.5,
    clip=(0, 1),
    spacing=(5.0, 0.7, 0.7),
    spacing_unit="mm",
    orientation="RAS",
)
SERIES = InputSpec(axes=("time", "y", "x"), size=(3, 96, 96), channels=(Channel(name="red"), Channel(name="nir")))


@pytest.mark.parametrize(
    "change",
    [
        {"channels": ()},
        {"size": (32, 96)},
        {"size": ()},
        {"bag": True},
        {"spacing": (1.0,)},
        {"clip": (1, 1)},
        {"colour": "blue"},
    ],
)
def test_inconsistent_specs_are_refused(change: dict) -> None:
    with pytest.raises(ValidationError):
        InputSpec.model_validate({**CT.model_dump(), **change})


def test_a_spec_survives_json() -> None:
    assert InputSpec.model_validate_json(CT.model_dump_json()) == CT


def test_resizing_keeps_the_field_of_view() -> None:
    smaller = CT.resized(48)
    assert smaller.size == (48, 48, 48)
    assert smaller.spacing is not None
    assert CT.spacing is not None
    for old, spacing, new, now in zip(CT.size, CT.spacing, smaller.size, smaller.spacing, strict=True):
        assert old * spacing == pytest.approx(new * now)


def test_resizing_leaves_time_alone() -> None:
    assert SERIES.resized(64).size == (3, 64, 64)
    assert SERIES.expand((64, 32)) == (3, 64, 32)
    assert SERIES.expand((7, 64, 32)) == (7, 64, 32)
    assert SERIES.spatial == (1, 2)


def test_a_size_that_fits_no_axes_is_refused() -> None:
    with pytest.raises(UsageError, match="does not fit the axes"):
        CT.expand((1, 2))


def test_groups_follow_first_appearance() -> None:
    channels = tuple(Channel(name=n, group=g) for n, g in [("B2", "rgb"), ("B8", "nir"), ("B3", "rgb"), ("VV", None)])
    spec = InputSpec(axes=("y", "x"), size=(8, 8), channels=channels)
    assert spec.groups == (("rgb", (0, 2)), ("nir", (1,)), ("", (3,)))


def test_differences_name_what_differs() -> None:
    assert CT.differences(CT.resized(CT.size)) == []
    changed = CT.model_copy(
        update={"orientation": "LPS", "spacing": (1.0, 1.0, 1.0), "scale": 1.0, "channels": (Channel(name="MR"),)}
    )
    text = "; ".join(CT.differences(changed))
    for word in ("LPS", "MR", "spacing", "intensity"):
        assert word in text


@settings(deadline=None, max_examples=30)
@given(
    scale=st.floats(1e-3, 10),
    offset=st.floats(-5, 5),
    clip=st.none() | st.tuples(st.floats(-3, 0), st.floats(0.5, 3)),
    seed=st.integers(0, 1000),
)
def test_normalize_is_its_formula(scale: float, offset: float, clip: tuple[float, float] | None, seed: int) -> None:
    channels = (Channel(name="a", mean=0.3, std=0.2), Channel(name="b", mean=-1.0, std=2.0))
    spec = InputSpec(axes=("y", "x"), size=(4, 4), channels=channels, scale=scale, offset=offset, clip=clip)
    raw = np.random.default_rng(seed).integers(0, 255, (2, 2, 4, 4)).astype(np.uint8)
    expected = offset + scale * raw.astype(np.float64)
    if clip is not None:
        expected = np.clip(expected, *clip)
    expected = (expected - np.array([0.3, -1.0])[:, None, None]) / np.array([0.2, 2.0])[:, None, None]
    got = Normalize(spec)(torch.from_numpy(raw))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_invalid_values_become_the_mean_even_if_not_finite() -> None:
    raw = torch.full((1, 3, 2, 2), float("nan"))
    raw[..., 0] = 0.5
    valid = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    valid[..., 0] = True
    out = Normalize(InputSpec(axes=("y", "x"), size=(2, 2), channels=rgb_channels()))(raw, valid)
    assert torch.equal(out[..., 1], torch.zeros(1, 3, 2))
    assert out[0, 0, 0, 0] == pytest.approx((0.5 - IMAGENET_MEAN[0]) / 0.229, rel=1e-5)


def test_invert_undoes_normalize() -> None:
    values = torch.randint(0, 255, (2, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    normalize = Normalize(InputSpec(axes=("y", "x"), size=(4, 4), channels=rgb_channels(), scale=1 / 255))
    torch.testing.assert_close(normalize.invert(normalize(values)), values.float(), rtol=0, atol=1e-3)


def test_bags_are_normalised_along_their_last_axis() -> None:
    channels = tuple(Channel(name=str(i), mean=float(i), std=1.0 + i) for i in range(3))
    spec = InputSpec(axes=("y", "x"), size=(), channels=channels, bag=True)
    out = Normalize(spec)(torch.ones(2, 5, 3))
    torch.testing.assert_close(out[0, 0], torch.tensor([1.0, 0.0, -1 / 3]))


TWO_SENSORS = InputSpec(
    axes=("y", "x"),
    size=(4, 4),
    channels=(
        Channel(name="B2", mean=0.1, std=0.05),
        Channel(name="VV", mean=-10, std=4, quantification=Quantification(clip=(-60.0, 40.0))),
        Channel(name="ST", mean=290, std=9, quantification=Quantification(scale=0.00341802, offset=149.0)),
    ),
    scale=1e-4,
    clip=(0.0, 2.0),
)


def test_a_channel_in_another_unit_is_normalised_by_its_own_quantification() -> None:
    raw = torch.tensor([[25_000.0, 1200.0], [-75.0, -12.5], [40_000.0, 0.0]])[None, :, :, None]
    reflectance, decibels, kelvin = raw[0].double()
    expected = torch.stack(
        [
            ((reflectance * 1e-4).clip(0, 2) - 0.1) / 0.05,
            (decibels.clip(-60, 40) + 10) / 4,
            (149 + 0.00341802 * kelvin - 290) / 9,
        ]
    )
    normalize = Normalize(TWO_SENSORS)
    found = normalize(raw)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-4)
    unclipped = torch.tensor([1200.0, -12.5, 40_000.0])[None, :, None, None]
    torch.testing.assert_close(normalize.invert(normalize(unclipped)), unclipped, rtol=1e-4, atol=1e-2)


def test_a_quantification_is_told_and_compared_channel_by_channel() -> None:
    assert InputSpec.model_validate_json(TWO_SENSORS.model_dump_json()) == TWO_SENSORS
    assert "quantification" not in TWO_SENSORS.channels[0].model_dump()
    channels = (*TWO_SENSORS.channels[:2], Channel(name="ST", mean=290, std=9))
    (said,) = TWO_SENSORS.differences(TWO_SENSORS.model_copy(update={"channels": channels}))
    assert said == "intensity scale 0.00341802 and offset 149 against window 0 to 20000 (becoming 0 to 2) in ST"
