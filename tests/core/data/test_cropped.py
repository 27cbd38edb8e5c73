"""A part of a scene: what it shows, and where it lies on the file's own grid."""

from __future__ import annotations

import numpy as np
import pytest

from fmsuite.core.data.cropped import CroppedScene
from fmsuite.core.data.sample import ArraySample
from fmsuite.core.data.scene import Scene
from fmsuite.core.data.scene_maps import MapKind


class Flipped(Scene):
    """Stored upside down and twice as fine as it is read."""

    source = "toy"
    size, native_size = (12, 10), (24, 20)
    origin, pitch, native_spacing = (100.0, 7.0), (2.0, 2.0), (1.0, 1.0)

    def __init__(self) -> None:
        self.values = np.arange(120.0).reshape(1, 12, 10)
        self.labels = np.arange(480).reshape(24, 20).astype(np.int16)
        self.written = None

    def read(self, start, extent):
        return ArraySample(self.values[:, start[0] : start[0] + extent[0], start[1] : start[1] + extent[1]])

    def native_map(self, name):
        return self.labels

    def scores_to_native(self, scores, outside=0.0):
        return scores.repeat(2, 1).repeat(2, 2)[:, ::-1]

    def write(self, values, path):
        self.written = values
        return path


def test_a_part_is_the_box_around_its_windows(tmp_path):
    scene = Flipped()
    part = CroppedScene(scene, np.array([[2, 4], [6, 7]]), (4, 4))
    # The second window reaches beyond the scene.
    assert (part.start, part.size) == ((2, 4), (8, 6))
    assert part.origin == (104.0, 15.0)
    assert (part.native_start, part.native_size) == ((4, 8), (16, 12))
    np.testing.assert_array_equal(part.read((1, 1), (3, 5)).values, scene.values[:, 3:6, 5:10])
    with pytest.raises(ValueError, match="a box at"):
        part.read((6, 0), (3, 5))
    scores = np.random.default_rng(0).random((2, 8, 6)).astype(np.float32)
    np.testing.assert_array_equal(part.scores_to_native(scores), scores.repeat(2, 1).repeat(2, 2)[:, ::-1])
    truth = part.native_map("m")
    shown = np.zeros((8, 6), bool)
    shown[:4, :4], shown[4:, 3:] = True, True
    shown = shown.repeat(2, 0).repeat(2, 1)[::-1]
    np.testing.assert_array_equal(truth, np.where(shown, scene.labels[4:20, 8:20], -1))
    writer = part.writer(tmp_path / "a", MapKind("classes"))
    writer.add((0, 0), np.stack([np.zeros((8, 6)), np.ones((8, 6))]).astype(np.float32))
    writer.finish()
    expected = np.zeros((24, 20))
    expected[4:20, 8:20] = 1
    np.testing.assert_array_equal(scene.written, expected)
