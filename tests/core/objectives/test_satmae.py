"""MAE of channel groups against the public SatMAE code in its four modes, and what that code cannot do."""

from __future__ import annotations

import pytest
import torch

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.positions import sincos_positions
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import Batch, View
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.core.objectives.mae import MAE, MAEConfig, masked_mean_error, patch_targets, place_statistics
from fmsuite.core.objectives.satmae import misplaced_channels
from fmsuite.errors import UsageError

GROUPS = "aaabbbabcc"
"""Of the ten bands of Sentinel-2 without B1, B9 and B10."""


@pytest.fixture(scope="module")
def reference(load):
    data = load("satmae")
    sizes = [torch.Size(shape).numel() for shape in data["shapes"]]
    parts = zip(data["names"], data["weights"].split(sizes), data["shapes"], strict=True)
    return {**data, "state_dict": {name: values.view(shape) for name, values, shape in parts}}


def satmae(size=48, **options):
    channels = tuple(Channel(name=f"c{number}", group=group) for number, group in enumerate(GROUPS))
    spec = InputSpec(axes=("y", "x"), size=(size, size), channels=channels)
    shape = {"width": 96, "depth": 2, "heads": 3, "patch_size": 8, "positions": "sincos"}
    torch.manual_seed(0)
    backbone = VisionTransformer(ModelConfig(**shape, position_widths={"group": 64}), spec)
    config = MAEConfig(
        decoder_width=64, decoder_depth=1, decoder_heads=4, decoder_position_widths={"group": 32}, **options
    )
    return MAE(config, backbone)


def loaded(reference, **options):
    """The small model of the reference; what our parameters do not hold (tables of positions) is compared instead."""
    objective = satmae(decoder_cls_group=True, **options)
    weights = dict(reference["state_dict"])
    place, group = weights.pop("pos_embed")[0], weights.pop("channel_embed")[0]
    table = torch.cat([place[1:].repeat(3, 1), group.repeat_interleave(36, 0)], dim=1)
    torch.testing.assert_close(
        sincos_positions(objective.whole_layout(), 96, widths={"group": 64}), table, atol=1e-5, rtol=0
    )
    assert not place[0].any()
    place, group = weights.pop("decoder_pos_embed")[0], weights.pop("decoder_channel_embed")[0]
    table = torch.cat([place[1:].repeat(3, 1), group[:3].repeat_interleave(36, 0)], dim=1)
    torch.testing.assert_close(objective._positions(objective.whole_layout()), table, atol=1e-5, rtol=0)
    torch.testing.assert_close(objective.cls_code, torch.cat([place[0], group[3]]), atol=1e-5, rtol=0)
    own = {}
    for name, values in weights.items():
        if name.startswith("decoder_pred"):
            # Theirs are channel by channel, ours pixel by pixel.
            values = values.unflatten(0, (-1, 64)).transpose(0, 1).flatten(0, 1)
        mine = name if name.startswith(("decoder", "mask_token")) else f"backbone.{name}"
        if name.startswith("patch_embed"):
            _, number, _, rest = name.split(".")
            mine = f"backbone.patch_embed.proj.{number}.{rest}"
        own[mine] = values
    result = objective.load_state_dict(own, strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == ["backbone.mask_token"]
    return objective


def channels_of(objective, prediction):
    """(B, C, L, 64) predictions of the heads, one after the other, as the reference has them."""
    parts = []
    for number, members in enumerate(objective.grid.groups):
        part = prediction[:, 36 * number : 36 * (number + 1), : 64 * len(members)]
        parts.append(part.unflatten(-1, (64, len(members))).permute(0, 3, 1, 2))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("mode", ["independent", "consistent"])
def test_prediction_loss_and_total_gradient_equal_the_reference(reference, mode, norm_pix, context):
    expected = reference[mode]
    alike = ("group",) if mode == "consistent" else ()
    over = {"norm_over": "place"} if norm_pix else {}
    objective = loaded(reference, alike=alike, norm_pix=norm_pix, reference_channels=True, **over)
    view = View(reference["images"], mask=expected["mask"].flatten(1))
    prediction, _ = objective.predict(view)
    found = channels_of(objective, prediction)[..., ::5]
    torch.testing.assert_close(found, expected["pred"], atol=1e-5, rtol=1e-5)
    loss = objective(Batch({"image": [view]}, torch.arange(2), torch.zeros(2)), context)["loss"]
    numbers = expected["normalised" if norm_pix else "raw"]
    assert loss.item() == pytest.approx(numbers["loss"], rel=1e-6)
    loss.backward()
    squares = [p.grad.double().square().sum() for p in objective.parameters() if p.grad is not None]
    assert torch.stack(squares).sum().sqrt().item() == pytest.approx(numbers["grad_total"], rel=1e-5)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_each_output_is_compared_with_its_own_channel_where_the_reference_confuses_some(reference, norm_pix):
    """The same prediction against the definition: the mean over hidden tokens of their channels' mean error."""
    over = {"norm_over": "place"} if norm_pix else {}
    right, wrong = (loaded(reference, norm_pix=norm_pix, reference_channels=each, **over) for each in (False, True))
    mask = reference["independent"]["mask"]
    view = View(reference["images"], mask=mask.flatten(1))
    prediction, _ = right.predict(view)
    by_head = channels_of(right, prediction)
    pixels = reference["images"].unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3).flatten(3)  # (B, C, L, 64)
    if norm_pix:
        whole = pixels.transpose(1, 2).flatten(2)
        mean, deviation = whole.mean(-1), (whole.var(-1) + 1e-6).sqrt()
        pixels = (pixels - mean[:, None, :, None]) / deviation[:, None, :, None]
    errors = {"right": [], "wrong": []}
    order = [channel for members in right.grid.groups for channel in members]
    assert order != sorted(order)
    for sample, group, place in mask.nonzero().tolist():
        members = right.grid.groups[group]
        for kind, output in (("right", order.index), ("wrong", int)):
            pairs = [(by_head[sample, output(channel), place], pixels[sample, channel, place]) for channel in members]
            errors[kind].append(torch.stack([((mine - target) ** 2).mean() for mine, target in pairs]).mean())
    expected = {kind: torch.stack(values).mean().item() for kind, values in errors.items()}
    visible = right.encode(view)
    assert right.decoder_loss(view, visible).item() == pytest.approx(expected["right"], rel=1e-5)
    assert wrong.decoder_loss(view, visible).item() == pytest.approx(expected["wrong"], rel=1e-5)
    assert abs(expected["right"] - expected["wrong"]) > 1e-3


