"""Controls: the same network without its training, and histograms held against NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.timm_backbone import TimmBackbone
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.controls import BandMeans, Histogram, channel_histograms, untrained
from fmsuite.core.data.sample import View
from fmsuite.core.encoders import Encoder, select_channels
from fmsuite.core.inputs import Channel, InputSpec, Quantification, rgb_channels
from fmsuite.errors import UsageError

RGB = InputSpec(axes=("y", "x"), size=(32, 32), channels=rgb_channels(), scale=1 / 255)
CT = InputSpec(
    axes=("z", "y", "x"), size=(4, 6, 5), channels=(Channel(name="CT", mean=0.3, std=0.2),), scale=1 / 400, offset=0.4
)


def encoder_of(kind: str, pooling: str = "mean") -> Encoder:
    if kind == "timm":
        backbone = TimmBackbone(ModelConfig(name="timm:test_vit"), RGB.resized(160))
        return Encoder(backbone, RGB.resized(160), pooling, {"from": "timm"})
    config = ModelConfig(name="vit_tiny", width=16, depth=2, heads=2, patch_size=8, registers=2, layer_scale=0.1)
    return Encoder(VisionTransformer(config, RGB), RGB, pooling, {"from": "a run"})


@pytest.mark.parametrize(("kind", "pooling"), [("vit", "cls+mean"), ("vit", "mean"), ("timm", "cls")])
def test_an_untrained_control_differs_in_its_weights_alone(kind: str, pooling: str) -> None:
    encoder = encoder_of(kind, pooling)
    state = torch.random.get_rng_state()
    control = untrained(encoder)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (control.spec, control.pooling, control.dim) == (encoder.spec, pooling, encoder.dim)
    assert type(control.backbone) is type(encoder.backbone)
    mine, theirs = encoder.backbone.state_dict(), control.backbone.state_dict()
    assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in theirs.items()}
    drawn = [key for key in mine if mine[key].min() < mine[key].max()]
    assert drawn
    assert not any(torch.equal(mine[key], theirs[key]) for key in drawn)
    assert control.provenance == {"control": "untrained", "seed": 0, "of": encoder.identity}
    assert control.identity != encoder.identity
    images = torch.randint(0, 256, (2, 3, *encoder.spec.size), dtype=torch.uint8)
    assert control.embed(images).shape == (2, encoder.dim)


def test_the_class_token_of_a_control_depends_on_its_input_whatever_the_layer_scale() -> None:
    config = ModelConfig(name="vit_tiny", width=16, depth=2, heads=2, patch_size=8, layer_scale=1e-5)
    encoder = Encoder(VisionTransformer(config, RGB), RGB, "cls", {})
    images = (torch.arange(4)[:, None, None, None] * 60).expand(4, 3, 32, 32).to(torch.uint8)
    assert encoder.embed(images).std(0).mean() < 1e-3
    assert untrained(encoder).embed(images).std(0).mean() > 0.01


def test_a_timm_control_has_no_layer_scale_near_zero_either() -> None:
    spec = RGB.resized(160)
    encoder = Encoder(TimmBackbone(ModelConfig(name="timm:test_vit2"), spec), spec, "mean", {})
    scales = [
        [value for name, value in one.backbone.named_parameters() if name.endswith("gamma")]
        for one in (encoder, untrained(encoder))
    ]
    assert len(scales[0]) == len(scales[1]) == 16
    assert all(bool((value == 1e-5).all()) for value in scales[0])
    assert all(bool((value == 1).all()) for value in scales[1])


def test_a_seed_decides_the_weights_of_a_control() -> None:
    encoder = encoder_of("vit")
    assert untrained(encoder, 3).identity == untrained(encoder, 3).identity
    assert untrained(encoder, 3).identity != untrained(encoder, 4).identity


def test_a_control_starts_from_no_weights(tmp_path) -> None:
    """A run that began from another encoder's weights names them in its options."""
    from fmsuite.core.encoders import save_encoder

    first = encoder_of("vit")
    save_encoder(tmp_path, first.backbone, RGB, "mean", {})
    first.backbone.config = first.backbone.config.model_copy(update={"weights": str(tmp_path)})
    control = untrained(first)
    key = "blocks.0.attn.qkv.weight"
    assert not torch.equal(control.backbone.state_dict()[key], first.backbone.state_dict()[key])


def test_a_control_has_the_channels_that_were_chosen() -> None:
    chosen = select_channels(encoder_of("vit"), ["blue", "red"])
    assert untrained(chosen).spec.channel_names == ("blue", "red")
    assert untrained(chosen).embed(torch.zeros(1, 2, 32, 32)).shape == (1, 16)


def unit_length(shares) -> np.ndarray:
    flat = np.asarray(shares).reshape(len(shares), -1)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9)


@pytest.mark.parametrize("bins", [32, 8, 5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_8_bit_values_are_counted_as_numpy_counts_them(bins: int, dtype: torch.dtype) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 20, 31)).astype(np.uint8)
    images[1, 2] = 255
    images[2, 0] = 0
    found = Histogram(RGB, bins).embed(View(torch.from_numpy(images).to(dtype)))
    assert found.dtype == torch.float32
    assert found.shape == (4, 3 * bins) == (4, Histogram(RGB, bins).dim)
    expected = [
        [np.histogram(channel, bins, range=(0, 256))[0] / channel.size for channel in image] for image in images
    ]
    assert np.allclose(found.numpy(), unit_length(expected), atol=1e-6)


