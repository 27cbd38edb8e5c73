"""Kernels computed from wavelengths: against a loop over the bands, on other bands, saved and loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.timm_layout import to_timm
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.backbones.wavelengths import WavelengthEmbed, check_wavelengths, wavelength_codes
from fmsuite.core.data.sample import View
from fmsuite.core.encoders import Encoder, load_encoder, save_encoder, select_channels
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.errors import UsageError

BLUE, GREEN, RED, NIR = 492.4, 559.8, 664.6, 832.8
FOUR = tuple(Channel(name=name, wavelength=w) for name, w in zip("BGRN", (BLUE, GREEN, RED, NIR)))
RADAR = (Channel(name="VV"), Channel(name="VH"))
WIDTH, PATCH = 24, 4


def spec_of(*channels: Channel, size: int = 8) -> InputSpec:
    return InputSpec(axes=("y", "x"), size=(size, size), channels=channels, spacing=(10.0, 10.0), spacing_unit="m")


def model_of(*channels: Channel, seed: int = 0, **options) -> VisionTransformer:
    torch.manual_seed(seed)
    config = {"width": WIDTH, "depth": 1, "heads": 2, "patch_size": PATCH, "patch_embedding": "wavelength"}
    model = VisionTransformer(ModelConfig(**{**config, **options}), spec_of(*channels)).eval()
    with torch.no_grad():
        for parameter in model.patch_embed.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def pixels_of(bands: int, size: int = 8) -> torch.Tensor:
    return torch.randn(2, bands, size, size, generator=torch.Generator().manual_seed(bands))


def test_blue_and_green_differ_in_nanometres_and_would_not_in_micrometres():
    codes = wavelength_codes([490.0, 560.0])
    assert float(torch.cosine_similarity(*codes, dim=0)) == pytest.approx(0.447, abs=5e-4)
    steps = torch.arange(64) / 64
    angles = torch.tensor([[0.490], [0.560]]) / 10_000**steps
    assert float(torch.cosine_similarity(*torch.cat([angles.sin(), angles.cos()], 1), dim=0)) > 0.9998
    with pytest.raises(UsageError, match=r"0\.49 nm is shorter.*nanometres"):
        wavelength_codes([0.49])


@torch.no_grad()
def test_a_token_is_the_sum_over_bands_of_values_times_their_slices():
    embed = model_of(*FOUR, *RADAR).patch_embed
    kernel, bias = embed.kernel()
    pixels = pixels_of(6)
    found = embed(pixels)
    expected = torch.zeros(2, 4, WIDTH)
    for token, (top, left) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        expected[:, token] += bias
        for band in range(6):
            for row in range(PATCH):
                for column in range(PATCH):
                    value = pixels[:, band, top + row, left + column]
                    expected[:, token] += value[:, None] * kernel[:, band, row, column]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    keep = torch.tensor([[3, 1], [0, 2]])
    torch.testing.assert_close(embed(pixels, keep), torch.stack([found[0, [3, 1]], found[1, [0, 2]]]))


@torch.no_grad()
def test_the_generator_is_the_published_one_layer_by_layer():
    """Written out: attention, norms and sums of a post-norm layer, without PyTorch's module."""
    embed = model_of(*FOUR).patch_embed
    state = embed.state_dict()

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    bands = wavelength_codes([BLUE, GREEN, RED, NIR])
    bands = bands + linear(linear(bands, "residual.0").relu(), "residual.2").relu()
    x = torch.cat([state["weight_tokens"], bands, state["bias_token"]])
    inner = "transformer.self_attn"
    qkv = x @ state[f"{inner}.in_proj_weight"].T + state[f"{inner}.in_proj_bias"]
    q, k, v = (part.unflatten(-1, (4, 32)).transpose(0, 1) for part in qkv.chunk(3, dim=-1))
    mixed = ((q @ k.transpose(1, 2)) / 32**0.5).softmax(-1) @ v
    x = norm(x + linear(mixed.transpose(0, 1).flatten(1), f"{inner}.out_proj"), "transformer.norm1")
    hidden = torch.nn.functional.gelu(linear(x, "transformer.linear1"))
    x = norm(x + linear(hidden, "transformer.linear2"), "transformer.norm2")
    slices = linear(x[128:-1] + bands, "to_kernel").view(4, PATCH, PATCH, WIDTH)
    kernel, bias = embed.kernel()
    torch.testing.assert_close(kernel, 0.02 * slices.permute(3, 0, 1, 2), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(bias, linear(x[-1], "to_bias"), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_order_of_the_bands_does_not_matter():
    model = model_of(*FOUR, *RADAR)
    encoder = Encoder(model, model.spec, "cls", {})
    order = [4, 2, 0, 5, 3, 1]
    turned = select_channels(encoder, [(*FOUR, *RADAR)[i] for i in order])
    pixels = pixels_of(6)
    torch.testing.assert_close(turned.embed(pixels[:, order]), encoder.embed(pixels), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_invalid_band_adds_nothing_and_leaves_the_others_as_they_are():
    model = model_of(*FOUR)
    kernel, bias = model.patch_embed.kernel()
    encoder, pixels = Encoder(model, model.spec, "cls", {}), pixels_of(4)
    valid = torch.ones(2, 4, 8, 8, dtype=torch.bool)
    valid[:, 1] = False
    view = View(pixels, valid)
    others = torch.nn.functional.conv2d(pixels[:, [0, 2, 3]], kernel[:, [0, 2, 3]], bias, PATCH)
    found = model.patch_embed(encoder.normalized(view).pixels)
    torch.testing.assert_close(found, others.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)
    wild = pixels.clone()
    wild[:, 1] = 1e6
    assert torch.equal(encoder.embed(view), encoder.embed(View(wild, valid)))


@pytest.mark.parametrize("law", ["normal", "xavier"])
@torch.no_grad()
def test_tokens_start_with_the_magnitude_of_a_linear_embeddings(law: str):
    pixels = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    spreads = []
    for kind in ("linear", "wavelength"):
        config = ModelConfig(name="vit_tiny", depth=1, patch_size=4, patch_embedding=kind, init=law)
        torch.manual_seed(0)
        tokens = VisionTransformer(config, spec_of(*FOUR)).patch_embed(pixels)
        spreads.append(float(tokens.std()))
        assert abs(float(tokens.mean())) < 0.1 * spreads[-1]
    assert 0.7 < spreads[1] / spreads[0] < 1.5


def test_gradients_reach_every_part_of_the_generator():
    model = model_of(*FOUR, *RADAR)
    model(View(pixels_of(6)), keep=torch.tensor([[0, 3], [1, 2]])).patches.square().sum().backward()
    for name, parameter in model.patch_embed.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


@torch.no_grad()
def test_bands_that_were_never_seen_are_taken_by_their_wavelength(tmp_path: Path):
    model = model_of(*FOUR, *RADAR)
    save_encoder(tmp_path, model, model.spec, "cls", {})
    encoder = load_encoder(tmp_path)
    assert encoder.identity == Encoder(model, model.spec, "cls", {}).identity
    thermal = Channel(name="B10", wavelength=10_895.0, mean=280.0, std=10.0)
    near = FOUR[1].model_copy(update={"name": "green", "mean": 0.1})
    other = load_encoder(tmp_path, channels=[near, "VH", thermal])
    assert other.spec.channels == (near, RADAR[1], thermal)
    pixels = pixels_of(3)
    pixels[:, 2] += 280
    assert other.embed(pixels).shape == (2, WIDTH)
    # The same wavelength under another name is the same band, but for its mean.
    same = load_encoder(tmp_path, channels=["G"]).embed(pixels[:, :1])
    torch.testing.assert_close(load_encoder(tmp_path, channels=[near]).embed(pixels[:, :1] + 0.1), same)
    # Fewer bands keep the size of tokens: their slices grow as those of a linear embedding do.
    alone, _ = load_encoder(tmp_path, channels=["R"]).backbone.patch_embed.kernel()
    among, _ = model.patch_embed.kernel()
    assert 3 < float(alone.norm() / among[:, 2].norm()) < 9
    assert load_encoder(tmp_path, channels=["VH", "VV"]).embed(pixels[:, :2]).shape == (2, WIDTH)
    with pytest.raises(UsageError, match=r"HH has no wavelength.*Trained on: B, G, R, N, VV, VH"):
        load_encoder(tmp_path, channels=[Channel(name="HH")])
    with pytest.raises(UsageError, match="no channel SWIR"):
        load_encoder(tmp_path, channels=["SWIR"])


def test_an_encoder_is_fitted_to_the_bands_of_data():
    spec = spec_of(*(c.model_copy(update={"mean": 0.2, "std": 0.1}) for c in FOUR)).model_copy(update={"scale": 1e-4})
    torch.manual_seed(0)
    config = {"width": WIDTH, "depth": 1, "heads": 2, "patch_size": PATCH}
    encoder = Encoder(VisionTransformer(ModelConfig(**config, patch_embedding="wavelength"), spec), spec, "cls", {})
    assert encoder.fitted(spec) is encoder
    # B is 842 nm there: a name alone makes no band.
    data = spec.model_copy(
        update={
            "channels": (
                FOUR[1].model_copy(update={"mean": 7.0}),
                Channel(name="B", wavelength=842.0, mean=3.0, std=2.0),
            ),
            "scale": 2e-4,
        }
    )
    with pytest.raises(UsageError, match="channels"):
        encoder.check_input(data)
    fitted = encoder.fitted(data)
    assert [(c.name, c.mean, c.std) for c in fitted.spec.channels] == [("G", 0.2, 0.1), ("B", 3.0, 2.0)]
    assert fitted.spec.quantifications[1].scale == 2e-4
    with pytest.raises(UsageError, match=r"intensity scale 0\.0001 .* in G"):
        fitted.check_input(data)
    fitted.check_input(data.model_copy(update={"scale": 1e-4, "channels": fitted.spec.channels}))
    linear = Encoder(VisionTransformer(ModelConfig(**config), spec), spec, "cls", {})
    assert linear.fitted(data) is linear


def test_weights_start_a_model_of_other_bands(tmp_path: Path):
    model = model_of(*FOUR, *RADAR)
    save_encoder(tmp_path, model, model.spec, "cls", {})
    config = model.config.model_copy(update={"weights": str(tmp_path)})
    started = build_backbone(config, spec_of(RADAR[1], Channel(name="SWIR", wavelength=1613.7)))
    assert torch.equal(started.patch_embed.named, model.patch_embed.named[1:])
    assert torch.equal(started.patch_embed.to_kernel.weight, model.patch_embed.to_kernel.weight)
    with pytest.raises(UsageError, match=r"patch_embedding is wavelength, the model's is linear"):
        build_backbone(config.model_copy(update={"patch_embedding": "linear"}), model.spec)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match=r"none of the channels VV, VH has one.*data.sensor"):
        check_wavelengths(spec_of(*RADAR))
    with pytest.raises(UsageError, match="channels are in groups"):
        model_of(*(channel.model_copy(update={"group": channel.name}) for channel in FOUR))
    bag = InputSpec(axes=("y", "x"), size=(), channels=FOUR, bag=True)
    with pytest.raises(UsageError, match="bag of vectors has no bands"):
        VisionTransformer(ModelConfig(width=24, heads=2, positions="sincos", patch_embedding="wavelength"), bag)
    with pytest.raises(UsageError, match=r"no patch embedding from wavelengths.*native"):
        to_timm(model_of(*FOUR))
    rgb = spec_of(*FOUR[:3], size=32).model_copy(update={"scale": 1 / 255})
    with pytest.raises(UsageError, match="patch_embedding"):
        build_backbone(ModelConfig(name="timm:vit_tiny_patch16_224", patch_embedding="wavelength"), rgb)


@pytest.mark.parametrize("axes", [("x",), ("time", "y", "x")])
@torch.no_grad()
def test_other_axes(axes: tuple[str, ...]):
    size = (4,) * len(axes)
    spec = InputSpec(axes=axes, size=size, channels=FOUR)
    torch.manual_seed(0)
    config = ModelConfig(width=24, depth=1, heads=2, patch_size=2, patch_embedding="wavelength")
    model = VisionTransformer(config, spec)
    assert isinstance(model.patch_embed, WavelengthEmbed)
    pixels = torch.randn(1, 4, *size)
    tokens = model.patch_embed(pixels)
    everything = torch.arange(tokens.shape[1])[None]
    torch.testing.assert_close(model.patch_embed(pixels, everything), tokens, atol=1e-6, rtol=1e-5)
