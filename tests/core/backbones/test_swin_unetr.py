"""Swin UNETR's encoder under the backbone interface, against MONAI's own forward pass."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

from fmsuite.core.backbones import swin_unetr
from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.swin_unetr import SwinUNETR
from fmsuite.core.data.sample import View
from fmsuite.core.encoders import load_encoder, save_encoder
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.errors import UsageError

CHANNEL = (Channel(name="ct"),)
PLANE = InputSpec(axes=("y", "x"), size=(64, 96), channels=CHANNEL)
VOLUME = InputSpec(axes=("z", "y", "x"), size=(32, 64, 32), channels=CHANNEL)


def build(spec: InputSpec = PLANE, seed: int = 0, **changes: object) -> SwinUNETR:
    torch.manual_seed(seed)
    config = {"name": "swin_unetr", "width": 96, "heads": 1, **changes}
    backbone = build_backbone(ModelConfig.model_validate(config), spec)
    assert isinstance(backbone, SwinUNETR)
    return backbone.eval()


def rearrange(values: torch.Tensor, pattern: str) -> torch.Tensor:
    """The permutations for which MONAI calls einops."""
    before, after = (side.split() for side in pattern.split("->"))
    return values.permute([before.index(name) for name in after])


@pytest.mark.parametrize("spec", [PLANE, VOLUME])
def test_maps_and_tokens_are_monais_on_the_volume_in_monais_order(
    spec: InputSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from monai.networks.nets import swin_unetr as theirs

    monkeypatch.setattr(theirs, "rearrange", rearrange)
    backbone = build(spec)
    x = torch.randn(1, 1, *spec.size)
    turned = x.permute(0, 1, 4, 3, 2) if x.dim() == 5 else x
    with torch.no_grad():
        expected = backbone.swinViT(turned.contiguous())
        features = backbone(View(x))
    widths = (6, 12, 24, 48, 96)
    assert backbone.map_widths == widths
    for level, (found, wanted) in enumerate(zip(features.maps, expected, strict=True)):
        wanted = wanted.permute(0, 1, 4, 3, 2) if x.dim() == 5 else wanted
        assert found.shape == (1, widths[level], *(length // 2 ** (level + 1) for length in spec.size))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert features.layout.shape == tuple(length // 32 for length in spec.size)
    assert torch.equal(features.patches, features.maps[-1].flatten(2).transpose(1, 2))
    assert features.patches.shape[1] == features.layout.num_tokens


def test_weights_of_monais_network_load_by_their_names_and_the_rest_is_left_out(tmp_path) -> None:
    from monai.networks.nets.swin_unetr import SwinUNETR as Network

    torch.manual_seed(1)
    network = Network(in_channels=1, out_channels=2, feature_size=12, spatial_dims=2)
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "net.pt")
    # The self-supervised release: the encoder alone, with timm's names in the perceptrons.
    alone = {
        f"module.{k.replace('linear1', 'fc1').replace('linear2', 'fc2')}": v
        for k, v in network.swinViT.state_dict().items()
    }
    torch.save({"state_dict": {**alone, "module.rotation_head.weight": torch.zeros(4, 4)}}, tmp_path / "ssl.pt")
    for name in ("net.pt", "ssl.pt"):
        encoder = load_encoder(tmp_path / name)
        backbone = encoder.backbone
        assert isinstance(backbone, SwinUNETR)
        assert (backbone.width, backbone.config.heads, encoder.pooling) == (192, 3, "mean")
        for key, value in network.swinViT.state_dict().items():
            assert torch.equal(backbone.swinViT.state_dict()[key], value)
        assert encoder.provenance["left_out_keys"] > 0
    started = build(PLANE, width=192, heads=3, weights=str(tmp_path / "ssl.pt"))
    assert torch.equal(started.swinViT.patch_embed.proj.weight, network.swinViT.patch_embed.proj.weight)
    del alone["module.layers2.0.blocks.1.attn.qkv.weight"]
    torch.save(alone, tmp_path / "short.pt")
    with pytest.raises(UsageError, match=r"does not fit the model: swinViT\.layers2\.0\.blocks\.1\.attn\.qkv\.weight"):
        load_encoder(tmp_path / "short.pt")
    torch.save({**alone, "module.layers1c.0.conv1.conv.weight": torch.zeros(1)}, tmp_path / "second.pt")
    with pytest.raises(UsageError, match="second version"):
        load_encoder(tmp_path / "second.pt")


def test_published_volume_weights_come_with_their_window_of_hounsfield_units() -> None:
    backbone = build(VOLUME)
    found, notes = swin_unetr.published(backbone.swinViT.state_dict(), "file")
    assert found.spec.size == (96, 96, 96)
    assert (found.spec.offset, found.spec.scale, found.spec.clip) == (0.5, 1 / 2000, (0.0, 1.0))
    assert notes["assumed"] == ["input"]


def test_it_is_saved_and_opened_as_an_encoder(tmp_path) -> None:
    backbone = build()
    save_encoder(tmp_path, backbone, PLANE, "mean", {})
    encoder = load_encoder(tmp_path)
    x = torch.randn(2, 1, 64, 96)
    with torch.no_grad():
        assert torch.equal(encoder.backbone.eval()(View(x)).patches, backbone(View(x)).patches)


def test_a_mask_hides_what_it_covers_and_the_token_stands_at_its_place() -> None:
    backbone = build(VOLUME)
    mask = torch.tensor([[True, False]])
    x = torch.randn(1, 1, *VOLUME.size)
    other = x.clone()
    other[:, :, :, :32] = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        first, second, whole = (backbone(View(v), mask=m) for v, m in ((x, mask), (other, mask), (other, None)))
    assert torch.equal(first.patches, second.patches)
    assert not torch.equal(first.patches, whole.patches)
    finest = first.maps[0][0]
    token = torch.nn.functional.layer_norm(backbone.mask_token[0], (6,))
    torch.testing.assert_close(finest[:, :, :16], token[:, None, None, None].expand(6, 16, 16, 16))
    torch.testing.assert_close(finest[:, :, 16:], whole.maps[0][0][:, :, 16:])


def test_other_sizes_and_layer_numbers() -> None:
    backbone = build()
    assert backbone(View(torch.randn(1, 1, 32, 32))).patches.shape == (1, 1, 96)
    numbers = {name: backbone.layer_of(name) for name, _ in backbone.named_parameters()}
    assert numbers["mask_token"] == numbers["swinViT.patch_embed.proj.weight"] == 0
    assert numbers["swinViT.layers1.0.blocks.0.attn.qkv.weight"] == 1
    assert numbers["swinViT.layers3.0.blocks.1.attn.qkv.weight"] == 6
    assert numbers["swinViT.layers4.0.downsample.norm.weight"] == 8 == backbone.depth


def test_it_can_be_copied_for_a_teacher() -> None:
    backbone, view = build(), View(torch.randn(1, 1, 32, 32))
    assert torch.equal(copy.deepcopy(backbone)(view).patches, backbone(view).patches)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        backbone = build().train()
        backbone.set_activation_checkpointing(recompute)
        torch.manual_seed(3)
        backbone(View(torch.randn(1, 1, 32, 64))).patches.sum().backward()
        gradients.append([p.grad for p in backbone.swinViT.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    ("changes", "spec", "match"),
    [
        ({}, PLANE.resized((48, 96)), r"y = 48 is no multiple of 32"),
        ({"input_size": 80}, VOLUME, r"z = 80, y = 80, x = 80 is no multiple"),
        ({"patch_size": 8}, PLANE, r"model\.patch_size does not apply"),
        ({"positions": "sincos"}, PLANE, r"model\.positions does not apply"),
        ({"width": 100}, PLANE, r"model\.width 100"),
        ({}, InputSpec(axes=("time", "y", "x"), size=(2, 32, 32), channels=CHANNEL), r"not \(time, y, x\)"),
        ({}, InputSpec(axes=("y", "x"), size=(), channels=CHANNEL, bag=True), "not bags"),
        (
            {},
            InputSpec(axes=("y", "x"), size=(32, 32), channels=tuple(Channel(name=n, group=n) for n in "ab")),
            "groups a, b",
        ),
    ],
)
def test_what_it_cannot_take_is_refused_by_name(changes: dict, spec: InputSpec, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        build(spec, **changes)


def test_calls_that_it_cannot_answer_are_refused() -> None:
    backbone, view = build(), View(torch.randn(1, 1, 32, 32))
    with pytest.raises(UsageError, match="cannot drop tokens"):
        backbone(view, keep=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(UsageError, match=r"Features\.maps"):
        backbone(view, layers=[0])
    with pytest.raises(UsageError, match="shows no attention"):
        backbone(view, attention=True)
    with pytest.raises(UsageError, match="x = 40"):
        backbone(View(torch.randn(1, 1, 32, 40)))


def test_without_monai_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "monai.networks.nets.swin_unetr", None)
    with pytest.raises(UsageError, match=r"needs .*monai.*not installed") as error:
        build()
    assert "fmsuite[medical]" in error.value.hint
