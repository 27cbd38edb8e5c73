"""CAPI against numbers of the public code, given its positions; what is predicted, read and clustered."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fmsuite.core.backbones import cross_attention, packing
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.positions import Rotary
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import MaskContext, SampleKey, View
from fmsuite.core.inputs import InputSpec, rgb_channels
from fmsuite.core.objectives.capi import CAPI, CAPIConfig, PartlyPredicted
from fmsuite.errors import UsageError

SMALL = {"capi": {"prototypes": 16, "predictor_depth": 2, "predict_share": 0.3, "mask_ratio": 0.6}}


class PublicRotation:
    """The public code's positions. They are no rotation: features i and i + d/2 turn together, one by its place along y
    and the other by that along x, so that lengths change. The frequencies are parameters of every block, and part of
    the gradient norms; registers stand along the edge of the visible tokens."""

    def __init__(self, frequencies):
        self.frequencies = [each.clone().requires_grad_() for each in frequencies]
        self.calls = 0

    def __call__(self, x, by):
        angle = by.cos @ self.frequencies[self.calls // 2]
        self.calls += 1
        first, second = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()

    @staticmethod
    def places(layout, registers, last=3):
        coords = layout.coords / last
        if registers:
            steps = torch.arange(registers // 4) / (registers // 4)
            one, zero = torch.ones_like(steps), torch.zeros_like(steps)
            sides = [(steps, zero), (one, steps), (1 - steps, one), (zero, 1 - steps)]
            edge = torch.cat([torch.stack(side, dim=-1) for side in sides])
            low, high = coords.amin(1, keepdim=True), coords.amax(1, keepdim=True)
            coords = torch.cat([low + edge * (high - low), coords], dim=1)
        return Rotary(coords[:, None], coords)


def load_public(objective, state, head):
    """The public code's weights under our names; returns its frequencies, encoder's first."""
    ours, frequencies = {}, []
    for part, start in (("encoder", "backbone.blocks"), ("decoder", "predictor.blocks")):
        for number in range(2):
            theirs, mine = f"{part}.blocks.{number}.residual", f"{start}.{number}."
            q, k, v = (state[f"{theirs}1.fn.{name}_proj.weight"] for name in "qkv")
            if part == "encoder":
                ours[f"{mine}attn.qkv.weight"] = torch.cat([q, k, v])
            else:
                ours |= {f"{mine}attn.q.weight": q, f"{mine}attn.kv.weight": torch.cat([k, v])}
            ours[f"{mine}attn.proj.weight"] = state[f"{theirs}1.fn.proj.weight"]
            for norm in "12":
                ours[f"{mine}norm{norm}.weight"] = state[f"{theirs}{norm}.norm.weight"]
            for layer in ("fc1", "fc2"):
                ours[f"{mine}mlp.{layer}.weight"] = state[f"{theirs}2.fn.{layer}.weight"]
            frequencies.append(state[f"{theirs}1.fn.rope.freqs"])
    ours |= {
        "backbone.reg_token": state["registers"],
        "backbone.patch_embed.proj.weight": state["patch_embed.weight"],
        "backbone.patch_embed.proj.bias": state["patch_embed.bias"],
        "predictor.mask_token": state["mask_token"],
        "head.weight_g": head["last_layer.weight_g"],
        "head.weight_v": head["last_layer.weight_v"],
    }
    missing, unexpected = objective.load_state_dict(ours, strict=False)
    assert not unexpected
    rest = {key for key in missing if not key.startswith(("teacher.", "clustering."))}
    assert rest == {"backbone.mask_token", "backbone.norm.weight"}
    return frequencies


def test_prediction_loss_and_gradients_are_the_public_codes_given_its_positions(load, monkeypatch):
    public = load("capi")["student"]
    config = ModelConfig(
        **{"width": 64, "depth": 2, "heads": 4, "patch_size": 14, "cls_token": False, "registers": 16},
        **{"positions": "rotary", "norm": "rms", "bias": False, "qkv_bias": False},
    )
    spec = InputSpec(axes=("y", "x"), size=(56, 56), channels=rgb_channels())
    options = CAPIConfig(prototypes=24, predictor_depth=2, predict_share=0.4)
    objective = CAPI(options, VisionTransformer(config, spec))
    rotation = PublicRotation(load_public(objective, public["state_dict"], public["head"]))
    for module in objective.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.eps = 1e-5
    for module in (packing, cross_attention):
        monkeypatch.setattr(module, "rotate", rotation)
    monkeypatch.setattr(VisionTransformer, "_rotary", lambda self, layout: rotation.places(layout, 16))
    monkeypatch.setattr(CAPI, "_rotary", lambda self, layout, prefix: rotation.places(layout, prefix))

    view = View(public["images"])
    mask = torch.ones(32, dtype=torch.bool)
    mask[public["visible"]] = False
    ids = public["predict"].reshape(2, 3) - torch.tensor([[0], [16]])
    tokens = objective.predict(view, mask.reshape(2, 16), objective.backbone.layout(view), ids)
    normed = torch.nn.functional.rms_norm(tokens, (64,), eps=1e-5)
    assert normed.norm().item() == pytest.approx(public["prediction"]["norm"].item(), rel=1e-5)
    assert normed.mean().item() == pytest.approx(public["prediction"]["mean"].item(), rel=1e-5)
    loss = objective.prediction_loss(tokens, public["target"].reshape(2, 3, 24))
    loss.backward()
    assert loss.item() == pytest.approx(public["loss"].item(), rel=1e-5)
    turns = [each.grad for each in rotation.frequencies]
    backbone, predictor = objective.backbone, objective.predictor
    gradients = {
        "mask_token": [predictor.mask_token.grad],
        "registers": [backbone.reg_token.grad],
        "patch_embed": [p.grad for p in backbone.patch_embed.parameters()],
        "encoder": [*(p.grad for p in backbone.blocks.parameters()), *turns[:2]],
        "decoder": [*(p.grad for p in predictor.blocks.parameters()), *turns[2:]],
    }
    for part, found in gradients.items():
        norm = torch.cat([each.flatten() for each in found]).norm().item()
        assert norm == pytest.approx(public["grad_norm"][part].item(), rel=1e-5), part


def drawn(masks, share, seed=0):
    """What the sampler makes of given masks."""
    generator = np.random.default_rng(seed)
    return [
        PartlyPredicted(lambda context, mask=mask: mask, share)(
            MaskContext(("y", "x"), (16, 16), np.ones(256, bool), generator, SampleKey(0, 0))
        )
        for mask in masks
    ]


def test_a_share_of_the_masked_tokens_is_predicted():
    masks = np.zeros((3, 256), dtype=bool)
    masks[0, 90:] = True
    masks[1, 7:12] = True
    parts = drawn(masks, 0.05)
    assert [part[1].sum() for part in parts] == [8, 1, 0]
    assert all(np.array_equal(part[0], mask) for part, mask in zip(parts, masks, strict=True))
    assert not (parts[0][1] & ~masks[0]).any()
    # Every masked token gets its turn: 800 draws of 8 in 166 are 38.6 each, with a standard deviation of 6.
    frequency = sum(part[1].astype(int) for part in drawn([masks[0]] * 800, 0.05, seed=1))
    assert frequency[90:].min() > 10
    assert frequency[90:].max() < 70


def test_published_settings_show_ninety_of_256_tokens_and_predict_eight():
    spec = InputSpec(axes=("y", "x"), size=(224, 224), channels=rgb_channels())
    small = {"width": 32, "depth": 1, "heads": 1, "patch_size": 14, "positions": "rotary", "cls_token": False}
    options = CAPIConfig(mask_ratio=0.648, prototypes=4, predictor_depth=1)
    objective = CAPI(options, VisionTransformer(ModelConfig(**small), spec))
    (request,) = objective.view_requests()
    for seed in range(20):
        generator = np.random.default_rng(seed)
        hidden, predicted = request.mask(
            MaskContext(("y", "x"), (16, 16), np.ones(256, bool), generator, SampleKey(0, seed))
        )
        assert ((~hidden).sum(), predicted.sum()) == (90, 8)
        # One block that may go on at the opposite edge: turned to some corner, it is a rectangle but for its last row.
        visible = ~hidden.reshape(16, 16)
        assert visible.any(0).sum() * visible.any(1).sum() < 90 + visible.any(1).sum() + visible.any(0).sum()


def test_the_loss_is_the_sum_of_two_and_no_gradient_crosses(toys, context):
    objective = toys.objective("capi")
    batch = toys.batch(objective)
    losses = objective(batch, context)
    assert losses["loss"].item() == pytest.approx((losses["prediction"] + losses["clustering"]).item(), rel=1e-6)
    own = [p for n, p in objective.named_parameters() if n.startswith("clustering.")]
    rest = [p for n, p in objective.named_parameters() if p.requires_grad and not n.startswith("clustering.")]
    assert all(g is None for g in torch.autograd.grad(losses["prediction"], own, allow_unused=True, retain_graph=True))
    assert all(g is None for g in torch.autograd.grad(losses["clustering"], rest, allow_unused=True))
    assert not any(p.requires_grad for p in objective.teacher.parameters())


def test_hidden_pixels_reach_the_teacher_only(toys, context):
    objective = toys.objective("capi").eval()
    view = toys.batch(objective, invalid=True).views["image"][0]
    layout = objective.backbone.layout(view)
    mask, ids = view.mask[:, 0] & layout.valid, torch.tensor([[5, 9]] * 4)
    first = objective.predict(view, mask, layout, ids)
    hidden = mask.reshape(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    changed = torch.where(hidden, view.pixels + 3.0, view.pixels)
    assert not torch.equal(changed, view.pixels)
    second = objective.predict(View(changed, view.valid), mask, layout, ids)
    assert torch.equal(first, second)
    shown = torch.where(~hidden & view.valid, view.pixels + 3.0, view.pixels)
    assert not torch.allclose(objective.predict(View(shown, view.valid), mask, layout, ids), first)


def test_a_prediction_depends_on_its_place_and_not_on_the_other_places(toys):
    objective = toys.objective("capi").eval()
    view = toys.batch(objective).views["image"][0]
    layout = objective.backbone.layout(view)
    both = objective.predict(view, view.mask[:, 0], layout, torch.tensor([[5, 9]] * 4))
    alone = objective.predict(view, view.mask[:, 0], layout, torch.tensor([[9]] * 4))
    assert torch.allclose(both[:, 1:], alone, atol=1e-6)
    assert not torch.allclose(both[:, 0], both[:, 1], atol=1e-3)


def test_rows_of_unlike_validity_are_as_if_alone(toys):
    """A sample's prediction is the same beside rows that show more tokens, and finite where no token is valid."""
    objective = toys.objective("capi", model={"cls_token": False}).eval()
    view = toys.batch(objective).views["image"][0]
    view.valid = torch.ones(4, 1, 16, 16, dtype=torch.bool)
    view.valid[1, :, :8] = False
    view.valid[2] = False
    layout = objective.backbone.layout(view)
    ids = torch.tensor([[9, 14]] * 4)
    together = objective.predict(view, view.mask[:, 0] & layout.valid, layout, ids)
    assert together.isfinite().all()
    one = view[1:2]
    layout = objective.backbone.layout(one)
    alone = objective.predict(one, one.mask[:, 0] & layout.valid, layout, ids[:1])
    assert torch.allclose(alone, together[1:2], atol=1e-5)


