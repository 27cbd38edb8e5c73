"""Published checkpoints: recognised by their keys, equal to their own networks."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import checkpoint_filter_fn

from fmsuite.core.backbones.config import VIT_SIZES, ModelConfig
from fmsuite.core.backbones.positions import sincos_positions
from fmsuite.core.backbones.timm_layout import load_equal
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.backbones.weights import Recognised, read_checkpoint, recognise
from fmsuite.core.data.sample import View
from fmsuite.core.inputs import IMAGENET_MEAN, Channel, InputSpec, rgb_channels
from fmsuite.core.tokens import PatchGrid
from fmsuite.errors import FmsuiteError, UsageError


def _state(
    registers: int = 0, *, cls: bool = True, scale: bool = False, gated: bool = False
) -> dict[str, torch.Tensor]:
    """Random weights of a ViT of width 64, two blocks, patch 8, 32 pixels, under DINOv2's or MAE's names."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(*shape, generator=rng)

    state = {"pos_embed": draw(1, 16 + cls, 64), "patch_embed.proj.weight": draw(64, 3, 8, 8)}
    state["patch_embed.proj.bias"] = draw(64)
    if cls:
        state["cls_token"] = draw(1, 1, 64)
    if registers:
        state["register_tokens"] = draw(1, registers, 64)
    first, second = ("w12", "w3") if gated else ("fc1", "fc2")
    hidden = 176 if gated else 256
    for i in range(2):
        shapes = {
            "norm1.weight": (64,),
            "norm1.bias": (64,),
            "attn.qkv.weight": (192, 64),
            "attn.qkv.bias": (192,),
            "attn.proj.weight": (64, 64),
            "attn.proj.bias": (64,),
            "norm2.weight": (64,),
            "norm2.bias": (64,),
            f"mlp.{first}.weight": (2 * hidden if gated else hidden, 64),
            f"mlp.{first}.bias": (2 * hidden if gated else hidden,),
            f"mlp.{second}.weight": (64, hidden),
            f"mlp.{second}.bias": (64,),
        }
        if scale:
            shapes |= {"ls1.gamma": (64,), "ls2.gamma": (64,)}
        state |= {f"blocks.{i}.{name}": draw(*shape) for name, shape in shapes.items()}
    return state | {"norm.weight": draw(64), "norm.bias": draw(64)}


