"""Encoders of single images on series: the same numbers as of each image alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fmsuite.core.adaptation.tuning import TuningOptions, tuned
from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.datewise import Datewise, one_date
from fmsuite.core.backbones.timm_backbone import TimmBackbone
from fmsuite.core.controls import untrained
from fmsuite.core.data.sample import View
from fmsuite.core.encoders import Encoder, load_encoder, save_encoder, seeing_dates
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.errors import UsageError

SERIES = InputSpec(
    axes=("time", "y", "x"),
    size=(3, 8, 8),
    channels=(Channel(name="red"), Channel(name="green"), Channel(name="vv", group="radar")),
    spacing=(1.0, 10.0, 10.0),
)
FLAT = InputSpec(axes=("y", "x"), size=(32, 32), channels=SERIES.channels[:2])
CONFIG = ModelConfig(
    width=24, heads=2, depth=2, patch_size=4, positions="sincos", registers=1, drop_path=0.5, datewise=True
)


def _model(spec: InputSpec = SERIES) -> Datewise:
    torch.manual_seed(0)
    model = build_backbone(CONFIG, spec)
    assert isinstance(model, Datewise)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _view(samples: int = 2, times: int = 3) -> View:
    draw = torch.Generator().manual_seed(1)
    return View(
        torch.randn(samples, 3, times, 8, 8, generator=draw),
        torch.ones(samples, 1, times, 8, 8, dtype=torch.bool),
        coords={"time": torch.arange(times).float().expand(samples, -1) + 9000},
        spacing=torch.tensor([[1.0, 10.0, 10.0]]).expand(samples, -1),
        keys=torch.arange(samples) + 7,
    )


@pytest.mark.parametrize("training", [False, True])
def test_a_series_of_one_date_is_the_image_exactly(training: bool) -> None:
    model, view = _model().train(training), _view(times=1)
    flat = View(view.pixels[:, :, 0], view.valid[:, :, 0], spacing=view.spacing[:, 1:], keys=view.keys)
    found = model(view, layers=(0, -1), attention=not training)
    alone = model.single(flat, layers=(0, -1), attention=not training)
    for name in ("patches", "cls", "registers") if training else ("patches", "cls", "registers", "attention"):
        assert torch.equal(getattr(found, name), getattr(alone, name)), name
    for one, other in zip(
        (*found.intermediate, *found.intermediate_prefix), (*alone.intermediate, *alone.intermediate_prefix)
    ):
        assert torch.equal(one, other)
    assert found.layout.axes == ("group", "time", "y", "x")
    assert found.layout.shape == (2, 1, 2, 2)


def test_each_dates_tokens_stand_at_its_place_and_vectors_are_means() -> None:
    model, view = _model().eval(), _view()
    found = model(view, attention=True)
    dates = [model.single(View(view.pixels[:, :, t]), attention=True) for t in range(3)]
    grid = found.patches.unflatten(1, (2, 3, 4))
    for t, date in enumerate(dates):
        torch.testing.assert_close(grid[:, :, t], date.patches.unflatten(1, (2, 4)), rtol=0, atol=1e-5)
        assert (found.layout.along("time").unflatten(1, (2, 3, 4))[:, :, t] == 9000 + t).all()
    torch.testing.assert_close(found.cls, sum(date.cls for date in dates) / 3, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        found.attention.unflatten(2, (2, 3, 4))[..., 1, :],
        dates[1].attention.unflatten(2, (2, 4)) / 3,
        rtol=0,
        atol=1e-5,
    )
    mask = torch.rand(2, 24, generator=torch.Generator().manual_seed(2)) < 0.5
    masked = model(view, mask=mask).patches.unflatten(1, (2, 3, 4))[:, :, 2]
    alone = model.single(View(view.pixels[:, :, 2]), mask=mask.unflatten(1, (2, 3, 4))[:, :, 2].flatten(1))
    torch.testing.assert_close(masked, alone.patches.unflatten(1, (2, 4)), rtol=0, atol=1e-5)


def test_padding_and_dates_without_data_change_nothing() -> None:
    model, view = _model().eval(), _view(times=2)
    plain = model(view)
    longer = _view(times=2)
    longer = replace(
        longer,
        pixels=torch.nn.functional.pad(longer.pixels, (0, 0, 0, 0, 1, 2), value=5.0),
        valid=torch.nn.functional.pad(longer.valid, (0, 0, 0, 0, 1, 2)),
        coords={"time": torch.zeros(2, 5)},
    )
    found = model(longer)
    assert torch.equal(found.patches.unflatten(1, (2, 5, 4))[:, :, 1:3], plain.patches.unflatten(1, (2, 2, 4)))
    assert torch.equal(found.cls, plain.cls)
    assert torch.equal(found.registers, plain.registers)
    torch.testing.assert_close(found.mean(), plain.mean(), rtol=0, atol=1e-6)
    nothing = replace(view, valid=torch.zeros_like(view.valid))
    assert not model(nothing).usable.any()
    assert torch.isfinite(model(nothing).cls).all()


def test_an_encoder_of_images_opens_series_and_is_saved_as_one_of_them(tmp_path) -> None:
    single = _model().single.eval()
    images = Encoder(single, one_date(SERIES), "cls", {})
    series = seeing_dates(images, SERIES)
    series.check_input(SERIES)
    assert seeing_dates(images, one_date(SERIES)) is images
    assert seeing_dates(series, SERIES) is series
    assert series.identity != images.identity
    # What else differs is told as ever.
    other = seeing_dates(images, SERIES.model_copy(update={"channels": SERIES.channels[:2]}))
    with pytest.raises(UsageError, match="vv missing"):
        other.check_input(SERIES.model_copy(update={"channels": SERIES.channels[:2]}))
    view = _view()
    expected = series.embed(view)
    save_encoder(tmp_path, series.backbone, series.spec, "cls", {})
    again = load_encoder(tmp_path)
    assert again.identity == series.identity
    assert torch.equal(again.embed(view), expected)
    assert not torch.equal(untrained(series).embed(view), expected)


def test_windows_of_attention_are_those_of_each_date() -> None:
    torch.manual_seed(0)
    spec = InputSpec(axes=("time", "y", "x"), size=(2, 32, 32), channels=FLAT.channels)
    model = build_backbone(CONFIG.model_copy(update={"registers": 0, "depth": 3}), spec)
    tuned(model, TuningOptions(attention="rvsa"))
    assert model.config.attention == "rvsa"
    pixels = torch.randn(1, 2, 2, 32, 32)
    alone = model.eval().single(View(pixels[:, :, 1])).patches
    torch.testing.assert_close(model(View(pixels)).patches[:, 64:], alone, rtol=0, atol=1e-5)


def test_layers_and_foreign_models_are_told_as_of_one_date() -> None:
    model = _model()
    assert model.layer_of("single.blocks.1.mlp.fc1.weight") == 2
    timm = TimmBackbone(ModelConfig(name="timm:resnet10t"), FLAT).eval()
    series = seeing_dates(
        Encoder(timm, FLAT, "cls", {}), InputSpec(axes=("time", "y", "x"), size=(2, 32, 32), channels=FLAT.channels)
    )
    pixels = torch.randn(1, 2, 2, 32, 32)
    expected = (timm(View(pixels[:, :, 0])).cls + timm(View(pixels[:, :, 1])).cls) / 2
    torch.testing.assert_close(series.backbone(View(pixels)).cls, expected, rtol=0, atol=1e-4)
    with pytest.raises(UsageError, match="cannot drop tokens"):
        series.backbone(View(pixels), keep=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(UsageError, match="taken one by one"):
        build_backbone(CONFIG, one_date(SERIES))
