"""Named normalisations against arithmetic in NumPy; what does not apply; sentences; identities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import ArraySample, View
from fmsuite.core.encoders import Encoder
from fmsuite.core.evaluation.normalisations import NORMALISATIONS, check_names
from fmsuite.core.evaluation.renormalised import Renormalised, WindowNormalize, renormalised
from fmsuite.core.evaluation.value_statistics import Statistics, ValueSample
from fmsuite.core.input_words import OWN, normalisation_sentence
from fmsuite.core.inputs import Channel, InputSpec, Normalize, Quantification, Reading, rgb_channels
from fmsuite.errors import FmsuiteError, ReadFailure, UsageError

RANDOM = np.random.default_rng(0)
RAW = RANDOM.integers(300, 9000, (6, 3, 8, 8)).astype(np.uint16)
RADAR = Quantification(scale=0.01, offset=-40.0, clip=(-30.0, 5.0))
SPEC = InputSpec(
    axes=("y", "x"),
    size=(8, 8),
    channels=(
        Channel(name="B4", wavelength=665, mean=0.3, std=0.1),
        Channel(name="B3", wavelength=560, mean=0.4, std=0.2),
        Channel(name="VV", mean=-10, std=4, quantification=RADAR),
    ),
    scale=1e-4,
    clip=(0.0, 0.6),
)


class Rows:
    """Reads ``RAW``; the last window has a corner without data, the fifth cannot be read."""

    def read(self, window: int) -> ArraySample:
        if window == 4:
            raise ReadFailure("four.tif", "read", "it is damaged.")
        valid = np.ones((1, 8, 8), dtype=bool)
        valid[:, 4:, 4:] = window != 5
        return ArraySample(RAW[window], valid)


class Index(Sequence):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, row: int) -> int:  # type: ignore[override]
        return row

    def label_code(self, row: int) -> int:
        return -1


def physical(raw: np.ndarray = RAW) -> np.ndarray:
    values = raw.astype(np.float64)
    found = [(values[:, band] * 1e-4).clip(0, 0.6) for band in (0, 1)]
    return np.stack([*found, (values[:, 2] * 0.01 - 40).clip(-30, 5)], axis=1)


@pytest.fixture(scope="module")
def sample() -> ValueSample:
    return ValueSample.of(Index(), range(6), Rows(), SPEC, "training windows")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(sample: ValueSample) -> Statistics:
    return Statistics.of(sample, SPEC)


def encoder(spec: InputSpec = SPEC) -> Encoder:
    config = ModelConfig.model_validate({"width": 24, "depth": 1, "heads": 2, "patch_size": 4})
    torch.manual_seed(0)
    return Encoder(VisionTransformer(config, spec), spec, "mean", {})


def known() -> np.ndarray:
    """(N, 3) physical values of what can be read and is valid."""
    whole = physical()
    parts = [whole[row].reshape(3, -1).T for row in (0, 1, 2, 3)]
    corner = np.ones((8, 8), dtype=bool)
    corner[4:, 4:] = False
    return np.concatenate([*parts, whole[5][:, corner].T])


def test_statistics_are_those_of_valid_values_that_can_be_read(data: Statistics) -> None:
    values = known()
    np.testing.assert_allclose(data.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(data.std, values.std(0), rtol=1e-12)
    np.testing.assert_allclose(data.least, values.min(0))
    np.testing.assert_allclose(data.most, values.max(0))
    np.testing.assert_allclose(np.stack([data.low, data.high]), np.percentile(values, (2, 98), axis=0))
    assert data.said == "5 of 6 training windows"


def network(name: str, data: Statistics) -> np.ndarray:
    made = NORMALISATIONS[name].apply(SPEC, data)
    module = WindowNormalize(made.spec) if made.by_window else Normalize(made.spec)
    return module(torch.from_numpy(RAW.astype(np.int32))).numpy()


def column(values: np.ndarray) -> np.ndarray:
    return np.asarray(values)[:, None, None]


def test_each_is_the_arithmetic_that_it_names(data: Statistics) -> None:
    values, of = physical(), known()
    own_mean, own_std = column([0.3, 0.4, -10]), column([0.1, 0.2, 4])
    mean, std = column(of.mean(0)), column(of.std(0))
    low, high = (column(end) for end in np.percentile(of, (2, 98), axis=0))
    axes = (2, 3)
    expected = {
        "trained": (values - own_mean) / own_std,
        "mean-std": (values - mean) / std,
        "two-sigma": ((values - mean + 2 * std) / (4 * std)).clip(0, 1),
        "min-max": ((values - column(of.min(0))) / column(of.max(0) - of.min(0))).clip(0, 1),
        "percentiles": ((values - low) / (high - low)).clip(0, 1),
        "window": (values - values.mean(axes, keepdims=True)) / values.std(axes, keepdims=True),
        "scale": values,
        "raw": RAW.astype(np.float64),
    }
    for name, wanted in expected.items():
        np.testing.assert_allclose(network(name, data), wanted, atol=2e-5, err_msg=name)
    assert set(expected) | {"imagenet"} == set(NORMALISATIONS)


def test_a_window_is_standardised_over_its_valid_values_and_invalid_ones_are_zero() -> None:
    module = WindowNormalize(NORMALISATIONS["scale"].apply(SPEC, None).spec)  # type: ignore[arg-type]
    raw = torch.from_numpy(RAW[:2].astype(np.float32))
    valid = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.7
    raw = torch.where(valid, raw, torch.nan)
    raw[1, 0] = 5000.0
    found = module(raw, valid)
    values = physical(np.nan_to_num(raw.numpy()))
    for image in range(2):
        for band in range(3):
            kept = valid[image, 0].numpy()
            mine = values[image, band][kept]
            expected = np.zeros(kept.sum()) if (image, band) == (1, 0) else (mine - mine.mean()) / mine.std()
            np.testing.assert_allclose(found[image, band].numpy()[kept], expected, atol=1e-5)
            assert not found[image, band].numpy()[~kept].any()


def test_imagenets_constants_go_to_the_colours_by_name_or_wavelength(data: Statistics) -> None:
    raw = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    rgb = InputSpec(axes=("y", "x"), size=(8, 8), channels=rgb_channels((0.5,) * 3, (0.25,) * 3), scale=1 / 255)
    sample = ValueSample(tuple(raw[:, n].numpy().ravel().astype(float) for n in range(3)), "all 2 windows")
    made = NORMALISATIONS["imagenet"].apply(rgb, Statistics.of(sample, rgb)).spec
    assert [(c.mean, c.std) for c in made.channels] == [(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]
    waves = tuple(Channel(name=f"b{w}", wavelength=w) for w in (490, 665, 560))
    bgr = rgb.model_copy(update={"channels": waves, "scale": 1e-4, "clip": None})
    few = ValueSample(tuple(np.linspace(0, 9000, 50) for _ in range(3)), "all")
    made = NORMALISATIONS["imagenet"].apply(bgr, Statistics.of(few, bgr)).spec
    assert [c.mean for c in made.channels] == [0.406, 0.485, 0.456]
    assert {q.clip for q in made.quantifications} == {(0.0, 1.0)}
    infrared = bgr.model_copy(update={"channels": (*waves[:2], Channel(name="B8", wavelength=842))})
    with pytest.raises(UsageError, match="B8 is none of them"):
        NORMALISATIONS["imagenet"].apply(infrared, Statistics.of(few, infrared))
    with pytest.raises(UsageError, match="from 0 to 1, and these run from"):
        NORMALISATIONS["imagenet"].apply(SPEC, data)


def test_names_that_do_not_apply_are_refused_with_the_reason_or_left_out_of_all(sample: ValueSample) -> None:
    bands = tuple(Channel(name=f"B{n}") for n in range(13))
    many = InputSpec(axes=("y", "x"), size=(8, 8), channels=bands)
    thirteen = ValueSample(tuple(np.arange(20.0) for _ in bands), "all 3 windows")
    with pytest.raises(UsageError, match=r"'imagenet' does not apply to 'net'.*there are 13 channels"):
        renormalised(encoder(many), "net", ["imagenet"], thirteen)
    with pytest.raises(UsageError, match=r"'raw' does not apply to 'net'.*trained with"):
        renormalised(encoder(many), "net", ["raw"], thirteen)
    found, notes = renormalised(encoder(many), "net", ["all"], thirteen)
    assert list(found) == ["mean-std", "two-sigma", "min-max", "percentiles", "window"]
    assert len(notes) == 3
    assert "'scale' was left out for net: raw values have no scale" in " ".join(notes)
    with pytest.raises(UsageError, match=r"no normalisation .minmax..*min-max"):
        check_names(["minmax"])


def test_weights_are_shared_and_identities_differ(sample: ValueSample) -> None:
    model = encoder()
    found, _ = renormalised(model, "net", ["all"], sample)
    identities = {model.identity, *(made.identity for made in found.values())}
    assert len(identities) == len(found) + 1
    again, _ = renormalised(encoder(), "net", ["all"], sample)
    assert {name: made.identity for name, made in again.items()} == {n: made.identity for n, made in found.items()}
    raw = View(torch.from_numpy(RAW.astype(np.int32)))
    for name, made in found.items():
        assert made.backbone is model.backbone
        normal = View(torch.from_numpy(network(name, Statistics.of(sample, SPEC))).float())
        torch.testing.assert_close(made.embed(raw), model.backbone(normal).pooled("mean"))
        assert isinstance(made, Renormalised)


def test_sentences_say_scale_and_whose_statistics(sample: ValueSample) -> None:
    rgb = InputSpec(axes=("y", "x"), size=(8, 8), channels=rgb_channels((0.5,) * 3, (0.25,) * 3), scale=1 / 255)
    assert normalisation_sentence(rgb, OWN) == "Raw values / 255; minus 0.5, divided by 0.25 (the encoder's own)."
    assert normalisation_sentence(SPEC, OWN) == (
        "By channel: B4, B3: raw values x 0.0001, clipped to 0 to 0.6; VV: raw values x 0.01 − 40, clipped to -30 to "
        "5; minus mean, divided by standard deviation of each channel (the encoder's own): B4 0.3 ± 0.1, B3 0.4 ± 0.2, "
        "VV -10 ± 4."
    )
    reading = Reading(domain="medical", modality="mr", plan="zscore", percentiles=(0.5, 99.5), size=(8, 8))
    mr = InputSpec(axes=("y", "x"), size=(8, 8), channels=(Channel(name="T1"),), reading=reading)
    assert "zscore (percentiles 0.5 and 99.5 of the whole image)" in normalisation_sentence(mr, OWN)
    assert normalisation_sentence(mr, OWN).endswith("nothing is divided by a standard deviation.")
    found, _ = renormalised(encoder(), "net", ["two-sigma", "window"], sample)
    assert "mean ± 2 standard deviations of the data (5 of 6 training windows) become 0 and 1" in (
        found["two-sigma"].normalisation
    )
    assert "standardised by itself" in found["window"].normalisation
    assert encoder().normalisation == normalisation_sentence(SPEC, OWN)


def test_without_a_readable_window_there_are_no_statistics() -> None:
    with pytest.raises(FmsuiteError, match=r"four\.tif: it is damaged"):
        ValueSample.of(Index(), [4], Rows(), SPEC, "windows")  # type: ignore[arg-type]
