"""Every decoder on every kind of map: planes and volumes, patches of any size, a hierarchical backbone."""

from __future__ import annotations

import pytest
import torch

from fmsuite.core.adaptation.dense import DECODERS, DenseNetwork
from fmsuite.core.adaptation.feature_maps import FeatureMaps, Level, MapSource, spread, token_map
from fmsuite.core.adaptation.pyramid import SimpleFeaturePyramid
from fmsuite.core.adaptation.unetr import Unetr, rungs
from fmsuite.core.adaptation.upernet import UperNet
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.timm_backbone import TimmBackbone
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import View
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.core.tokens import TokenLayout
from fmsuite.errors import UsageError

NARROW = {"linear": {}, "unetr": {"base": 4}, "upernet": {"width": 8}, "dpt": {"width": 8}}
KINDS = {
    "patches of 16": (("y", "x"), (32, 48), 16),
    "patches of 14": (("y", "x"), (28, 56), 14),
    "patches of 6": (("y", "x"), (12, 24), 6),
    "patches of 2": (("y", "x"), (4, 6), 2),
    "oblong patches": (("y", "x"), (8, 24), (2, 8)),
    "volume": (("z", "y", "x"), (8, 12, 8), 4),
    "flat volume": (("z", "y", "x"), (4, 16, 24), (2, 8, 8)),
    "series": (("time", "y", "x"), (3, 16, 24), 8),
}


def backbone(kind: str, **options) -> VisionTransformer:
    axes, size, patch = KINDS[kind]
    torch.manual_seed(0)
    spec = InputSpec(axes=axes, size=size, channels=(Channel(name="a"), Channel(name="b")))
    shape = {"width": 24, "depth": 3, "heads": 2, "positions": "sincos", "patch_size": patch}
    return VisionTransformer(ModelConfig(**{**shape, **options}), spec)


def view_of(model: VisionTransformer, size: tuple[int, ...], batch: int = 2) -> View:
    pixels = torch.randn(batch, 2, *size, generator=torch.Generator().manual_seed(1))
    coords = {"time": torch.arange(3.0).expand(batch, -1)} if "time" in model.spec.axes else {}
    return View(pixels, coords=coords)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_logits_have_the_size_of_the_input_and_every_parameter_a_gradient(decoder, kind):
    model = backbone(kind)
    network = DenseNetwork(model, decoder, 3, **NARROW[decoder])
    size = model.spec.size
    spatial = size[1:] if kind == "series" else size
    outputs = network(view_of(model, size))
    assert [tuple(output.shape) for output in outputs] == [(2, 3, *spatial)]
    # At first no class is favoured, whatever the widths.
    assert outputs[0].std() < 1
    shares = outputs[0].softmax(1).flatten(2).mean((0, 2))
    assert bool(((shares > 0.15) & (shares < 0.6)).all())
    (outputs[0] ** 2).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.blocks.parameters())
    odd = (3, 15, 23) if kind == "series" else tuple(n - 1 for n in size)
    assert network.logits(view_of(model, odd)).shape[2:] == odd[-len(spatial) :]