def _load(found: Recognised) -> VisionTransformer:
    model = VisionTransformer(found.config, found.spec).eval()
    load_equal(model, found.state, "test")
    return model


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_dinov2_checkpoints_equal_timms_conversion(gated: bool, chunked: bool) -> None:
    """timm converts DINOv2's files by itself: an independent reading of the same keys."""
    state = _state(4, scale=True, gated=gated) | {"mask_token": torch.randn(1, 64)}
    name = "vit_giant_patch14_reg4_dinov2" if gated else "vit_small_patch14_reg4_dinov2"
    options: dict[str, Any] = {"mlp_ratio": 5.5} if gated else {}
    theirs = timm.create_model(
        name, img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=0, **options
    ).eval()
    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs))
    if chunked:
        state = {k.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): v for k, v in state.items()}
    found = recognise(state, "file", heads=4)
    assert (found.family, found.pooling, found.config.registers) == ("dinov2", "cls", 4)
    assert found.config.mlp == ("swiglu" if gated else "gelu")
    assert torch.equal(found.state["mask_token"], state["mask_token"])
    x = torch.randn(2, 3, 32, 32)
    ours, expected = _load(found)(View(x)), theirs.forward_features(x)
    torch.testing.assert_close(ours.cls, expected[:, 0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.patches, expected[:, 5:], atol=1e-6, rtol=1e-5)


def test_teacher_of_a_dino_checkpoint_is_taken_and_its_head_reported(tmp_path: Path) -> None:
    state = _state()
    teacher = {f"backbone.{k}": v for k, v in state.items()} | {"head.mlp.0.weight": torch.ones(3, 64)}
    student = {f"module.backbone.{k}": v + 1 for k, v in state.items()}
    file = tmp_path / "checkpoint.pth"
    torch.save({"student": student, "teacher": teacher, "epoch": 3, "args": argparse.Namespace(lr=1.0)}, file)
    found = recognise(read_checkpoint(file), str(file), heads=4)
    assert found.family == "dino"
    assert all(torch.equal(found.state[key], value) for key, value in state.items())
    assert found.notes["taken"] == "teacher"
    assert found.notes["left_out_parts"] == ["student"]
    assert found.notes["left_out_keys"] == {"head": 1}
    only = recognise({"student": student}, "file", heads=4)
    assert torch.equal(only.state["norm.bias"], state["norm.bias"] + 1)


def test_a_dino_checkpoint_gives_the_outputs_of_timm_which_hosts_dinos_weights_under_their_own_names() -> None:
    state = _state()
    reference = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=0
    ).eval()
    reference.load_state_dict(state, strict=True)
    teacher = {f"backbone.{key}": value for key, value in state.items()} | {"head.mlp.0.weight": torch.ones(3, 64)}
    found = recognise({"student": {}, "teacher": teacher}, "file", heads=4)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = _load(found).eval()(View(pixels))
        expected = reference.forward_features(pixels)
    torch.testing.assert_close(ours.cls, expected[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.patches, expected[:, 1:], rtol=0, atol=1e-5)


def test_ijepa_target_encoder_has_no_class_token() -> None:
    state = _state(cls=False)
    wrapped = {f"module.{k}": v for k, v in state.items()}
    found = recognise({"encoder": {}, "predictor": wrapped, "target_encoder": wrapped}, "file", heads=4)
    assert (found.family, found.pooling, found.config.cls_token) == ("ijepa", "mean", False)
    assert found.notes["left_out_parts"] == ["encoder", "predictor"]
    assert _load(found)(View(torch.randn(1, 3, 32, 32))).cls is None


def test_mae_decoder_is_left_out_and_its_mask_token_with_it() -> None:
    state = _state() | {"mask_token": torch.ones(1, 1, 32), "decoder_pos_embed": torch.ones(1, 17, 32)}
    found = recognise({"model": state}, "file", heads=4)
    assert found.family == "mae"
    assert found.notes["left_out_keys"] == {"decoder": 2}
    assert "mask_token" not in found.state


def test_encoder_only_mae_is_known_by_its_fixed_positions() -> None:
    state = _state()
    assert recognise(state, "file", heads=4).family == "vit"
    spec = InputSpec(axes=("y", "x"), size=(32, 32), channels=rgb_channels())
    code = sincos_positions(PatchGrid.build(spec, 8).layout((32, 32)), 64)
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 64), code[None]], dim=1)
    assert recognise({"model": state}, "file", heads=4).family == "mae"