def test_other_values_are_counted_around_their_mean_with_open_ends() -> None:
    volumes = np.random.default_rng(1).normal(0, 150, (3, 1, 4, 6, 5)).astype(np.float32)
    volumes[0, 0, 0, 0, :2] = (-1e6, 1e30)
    found = Histogram(CT, 16).embed(View(torch.from_numpy(volumes)))
    normal = (volumes / 400 + 0.4 - 0.3) / 0.2
    edges = np.linspace(-3, 3, 17)
    edges[0], edges[-1] = -np.inf, np.inf
    expected = [np.histogram(volume, edges)[0] / volume.size for volume in normal]
    assert np.allclose(found.numpy(), unit_length(expected), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_only_valid_values_are_counted(channels: int) -> None:
    random = np.random.default_rng(2)
    images = random.integers(0, 256, (2, 3, 8, 8)).astype(np.uint8)
    valid = random.random((2, channels, 8, 8)) < 0.6
    valid[1, 0] = False
    view = View(torch.from_numpy(images), torch.from_numpy(valid))
    found = channel_histograms(view.pixels.float(), 32, 0.0, 256.0, view.valid).numpy().reshape(2, 3, 32)
    assert np.allclose(Histogram(RGB).embed(view).numpy(), unit_length(found), atol=1e-6)
    for image in range(2):
        for channel in range(3):
            values = images[image, channel][valid[image, channel % channels]]
            expected = np.histogram(values, 32, range=(0, 256))[0] / max(1, len(values))
            assert np.allclose(found[image, channel], expected, atol=1e-7)
    assert found[0].sum(-1) == pytest.approx([1, 1, 1])
    assert (found[1, 0] == 0).all()


def test_a_valid_value_that_is_not_finite_shows() -> None:
    values = torch.rand(2, 2, 4, 4)
    values[0, 1, 2, 2] = torch.nan
    values[1, 0, 0, 0] = torch.inf
    found = channel_histograms(values, 4, 0.0, 1.0).view(2, 2, 4)
    assert found.isnan().all(-1).tolist() == [[False, True], [True, False]]
    valid = values.isfinite()
    assert channel_histograms(values, 4, 0.0, 1.0, valid).isfinite().all()


def test_identities_name_the_input_and_the_bins() -> None:
    assert Histogram(RGB).identity == Histogram(RGB).identity
    others = [Histogram(RGB, 16), Histogram(RGB.resized(16)), Histogram(CT)]
    assert len({Histogram(RGB).identity, *(other.identity for other in others)}) == 4


def test_what_has_no_histogram_is_refused() -> None:
    bag = InputSpec(axes=("y", "x"), size=(), channels=RGB.channels, bag=True)
    with pytest.raises(UsageError, match="bags of vectors"):
        Histogram(bag)
    with pytest.raises(UsageError, match=r"takes \(B, 3, y, x\), not an array of shape \(1, 2, 8, 8\)"):
        Histogram(RGB).embed(View(torch.zeros(1, 2, 8, 8)))


BANDS = InputSpec(
    axes=("y", "x"),
    size=(6, 5),
    channels=(
        Channel(name="B2", mean=0.2),
        Channel(name="B3", mean=0.3),
        Channel(name="VV", mean=-9.0, quantification=Quantification(offset=-30.0, scale=0.01)),
    ),
    scale=1e-4,
    clip=(0.0, 0.5),
)


def test_band_means_are_numpys_of_the_valid_physical_values() -> None:
    random = np.random.default_rng(3)
    raw = random.integers(0, 8000, (4, 3, 6, 5))
    valid = random.random((4, 3, 6, 5)) < 0.6
    valid[1, 0] = False
    found = BandMeans(BANDS, deviations=True).embed(View(torch.from_numpy(raw), torch.from_numpy(valid))).numpy()
    physical = np.stack([(raw[:, n] * 1e-4).clip(0, 0.5) for n in (0, 1)] + [raw[:, 2] * 0.01 - 30], axis=1)
    for image in range(4):
        for band in range(3):
            kept = physical[image, band][valid[image, band]]
            expected = (kept.mean(), kept.std()) if len(kept) else (0.2, 0.0)
            np.testing.assert_allclose(found[image, [band, 3 + band]], expected, rtol=1e-6, atol=1e-6)
    series = InputSpec(axes=("time", "y", "x"), size=(2, 6, 5), channels=BANDS.channels, scale=1e-4, clip=(0.0, 0.5))
    whole = raw.reshape(2, 2, 3, 6, 5).swapaxes(1, 2)
    means = BandMeans(series).embed(View(torch.from_numpy(whole.copy()))).numpy()
    np.testing.assert_allclose(means, physical.reshape(2, 2, 3, 30).mean((1, 3)), rtol=1e-6)


def test_band_means_refuse_what_has_none_and_have_identities_of_their_own() -> None:
    broken = torch.full((1, 3, 6, 5), torch.nan)
    assert BandMeans(BANDS).embed(View(broken)).isnan().all()
    with pytest.raises(UsageError, match="not of an array"):
        BandMeans(BANDS).embed(View(torch.zeros(1, 2, 6, 5)))
    bag = InputSpec(axes=("y", "x"), size=(), channels=(Channel(name="a"),), bag=True)
    with pytest.raises(UsageError, match="bags of vectors"):
        BandMeans(bag)
    assert len({BandMeans(BANDS).identity, BandMeans(BANDS, True).identity, BandMeans(CT).identity}) == 3
    assert (BandMeans(BANDS).dim, BandMeans(BANDS, True).dim) == (3, 6)
    assert "B2, B3: raw values x 0.0001, clipped to 0 to 0.5" in BandMeans(BANDS).normalisation
