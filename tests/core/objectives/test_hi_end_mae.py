"""Hi-End-MAE against the public modules, and against its equations written as loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.positions import sincos_positions
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import Batch, View
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.core.objectives.hi_end_mae import HiEndMAE, HiEndMAEConfig, normalised_patches
from fmsuite.errors import UsageError

SMALL = {"hi_end_mae": {"read_layers": (1, 0), "decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}}


def ours(name):
    """A parameter of the reference by our name."""
    if name == "mask_token":
        return name
    for theirs, mine in (
        ("encoder_to_decoder.3", "decoder_embed"),
        ("decoder.norm", "decoder_norm"),
        ("decoder.head", "decoder_pred"),
        ("decoder.blocks", "decoder_blocks"),
        ("decoder.cross_attention_blocks", "reading_blocks"),
        ("encoder.", "backbone."),
    ):
        if name.startswith(theirs):
            return name.replace(theirs, mine)
    # The reference numbers these maps from the shallowest block, ours go with the blocks that read through them.
    number, _, rest = name.removeprefix("encoder_to_decoder.").partition(".")
    return f"reading_embeds.{2 - int(number)}.{rest}"


def turned(values):
    """Axes (h, w, d) of the reference as (z, y, x) = (d, w, h): its position code puts the first axis first, ours the
    last."""
    return values.permute(*range(values.dim() - 3), -1, -2, -3)


def test_what_the_decoder_reads_its_output_and_the_loss_equal_the_reference(load, context):
    reference = load("hi_end_mae")
    spec = InputSpec(axes=("z", "y", "x"), size=(48, 48, 48), channels=(Channel(name="ct"),))
    model = ModelConfig(name="vit_tiny", width=48, depth=12, heads=4, patch_size=12, positions="sincos")
    config = HiEndMAEConfig(decoder_width=24, decoder_heads=4)
    objective = HiEndMAE(config, VisionTransformer(model, spec)).eval()
    assert objective.read_layers == (9, 6, 3)
    sizes = [torch.Size(shape).numel() for shape in reference["shapes"]]
    parts = zip(reference["names"], reference["weights"].split(sizes), reference["shapes"], strict=True)
    weights = {ours(name): values.view(shape) for name, values, shape in parts}
    kernel = "backbone.patch_embed.proj.weight"
    weights[kernel] = turned(weights[kernel])
    for name in ("decoder_pred.weight", "decoder_pred.bias"):
        rows = weights[name].view(12, 12, 12, -1).permute(2, 1, 0, 3)
        weights[name] = rows.reshape(weights[name].shape)
    result = objective.load_state_dict(weights, strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == ["backbone.mask_token"]

    torch.manual_seed(reference["image_seed"])
    images = torch.randn(2, 1, 48, 48, 48)
    assert torch.equal(images.flatten()[::4001], reference["image_probe"])
    # The place in our order of every token in theirs.
    place = torch.arange(64).view(4, 4, 4).permute(2, 1, 0).flatten()
    layout = objective.whole_layout()
    for width, name in ((48, "encoder_positions"), (24, "decoder_positions")):
        torch.testing.assert_close(sincos_positions(layout, width)[place], reference[name][0], atol=1e-6, rtol=0)
    order = place[reference["permutation"]]
    kept = order[:, : reference["kept"]]
    view = View(turned(images).contiguous(), mask=torch.ones(2, 64, dtype=torch.bool).scatter(1, kept, False))

    visible = objective.encode(view, objective.read_layers, norm_layers=False)
    # Theirs stand in the order of the permutation, ours in that of the places.
    theirs = kept.argsort(1)
    assert torch.equal(visible.ids, kept.gather(1, theirs))
    for block, found in zip((9, 6, 3), objective.contexts(visible.features), strict=True):
        expected = reference["read"][block]
        rows = theirs[..., None].expand(-1, -1, 24)
        torch.testing.assert_close(found[:, 0], expected[:, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[:, 1:], expected[:, 1:].gather(1, rows), atol=1e-5, rtol=1e-5)
    tokens, _ = objective.place_tokens(visible)
    torch.testing.assert_close(tokens[:, 0], reference["read"][12][:, 0], atol=1e-5, rtol=1e-5)
    rows = order[..., None]
    found = tokens[:, 1:].gather(1, rows.expand(-1, -1, 24))
    torch.testing.assert_close(found, reference["read"][12][:, 1:], atol=1e-5, rtol=1e-5)

    prediction, mask = objective.predict(view)
    by_axes = prediction.view(2, 64, 12, 12, 12).permute(0, 1, 4, 3, 2).reshape(2, 64, -1)
    found = by_axes.gather(1, rows.expand_as(by_axes))[..., ::48]
    torch.testing.assert_close(found, reference["output"][:, 1:], atol=1e-5, rtol=1e-5)
    loss = objective(Batch({"image": [view]}, torch.arange(2), torch.zeros(2)), context)["loss"]
    assert loss.item() == pytest.approx(reference["loss"], rel=1e-5)
    assert torch.equal(mask, view.mask)


@pytest.mark.parametrize("kind", ["rgb", "thirteen_grouped", "volume"])
def test_the_target_is_a_layer_norm_over_valid_values(toys, kind):
    objective = toys.objective("hi_end_mae", kind)
    view = toys.batch(objective, kind).views["image"][0]
    target, weight = normalised_patches(objective.grid, view)
    patches = objective.grid.patchify(view.pixels)
    exists = weight[0, 0] > 0
    if weight.all():
        expected = functional.layer_norm(patches, patches.shape[-1:], eps=1e-6)
        torch.testing.assert_close(target, expected, atol=1e-5, rtol=1e-5)
    first = patches[0, 0][exists]
    expected = (first - first.mean()) / (first.var(unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(target[0, 0][exists], expected, atol=1e-5, rtol=1e-5)
    assert not target[weight == 0].any()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_loss_equals_a_loop_over_patches_and_valid_values(toys, norm_pix, context):
    objective = toys.objective("hi_end_mae", norm_pix=norm_pix).eval()
    batch = toys.batch(objective, invalid=True)
    view = batch.views["image"][0]
    prediction, mask = objective.predict(view)
    pixels, counted = objective.grid.patchify(view.pixels), objective.grid.patchify(view.valid.expand_as(view.pixels))
    errors = []
    for sample, token in mask.nonzero().tolist():
        here = counted[sample, token]
        target = pixels[sample, token][here]
        if norm_pix:
            target = (target - target.mean()) / (target.var(unbiased=False) + 1e-6).sqrt()
        errors.append(((prediction[sample, token][here] - target) ** 2).mean())
    assert objective(batch, context)["loss"].item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_only_visible_valid_tokens_are_read(toys):
    objective = toys.objective("hi_end_mae", model={"registers": 2}).eval()
    view = toys.batch(objective, invalid=True).views["image"][0]
    # One sample shows fewer tokens than the others, so that its row is filled up with some that are no keys.
    shown = (~view.mask[1] & objective.backbone.layout(view).valid[1]).nonzero().flatten()
    view.mask[1, shown[1:]] = True
    visible = objective.encode(view, objective.read_layers, norm_layers=False)
    valid = visible.features.layout.valid
    assert not valid[1].all()
    assert objective.contexts(visible.features)[0].shape[1] == 1 + 2 + valid.shape[1]
    expected = objective.decode(visible)
    junk = tuple(torch.where(valid[..., None], each, 9.0) for each in visible.features.intermediate)
    changed = replace(visible.features, intermediate=junk)
    assert torch.equal(objective.decode(replace(visible, features=changed)), expected)


def test_each_block_reads_its_own_depth(toys):
    objective = toys.objective("hi_end_mae").eval()
    view = toys.batch(objective).views["image"][0]
    visible = objective.encode(view, objective.read_layers, norm_layers=False)
    for number, layer in enumerate((1, 0)):
        output = objective.backbone(view, keep=visible.ids, layers=[layer], norm_layers=False)
        whole = torch.cat([output.intermediate_prefix[0], output.intermediate[0]], dim=1)
        torch.testing.assert_close(
            objective.contexts(visible.features)[number], objective.reading_embeds[number](whole)
        )


def test_layers_that_are_not_there_are_refused(toys):
    with pytest.raises(UsageError, match="read_layers names block 2, and the encoder has 2"):
        toys.objective("hi_end_mae", read_layers=(2,))
    assert toys.objective("hi_end_mae", read_layers=None).read_layers == (1, 1, 0)