def test_a_short_run_learns_the_clusters_of_a_fixed_teacher(toys, context):
    objective = toys.objective("capi", momentum=1.0, predict_share=1.0, target_temp=0.03)
    batches = [toys.batch(objective, step=step) for step in range(4)]
    before = [objective.eval()(batch, context)["prediction"].item() for batch in batches]
    start = [objective(batch, context)["clustering"].item() for batch in batches]
    toys.train(objective, batches, steps=80)
    after = [objective.eval()(batch, context)["prediction"].item() for batch in batches]
    assert sum(after) < 0.8 * sum(before)
    assert sum(objective(batch, context)["clustering"].item() for batch in batches) < sum(start)


def test_the_clustering_head_has_a_learning_rate_of_its_own(toys):
    objective = toys.objective("capi", cluster_lr_scale=0.25)
    rule = objective.parameter_rule("clustering.layer.weight")
    assert (rule.lr_scale, rule.decayed, rule.scheduled) == (0.25, False, True)
    assert objective.parameter_rule("predictor.mask_token").lr_scale == 1.0


def test_the_predictor_may_be_narrower_and_has_no_biases(toys, context):
    objective = toys.objective("capi", predictor_width=12, predictor_heads=1)
    assert objective.head.weight_v.shape == (16, 12)
    assert not any(name.endswith("bias") for name, _ in objective.predictor.named_parameters())
    assert objective(toys.batch(objective), context)["loss"].isfinite()


def test_options_that_do_not_fit_are_refused(toys):
    with pytest.raises(UsageError, match=r"rotary positions .* Raise objective\.predictor_width"):
        toys.objective("capi", predictor_width=6, predictor_heads=2)
    with pytest.raises(UsageError, match="predict_share"):
        toys.objective("capi", predict_share=0.05)
    with pytest.raises(UsageError, match="multiple"):
        toys.objective("capi", predictor_width=25)
    with pytest.raises(UsageError, match=r"[Hh]eads"):
        toys.objective("capi", predictor_width=2, predictor_heads=1)
    with pytest.raises(UsageError, match="teacher"):
        toys.objective("capi", masking="attention_high")
    with pytest.raises(UsageError, match="spacing"):
        toys.objective("capi", predictor_position_units="physical")
