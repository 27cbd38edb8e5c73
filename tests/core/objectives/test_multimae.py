"""MultiMAE: its equations written as loops, missing modalities, and that one sensor is predicted from another."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.positions import sincos_positions
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import Batch, MaskContext, SampleKey, View
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.core.masking import BlockPattern, DirichletMasking
from fmsuite.core.objectives.mae import patch_targets, pixel_targets
from fmsuite.core.objectives.multimae import MultiMAE, MultiMAEConfig
from fmsuite.errors import UsageError

SMALL = {"multimae": {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}}
FITS = {"multimae": ("thirteen_grouped",)}

RADAR, OPTICAL = slice(0, 2), slice(2, 6)


def two_sensors(seed=0, size=16, cls_token=True, **options):
    names = {"VV": "sentinel1", "VH": "sentinel1", "B2": "sentinel2", "B3": "sentinel2", "B4": "sentinel2"}
    channels = tuple(Channel(name=name, group=group) for name, group in (names | {"B8": "sentinel2"}).items())
    spec = InputSpec(axes=("y", "x"), size=(size, size), channels=channels)
    torch.manual_seed(seed)
    model = ModelConfig(
        width=24, depth=2, heads=2, patch_size=4, positions="sincos", cls_token=cls_token, registers=int(cls_token)
    )
    return MultiMAE(MultiMAEConfig(**{**SMALL["multimae"], **options}), VisionTransformer(model, spec))


def pictures(toys, objective, batch=8, step=0, missing=()):
    """Two smooth fields, which both sensors mix in their own ways; of some rows one sensor is missing."""
    generator = torch.Generator().manual_seed(step)
    size = objective.size[0]
    y, x = torch.meshgrid(*[torch.linspace(0, 1, size)] * 2, indexing="ij")
    phase, wave = torch.rand(2, batch, 2, 1, 1, generator=generator) * 6
    fields = torch.sin(wave * x + phase) + torch.cos(wave.flip(1) * y + phase.flip(1))
    mixtures = torch.tensor([[1, -1], [0.5, 1], [1, 0.2], [0.1, 1], [-1, 0.5], [0.7, 0.7]])
    bands = torch.einsum("cf,bfyx->bcyx", mixtures, fields)
    valid = torch.ones(batch, 6, size, size, dtype=torch.bool)
    for rows, sensor in missing:
        valid[rows, sensor] = False
    pixels = torch.where(valid, bands, 0.0)
    view = View(pixels, valid=valid if missing else None, keys=torch.arange(batch))
    masks = []
    tokens = objective.backbone.layout(view)
    for row in range(batch):
        known = torch.ones(tokens.num_tokens, dtype=torch.bool) if tokens.valid is None else tokens.valid[row]
        masks.append(draw(objective.sampler, objective, known, 1000 * step + row))
    view.mask = torch.stack(masks)
    return Batch({"image": [view]}, torch.arange(batch), torch.full((batch,), -1))


def draw(sampler, objective, valid, seed):
    grid = objective.grid
    context = MaskContext(
        grid.token_axes, grid.shape(objective.size), valid.numpy(), np.random.default_rng(seed), SampleKey(0, 0)
    )
    return torch.from_numpy(sampler(context))


def attend(queries, keys, values, heads):
    """Softmax attention of one sample, head by head and query by query."""
    out = torch.zeros_like(queries)
    share = queries.shape[1] // heads
    for head in range(heads):
        part = slice(head * share, (head + 1) * share)
        for number, query in enumerate(queries[:, part]):
            scores = torch.stack([(query * key).sum() / math.sqrt(share) for key in keys[:, part]])
            weights = scores.exp() / scores.exp().sum()
            out[number, part] = sum(weight * value for weight, value in zip(weights, values[:, part], strict=True))
    return out


def decoded(decoder, features, ids, layout, modality, valid=None):
    """What ``ModalityDecoder`` gives for one sample, from its docstring."""
    heads, width, places = decoder.cross.heads, decoder.mask_token.shape[-1], layout.num_tokens
    codes = sincos_positions(layout, width)
    place_of = [divmod(int(number), places) for number in ids]
    patches = [decoder.embed(token) for token in features.patches]
    first = [] if features.cls is None else [decoder.embed(features.cls)]
    first += [] if features.registers is None else [decoder.embed(token) for token in features.registers]
    named = [
        patch + codes[place] + decoder.modality_embed[group]
        for patch, (group, place) in zip(patches, place_of, strict=True)
    ]
    queries = []
    for place in range(places):
        if (modality, place) in place_of:
            queries.append(named[place_of.index((modality, place))])
        else:
            queries.append(decoder.mask_token[0, 0] + codes[place] + decoder.modality_embed[modality])
    context = decoder.context_norm(torch.stack([*first, *named]))
    asked = decoder.query_norm(torch.stack(queries))
    keys, values = decoder.cross.kv(context).chunk(2, dim=1)
    x = decoder.cross.proj(attend(decoder.cross.q(asked), keys, values, heads))
    x = x + decoder.mlp(decoder.out_norm(x))
    for block in decoder.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=1)
        here = torch.ones(places, dtype=torch.bool) if valid is None else valid
        x = x + block.attn.proj(attend(q, k[here], v[here], heads))
        x = x + block.mlp(block.norm2(x))
    return decoder.pred(x)


@pytest.mark.parametrize("cls_token", [True, False])
@torch.no_grad()
def test_predictions_equal_the_equations_written_as_loops(toys, cls_token):
    objective = two_sensors(cls_token=cls_token, decoder_depth=2).eval()
    view = pictures(toys, objective, batch=3).views["image"][0]
    view.valid = torch.ones(3, 6, 16, 16, dtype=torch.bool)
    view.valid[1, OPTICAL, :, :8] = False
    prediction, mask = objective.predict(view)
    assert torch.equal(mask, view.mask & objective.backbone.layout(view).valid)
    places = objective.grid.layout((16, 16))
    one = replace(places, axes=("y", "x"), coords=places.coords[:16, 1:], shape=(4, 4))
    visible = objective.encode(view)
    for row in range(3):
        known = visible.layout.valid[row]
        number = int((known & ~view.mask[row]).sum())
        features = replace(
            visible.features,
            patches=visible.features.patches[row, :number],
            cls=None if visible.features.cls is None else visible.features.cls[row],
            registers=None if visible.features.registers is None else visible.features.registers[row],
        )
        ids = visible.ids[row, :number]
        for modality, values in ((0, 32), (1, 64)):
            mine = slice(16 * modality, 16 * modality + 16)
            expected = decoded(objective.decoders[modality], features, ids, one, modality, known[mine])
            torch.testing.assert_close(prediction[row, mine, :values], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_loss_is_the_sum_over_modalities_of_the_mean_over_samples_of_their_masked_tokens(toys, norm_pix, context):
    objective = two_sensors(norm_pix=norm_pix).eval()
    batch = pictures(toys, objective, batch=6, missing=[(0, RADAR), (3, OPTICAL)])
    view = batch.views["image"][0]
    # A sample that shows all of one modality has none of it to predict.
    view.mask[5, 16:] = False
    prediction, mask = objective.predict(view)
    target, weight = pixel_targets(objective.grid, view, norm_pix)
    expected = []
    for mine in (slice(0, 16), slice(16, 32)):
        means = []
        for row in range(6):
            errors = []
            for token in (mask[row, mine].nonzero().flatten() + mine.start).tolist():
                here = weight[row, token] > 0
                errors.append(((prediction[row, token][here] - target[row, token][here]) ** 2).mean())
            if errors:
                means.append(torch.stack(errors).mean())
        assert len(means) == 5 - (mine.start // 16)
        expected.append(torch.stack(means).mean().item())
    losses = objective(batch, context)
    assert losses["loss_sentinel1"].item() == pytest.approx(expected[0], rel=1e-5)
    assert losses["loss_sentinel2"].item() == pytest.approx(expected[1], rel=1e-5)
    assert losses["loss"].item() == pytest.approx(sum(expected), rel=1e-5)


@pytest.mark.parametrize(("missing", "name", "other"), [(RADAR, "sentinel1", 1), (OPTICAL, "sentinel2", 0)])
def test_a_modality_that_no_sample_has_leaves_the_other_as_it_is(toys, missing, name, other, context):
    objective = two_sensors()
    batch = pictures(toys, objective, missing=[(slice(None), missing)])
    view = batch.views["image"][0]
    absent = slice(16 * (1 - other), 16 * (2 - other))
    assert not view.mask[:, absent].any()
    # All that is visible is the other's: 1/6 of its tokens.
    assert ((~view.mask)[:, 16 * other : 16 * other + 16].sum(1) == 2).all()
    losses = objective(batch, context)
    losses["loss"].backward()
    assert losses[f"loss_{name}"].item() == 0
    assert losses["loss"].item() > 0
    grads = {key: p.grad for key, p in objective.named_parameters() if p.grad is not None}
    assert all(grad.isfinite().all() for grad in grads.values())
    assert not any(grad.any() for key, grad in grads.items() if key.startswith(f"decoders.{1 - other}."))
    assert grads[f"decoders.{other}.pred.weight"].any()
    # Whatever stands where the sensor is missing.
    junk = Batch({"image": [replace(view, pixels=torch.where(view.valid, view.pixels, 7.0))]}, *2 * [batch.indices])
    assert objective(junk, context)["loss"].item() == losses["loss"].item()


def test_a_sample_without_one_sensor_changes_nothing_for_the_decoder_of_that_sensor(toys, context):
    objective = two_sensors()
    whole = pictures(toys, objective, batch=4, missing=[(0, RADAR)])
    part = whole[1:]
    results = []
    for batch in (whole, part):
        objective.zero_grad()
        losses = objective(batch, context)
        losses["loss_sentinel1"].backward()
        results.append((losses["loss_sentinel1"].item(), objective.decoders[0].pred.weight.grad.clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-4)


def test_hidden_pixels_reach_neither_encoder_nor_decoder_and_a_visible_one_reaches_the_other_sensor(toys):
    objective = two_sensors().eval()
    view = pictures(toys, objective, batch=2).views["image"][0]
    view.mask[:] = True
    view.mask[:, 16] = False  # the first optical patch is all that is seen
    prediction, _ = objective.predict(view)
    pixels = torch.randn_like(view.pixels)
    pixels[:, OPTICAL, :4, :4] = view.pixels[:, OPTICAL, :4, :4]
    assert torch.equal(objective.predict(replace(view, pixels=pixels))[0], prediction)
    pixels[:, OPTICAL, :4, :4] += 1.0
    changed = objective.predict(replace(view, pixels=pixels))[0]
    assert not torch.isclose(changed[:, 5, :32], prediction[:, 5, :32]).all()


def test_the_missing_sensor_is_predicted_better_than_by_its_mean_on_pictures_not_seen(toys, context):
    objective = two_sensors(norm_pix=False)
    toys.train(objective, [pictures(toys, objective, 8, step) for step in range(20)], steps=45, lr=5e-3)
    objective.eval()
    view = pictures(toys, objective, 32, step=999).views["image"][0]
    for sensor, other in ((0, 1), (1, 0)):
        view.mask = torch.zeros(32, 32, dtype=torch.bool)
        view.mask[:, 16 * sensor : 16 * sensor + 16] = True
        filled = objective.reconstruct(Batch({"image": [view]}, torch.arange(32), torch.zeros(32)))
        channels = (RADAR, OPTICAL)[sensor]
        truth, found = view.pixels[:, channels], filled.filled[:, channels]
        mean = truth.mean((0, 2, 3), keepdim=True)
        assert ((found - truth) ** 2).mean() < 0.7 * ((mean - truth) ** 2).mean()
        seen = (RADAR, OPTICAL)[other]
        assert torch.equal(filled.filled[:, seen], view.pixels[:, seen])


def test_reconstructions_of_normalised_patches_are_scaled_back(toys, monkeypatch):
    objective = two_sensors()
    batch = pictures(toys, objective, missing=[(0, RADAR)])
    view = batch.views["image"][0]
    target, _, mean, spread = patch_targets(objective.grid, view)
    monkeypatch.setattr(objective, "predict", lambda view: ((target - mean) / spread, view.mask))
    torch.testing.assert_close(objective.reconstruct(batch).filled, view.pixels, atol=1e-5, rtol=1e-5)


def test_bfloat16_gives_nearly_the_same_loss(toys, context):
    objective = two_sensors().eval()
    batch = pictures(toys, objective, missing=[(0, RADAR), (1, OPTICAL)])
    exact = objective(batch, context)["loss"].item()
    with torch.autocast("cpu", torch.bfloat16):
        rough = objective(batch, context)["loss"]
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact, rel=0.05)


def test_the_view_asked_for_follows_the_options():
    request = two_sensors(masking="block", mask_ratio=0.5, alpha=0.3, lowest_aspect=0.4).view_requests()[0]
    assert request.mask == DirichletMasking(0.5, 0.3, BlockPattern((), 4, 0.4))
    assert pickle.loads(pickle.dumps(request)) == request


def test_what_does_not_fit_is_refused(toys):
    with pytest.raises(UsageError, match="predicts one channel group from another, and this input has a single one"):
        toys.objective("multimae", "rgb")
    with pytest.raises(UsageError, match="decoder_heads 5"):
        two_sensors(decoder_heads=5)
    with pytest.raises(UsageError, match=r"objective\.alike: Masks cannot be alike along 'group'"):
        two_sensors(alike=("group",))
    with pytest.raises(UsageError, match=r"objective\.masking: Masks of every channel group need channel groups"):
        two_sensors(masking="group")
    with pytest.raises(UsageError, match="no teacher"):
        two_sensors(masking="attention_high")
    with pytest.raises(UsageError, match=r"objective\.mask_ratio 0\.99 leaves 0 of 32 tokens"):
        two_sensors(mask_ratio=0.99)
    with pytest.raises(UsageError, match="physical"):
        two_sensors(decoder_position_units="physical")


def test_patches_of_both_sensors_at_one_place_have_one_position(toys):
    objective = two_sensors()
    positions = objective._positions(objective.whole_layout())
    expected = sincos_positions(
        replace(objective.whole_layout(), axes=("y", "x"), coords=objective.whole_layout().coords[16:, 1:]), 24
    )
    assert torch.equal(positions[0], expected)
    assert functional.pdist(positions[0]).min() > 0.1
