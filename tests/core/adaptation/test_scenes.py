"""Predictions over whole scenes, of a toy scene with invalid borders, against a naive computation."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from fmsuite.core.adaptation.scenes import scene_scores, stream_scene
from fmsuite.core.adaptation.sliding_window import WindowPlan
from fmsuite.core.adaptation.task import Segmentation, SegmentationConfig
from fmsuite.core.backbones.build import build_backbone
from fmsuite.core.backbones.config import SWIN_UNETR, ModelConfig
from fmsuite.core.data.forgiving import ForgivingScene
from fmsuite.core.data.sample import ArraySample, View
from fmsuite.core.data.scene import Scene
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.inputs import Channel, InputSpec, Normalize
from fmsuite.errors import ReadFailure, UsageError

SPEC = InputSpec(axes=("y", "x"), size=(8, 8), channels=(Channel(name="a", mean=3.0, std=2.0), Channel(name="b")))


class Toy(Scene):
    """An array, stored upside down and twice as fine as it is read; part of it is not valid."""

    source = "toy"

    def __init__(self, size: tuple[int, ...], channels: int = 2) -> None:
        random = np.random.default_rng(0)
        self.values = random.integers(0, 50, (channels, *size)).astype(np.int16)
        self.valid = np.ones((1, *size), dtype=bool)
        self.valid[..., : size[-1] // 3] = False
        self.size = size
        self.origin, self.pitch = (0.0,) * len(size), (1.0,) * len(size)
        self.native_size = tuple(2 * n for n in size)
        self.native_spacing = (0.5,) * len(size)

    def read(self, start, extent):
        box = (slice(None), *(slice(s, s + e) for s, e in zip(start, extent, strict=True)))
        return ArraySample(self.values[box], self.valid[box])

    def native_map(self, name):
        return np.zeros(self.native_size, np.uint8)

    def scores_to_native(self, scores, outside=0.0):
        for axis in range(1, scores.ndim):
            scores = scores.repeat(2, axis)
        return scores[:, ::-1]

    def write(self, values, path: Path) -> Path:
        raise AssertionError


def segmentation(spec: InputSpec = SPEC, **model) -> Segmentation:
    torch.manual_seed(0)
    shape = model or {"width": 24, "depth": 1, "heads": 1, "patch_size": 4}
    options = SegmentationConfig(classes=3, label_map="m", decoder_options={"base": 2})
    return Segmentation(options, build_backbone(ModelConfig(**shape), spec)).eval()


@pytest.mark.parametrize(("size", "overlap"), [((13, 11), 0.5), ((8, 20), 0.25), ((5, 9), 0.0)])
@torch.no_grad()
def test_equals_a_naive_computation(size, overlap):
    task, scene = segmentation(), Toy(size)
    found = scene_scores(task, SPEC, scene, overlap=overlap, batch=3).scores
    plan = WindowPlan(size, (8, 8), overlap)
    weights = plan.weights("gaussian").double().numpy()
    before = [max(0, -plan.starts(axis)[0]) for axis in range(2)]
    canvas = [max(n, 8) for n in size]
    values, valid = np.zeros((2, *canvas), np.float32), np.zeros((1, *canvas), bool)
    inside = tuple(slice(b, b + n) for b, n in zip(before, size, strict=True))
    values[:, *inside], valid[:, *inside] = scene.values, scene.valid
    total, weight = np.zeros((3, *canvas)), np.zeros(canvas)
    for place in itertools.product(plan.starts(0), plan.starts(1)):
        box = tuple(slice(s + b, s + b + 8) for s, b in zip(place, before, strict=True))
        view = View(torch.from_numpy(values[:, *box])[None], torch.from_numpy(valid[:, *box])[None])
        said = task.predict(Normalize(SPEC).view(view))[0].double().numpy()
        total[:, *box] += said * weights
        weight[box] += weights
    np.testing.assert_allclose(found, (total / weight)[:, *inside], rtol=1e-5, atol=1e-6)
    labels = scene.labels_to_native(found)
    assert np.array_equal(labels, found.argmax(0).repeat(2, 0).repeat(2, 1)[::-1])


class Dated(Toy):
    """Three dates; each sample of the last axis is valid at some."""

    def read(self, start, extent):
        sample = super().read(start, extent)
        values = np.stack([sample.values, sample.values + 1, sample.values * 2], axis=1)
        valid = np.stack([sample.valid, ~sample.valid, sample.valid], axis=1)
        return ArraySample(values, valid, coords={"time": np.array([1.0, 5.0, 9.0], np.float32)})


@torch.no_grad()
def test_a_series_is_predicted_with_all_its_dates():
    spec = InputSpec(axes=("time", "y", "x"), size=(3, 8, 8), channels=SPEC.channels)
    task, scene = (
        segmentation(spec, width=24, depth=1, heads=1, patch_size=(1, 4, 4), positions="sincos"),
        Dated((8, 8)),
    )
    box = scene_scores(task, spec, scene)
    sample = scene.read((0, 0), (8, 8))
    view = View(
        torch.from_numpy(sample.values.astype(np.float32))[None],
        torch.from_numpy(sample.valid).expand(2, -1, -1, -1)[None],
        coords={"time": torch.from_numpy(sample.coords["time"])[None]},
    )
    expected = task.predict(Normalize(spec).view(view))[0].numpy()
    np.testing.assert_allclose(box.scores, expected, rtol=1e-5)
    assert box.valid.all()


def test_other_axes_are_refused():
    spec = InputSpec(axes=("polarisation", "y", "x"), size=(1, 8, 8), channels=SPEC.channels)
    with pytest.raises(UsageError, match="spatial axes, and this input has 'polarisation'"):
        scene_scores(segmentation(), spec, Toy((8, 8)))


class Broken(Toy):
    """What is read of it must not touch a block in its middle."""

    bad = ((40, 60), (30, 60))

    def read(self, start, extent):
        if all(s < high and s + n > low for s, n, (low, high) in zip(start, extent, self.bad, strict=True)):
            raise ReadFailure("toy", "read", "a block cannot be decoded.", "Fetch it again.")
        return super().read(start, extent)


@torch.no_grad()
def test_parts_are_the_whole_and_what_cannot_be_read_is_left_out():
    """In panels, bit for bit; and a damaged block costs the squares that it touches and no more."""
    task, scene, log = segmentation(), Broken((80, 76)), SkippedLog()
    forgiving = ForgivingScene(scene)
    boxes = list(stream_scene(task, SPEC, forgiving, overlap=0.25, batch=3, panel=2))
    assert max(box.valid.shape[1] for box in boxes) <= 2 * 8 + 3 * 4
    assert max(box.valid.shape[0] for box in boxes) <= 8
    scores, valid = np.full((3, 80, 76), np.nan, np.float32), np.zeros((80, 76), bool)
    for box in boxes:
        place = tuple(slice(s, s + n) for s, n in zip(box.start, box.valid.shape, strict=True))
        assert np.isnan(scores[:, *place]).all()
        scores[:, *place], valid[place] = box.scores, box.valid
    whole = scene_scores(task, SPEC, ForgivingScene(scene), overlap=0.25, batch=3)
    np.testing.assert_array_equal(scores, whole.scores)
    np.testing.assert_array_equal(valid, whole.valid)
    assert not valid[40:60, 30:60].any()
    lost = np.zeros((80, 76), bool)
    lost[32:64, :64] = True
    np.testing.assert_array_equal(valid[~lost], scene.valid[0][~lost])
    # Where no window reaches the block, nothing has changed.
    sound = scene_scores(task, SPEC, Toy((80, 76)), overlap=0.25, batch=3)
    np.testing.assert_array_equal(sound.scores[:, :24], scores[:, :24])
    forgiving.note(log)
    (line,) = log.entries
    assert line.path == "toy"
    assert "2 of its squares of 32 samples have no result, the first at (32, 0)" in line.reason
    scene.bad = ((0, 80), (0, 76))
    with pytest.raises(ReadFailure, match="cannot be decoded"):
        ForgivingScene(scene).read((0, 0), (8, 8))


@torch.no_grad()
def test_swin_unetr_gives_its_own_maps():
    """The decoder gets the five maps of MONAI's encoder, each at its resolution, and the network can be made again
    with fresh weights."""
    pytest.importorskip("monai")
    spec = InputSpec(axes=("y", "x"), size=(32, 32), channels=(Channel(name="a"),))
    task = segmentation(spec, name=SWIN_UNETR, width=32, heads=1)
    source = task.network.source
    assert [(level.width, level.stride) for level in source.levels] == [(2 * 2**j, (2.0 * 2**j,) * 2) for j in range(5)]
    view = View(torch.randn(1, 1, 32, 32))
    maps = source(view)
    assert [tuple(level.shape[1:]) for level in maps.levels] == [(2 * 2**j, 16 // 2**j, 16 // 2**j) for j in range(5)]
    assert all(torch.equal(a, b) for a, b in zip(maps.levels, task.backbone(view).maps, strict=True))
    assert task.predict(view).shape == (1, 3, 32, 32)
    fresh = Segmentation(task.config.model_copy(update={"scratch": True}), task.backbone)
    assert fresh.backbone.state_dict().keys() == task.backbone.state_dict().keys()
    assert not torch.equal(fresh.backbone.mask_token, task.backbone.mask_token)