def test_channels_in_the_order_of_their_groups_are_not_confused(toys):
    objective = toys.objective("mae", "thirteen_grouped")
    grid = objective.grid
    prediction = torch.randn(2, 48, grid.patch_values) * grid.element_mask().repeat_interleave(16, 0)
    moved = misplaced_channels(grid, prediction)
    assert moved.shape == prediction.shape
    assert not torch.equal(moved, prediction)
    in_order = type(grid)(grid.axes, grid.patch_size, (tuple(range(5)), tuple(range(5, 11)), (11, 12)))
    prediction = torch.randn(2, 48, in_order.patch_values) * in_order.element_mask().repeat_interleave(16, 0)
    assert torch.equal(misplaced_channels(in_order, prediction), prediction)


def test_statistics_of_a_place_are_of_all_its_valid_values(toys):
    objective = toys.objective("mae", "thirteen_grouped", norm_over="place")
    batch = toys.batch(objective, "thirteen_grouped", invalid=True)
    view = batch.views["image"][0]
    view.valid = view.valid.expand(-1, 13, -1, -1).clone()
    view.valid[0, 2] = False
    values, weight, _, _ = patch_targets(objective.grid, view)
    mean, spread = place_statistics(objective.grid, values, weight)
    for sample, row, column in ((0, 0, 3), (1, 2, 2), (3, 3, 1)):
        box = (sample, slice(None), slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
        counted = view.pixels[box][view.valid[box]]
        for group in range(3):
            token = (sample, 16 * group + 4 * row + column, 0)
            assert mean[token].item() == pytest.approx(counted.mean().item(), abs=1e-5)
            assert spread[token].item() == pytest.approx(counted.std().item(), rel=1e-4)


def test_reconstructions_are_scaled_back_by_the_statistics_of_the_place(toys, monkeypatch):
    objective = toys.objective("mae", "thirteen_grouped", norm_over="place")
    batch = toys.batch(objective, "thirteen_grouped", invalid=True)
    view = batch.views["image"][0]
    values, weight, _, _ = patch_targets(objective.grid, view)
    mean, spread = place_statistics(objective.grid, values, weight)
    monkeypatch.setattr(objective, "predict", lambda view: ((values - mean) / spread, view.mask))
    filled = objective.reconstruct(batch).filled
    valid = view.valid.expand_as(filled)
    torch.testing.assert_close(filled[valid], view.pixels[valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [32, 40, 56])
def test_consistent_masks_leave_any_number_of_places_visible(size, context):
    """4, 6 and 12 visible places of three groups; the public code needs a multiple of three."""
    objective = satmae(size, alike=("group",), norm_pix=False)
    places = (size // 8) ** 2
    kept = int(places * 0.25)
    mask = torch.zeros(2, 3, places, dtype=torch.bool)
    hidden = [torch.randperm(places, generator=torch.Generator().manual_seed(row))[kept:] for row in range(2)]
    for row, ids in enumerate(hidden):
        mask[row][:, ids] = True
    view = View(torch.randn(2, 10, size, size, generator=torch.Generator().manual_seed(9)), mask=mask.flatten(1))
    visible = objective.encode(view)
    assert visible.ids.shape == (2, 3 * kept)
    loss = objective(Batch({"image": [view]}, torch.arange(2), torch.zeros(2)), context)["loss"]
    target, weight, _, _ = patch_targets(objective.grid, view)
    expected = masked_mean_error(objective.predict(view)[0], target, weight, view.mask)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("rgb", {"norm_over": "place"}, r"objective\.norm_over=place has no effect on tokens of a single"),
        ("rgb", {"decoder_cls_group": True}, r"objective\.decoder_cls_group has no effect on tokens of a single"),
        ("rgb", {"reference_channels": True}, r"objective\.reference_channels has no effect on tokens of a single"),
        ("thirteen_grouped", {"norm_over": "place", "norm_pix": False}, "no effect without norm_pix"),
    ],
)
def test_options_without_effect_are_refused(toys, kind, options, said):
    with pytest.raises(UsageError, match=said):
        toys.objective("mae", kind, **options)


def test_a_class_token_that_is_not_there_has_no_group(toys):
    with pytest.raises(UsageError, match="without a class token"):
        toys.objective("mae", "thirteen_grouped", decoder_cls_group=True, model={"cls_token": False})
