"""Bands and sensors that are hidden in training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.pipeline import Item, ViewPipeline, collate
from fmsuite.core.data.sample import ArraySample, SampleKey, ViewRequest
from fmsuite.core.inputs import Channel, InputSpec, Normalize
from fmsuite.core.seeding import generator
from fmsuite.domains.remote_sensing import RemoteSensingDomain
from fmsuite.domains.remote_sensing.augment import RasterAugmentation
from fmsuite.domains.remote_sensing.dropout import Dropout
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.errors import UsageError

SENSORS = ((0, 1), (2, 3, 4, 5))


def ones(bands: int = 4) -> ArraySample:
    return ArraySample(np.ones((bands, 8, 8), np.float32))


def stays(sample: ArraySample) -> np.ndarray:
    """(C,) bool: bands that are there. Those that are not are so everywhere, and zero."""
    if sample.valid is None:
        return np.ones(len(sample.values), dtype=bool)
    whole = sample.valid.reshape(len(sample.values), -1)
    assert (whole.all(1) | ~whole.any(1)).all()
    assert not sample.values[~sample.valid].any()
    return whole.all(1)


def test_bands_go_at_weak_and_at_strong_and_never_at_none():
    augmentation, sample = RasterAugmentation(dropout=Dropout(bands=0.5)), ones()
    for strength in ("weak", "strong"):
        kept = [stays(augmentation.after_crop(sample, strength, False, generator(seed))) for seed in range(40)]
        assert 0.4 < np.mean(kept) < 0.9
        assert len({tuple(k) for k in kept}) > 5
    assert augmentation.after_crop(sample, "none", False, generator(0)) is sample
    assert sample.valid is None
    assert sample.values.all()


def test_each_band_goes_with_its_probability_and_half_of_a_group_stays():
    kept = np.array([stays(Dropout(bands=0.3)(ones(13), generator(seed))) for seed in range(600)])
    assert kept.mean() == pytest.approx(0.7, abs=0.03)
    kept = np.array([stays(Dropout(bands=0.95)(ones(5), generator(seed))) for seed in range(300)])
    assert kept.sum(1).min() == 3
    assert kept.mean(0) == pytest.approx(np.full(5, kept.mean()), abs=0.1)
    grouped = Dropout(bands=0.9, members=((0,), (1, 2), (3, 4, 5, 6)))
    kept = np.array([stays(grouped(ones(7), generator(seed))) for seed in range(100)])
    assert kept[:, 0].all()
    assert (kept[:, 1:3].sum(1) >= 1).all()
    assert (kept[:, 3:].sum(1) >= 2).all()


def test_whole_sensors_go_but_never_all():
    drop = Dropout(groups=0.4, members=SENSORS)
    kept = np.array([stays(drop(ones(6), generator(seed))) for seed in range(600)])
    first, second = kept[:, 0], kept[:, 2]
    assert (kept[:, :2] == first[:, None]).all()
    assert (kept[:, 2:] == second[:, None]).all()
    assert (first | second).all()
    # Both would go with 0.16, and then one of them stays.
    assert first.mean() == pytest.approx(0.6 + 0.08, abs=0.06)
    assert second.mean() == pytest.approx(0.6 + 0.08, abs=0.06)


def test_what_a_sample_lacks_is_not_what_stays():
    sample = ones(6)
    sample.valid = np.ones((6, 8, 8), dtype=bool)
    sample.valid[:2] = False
    sample.values[:2] = 0
    for seed in range(50):
        assert stays(Dropout(groups=0.9, members=SENSORS)(sample, generator(seed)))[2:].all()
    sample.valid[2:4] = False
    sample.values[2:4] = 0
    for seed in range(50):
        assert stays(Dropout(bands=0.9, members=SENSORS)(sample, generator(seed)))[4:].all()


def test_a_series_loses_a_band_on_all_dates():
    sample = ArraySample(np.ones((4, 3, 8, 8), np.float32), np.ones((1, 3, 8, 8), dtype=bool))
    dropped = [~stays(Dropout(bands=0.5)(sample, generator(seed))) for seed in range(10)]
    assert np.any(dropped)


@torch.no_grad()
def test_a_sensor_that_was_dropped_is_invalid_tokens_and_its_values_do_not_matter():
    spec = InputSpec(
        axes=("y", "x"),
        size=(8, 8),
        channels=tuple(Channel(name=str(i), group="radar" if i < 2 else "optical") for i in range(6)),
    )
    options = RemoteSensingOptions(sensor_dropout=0.7)
    torch.manual_seed(0)
    model = VisionTransformer(ModelConfig(width=24, depth=1, heads=2, patch_size=4, positions="sincos"), spec).eval()
    pipeline = ViewPipeline(
        (ViewRequest("image", (8, 8)),),
        RemoteSensingDomain(options).augmentation(spec),
        model.grid,
        spec.axes,
        seed=0,
    )
    random = np.random.default_rng(0)
    seen = set()
    for row in range(12):
        sample = ArraySample(random.normal(size=(6, 8, 8)).astype(np.float32))
        (view,) = collate([Item(pipeline(sample, SampleKey(0, row)), row, -1)]).views["image"]
        view = Normalize(spec).view(view)
        features = model(view)
        valid = features.layout.valid
        per_sensor = (True, True) if valid is None else tuple(valid[0].view(2, 4).all(1).tolist())
        assert valid is None or set(valid[0].view(2, 4).sum(1).tolist()) <= {0, 4}
        seen.add(per_sensor)
        if per_sensor == (False, True):
            expected = features.pooled("cls")
            view.pixels[:, :2] = 7.0
            torch.testing.assert_close(model(view).pooled("cls"), expected)
    assert seen == {(True, True), (True, False), (False, True)}


def test_a_single_group_has_no_sensors_to_drop():
    spec = InputSpec(axes=("y", "x"), size=(8, 8), channels=(Channel(name="a"), Channel(name="b")))
    with pytest.raises(UsageError, match=r"sensor_dropout hides whole channel groups.*data\.band_dropout"):
        RemoteSensingDomain(RemoteSensingOptions(sensor_dropout=0.1)).augmentation(spec)
