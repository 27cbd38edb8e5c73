"""The vision transformer: timm's outputs, subsets of tokens, invalid tokens, other axes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsuite.core.backbones.base import Features
from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.timm_layout import load_equal, to_timm
from fmsuite.core.backbones.transfer import transfer
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import View
from fmsuite.core.inputs import Channel, InputSpec, rgb_channels
from fmsuite.core.tokens import PatchGrid
from fmsuite.errors import UsageError

RGB = InputSpec(axes=("y", "x"), size=(32, 32), channels=rgb_channels(), scale=1 / 255)
BANDS = InputSpec(
    axes=("y", "x"),
    size=(16, 16),
    channels=tuple(Channel(name=f"B{i}", group="abc"[min(i // 5, 2)]) for i in range(13)),
)
VOLUME = InputSpec(axes=("z", "y", "x"), size=(8, 8, 12), channels=(Channel(name="ct"),), spacing=(5.0, 0.7, 0.7))
SERIES = InputSpec(axes=("time", "y", "x"), size=(3, 16, 16), channels=(Channel(name="a"), Channel(name="b")))
BAG = InputSpec(
    axes=("y", "x"), size=(), channels=tuple(Channel(name=str(i)) for i in range(6)), bag=True, spacing_unit="um"
)


def _config(**changes: object) -> ModelConfig:
    return ModelConfig.model_validate({"width": 48, "depth": 3, "heads": 3, "patch_size": 8, **changes})


def _vit(spec: InputSpec, **changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(_config(**changes), spec).eval()


def _view(spec: InputSpec, batch: int = 2, seed: int = 0) -> View:
    rng = torch.Generator().manual_seed(seed)
    if spec.bag:
        coords = {axis: torch.rand(batch, 9, generator=rng) * 500 for axis in spec.axes}
        return View(torch.randn(batch, 9, spec.in_chans, generator=rng), coords=coords)
    return View(torch.randn(batch, spec.in_chans, *spec.size, generator=rng))


def _invalidate(view: View, spec: InputSpec, grid: PatchGrid, tokens: torch.Tensor) -> View:
    """Mark whole patches of a single-group view as invalid; ``tokens`` is (B, N), True where invalid."""
    patches = tokens[..., None].expand(-1, -1, grid.patch_values).float()
    return replace(view, valid=grid.unpatchify(patches, spec.size) == 0)


@pytest.mark.parametrize(
    ("name", "options", "config"),
    [
        ("vit_tiny_patch16_224", {}, {"width": 192, "heads": 3, "patch_size": 16}),
        (
            "vit_small_patch14_reg4_dinov2",
            {"embed_dim": 96, "num_heads": 3},
            {"width": 96, "patch_size": 14, "registers": 4, "layer_scale": 1e-5, "positions_cls": False},
        ),
        (
            "vit_giant_patch14_reg4_dinov2",
            {"embed_dim": 96, "num_heads": 3, "mlp_ratio": 2 * 256 / 96},
            {
                "width": 96,
                "patch_size": 14,
                "registers": 4,
                "layer_scale": 1e-5,
                "positions_cls": False,
                "mlp": "swiglu",
            },
        ),
    ],
)
def test_timm_weights_go_in_and_out_unchanged_with_equal_outputs(name: str, options: dict, config: dict) -> None:
    torch.manual_seed(0)
    patch = config["patch_size"]
    side = 4 * patch
    theirs = timm.create_model(name, depth=2, img_size=side, num_classes=0, dynamic_img_size=True, **options).eval()
    for parameter in theirs.parameters():  # LayerScale starts too small to show an error
        torch.nn.init.normal_(parameter, std=0.05 if parameter.dim() > 1 else 0.3)
    ours = _vit(RGB.resized(side), depth=2, **config)
    load_equal(ours, theirs.state_dict(), name)
    x = torch.randn(2, 3, side, side)
    torch.testing.assert_close(_sequence(ours(View(x))), theirs.forward_features(x), atol=1e-6, rtol=1e-5)
    wide = torch.randn(1, 3, side + patch, side - patch)
    torch.testing.assert_close(_sequence(ours(View(wide))), theirs.forward_features(wide), atol=1e-5, rtol=1e-5)
    back = to_timm(ours).state
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in theirs.state_dict().items())


def _sequence(features: Features) -> torch.Tensor:
    parts = [] if features.cls is None else [features.cls[:, None]]
    parts += [] if features.registers is None else [features.registers]
    return torch.cat([*parts, features.patches], dim=1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"registers": 4},
        {"registers": 2, "positions_cls": False},
        {"positions": "sincos", "registers": 1},
        {"positions": "sincos", "mlp": "swiglu", "layer_scale": 0.1},
        {"cls_token": False},
        {"positions": "none", "qkv_bias": False},
    ],
)
def test_timms_model_made_from_the_suggestion_gives_equal_outputs(changes: dict) -> None:
    ours = _vit(RGB, **changes)
    pooling = "cls" if ours.has_cls else "mean"
    form = to_timm(ours, pooling)
    theirs = timm.create_model(form.name, **form.arguments).eval()
    theirs.load_state_dict(form.state)
    view = _view(RGB)
    torch.testing.assert_close(theirs.forward_features(view.pixels), _sequence(ours(view)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(theirs(view.pixels), ours(view).pooled(pooling), atol=1e-6, rtol=1e-5)
    again = VisionTransformer(form.config, RGB).eval()
    assert load_equal(again, form.state, "export") == ["mask_token"]
    torch.testing.assert_close(_sequence(again(view)), _sequence(ours(view)), atol=0, rtol=0)


@pytest.mark.parametrize("positions", ["learned", "sincos", "rotary"])
@pytest.mark.parametrize("spec", [RGB, VOLUME])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_kept_tokens_are_as_if_the_others_were_invalid(positions: str, spec: InputSpec, data: st.DataObject) -> None:
    model = _vit(spec, positions=positions, patch_size=4)
    assert model.grid is not None
    view = _view(spec)
    tokens = model.layout(view).num_tokens
    count = data.draw(st.integers(1, tokens - 1))
    order = torch.stack([torch.randperm(tokens) for _ in range(2)])
    keep = order[:, :count]
    subset = model(view, keep=keep)
    dropped = torch.ones(2, tokens, dtype=torch.bool).scatter(1, keep, False)
    # Normalize zeroes invalid pixels; here none of the kept patches has any.
    full = model(_invalidate(view, spec, model.grid, dropped))
    expected = full.patches.gather(1, keep[..., None].expand(-1, -1, model.width))
    torch.testing.assert_close(subset.patches, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(subset.cls, full.cls, atol=1e-5, rtol=1e-4)


def test_pixels_of_invalid_and_dropped_patches_change_nothing() -> None:
    model = _vit(RGB, registers=2)
    assert model.grid is not None
    view = _view(RGB)
    invalid = torch.zeros(2, 16, dtype=torch.bool)
    invalid[0, 3] = invalid[1, 10:] = True
    marked = _invalidate(view, RGB, model.grid, invalid)
    changed = replace(marked, pixels=torch.where(marked.valid, marked.pixels, torch.tensor(9.0)))
    first, second = model(marked), model(changed)
    torch.testing.assert_close(_sequence(first), _sequence(second), atol=0, rtol=0)
    assert torch.equal(first.layout.valid, ~invalid)
    keep = torch.tensor([[0, 5], [1, 2]])
    other = view.pixels.clone()
    other[:, :, 16:] = 7.0  # rows of patches 8 to 15
    torch.testing.assert_close(
        model(view, keep=keep).patches, model(replace(view, pixels=other), keep=keep).patches, atol=0, rtol=0
    )


def test_padding_in_keep_has_no_influence() -> None:
    model = _vit(RGB)
    view = _view(RGB)
    short = model(view, keep=torch.tensor([[4, 9], [2, 3]]))
    padded = model(
        view,
        keep=torch.tensor([[4, 9, 0, 0], [2, 3, 0, 0]]),
        keep_valid=torch.tensor([[True, True, False, False]] * 2),
    )
    torch.testing.assert_close(padded.cls, short.cls, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(padded.patches[:, :2], short.patches, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(padded.mean(), short.mean(), atol=1e-6, rtol=1e-5)


def test_a_sample_without_any_valid_token_stays_finite() -> None:
    model = _vit(RGB, cls_token=False)
    view = replace(_view(RGB), valid=torch.zeros(2, 1, 32, 32, dtype=torch.bool))
    features = model(view)
    assert features.patches.isfinite().all()
    assert torch.equal(features.mean(), torch.zeros(2, 48))


def test_masked_patches_are_the_mask_token() -> None:
    model = _vit(RGB)
    view = _view(RGB)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 8:] = True
    other = view.pixels.clone()
    other[:, :, 16:] = 7.0
    first, second = model(view, mask=mask), model(replace(view, pixels=other), mask=mask)
    torch.testing.assert_close(first.cls, second.cls, atol=0, rtol=0)
    with torch.no_grad():
        model.mask_token.add_(1.0)
    assert not torch.allclose(model(view, mask=mask).cls, first.cls)


def test_intermediate_layers_come_in_the_order_asked_for() -> None:
    model = _vit(RGB, registers=2)
    view = _view(RGB)
    features = model(view, layers=[-1, 0, 2])
    torch.testing.assert_close(features.intermediate[0], features.patches)
    torch.testing.assert_close(features.intermediate[2], features.patches)
    raw = model(view, layers=[0], norm_layers=False).intermediate[0]
    torch.testing.assert_close(model.norm(raw), features.intermediate[1])
    with pytest.raises(UsageError, match="no layer 3"):
        model(view, layers=[3])


@pytest.mark.parametrize("positions", ["learned", "rotary", "relative"])
def test_other_blocks_are_run_as_the_models_own_on_whole_sequences(positions: str) -> None:
    model = _vit(RGB, positions=positions, registers=2).train()
    view = _view(RGB)
    invalid = torch.arange(16).expand(2, -1) < torch.tensor([[3], [0]])
    view = replace(_invalidate(view, RGB, model.grid, invalid), keys=torch.arange(2))
    features = model(view, layers=(0, -1), norm_layers=False)
    first, last = (
        torch.cat([prefix, patches], dim=1)
        for prefix, patches in zip(features.intermediate_prefix, features.intermediate, strict=True)
    )
    assert torch.equal(model.norm(last), features.sequence)
    assert features.sequence.shape == (2, 1 + 2 + 16, 48)
    assert torch.equal(model.run_blocks(model.blocks[1:], first, features.layout, view.keys), last)
    block = model.make_block(7, drop_path=0.25)
    assert {n: p.shape for n, p in block.named_parameters()} == {
        n: p.shape for n, p in model.blocks[0].named_parameters()
    }


def test_crops_of_several_sizes_equal_separate_calls() -> None:
    model = _vit(RGB, registers=1)
    small = RGB.resized(16)
    views = [_view(RGB, 2, 0), _view(small, 3, 1), _view(RGB, 1, 2), _view(small, 2, 3)]
    views[2] = replace(views[2], valid=torch.rand(1, 1, 32, 32) > 0.4)
    masks = [torch.rand(2, 16) > 0.5, None, None, None]
    together = model.forward_crops(views, masks)
    for view, mask, found in zip(views, masks, together, strict=True):
        alone = model(view, mask=mask)
        torch.testing.assert_close(_sequence(found), _sequence(alone), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.mean(), alone.mean(), atol=1e-5, rtol=1e-4)
    assert [len(found.patches) for found in together] == [2, 3, 1, 2]


def test_channel_groups_have_tokens_of_their_own() -> None:
    model = _vit(BANDS, positions="sincos", patch_size=4)
    view = _view(BANDS)
    features = model(view)
    assert features.layout.axes == ("group", "y", "x")
    assert features.patches.shape == (2, 3 * 16, 48)
    # Without the first group's channels its tokens are invalid, and what stands there is never read.
    valid = torch.ones(2, 13, 16, 16, dtype=torch.bool)
    valid[:, :5] = False
    pixels = view.pixels.clone()
    pixels[:, :5] = 5.0
    first, second = model(replace(view, valid=valid)), model(View(pixels, valid))
    torch.testing.assert_close(first.cls, second.cls, atol=0, rtol=0)
    assert not torch.allclose(first.cls, features.cls)


def test_one_batch_holds_series_of_different_dates() -> None:
    view = replace(_view(SERIES), coords={"time": torch.tensor([[0.0, 10.0, 400.0], [3.0, 4.0, 5.0]])})
    for positions in ("sincos", "rotary"):
        model = _vit(SERIES, positions=positions)
        together = model(view)
        for row in range(2):
            alone = model(view[row : row + 1])
            torch.testing.assert_close(together.cls[row], alone.cls[0], atol=1e-5, rtol=1e-4)
        swapped = replace(view, coords={"time": view.coords["time"].flip(0)})
        assert not torch.allclose(model(swapped).cls, together.cls, atol=1e-5)
    with pytest.raises(UsageError, match="coordinates of their own"):
        _vit(SERIES)(view)


def test_a_padded_series_equals_the_short_one() -> None:
    model = _vit(SERIES, positions="sincos")
    short = View(torch.randn(1, 2, 2, 16, 16), coords={"time": torch.tensor([[5.0, 9.0]])})
    pixels = torch.cat([short.pixels, torch.zeros(1, 2, 1, 16, 16)], dim=2)
    valid = torch.ones(1, 1, 3, 16, 16, dtype=torch.bool)
    valid[:, :, 2] = False
    padded = View(pixels, valid, coords={"time": torch.tensor([[5.0, 9.0, 0.0]])})
    torch.testing.assert_close(model(padded).cls, model(short).cls, atol=1e-5, rtol=1e-4)


def test_volumes_of_different_spacing_share_physical_positions() -> None:
    model = _vit(VOLUME, positions="rotary", patch_size=4, position_units="physical", heads=2)
    pixels = _view(VOLUME, 1).pixels.expand(2, -1, -1, -1, -1)
    view = View(pixels, spacing=torch.tensor([[5.0, 0.7, 0.7], [1.0, 1.0, 1.0]]))
    cls = model(view).cls
    assert not torch.allclose(cls[0], cls[1], atol=1e-4)
    torch.testing.assert_close(model(View(pixels[:1])).cls, cls[:1], atol=1e-6, rtol=1e-5)


def test_a_shifted_bag_is_the_same_bag_under_rotary_positions() -> None:
    model = _vit(
        BAG, positions="rotary", patch_size=1, position_units="physical", position_scale=100.0, cls_token=False
    )
    # A class token does not turn, so that only patches among themselves see differences alone.
    view = _view(BAG)
    moved = replace(view, coords={axis: values + 300.0 for axis, values in view.coords.items()})
    torch.testing.assert_close(model(view).mean(), model(moved).mean(), atol=1e-4, rtol=1e-3)
    stretched = replace(view, coords={axis: values * 3.0 for axis, values in view.coords.items()})
    assert not torch.allclose(model(view).mean(), model(stretched).mean(), atol=1e-3)
    padded = replace(view, valid=torch.tensor([[True] * 7 + [False] * 2] * 2))
    shorter = view.map(lambda tensor: tensor[:, :7])
    torch.testing.assert_close(model(padded).mean(), model(shorter).mean(), atol=1e-5, rtol=1e-4)


def test_checkpointing_changes_no_gradient() -> None:
    def gradients(enabled: bool) -> list[torch.Tensor]:
        model = _vit(RGB, drop_path=0.3).train()
        model.set_activation_checkpointing(enabled)
        model(replace(_view(RGB), keys=torch.tensor([5, 6]))).mean().square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, recomputed, atol=0, rtol=0)


def test_compiled_blocks_keep_names_and_outputs() -> None:
    model, compiled = _vit(RGB, registers=1), _vit(RGB, registers=1)
    compiled.compile_blocks(backend="eager")
    assert list(compiled.state_dict()) == list(model.state_dict())
    valid = torch.rand(2, 1, 32, 32) > 0.5
    for view in (_view(RGB), replace(_view(RGB), valid=valid)):
        torch.testing.assert_close(compiled(view).cls, model(view).cls, atol=1e-6, rtol=1e-5)
    assert compiled.blocks[0]._compiled_call_impl is not None


def test_drop_path_follows_the_sample_not_the_batch() -> None:
    model = _vit(RGB, drop_path=0.5, drop_path_uniform=True).train()
    view = replace(_view(RGB, 6), keys=torch.arange(6) * 977)
    together = model(view).cls
    apart = torch.cat([model(view[i : i + 2]).cls for i in range(0, 6, 2)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together, model(replace(view, keys=view.keys + 1)).cls, atol=1e-3)


def test_drop_path_grows_with_depth_unless_uniform() -> None:
    def rates(**changes: object) -> list[float]:
        return [block.drop_path1.rate for block in _vit(RGB, drop_path=0.2, **changes).blocks]

    assert rates() == [0.0, 0.1, 0.2]
    assert rates(drop_path_uniform=True) == [0.2, 0.2, 0.2]


def test_layers_of_parameters() -> None:
    model = _vit(RGB, registers=1)
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert {n: k for n, k in layers.items() if "blocks" not in n} == {
        "cls_token": 0,
        "reg_token": 0,
        "mask_token": 0,
        "pos_embed": 0,
        "patch_embed.proj.weight": 0,
        "patch_embed.proj.bias": 0,
        "norm.weight": 4,
        "norm.bias": 4,
    }
    assert layers["blocks.0.attn.qkv.weight"] == 1
    assert layers["blocks.2.mlp.fc2.bias"] == 3


def test_every_parameter_is_initialised() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(_config(registers=2, layer_scale=0.3), RGB)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert abs(model.blocks[0].mlp.fc1.weight.std().item() - 0.02) < 0.001
    assert torch.equal(model.blocks[1].ls1.gamma, torch.full((48,), 0.3))


@pytest.mark.parametrize(
    ("spec", "changes", "message"),
    [
        (RGB, {"patch_size": 7}, "cannot be cut"),
        (RGB, {"heads": 5}, "not a multiple"),
        (BAG, {}, "no grid for a learned"),
        (BAG, {"input_size": 32, "positions": "none"}, "bag of vectors"),
        (RGB, {"positions": "rotary", "heads": 24}, "cannot hold rotary"),
        (VOLUME, {"positions": "sincos", "width": 4, "heads": 1, "patch_size": 4}, "too narrow to encode"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(spec: InputSpec, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_backbone(_config(**changes), spec)


def test_input_size_resizes_the_input_once() -> None:
    model = _vit(VOLUME, input_size=16, patch_size=4)
    assert model.spec.size == (16, 16, 16)
    assert model.spec.spacing == pytest.approx((2.5, 0.35, 0.525))
    assert VisionTransformer(model.config, model.spec).spec == model.spec


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    """Zhang and Sennrich 2019, equation 4, in place of every LayerNorm."""
    model = _vit(RGB, norm="rms")
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.RMSNorm)]
    assert len(norms) == 7
    assert all(isinstance(norm, torch.nn.RMSNorm) for norm in norms)
    assert not any(name.startswith("norm") and name.endswith("bias") for name, _ in model.named_parameters())
    torch.nn.init.normal_(model.norm.weight)
    x = 3 + 2 * torch.randn(5, 48)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * model.norm.weight
    torch.testing.assert_close(model.norm(x), expected)
    torch.nn.init.constant_(model.blocks[0].norm1.weight, float("nan"))
    model.init_weights()
    assert torch.equal(model.blocks[0].norm1.weight, torch.ones(48))


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_without_biases_the_blocks_have_none_but_their_norms(mlp: str) -> None:
    plain = {name for name, _ in _vit(RGB, mlp=mlp).named_parameters()}
    bare = {name for name, _ in _vit(RGB, mlp=mlp, bias=False).named_parameters()}
    neither = {name for name, _ in _vit(RGB, mlp=mlp, bias=False, qkv_bias=False).named_parameters()}
    gone = {f"blocks.{i}.{part}.bias" for i in range(3) for part in ("attn.proj", "mlp.fc1", "mlp.fc2")}
    assert plain - bare == gone
    assert bare - neither == {f"blocks.{i}.attn.qkv.bias" for i in range(3)}
    # Biases start at zero, so that the outputs are those of the model that has them.
    torch.manual_seed(0)
    first, second = _vit(RGB, mlp=mlp), _vit(RGB, mlp=mlp, bias=False)
    second.load_state_dict({k: v for k, v in first.state_dict().items() if k in bare})
    torch.testing.assert_close(first(_view(RGB)).patches, second(_view(RGB)).patches, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("init", ["normal", "xavier"])
def test_depth_rescale_divides_what_each_block_adds(init: str) -> None:
    """Block l = 1, 2, ... has ``attn.proj`` and ``mlp.fc2`` divided by sqrt(2 l) (Bao et al. 2021, section 2.5)."""
    plain, scaled = _vit(RGB, init=init), _vit(RGB, init=init, depth_rescale=True)
    for (name, before), after in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        factor = 1.0
        if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
            factor = (2 * (int(name.split(".")[1]) + 1)) ** -0.5
        torch.testing.assert_close(after, before * factor)


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"positions": "relative"}, "relative positions"), ({"norm": "rms"}, "RMS"), ({"bias": False}, "without biases")],
)
def test_what_timm_cannot_hold_is_not_exported_to_it(changes: dict, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        to_timm(_vit(RGB, **changes))


@pytest.mark.parametrize("changes", [{"norm": "rms"}, {"bias": False}])
def test_weights_of_other_layers_are_refused_by_name(changes: dict) -> None:
    (key,) = changes
    with pytest.raises(UsageError, match=f"its {key} is"):
        transfer(_vit(RGB), _vit(RGB, **changes), "weights")
    with pytest.raises(UsageError, match=f"its {key} is"):
        transfer(_vit(RGB, **changes), _vit(RGB), "weights")


@pytest.mark.parametrize("spec", [RGB, VOLUME])
def test_a_learned_table_and_rotary_positions_act_together(spec: InputSpec) -> None:
    view = _view(spec)
    models = {name: _vit(spec, positions=name, patch_size=4) for name in ("learned", "rotary", "learned+rotary")}
    both = models["learned+rotary"]
    state = both.state_dict()
    models["learned"].load_state_dict(state)
    turned_only = {key: value for key, value in state.items() if key != "pos_embed"}
    models["rotary"].load_state_dict(turned_only)
    assert not torch.allclose(models["learned"](view).patches, both(view).patches, atol=1e-3)
    assert not torch.allclose(models["rotary"](view).patches, both(view).patches, atol=1e-3)
    with torch.no_grad():
        both.pos_embed.zero_()
    assert torch.equal(models["rotary"](view).patches, both(view).patches)
    larger = VisionTransformer(both.config, spec.resized(tuple(2 * length for length in spec.size)))
    transfer(models["learned+rotary"], larger, "run")
    assert larger.pos_embed.shape[1] == 1 + larger.grid.layout(larger.spec.size).num_tokens
    with pytest.raises(UsageError, match="timm"):
        to_timm(both, "cls")
