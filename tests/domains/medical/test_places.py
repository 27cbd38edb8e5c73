"""Places of a volume: from its file's voxels and from millimetres to the input's grid."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fmsuite.core.data.scene import Scene
from fmsuite.errors import UsageError
from tests.domains.medical.test_scene import scene_of, texture, turned


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "SLA", "PIR"])
@pytest.mark.parametrize("spacing", [None, 1.7])
def test_a_voxel_is_found_where_interpolation_finds_it(save, gridded, orientation, spacing) -> None:
    values, affine = gridded(texture, orientation, spacing=(1.0, 1.5, 2.0), field=10.0)
    values[:5] = 0
    scene = scene_of(save("a.nii.gz", values, turned(affine, (5, -8, 3))), spacing=spacing, margin=1.0)
    corners = itertools.product(*((0, length // 2, length - 1) for length in scene.native_size))

    found = {corner: (scene.locate(corner), Scene.locate(scene, corner)) for corner in corners}

    for fast, slow in found.values():
        assert (fast is None) == (slow is None)
        if fast is not None and slow is not None:
            np.testing.assert_allclose(fast, slow, atol=1e-4)
    assert any(fast is not None for fast, _ in found.values())
    if orientation == "RAS" and spacing is None:
        assert any(fast is None for fast, _ in found.values())


def test_millimetres_lead_to_the_voxel_that_the_affine_puts_there(save, gridded) -> None:
    values, affine = gridded(texture, "LPI", spacing=(1.0, 1.5, 2.0), field=10.0)
    oblique = turned(affine, (5, -8, 3))
    scene = scene_of(save("a.nii.gz", values, oblique), spacing=1.0, margin=None)

    for voxel in [(0, 0, 0), (3, 5, 2), tuple(n - 1 for n in values.shape)]:
        world = (oblique @ [*voxel, 1])[:3]
        assert scene.from_world(world + 0.2) == voxel
    with pytest.raises(UsageError, match="three coordinates"):
        scene.from_world((1.0, 2.0))


def test_a_scene_without_world_coordinates_says_so(save, gridded) -> None:
    scene = scene_of(save("a.nii.gz", *gridded(texture, "RAS", field=8.0)))
    with pytest.raises(UsageError, match="no world coordinates"):
        Scene.from_world(scene, (0, 0, 0))
