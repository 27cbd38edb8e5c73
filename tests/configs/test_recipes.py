"""Recipes: every one is accepted, and the published ones say what was published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fmsuite.commands.setup import resolve_run
from fmsuite.configs import load_recipe, recipes
from fmsuite.core.adaptation.tuning import TuningOptions, tuned
from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.layers import Attention
from fmsuite.core.backbones.positions import axis_widths
from fmsuite.core.data.sample import MaskContext, SampleKey
from fmsuite.core.inputs import Channel, InputSpec, rgb_channels
from fmsuite.core.objectives.base import Objective, find_objective
from fmsuite.core.training.optim import OptimSchedules
from fmsuite.core.training.schedules import run_length
from fmsuite.domains.base import domain_names
from fmsuite.domains.medical.options import MedicalOptions
from fmsuite.domains.remote_sensing.options import RemoteSensingOptions
from fmsuite.errors import UsageError

INPUTS = {
    "pathology": InputSpec(axes=("y", "x"), size=(256, 256), channels=rgb_channels()),
    "svg": InputSpec(axes=("y", "x"), size=(64, 64), channels=rgb_channels()),
    "remote_sensing": InputSpec(axes=("y", "x"), size=(64, 64), channels=rgb_channels()),
    "medical": InputSpec(axes=("z", "y", "x"), size=(32, 32, 32), channels=rgb_channels()[:1]),
    "xray": InputSpec(axes=("y", "x"), size=(64, 64), channels=rgb_channels()[:1]),
}


GIVEN = {
    "beitv2": ["objective.tokenizer=random:8192"],
    "dmae": ["objective.teacher=random"],
    "eva": ["objective.teacher=random"],
    "maskdistill": ["objective.teacher=random"],
    "vqkd": ["objective.teacher=random"],
}
"""What a recipe leaves to its user, because only they have it."""
VOLUMES = ("mae-st", "vjepa")


@pytest.mark.parametrize("name", list(recipes()))
def test_every_recipe_is_accepted_and_its_network_can_be_built(name: str) -> None:
    recipe = load_recipe(name)
    domain = recipe.domain or ("medical" if name in VOLUMES else "pathology")
    config = resolve_run(domain, name, overrides=GIVEN.get(name, []))
    assert recipe.description
    with torch.device("meta"):
        spec = INPUTS[config.domain]
        if recipe.domain == "medical":
            assert isinstance(config.data, MedicalOptions)
            xray = config.data.modality == "xray"
            spec = INPUTS["xray"] if xray else spec.model_copy(update={"size": config.data.full_size})
        if recipe.domain == "remote_sensing":
            assert isinstance(config.data, RemoteSensingOptions)
            spec = raster(config.data)
        backbone = build_backbone(config.model, spec)
        objective = find_objective(config.objective)(config.objective_options, backbone)
    assert objective.view_requests()
    batch, windows = config.training.batch_size, 1_000_000
    OptimSchedules.build(config.optim, batch, run_length(config.training, windows), windows // batch)


def test_uni_has_the_published_hyper_parameters() -> None:
    config = resolve_run("pathology", "uni")
    with torch.device("meta"):
        backbone = build_backbone(config.model, INPUTS["pathology"])
        objective = find_objective(config.objective)(config.objective_options, backbone)
    assert (backbone.width, backbone.depth, config.model.size.heads) == (1024, 24, 16)
    assert backbone.spec.size == (224, 224)
    assert sum(p.numel() for p in backbone.parameters()) == pytest.approx(303e6, rel=0.01)

    crops = {request.name: request for request in objective.view_requests()}
    globals_ = [request for name, request in crops.items() if name.startswith("global")]
    assert sum(request.count for request in globals_) == 2
    assert all(request.size == (224, 224) and request.scale == (0.48, 1.0) for request in globals_)
    assert (crops["local"].count, crops["local"].size, crops["local"].scale) == (8, (96, 96), (0.16, 0.48))

    schedules = OptimSchedules.build(config.optim, config.training.batch_size, 125_000, 32_000)
    assert schedules.lr(0) == 0
    assert schedules.lr(12_500) == pytest.approx(2e-3)
    assert schedules.lr(124_999) == pytest.approx(1e-6, rel=0.01)
    assert schedules.weight_decay(0) == pytest.approx(0.04)
    assert schedules.weight_decay(124_999) == pytest.approx(0.4, rel=1e-3)
    assert config.training.batch_size == 3072


def built(name: str, spec: InputSpec) -> Objective:
    config = resolve_run("medical", name)
    with torch.device("meta"):
        return find_objective(config.objective)(config.objective_options, build_backbone(config.model, spec))


def raster(options: RemoteSensingOptions) -> InputSpec:
    """A window with the bands and groups that a recipe asks for."""
    names = options.wanted_bands or options.known_channels
    channels = tuple(Channel(name=name, group=options.group_of(name)) for name in names)
    size = (options.size, options.size)
    if options.series:
        return InputSpec(axes=("time", "y", "x"), size=(3, *size), channels=channels or rgb_channels())
    return InputSpec(axes=("y", "x"), size=size, channels=channels or rgb_channels())


def volume(size: tuple[int, int, int]) -> InputSpec:
    return INPUTS["medical"].model_copy(update={"size": size})


def test_the_medical_recipes_have_the_published_shapes() -> None:
    primus = built("openmind-mae", volume((160, 160, 160)))
    assert (primus.backbone.width, primus.backbone.depth) == (864, 16)
    assert primus.backbone.pos_embed.shape == (1, 20**3, 864)
    assert primus.backbone.blocks[0].mlp.fc2.in_features == 2304
    reading = built("hi-end-mae", volume((96, 96, 96)))
    assert (reading.backbone.width, reading.read_layers) == (1536, (9, 6, 3))
    assert (len(reading.decoder_blocks), len(reading.reading_blocks)) == (2, 3)
    voco = built("voco", volume((64, 192, 192)))
    assert [request.size for request in voco.view_requests()] == [(64, 64, 64)] * 2
    assert [request.cells for request in voco.view_requests()] == [(1, 3, 3)] * 2
    swin = built("swin-unetr", volume((96, 96, 96)))
    assert sum(p.numel() for p in swin.backbone.swinViT.parameters()) == pytest.approx(8.06e6, rel=0.01)
    assert swin.view_requests()[0].size == (96, 96, 96)


def surveyed(name: str, *overrides: str) -> Objective:
    config = resolve_run("remote_sensing", name, overrides=overrides)
    assert isinstance(config.data, RemoteSensingOptions)
    with torch.device("meta"):
        backbone = build_backbone(config.model, raster(config.data))
        return find_objective(config.objective)(config.objective_options, backbone)


def test_the_remote_sensing_recipes_have_the_published_shapes() -> None:
    spectral = surveyed("satmae-spectral")
    assert (spectral.backbone.width, spectral.backbone.depth) == (1024, 24)
    assert spectral.grid.shape((96, 96)) == (3, 12, 12)
    assert spectral.grid.groups == ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))
    assert [head.out_features for head in spectral.decoder_pred] == [256, 256, 128]
    optical, radar = surveyed("fg-mae"), surveyed("fg-mae-sar")
    assert (optical.backbone.width, len(optical.decoder_blocks)) == (384, 8)
    assert (optical.decoder_pred.out_features, optical.decoder_pred2.out_features) == (468, 768)
    assert (radar.decoder_pred.out_features, radar.decoder_pred2) == (72, None)
    sensors = surveyed("multimae")
    assert sensors.names == ("sentinel1", "sentinel2-l1c")
    assert [decoder.pred.out_features for decoder in sensors.decoders] == [512, 13 * 256]
    shape = sensors.grid.shape((224, 224))
    context = MaskContext(sensors.grid.token_axes, shape, np.ones(392, bool), np.random.default_rng(0), SampleKey(0, 0))
    # Of three modalities 98 of 588 tokens are visible.
    assert (~sensors.sampler(context)).sum() == round(392 * 98 / 588)


@pytest.mark.parametrize("masking", ["random", "tube"])
def test_satmae_of_series_encodes_calendars_and_masks_dates_alike_or_apart(masking: str) -> None:
    temporal = surveyed("satmae-temporal", f"objective.masking={masking}")
    assert (temporal.backbone.width, temporal.backbone.depth) == (1024, 24)
    shares = axis_widths(temporal.grid.token_axes, 1024, temporal.backbone.config.position_widths)
    assert shares == {"time": 384, "y": 320, "x": 320}
    assert axis_widths(("time", "y", "x"), 512, temporal.config.decoder_position_widths)["time"] == 192
    axes, shape = temporal.grid.token_axes, temporal.grid.shape((3, 224, 224))
    context = MaskContext(axes, shape, np.ones(588, bool), np.random.default_rng(0), SampleKey(0, 0))
    mask = temporal.sampler(context).reshape(3, 196)
    assert (~mask).sum() == 147
    assert (mask == mask[0]).all() == (masking == "tube")


def test_rvsa_is_the_published_autoencoder_and_takes_windows() -> None:
    config = resolve_run("remote_sensing", "rvsa")
    with torch.device("meta"):
        backbone = build_backbone(config.model, INPUTS["remote_sensing"])
        tuned(backbone, TuningOptions(attention="rvsa"))
    assert (backbone.width, backbone.depth, backbone.spec.size) == (768, 12, (224, 224))
    full = [number for number, block in enumerate(backbone.blocks, 1) if type(block.attn) is Attention]
    assert full == [3, 6, 9, 12]
    # Eight blocks with regressors of 12 heads times (2 + 2 + 1), and two tables of 13 distances of 64 features.
    plain = 85_798_656 - 768 * 197
    assert sum(p.numel() for p in backbone.parameters()) == plain + 768 + 8 * (60 * 769 + 2 * 13 * 64)
    images, batch = 990_000, config.training.batch_size
    schedules = OptimSchedules.build(config.optim, batch, run_length(config.training, images), images // batch)
    assert (config.training.epochs, batch) == (1600, 2048)
    assert schedules.lr(40 * (images // batch)) == pytest.approx(1.5e-4 * 2048 / 256, rel=0.01)


def test_two_recipes_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "uni.yaml").write_text("domain: pathology\n", encoding="utf-8")
    with pytest.raises(UsageError, match="Two recipes are called 'uni'"):
        recipes([tmp_path])


def test_a_recipe_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(UsageError, match="not a configuration"):
        load_recipe(str(tmp_path / "list.yaml"))


def test_a_recipe_without_a_domain_fits_every_domain(tmp_path: Path) -> None:
    (tmp_path / "any.yaml").write_text("objective: {name: mae}\ntraining: {epochs: 1}\n", encoding="utf-8")
    for domain in domain_names():
        assert resolve_run(domain, str(tmp_path / "any.yaml")).domain == domain
