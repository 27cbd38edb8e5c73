"""FG-MAE against the public code, its targets against loops, and which inputs it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.positions import sincos_positions
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import Batch, View
from fmsuite.core.inputs import Channel, InputSpec, Normalize
from fmsuite.core.objectives.fg_mae import FGMAE, FGMAEConfig, channel_pairs, normalised_differences
from fmsuite.core.objectives.hog import hog
from fmsuite.core.objectives.mae import masked_mean_error
from fmsuite.errors import UsageError

SMALL = {
    "fg_mae": {
        "decoder_width": 24,
        "decoder_depth": 1,
        "decoder_heads": 2,
        "cell": 2,
        "window": 4,
        "indices": {"first": ("c0", "c1")},
    }
}
FITS = {"fg_mae": ("rgb", "thirteen_grouped", "two_channels", "series")}
"""A volume has one channel, and so no second one for an index."""

TINY = {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}
BANDS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")


def bands(**channel):
    return tuple(Channel(name=name, **channel) for name in BANDS)


@pytest.fixture(scope="module")
def public(load):
    """The reference, and our model with its weights."""
    reference = load("fgmae")
    spec = InputSpec(axes=("y", "x"), size=(224, 224), channels=bands())
    model = ModelConfig(width=48, depth=1, heads=3, patch_size=16, positions="sincos")
    objective = FGMAE(
        FGMAEConfig(decoder_width=32, decoder_depth=1, decoder_heads=4), VisionTransformer(model, spec)
    ).eval()
    for module in objective.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5  # PyTorch's own, with which the reference was computed
    sizes = [torch.Size(shape).numel() for shape in reference["shapes"]]
    parts = zip(reference["names"], reference["weights"].split(sizes), reference["shapes"], strict=True)
    weights = {name: values.view(shape) for name, values, shape in parts}
    layout = objective.whole_layout()
    for width, name in ((48, "pos_embed"), (32, "decoder_pos_embed")):
        table = weights.pop(name)[0]
        torch.testing.assert_close(sincos_positions(layout, width), table[1:], atol=1e-5, rtol=0)
        assert not table[0].any()
    own = {
        name if name.startswith(("decoder", "mask_token")) else f"backbone.{name}": value
        for name, value in weights.items()
    }
    result = objective.load_state_dict(own, strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == ["backbone.mask_token"]
    images = torch.rand(1, 13, 224, 224, generator=torch.Generator().manual_seed(reference["image_seed"]))
    assert torch.equal(images.flatten()[::4001], reference["image_probe"])
    return reference, objective, View(images, mask=reference["mask"])


def test_histograms_both_predictions_and_the_loss_equal_the_public_code(public, context):
    reference, objective, view = public
    maps, counted = hog(view.pixels, window=16)
    assert bool(counted.all())
    torch.testing.assert_close(maps.flatten()[::37], reference["maps"], atol=1e-6, rtol=1e-5)
    plain = FGMAE(objective.config.model_copy(update={"norm_targets": False}), objective.backbone)
    torch.testing.assert_close(plain.histograms(view)[0][..., ::13], reference["tokens"], atol=1e-6, rtol=1e-5)

    prediction, mask = objective.predict(view)
    assert int(mask.sum()) == 138
    torch.testing.assert_close(prediction[..., ::13], reference["pred_hog"], atol=1e-5, rtol=1e-5)
    second = objective.decoder_pred2(objective.decode_tokens(objective.encode(view)))
    torch.testing.assert_close(second[..., ::16], reference["pred_ndi"], atol=1e-5, rtol=1e-5)
    losses = objective(Batch({"image": [view]}, torch.arange(1), torch.zeros(1)), context)
    assert losses["loss"].item() == pytest.approx(reference["loss"], rel=1e-6)
    assert losses["loss"].item() == pytest.approx((losses["hog"] + losses["indices"]).item(), rel=1e-6)


def test_indices_are_those_of_physical_values_whatever_the_normalisation(public):
    """The same reflectances in counts of 1/10000, normalised by statistics that differ from band to band."""
    _, objective, view = public
    channels = tuple(
        Channel(name=name, mean=0.05 * number, std=0.1 + 0.01 * number) for number, name in enumerate(BANDS)
    )
    spec = InputSpec(axes=("y", "x"), size=(224, 224), channels=channels, scale=1e-4)
    torch.manual_seed(0)
    other = FGMAE(objective.config, VisionTransformer(objective.backbone.config, spec))
    counts = replace(view, pixels=Normalize(spec)(view.pixels * 1e4))
    expected, found = objective.index_maps(view)[0], other.index_maps(counts)[0]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    # And they are the definition, pixel by pixel, with indices varying fastest.
    b8, b4 = view.pixels[0, 7, 16:32, 32:48], view.pixels[0, 3, 16:32, 32:48]
    plain = FGMAE(objective.config.model_copy(update={"norm_targets": False}), objective.backbone)
    token = plain.index_maps(view)[0][0, 14 + 2].view(16, 16, 3)
    torch.testing.assert_close(token[..., 0], (b8 - b4) / (b8 + b4 + 1e-5))
    b3 = view.pixels[0, 2, 16:32, 32:48]
    torch.testing.assert_close(token[..., 1], (b3 - b8) / (b3 + b8 + 1e-5))
    b11 = view.pixels[0, 11, 16:32, 32:48]
    torch.testing.assert_close(token[..., 2], (b11 - b8) / (b11 + b8 + 1e-5))


def test_an_index_is_bounded_where_one_band_is_minus_the_other():
    red = torch.tensor([0.2, -0.2, -0.2, 0.0, -1e-5, 0.3])
    infrared = torch.tensor([-0.2, 0.2, -0.2, 0.0, 0.0, 0.5])
    values = torch.stack([red, infrared])[None, :, None]
    found, counted = normalised_differences(values, [(1, 0)], 1e-5)
    assert bool(counted.all())
    expected = torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0, 0.2 / 0.8])
    torch.testing.assert_close(found[0, 0, 0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["rgb", "thirteen_grouped", "series"])
def test_the_loss_equals_a_loop_over_masked_tokens_and_what_counts(toys, kind, context):
    objective = toys.objective("fg_mae", kind).eval()
    batch = toys.batch(objective, kind, invalid=True)
    view = batch.views["image"][0]
    view.valid = view.valid.expand(-1, objective.backbone.spec.in_chans, *view.pixels.shape[2:]).clone()
    view.valid[1, 1, ..., 5:7] = False  # one of the two bands of the index
    maps, counted = hog(view.pixels, view.valid, cell=2, window=4)
    spec = objective.backbone.spec
    physical = [view.pixels[:, number] * spec.channels[number].std + spec.channels[number].mean for number in (0, 1)]
    first, second = (band.clamp(min=0) for band in physical)
    index = (first - second) / (first + second + 1e-5)
    both = view.valid[:, 0] & view.valid[:, 1]
    visible = objective.encode(view)
    tokens = objective.decode_tokens(visible)
    one, two = objective.decode(visible), objective.decoder_pred2(tokens)
    errors = {"hog": [], "indices": []}
    places = objective.grid.shape(objective.size)[-2:]
    for sample, token in visible.mask.nonzero().tolist():
        outer, place = divmod(token, places[0] * places[1])
        row, column = divmod(place, places[1])
        group, frame = (outer, ()) if len(objective.grid.groups) > 1 else (0, (outer,))
        if kind == "rgb":
            frame = ()
        pairs = []
        for channel in objective.grid.groups[group]:
            for orientation in range(9):
                for y in (2 * row, 2 * row + 1):
                    for x in (2 * column, 2 * column + 1):
                        pairs.append(
                            (
                                counted[(sample, channel, *frame, y, x)].item(),
                                maps[(sample, channel, orientation, *frame, y, x)],
                            )
                        )
        box = (sample, *frame, slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
        values = list(zip(both[box].flatten().tolist(), index[box].flatten(), strict=True))
        for name, known, guess in (("hog", pairs, one), ("indices", values, two)):
            here = torch.tensor([seen for seen, _ in known])
            if here.any():
                target = torch.stack([value for _, value in known])[here].double()
                deviation = target.var() if here.sum() > 1 else torch.tensor(0.0)
                target = (target - target.mean()) / (deviation + 1e-6).sqrt()
                errors[name].append(((guess[sample, token, : len(known)][here] - target) ** 2).mean())
    losses = objective(batch, context)
    for name, each in errors.items():
        assert losses[name].item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-4)


def test_what_stands_at_invalid_pixels_is_no_target(toys):
    objective = toys.objective("fg_mae", "thirteen_grouped")
    view = toys.batch(objective, "thirteen_grouped", invalid=True).views["image"][0]
    junk = replace(view, pixels=torch.where(view.valid, view.pixels, 99.0))
    for one, two in ((objective.histograms(view), objective.histograms(junk)), (
        objective.index_maps(view),
        objective.index_maps(junk),
    )):  # fmt: skip
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
        assert not one[1].all()


def test_radar_has_histograms_only(toys, context):
    objective = toys.objective("fg_mae", "two_channels", indices={})
    assert objective.decoder_pred2 is None
    losses = objective(toys.batch(objective, "two_channels"), context)
    assert losses.keys() == {"loss", "hog"}
    assert losses["loss"].item() == losses["hog"].item()
    spec = InputSpec(axes=("y", "x"), size=(64, 64), channels=(Channel(name="VV"), Channel(name="VH")))
    model = VisionTransformer(ModelConfig(width=24, depth=1, heads=2, patch_size=16, positions="sincos"), spec)
    assert FGMAE(FGMAEConfig(indices={}, **TINY), model).decoder_pred.out_features == 72


def test_a_short_run_beats_the_best_constant_on_pictures_it_has_not_seen(toys, context):
    objective = toys.objective("fg_mae", "two_channels", norm_targets=False)
    unseen = toys.batch(objective, "two_channels", batch=16, step=99)
    view = unseen.views["image"][0]
    constant = 0.0
    for target, weight in (objective.histograms(view), objective.index_maps(view)):
        constant += masked_mean_error(target.mean((0, 1)).expand_as(target), target, weight, view.mask).item()
    toys.train(objective, [toys.batch(objective, "two_channels", step=step) for step in range(12)], steps=36)
    assert objective(unseen, context)["loss"].item() < 0.8 * constant


def test_bands_that_the_input_does_not_have_are_named():
    rgb = InputSpec(axes=("y", "x"), size=(32, 32), channels=tuple(Channel(name=name) for name in ("B4", "B3", "B2")))
    with pytest.raises(UsageError, match="ndvi needs the channel 'B8', and the input has B4, B3, B2"):
        channel_pairs(rgb, {"ndvi": ("B8", "B4")})
    with pytest.raises(UsageError, match="ndvi needs the channel 'B8'"):
        FGMAE(
            FGMAEConfig(**TINY),
            VisionTransformer(ModelConfig(width=24, depth=1, heads=2, patch_size=16, positions="sincos"), rgb),
        )


def test_cells_and_windows_that_do_not_fit_are_refused(toys):
    with pytest.raises(UsageError, match=r"Cells of objective\.cell=3 pixels do not divide patches of 4 x 4"):
        toys.objective("fg_mae", cell=3)
    with pytest.raises(UsageError, match=r"window of objective\.window=5 pixels does not divide a view of 16 x 16"):
        toys.objective("fg_mae", window=5)
    spec = InputSpec(axes=("y", "x", "z"), size=(8, 8, 8), channels=bands())
    model = ModelConfig(width=24, depth=1, heads=2, patch_size=4, positions="sincos")
    with pytest.raises(UsageError, match="planes of y and x; this input's axes are y, x, z"):
        FGMAE(FGMAEConfig(**TINY), VisionTransformer(model, spec))