@pytest.mark.parametrize("decoder", ["unetr", "upernet", "dpt"])
def test_deep_outputs_get_coarser_and_cover_the_input(decoder):
    model = backbone("patches of 16")
    network = DenseNetwork(model, decoder, 3, deep=2, **NARROW[decoder])
    shapes = [tuple(output.shape[2:]) for output in network(view_of(model, (32, 48)))]
    assert (
        shapes
        == {
            "unetr": [(32, 48), (16, 24), (8, 12)],
            "upernet": [(32, 48), (4, 6), (2, 3)],
            "dpt": [(32, 48), (4, 6), (2, 3)],
        }[decoder]
    )
    with pytest.raises(UsageError, match="deep supervision"):
        DenseNetwork(model, decoder, 3, deep=4, **NARROW[decoder])


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_hierarchical_backbone(decoder):
    spec = InputSpec(axes=("y", "x"), size=(64, 96), channels=(Channel(name="a"), Channel(name="b")))
    model = TimmBackbone(ModelConfig(name="timm:test_resnet"), spec).eval()
    network = DenseNetwork(model, decoder, 3, **NARROW[decoder]).eval()
    assert len({level.stride for level in network.source.levels}) == len(network.source.levels) > 3
    assert network.logits(view_of(model, (61, 90), batch=1)).shape == (1, 3, 61, 90)
    with pytest.raises(UsageError, match="no layers to choose"):
        DenseNetwork(model, decoder, 3, layers=(0,))


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_stands_at_invalid_pixels_changes_nothing(decoder):
    model = backbone("patches of 6").eval()
    network = DenseNetwork(model, decoder, 3, **NARROW[decoder]).eval()
    view = view_of(model, (12, 24))
    view.valid = torch.ones(2, 1, 12, 24, dtype=torch.bool)
    view.valid[0, :, :, :12] = False
    view.pixels = torch.where(view.valid, view.pixels, 0.0)
    before = network.logits(view)
    # A token without data is not read; pixels of half-valid ones are zero by ``Normalize``.
    view.pixels = torch.where(view.valid, view.pixels, 7.0)
    assert torch.equal(network.logits(view), before)
    assert before.isfinite().all()


@pytest.mark.parametrize("readout", ["add", "project"])
def test_dpt_reads_the_class_token(readout):
    model = backbone("patches of 16").eval()
    network = DenseNetwork(model, "dpt", 3, readout=readout, **NARROW["dpt"]).eval()
    before = network.logits(view_of(model, (32, 48)))
    source = network.source(view_of(model, (32, 48)))
    assert [vector.shape for vector in source.vectors] == [(2, 24)] * 4
    moved = FeatureMaps(source.levels, source.size, source.pixels, tuple(v + 1 for v in source.vectors))
    assert not torch.allclose(network.decoder(moved)[0], before)
    without = backbone("patches of 16", cls_token=False)
    with pytest.raises(UsageError, match="no class token"):
        DenseNetwork(without, "dpt", 3, readout=readout, **NARROW["dpt"]).logits(view_of(without, (32, 48)))


def test_vitdets_pyramid():
    stage = SimpleFeaturePyramid([Level(32, (16.0, 16.0))], width=8)
    assert [level.stride for level in stage.levels] == [(4, 4), (8, 8), (16, 16), (32, 32)]
    maps = stage(FeatureMaps((torch.randn(1, 32, 3, 5),), (48, 80), torch.zeros(1, 1, 48, 80)))
    assert [tuple(level.shape[1:]) for level in maps.levels] == [(8, 12, 20), (8, 6, 10), (8, 3, 5), (8, 2, 3)]
    assert len(SimpleFeaturePyramid([Level(32, (3.0, 3.0))], width=8).levels) == 3
    with pytest.raises(UsageError, match="pyramid already"):
        SimpleFeaturePyramid([Level(8, (4.0, 4.0)), Level(8, (8.0, 8.0))])


def test_ladders_of_resolutions():
    assert rungs((16.0,)) == [(1,), (2,), (4,), (8,), (16,)]
    assert rungs((14.0, 14.0)) == [(1, 1), (2, 2), (4, 4), (8, 8), (14, 14)]
    assert rungs((4.0, 16.0)) == [(1, 1), (2, 2), (4, 4), (4, 8), (4, 16)]
    assert rungs((1.0, 1.0)) == [(1, 1)]
    assert Unetr.wanted((16.0,) * 3) == 4
    assert UperNet.wanted((16.0,) * 2) == 4
    assert spread(12, 4) == (2, 5, 8, 11)
    assert spread(2, 4) == (0, 0, 1, 1)


def test_unetr_refuses_what_fits_no_ladder():
    with pytest.raises(UsageError, match="takes 4 layers, not 2"):
        Unetr([Level(8, (16.0, 16.0))] * 2, 1, 2)
    with pytest.raises(UsageError, match="stride 3 x 3 lies on no rung"):
        Unetr([Level(8, (3.0, 3.0)), Level(8, (16.0, 16.0))], 1, 2)


