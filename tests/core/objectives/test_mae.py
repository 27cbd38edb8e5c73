"""MAE against the public implementation, and what it does with masked and invalid pixels."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.positions import sincos_positions
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.pipeline import Item, NoAugmentation, ViewPipeline, collate
from fmsuite.core.data.sample import ArraySample, Batch, MaskContext, SampleKey, View
from fmsuite.core.inputs import Channel, InputSpec, rgb_channels
from fmsuite.core.masking import BlockPattern, RatioMasking, keep_ids
from fmsuite.core.objectives.group_heads import group_heads, project
from fmsuite.core.objectives.mae import MAE, MAEConfig, masked_mean_error, patch_targets
from fmsuite.errors import UsageError
from tests.ranks import averaged

SMALL = {"mae": {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}}


@pytest.fixture(scope="module")
def reference(load):
    """The tiny model of the reference: its weights by name, images, mask, losses."""
    data = load("mae_objective")
    sizes = [torch.Size(shape).numel() for shape in data["shapes"]]
    parts = zip(data["names"], data["weights"].split(sizes), data["shapes"], strict=True)
    return {**data, "state_dict": {name: values.view(shape) for name, values, shape in parts}}


def reference_model(reference, norm_pix):
    spec = InputSpec(axes=("y", "x"), size=(32, 32), channels=rgb_channels())
    model = ModelConfig(width=64, depth=2, heads=4, patch_size=8, positions="sincos")
    config = MAEConfig(norm_pix=norm_pix, decoder_width=32, decoder_depth=1, decoder_heads=2)
    objective = MAE(config, VisionTransformer(model, spec))
    weights = dict(reference["state_dict"])
    table = weights.pop("pos_embed")
    decoder_table = weights.pop("decoder_pos_embed")
    layout = objective.grid.layout((32, 32))
    torch.testing.assert_close(sincos_positions(layout, 64), table[0, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(sincos_positions(layout, 32), decoder_table[0, 1:], atol=1e-5, rtol=0)
    assert not table[0, 0].any()
    own = {name: name if name.startswith(("decoder", "mask_token")) else f"backbone.{name}" for name in weights}
    result = objective.load_state_dict({own[name]: value for name, value in weights.items()}, strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == ["backbone.mask_token"]
    return objective, {target: name for name, target in own.items()}


@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_prediction_and_every_gradient_equal_the_reference(reference, norm_pix, context):
    objective, names = reference_model(reference, norm_pix)
    # The reference keeps the tokens whose noise is smallest.
    kept = reference["noise"].argsort(1)[:, :4]
    mask = torch.ones(4, 16, dtype=torch.bool).scatter(1, kept, False)
    assert torch.equal(mask, reference["mask"])
    view = View(reference["images"], mask=mask)
    prediction, _ = objective.predict(view)
    torch.testing.assert_close(prediction[0], reference["pred"], atol=1e-5, rtol=1e-5)
    loss = objective(Batch({"image": [view]}, torch.arange(4), torch.zeros(4)), context)["loss"]
    expected = reference["normalised" if norm_pix else "raw"]
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-5)
    loss.backward()
    rows = dict(zip(reference["grad_names"], expected["grads"], strict=True))
    found = {names[name]: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    assert found.keys() == rows.keys()
    for name, grad in found.items():
        # Two fixed projections and the norm of the reference's gradient.
        flat = grad.flatten().double()
        number = torch.arange(len(flat), dtype=torch.float64)
        dots = [(flat * torch.cos(0.37 * number + 0.1)).sum(), (flat * torch.cos(1.71 * number + 0.7)).sum()]
        torch.testing.assert_close(torch.stack([*dots, flat.norm()]), rows[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["rgb", "thirteen_grouped", "volume", "series"])
def test_pixels_of_masked_patches_never_reach_the_encoder(toys, kind):
    objective = toys.objective("mae", kind).eval()
    view = toys.batch(objective, kind).views["image"][0]
    hidden = objective.grid.unpatchify(
        view.mask[..., None].expand(-1, -1, objective.grid.patch_values).float(), view.pixels.shape[2:]
    ).bool()
    other = replace(view, pixels=torch.where(hidden, torch.randn_like(view.pixels), view.pixels))
    assert not torch.equal(other.pixels, view.pixels)
    ids, keep_valid = keep_ids(view.mask)
    first, second = (objective.backbone(v, keep=ids, keep_valid=keep_valid) for v in (view, other))
    assert torch.equal(first.patches, second.patches)
    assert torch.equal(first.cls, second.cls)
    assert torch.equal(objective.predict(view)[0], objective.predict(other)[0])


@pytest.mark.parametrize("kind", ["rgb", "thirteen_grouped", "volume", "series"])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_invalid_pixels_are_neither_context_nor_target(toys, kind, norm_pix, context):
    objective = toys.objective("mae", kind, norm_pix=norm_pix)
    clean = toys.batch(objective, kind, invalid=True)
    view = clean.views["image"][0]
    tokens = objective.backbone.layout(view).valid
    assert not tokens.all()
    assert tokens.any(1).all()
    assert not (view.mask & ~tokens).any()
    # What stands at invalid tokens is of no consequence, even before normalisation clears it.
    junk = torch.randn_like(view.pixels) * 1e3
    token_pixels = objective.grid.unpatchify(
        tokens[..., None].expand(-1, -1, objective.grid.patch_values).float(), view.pixels.shape[2:]
    ).bool()
    dirty = Batch({"image": [replace(view, pixels=torch.where(token_pixels, view.pixels, junk))]}, *2 * [clean.indices])
    assert objective(clean, context)["loss"].item() == objective(dirty, context)["loss"].item()


def test_invalid_tokens_are_no_keys_in_the_decoder(toys, monkeypatch):
    objective = toys.objective("mae").eval()
    view = toys.batch(objective, invalid=True).views["image"][0]
    valid = objective.backbone.layout(view).valid
    expected, _ = objective.predict(view)
    positions = objective._positions
    monkeypatch.setattr(objective, "_positions", lambda layout: positions(layout) + 5.0 * ~layout.valid[..., None])
    found, _ = objective.predict(view)
    assert torch.equal(found[valid], expected[valid])
    assert not torch.equal(found[~valid], expected[~valid])


def test_an_invalid_token_marked_as_masked_is_not_a_target(toys, context):
    objective = toys.objective("mae")
    batch = toys.batch(objective, invalid=True)
    expected = objective(batch, context)["loss"].item()
    view = batch.views["image"][0]
    view.mask = view.mask | ~objective.backbone.layout(view).valid
    assert objective(batch, context)["loss"].item() == expected


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("kind", ["rgb", "thirteen_grouped"])
def test_the_loss_equals_a_loop_over_patches_and_valid_values(toys, kind, norm_pix):
    objective = toys.objective("mae", kind, norm_pix=norm_pix)
    view = toys.batch(objective, kind, invalid=True).views["image"][0]
    grid, generator = objective.grid, torch.Generator().manual_seed(0)
    tokens = objective.backbone.layout(view).num_tokens
    prediction = torch.randn(4, tokens, grid.patch_values, generator=generator)
    errors = []
    for b, t in view.mask.nonzero().tolist():
        group, place = divmod(t, 16)
        row, column = divmod(place, 4)
        values, position = [], 0
        for y in range(4):
            for x in range(4):
                for channel in grid.groups[group]:
                    if view.valid[b, 0, 4 * row + y, 4 * column + x]:
                        pixel = view.pixels[b, channel, 4 * row + y, 4 * column + x].item()
                        values.append((pixel, prediction[b, t, position].item()))
                    position += 1
        target = torch.tensor([v for v, _ in values], dtype=torch.float64)
        if norm_pix:
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        guess = torch.tensor([p for _, p in values], dtype=torch.float64)
        errors.append(((guess - target) ** 2).mean().item())
    loss = objective.reconstruction_loss(view, prediction, view.mask)
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_a_batch_without_valid_tokens_in_one_sample_stays_finite(toys, context):
    objective = toys.objective("mae", model={"cls_token": False})
    batch = toys.batch(objective, invalid=True)
    view = batch.views["image"][0]
    view.valid[0] = False
    view.mask[0] = False
    loss = objective(batch, context)["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_the_reconstruction_keeps_visible_pixels_and_a_perfect_prediction_gives_the_input(toys, norm_pix, monkeypatch):
    objective = toys.objective("mae", "thirteen_grouped", norm_pix=norm_pix)
    batch = toys.batch(objective, "thirteen_grouped")
    view = batch.views["image"][0]
    picture = objective.reconstruct(batch).filled
    patches, shown = objective.grid.patchify(view.pixels), objective.grid.patchify(picture)
    assert torch.equal(shown[~view.mask], patches[~view.mask])
    assert not torch.allclose(shown[view.mask], patches[view.mask], atol=1e-2)
    target, _, mean, spread = patch_targets(objective.grid, view)
    perfect = (target - mean) / spread if norm_pix else target
    monkeypatch.setattr(objective, "predict", lambda view: (perfect, view.mask))
    torch.testing.assert_close(objective.reconstruct(batch).filled, view.pixels, atol=1e-5, rtol=1e-5)


def test_the_view_asked_for_follows_the_options(toys):
    request = toys.objective("mae", "series", masking="block", alike=("time",), scale=(0.3, 0.9)).view_requests()[0]
    assert request.size == (3, 16, 16)
    assert request.scale == (0.3, 0.9)
    assert isinstance(request.mask, RatioMasking)
    assert request.mask.ratio == 0.75
    assert request.mask.pattern == BlockPattern(("time",), 4, 0.3)
    assert toys.objective("mae", size=8).view_requests()[0].size == (8, 8)


def draws(sampler, axes, shape, number):
    """(number, *shape) bool masks."""
    valid = np.ones(math.prod(shape), dtype=bool)
    key = SampleKey(0, 0)
    masks = [sampler(MaskContext(axes, shape, valid, np.random.default_rng(i), key)) for i in range(number)]
    return np.stack(masks).reshape(number, *shape)


def test_random_masks_of_series_know_nothing_of_the_axes_and_tubes_repeat_in_time(toys):
    """The spacetime-agnostic masks of Feichtenhofer et al. 2022 (section 3, figure 3) against tubes."""
    agnostic = toys.objective("mae", "series", mask_ratio=0.75).view_requests()[0].mask
    tubes = toys.objective("mae", "series", mask_ratio=0.75, masking="tube").view_requests()[0].mask
    axes, shape = ("time", "y", "x"), (3, 4, 4)
    masks = draws(agnostic, axes, shape, 4000).reshape(4000, 48).astype(float)
    assert (masks.sum(1) == 36).all()
    # Of 48 tokens 36 are hidden, whichever they are: two of them at once with probability 36/48 * 35/47.
    pairs = masks.T @ masks / len(masks)
    expected = np.where(np.eye(48, dtype=bool), 36 / 48, 36 / 48 * 35 / 47)
    assert np.abs(pairs - expected).max() < 5 * math.sqrt(0.25 / len(masks))
    place, time = np.arange(48) % 16, np.arange(48) // 16
    same_place = (place[:, None] == place) & (time[:, None] != time)
    assert pairs[same_place].mean() == pytest.approx(36 / 48 * 35 / 47, abs=0.005)
    repeated = draws(tubes, axes, shape, 50)
    assert (repeated == repeated[:, :1]).all()
    assert (repeated.sum((1, 2, 3)) == 36).all()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("rgb", {"masking": "inverse_block"}),
        ("rgb", {"masking": "noise"}),
        ("thirteen_grouped", {"masking": "group"}),
        ("series", {"masking": "tube"}),
        ("volume", {"masking": "random", "mask_ratio": 0.9}),
    ],
)
def test_any_kind_of_mask_trains(toys, kind, options, context):
    objective = toys.objective("mae", kind, **options)
    loss = objective(toys.batch(objective, kind, invalid=True), context)["loss"]
    loss.backward()
    assert loss.isfinite()
    assert objective.decoder_embed.weight.grad.abs().sum() > 0


def test_masks_that_follow_a_teacher_are_refused(toys):
    with pytest.raises(UsageError, match="no teacher"):
        toys.objective("mae", masking="attention_high")


def masked_step(rank=0, ranks=1):
    """Loss and gradient of a scale for a rank's samples; the first of two ranks has nine masked tokens, the other
    none."""
    prediction, target, weight = torch.rand(3, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(24).view(4, 6) < 9
    mine = slice(4 * rank // ranks, 4 * (rank + 1) // ranks)
    scale = torch.ones(5, requires_grad=True)
    loss = masked_mean_error(prediction[mine] * scale, target[mine], weight[mine], mask[mine])
    loss.backward()
    return loss.detach(), scale.grad


def test_two_ranks_with_different_numbers_of_masked_tokens_give_the_loss_and_gradient_of_one(two_ranks):
    torch.testing.assert_close(averaged(two_ranks(masked_step, 2)), masked_step())


@pytest.mark.parametrize("whole", [True, False])
def test_every_token_goes_through_the_head_of_its_group(whole):
    torch.manual_seed(0)
    heads = group_heads(6, [5, 3, 4])
    tokens = torch.randn(2, 12, 6, requires_grad=True)
    groups = (torch.arange(12) // 4).expand(2, -1) if whole else torch.randint(3, (2, 12))
    found = project(heads, tokens, None if whole else groups)
    assert found.shape == (2, 12, 5)
    for sample in range(2):
        for token in range(12):
            head = heads[groups[sample, token]]
            output = head(tokens[sample, token])
            torch.testing.assert_close(found[sample, token, : len(output)], output)
            assert not found[sample, token, len(output) :].any()
    found.sum().backward()
    expected = torch.stack([heads[group].weight.sum(0) for group in groups.flatten()]).view_as(tokens)
    torch.testing.assert_close(tokens.grad, expected)


def test_unsuitable_options_are_refused_before_training(toys):
    with pytest.raises(UsageError, match="cannot be cut"):
        toys.objective("mae", size=10)
    with pytest.raises(UsageError, match="decoder_heads 5"):
        toys.objective("mae", decoder_heads=5)
    with pytest.raises(UsageError, match=r"objective\.mask_ratio 0\.\d+ leaves 0 of 16 tokens"):
        toys.objective("mae", mask_ratio=0.95)
    with pytest.raises(UsageError, match="alike along 'time'"):
        toys.objective("mae", alike=("time",))
    with pytest.raises(UsageError, match="physical"):
        toys.objective("mae", decoder_position_units="physical")


def test_a_backbone_that_cannot_drop_tokens_is_refused_by_name(toys):
    backbone = toys.model(toys.toys["rgb"])
    backbone.can_drop_tokens = False
    with pytest.raises(UsageError, match="VisionTransformer, which cannot"):
        MAE(MAEConfig(), backbone)


def slab(context: MaskContext) -> np.ndarray:
    """Hides the tokens of the last third of x in the first half of z."""
    z, _, x = np.indices(context.shape)
    return ((z < context.shape[0] // 2) & (x >= 2 * context.shape[2] // 3)).ravel()


def test_a_mask_hides_the_same_places_of_a_volume_that_is_no_cube_from_pipeline_to_loss(context):
    """Axes that change places between mask and tokens would go unseen in a cube."""
    size, patch = (4, 8, 12), 2
    spec = InputSpec(axes=("z", "y", "x"), size=size, channels=rgb_channels()[:1])
    torch.manual_seed(0)
    model = ModelConfig(width=24, depth=2, heads=2, patch_size=patch, positions="sincos")
    config = MAEConfig(norm_pix=False, decoder_width=24, decoder_depth=1, decoder_heads=2)
    objective = MAE(config, VisionTransformer(model, spec)).eval()
    request = replace(objective.view_requests()[0], mask=slab, scale=(1.0, 1.0), augment="none")
    pipeline = ViewPipeline([request], NoAugmentation(), objective.grid, spec.axes, seed=0)
    values = np.random.default_rng(0).normal(size=(1, *size)).astype(np.float32)
    item = Item(pipeline(ArraySample(values), SampleKey(0, 0)), 0, -1)
    batch = collate([item])
    view = batch.views["image"][0]
    hidden = torch.zeros(size, dtype=torch.bool)
    hidden[:2, :, 8:] = True
    assert int(view.mask.sum()) == 1 * 4 * 2

    prediction, mask = objective.predict(view)
    others = view.pixels.clone()
    others[:, :, hidden] = 7.0
    assert torch.equal(objective.predict(replace(view, pixels=others))[0], prediction)
    for place in ((3, 0, 11), (0, 0, 7), (2, 7, 8)):
        shown = view.pixels.clone()
        shown[(0, 0, *place)] += 3.0
        assert not torch.equal(objective.predict(replace(view, pixels=shown))[0], prediction)

    errors = []
    for z, y, x in np.ndindex(2, 4, 6):
        box = tuple(slice(patch * index, patch * (index + 1)) for index in (z, y, x))
        token = (z * 4 + y) * 6 + x
        assert bool(mask[0, token]) == bool(hidden[box].all())
        if mask[0, token]:
            errors.append(((prediction[0, token] - view.pixels[0, 0][box].flatten()) ** 2).mean().item())
    assert len(errors) == 8
    assert objective(batch, context)["loss"].item() == pytest.approx(np.mean(errors), rel=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_the_error_is_a_mean_over_channels_and_not_their_sum(channels):
    named = tuple(Channel(name=str(number)) for number in range(channels))
    spec = InputSpec(axes=("z", "y", "x"), size=(4, 4, 8), channels=named)
    model = ModelConfig(width=24, depth=1, heads=2, patch_size=2, positions="sincos")
    config = MAEConfig(norm_pix=False, decoder_width=24, decoder_depth=1, decoder_heads=2)
    objective = MAE(config, VisionTransformer(model, spec))
    plane = torch.randn(3, 1, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < 0.75
    view = View(plane.expand(-1, channels, -1, -1, -1), mask=mask)
    prediction = torch.zeros(3, 16, 8 * channels)
    hidden = objective.grid.unpatchify(mask[..., None].expand(-1, -1, 8 * channels).float(), (4, 4, 8))[:, :1] > 0
    loss = objective.reconstruction_loss(view, prediction, mask)
    assert loss.item() == pytest.approx((plane[hidden] ** 2).mean().item(), rel=1e-5)