def test_register_positions_of_timm_are_added_to_the_registers() -> None:
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, reg_tokens=3, num_classes=0, embed_dim=64, num_heads=4
    ).eval()
    torch.nn.init.normal_(theirs.pos_embed)
    found = recognise(theirs.state_dict(), "file", heads=4)
    ours = _load(found)
    assert found.config.patch_size == 16
    x = torch.randn(2, 3, 32, 32)
    expected = theirs.forward_features(x)
    torch.testing.assert_close(ours(View(x)).patches, expected[:, 4:], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours(View(x)).registers, expected[:, 1:4], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny", "vit_huge"])
def test_published_shapes_have_their_published_heads(name: str) -> None:
    width, depth, heads = VIT_SIZES[name].width, VIT_SIZES[name].depth, VIT_SIZES[name].heads
    wider = {64: width, 192: 3 * width, 256: 4 * width}
    state = {}
    for key, value in _state().items():
        if not key.startswith("blocks.1."):
            numbers = range(depth) if key.startswith("blocks.") else range(1)
            shape = [wider.get(length, length) for length in value.shape]
            state |= {key.replace("blocks.0.", f"blocks.{i}."): torch.zeros(1).expand(shape) for i in numbers}
    found = recognise(state, "file")
    assert (found.config.name, found.config.size.heads) == (name, heads)
    assert any("published size" in note for note in found.notes["assumed"])


def test_a_narrow_model_needs_its_heads_named() -> None:
    assert recognise(_state(), "file").config.heads == 1
    state = {key: value[..., :40] if value.shape[-1] == 64 else value for key, value in _state().items()}
    state["patch_embed.proj.weight"] = torch.zeros(40, 3, 8, 8)
    with pytest.raises(UsageError, match="number of heads"):
        recognise(state, "file")
    with pytest.raises(UsageError, match="not a multiple of 5 heads"):
        recognise(_state(), "file", heads=5)


def test_bands_need_a_description() -> None:
    state = _state()
    state["patch_embed.proj.weight"] = torch.randn(64, 4, 8, 8)
    with pytest.raises(UsageError, match="what its 4 channels are"):
        recognise(state, "file", heads=4)
    spec = InputSpec(axes=("y", "x"), size=(16, 64), channels=tuple(Channel(name=n) for n in "abcd"))
    found = recognise(state, "file", heads=4, spec=spec)
    assert found.spec == spec
    assert _load(found)(View(torch.randn(1, 4, 16, 64))).layout.shape == (2, 8)
    with pytest.raises(UsageError, match="no square grid"):
        recognise(_state(), "file", heads=4, spec=spec.model_copy(update={"channels": rgb_channels(), "size": (8, 8)}))


def test_rgb_checkpoints_get_imagenet_statistics_and_say_so() -> None:
    found = recognise(_state(), "file", heads=4)
    assert found.spec.size == (32, 32)
    assert tuple(channel.mean for channel in found.spec.channels) == IMAGENET_MEAN
    assert any("ImageNet" in note for note in found.notes["assumed"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope.periods": torch.ones(3)}, "unexpected keys: rope.periods"),
        ({"blocks.0.attn.q_norm.weight": torch.ones(3)}, "q_norm"),
        ({"pos_embed": None}, "no pos_embed"),
        ({"pos_embed": torch.ones(1, 12, 64)}, "no square grid"),
        ({"blocks.1.norm1.weight": None, "blocks.5.norm1.weight": torch.ones(64)}, "blocks are missing"),
        ({"patch_embed.proj.weight": torch.ones(64, 1, 2, 2, 2)}, "two-dimensional"),
    ],
)
def test_foreign_weights_are_refused_by_name(change: dict[str, torch.Tensor | None], message: str) -> None:
    merged = {**_state(), **change}
    with pytest.raises(UsageError, match=message):
        recognise({key: value for key, value in merged.items() if value is not None}, "file", heads=4)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_checkpoint(tmp_path / "missing.pth")
    for name in ("a.pth", "b.safetensors"):
        (tmp_path / name).write_bytes(b"not a checkpoint at all")
        with pytest.raises(FmsuiteError, match=name):
            read_checkpoint(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(FmsuiteError, match="holds a list"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save({"optimizer": {"lr": 1.0}}, tmp_path / "empty.pth")
    with pytest.raises(UsageError, match="no weights found; it holds optimizer"):
        recognise(read_checkpoint(tmp_path / "empty.pth"), "empty.pth")


class _Payload:
    def __reduce__(self) -> tuple:
        return print, ("run",)


def test_files_that_would_run_code_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": _Payload()}, tmp_path / "evil.pth")
    with pytest.raises(FmsuiteError, match="more than tensors"):
        read_checkpoint(tmp_path / "evil.pth")
    assert "run" not in capsys.readouterr().out


def test_safetensors_are_read_like_pytorch_files(tmp_path: Path) -> None:
    save_file(_state(), tmp_path / "a.safetensors")
    torch.save(_state(), tmp_path / "a.pth")
    first, second = (recognise(read_checkpoint(tmp_path / n), n, heads=4) for n in ("a.safetensors", "a.pth"))
    assert first.config == second.config
    assert all(torch.equal(first.state[key], value) for key, value in second.state.items())


def _reference(real_data: Path, name: str) -> dict[str, Any]:
    file = real_data.parent / "oracles" / f"{name}.pt"
    if not file.is_file():
        pytest.skip(f"no reference numbers at {file}")
    return torch.load(file, weights_only=True)


@pytest.mark.realdata
@pytest.mark.parametrize("kind", ["mlp", "swiglufused"])
def test_dinov2_reference_outputs_and_gradients(real_data: Path, kind: str) -> None:
    reference = _reference(real_data, "dinov2_vit")[f"tiny/{kind}"]
    model = _load(recognise(reference["state_dict"], "reference", heads=4))
    images, masks, out = reference["images"], reference["masks"], reference["out"]
    found = model(View(images), mask=masks)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(found.cls, out["x_norm_clstoken"], **close)
    torch.testing.assert_close(found.registers, out["x_norm_regtokens"], **close)
    torch.testing.assert_close(found.patches, out["x_norm_patchtokens"], **close)
    layers = model(View(images), layers=[1, 2]).intermediate
    for ours, theirs in zip(layers, reference["layers"], strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    torch.testing.assert_close(model(View(reference["wide"])).patches, reference["wide_patch"], **close)
    numbers = json.loads((real_data.parent / "oracles" / "dinov2_vit.json").read_text())[f"tiny/{kind}"]["grad_norm"]
    (found.cls.square().mean() + found.patches.square().mean()).backward()
    for part, expected in numbers.items():
        start = {"register_tokens": "reg_token", "total": ""}.get(part, part)
        squares = [p.grad.square().sum() for name, p in model.named_parameters() if name.startswith(start)]
        # The mean square after a LayerNorm is nearly constant: its gradient is a small difference, exact to 1e-3 in
        # float32 (it grows tenfold with LayerNorm's epsilon, and so pins that down).
        assert torch.stack(squares).sum().sqrt().item() == pytest.approx(expected, rel=2e-3), part


@pytest.mark.realdata
def test_mae_reference_prediction_from_the_encoder(real_data: Path) -> None:
    """The reference holds the decoder's output only: decode our encoder's tokens with timm's blocks."""
    reference = _reference(real_data, "mae")["tiny/norm_pix=False"]
    weights = reference["state_dict"]
    model = _load(recognise(weights, "reference", heads=4))
    order = reference["noise"].argsort(dim=1)
    keep, back = order[:, :4], order.argsort(dim=1)
    features = model(View(reference["images"]), keep=keep)
    x = torch.cat([features.cls[:, None], features.patches], dim=1)
    x = torch.nn.functional.linear(x, weights["decoder_embed.weight"], weights["decoder_embed.bias"])
    tokens = torch.cat([x[:, 1:], weights["mask_token"].expand(4, 12, -1)], dim=1)
    tokens = tokens.gather(1, back[..., None].expand(-1, -1, 32))
    x = torch.cat([x[:, :1], tokens], dim=1) + weights["decoder_pos_embed"]
    block = TimmBlock(32, 2, qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6))
    prefix = "decoder_blocks.0."
    block.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    norm = weights["decoder_norm.weight"], weights["decoder_norm.bias"]
    x = torch.nn.functional.layer_norm(block(x), (32,), *norm, eps=1e-6)
    found = torch.nn.functional.linear(x, weights["decoder_pred.weight"], weights["decoder_pred.bias"])[:, 1:]
    torch.testing.assert_close(found, reference["pred"], atol=1e-5, rtol=1e-5)


@pytest.mark.realdata
def test_ijepa_reference_targets(real_data: Path) -> None:
    reference = _reference(real_data, "ijepa")["tiny"]
    found = recognise({k: reference[k] for k in ("encoder", "predictor", "target_encoder")}, "reference", heads=4)
    assert found.family == "ijepa"
    patches = _load(found)(View(reference["images"])).patches
    patches = torch.nn.functional.layer_norm(patches, (64,))
    targets = [patches.gather(1, ids[..., None].expand(-1, -1, 64)) for ids in reference["masks_pred"]]
    torch.testing.assert_close(torch.cat(targets), reference["h"], atol=1e-5, rtol=1e-5)


def test_only_what_differs_from_a_named_size_is_set() -> None:
    found = recognise(_state(), "file", heads=4)
    assert found.config == ModelConfig(width=64, depth=2, heads=4, patch_size=8)