def test_tokens_become_maps_and_other_axes_means_over_valid_ones():
    tokens = torch.arange(2 * 2 * 3, dtype=torch.float32).reshape(1, 12, 1)
    layout = TokenLayout(("time", "y", "x"), torch.zeros(12, 3), (2, 2, 3))
    assert token_map(tokens, layout, ("y", "x"))[0, 0].tolist() == [[3, 4, 5], [6, 7, 8]]
    valid = torch.ones(1, 12, dtype=torch.bool)
    valid[0, [0, 1, 7]] = False
    layout = TokenLayout(("time", "y", "x"), torch.zeros(12, 3), (2, 2, 3), valid=valid)
    assert token_map(tokens, layout, ("y", "x"))[0, 0].tolist() == [[6, 0, 5], [6, 7, 8]]
    with pytest.raises(UsageError, match="no axis 'z'"):
        token_map(tokens, layout, ("z", "y"))
    with pytest.raises(UsageError, match="no regular grid"):
        token_map(tokens, layout.select(torch.zeros(1, 3, dtype=torch.int64)), ("y", "x"))


def test_maps_of_a_transformer_are_its_layers():
    model = backbone("patches of 6").eval()
    view = view_of(model, (12, 24))
    maps = MapSource(model, (0, 2))(view)
    features = model(view, layers=(0, 2))
    for level, layer in zip(maps.levels, features.intermediate, strict=True):
        assert torch.equal(level.flatten(2).transpose(1, 2), layer)


def _copy_block(ours, theirs) -> None:
    """A residual block of MONAI's UNETR."""
    ours.conv1.weight, ours.conv2.weight = theirs.conv1.conv.weight, theirs.conv2.conv.weight
    if theirs.downsample:
        ours.skip[0].weight = theirs.conv3.conv.weight


@pytest.mark.parametrize("size", [(32, 48), (16, 32, 16)])
def test_unetr_is_monais(size):
    """MONAI's blocks, joined as its UNETR joins them (whose transformer needs a package of its own)."""
    blocks = pytest.importorskip("monai.networks.blocks")
    dims = len(size)
    torch.manual_seed(0)
    common = {"kernel_size": 3, "norm_name": "instance", "res_block": True}
    image = blocks.UnetrBasicBlock(dims, 2, 4, stride=1, **common)
    climbs = [
        blocks.UnetrPrUpBlock(
            dims, 12, 4 * 2**rung, 3 - rung, stride=1, upsample_kernel_size=2, conv_block=True, **common
        )
        for rung in (1, 2, 3)
    ]
    decoders = [
        blocks.UnetrUpBlock(dims, below, 4 * 2**rung, upsample_kernel_size=2, **common)
        for rung, below in enumerate((8, 16, 32, 12))
    ]
    out = blocks.UnetOutBlock(dims, 4, 3)

    ours = Unetr([Level(12, (16.0,) * dims)] * 4, 2, 3, base=4)
    _copy_block(ours.image, image.layer)
    for rung, climb in zip("123", climbs, strict=True):
        ours.climbs[rung].ups[0].up.weight = climb.transp_conv_init.conv.weight
        for number, (up, mix) in enumerate(climb.blocks, start=1):
            ours.climbs[rung].ups[number].up.weight = up.conv.weight
            _copy_block(ours.climbs[rung].mixes[number], mix)
    for rung, decoder in enumerate(decoders):
        ours.ups[rung].up.weight = decoder.transp_conv.conv.weight
        _copy_block(ours.mixes[rung], decoder.conv_block)
    ours.classify[0].weight, ours.classify[0].bias = out.conv.conv.weight, out.conv.conv.bias

    pixels = torch.randn(2, 2, *size)
    levels = tuple(torch.randn(2, 12, *(n // 16 for n in size)) for _ in range(4))
    skips = [image(pixels), *(climb(level) for climb, level in zip(climbs, levels))]
    x = levels[3]
    for decoder, skip in zip(reversed(decoders), reversed(skips), strict=True):
        x = decoder(x, skip)
    (found,) = ours(FeatureMaps(levels, size, pixels))
    torch.testing.assert_close(found, out(x), rtol=1e-5, atol=1e-5)
