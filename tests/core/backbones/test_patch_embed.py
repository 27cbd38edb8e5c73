"""The patch projection against patchify and a matrix product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsuite.core.backbones.patch_embed import BagEmbed, PatchEmbed
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.core.tokens import PatchGrid
from fmsuite.errors import UsageError


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_projection_equals_patchify_times_weight(data: st.DataObject) -> None:
    axes = data.draw(st.sampled_from([("x",), ("y", "x"), ("z", "y", "x"), ("time", "y", "x")]))
    patch = tuple(data.draw(st.integers(1, 3)) for _ in axes)
    size = tuple(p * data.draw(st.integers(1, 3)) for p in patch)
    groups = data.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=6))
    spec = InputSpec(axes=axes, size=size, channels=tuple(Channel(name=str(i), group=g) for i, g in enumerate(groups)))
    grid = PatchGrid.build(spec, patch)
    embed = PatchEmbed(grid, 5)
    pixels = torch.randn(2, len(groups), *size)
    patches = grid.patchify(pixels)
    projections = [embed.proj] if len(grid.groups) == 1 else list(embed.proj)
    per_group = patches.shape[1] // len(grid.groups)
    expected = []
    for number, (members, proj) in enumerate(zip(grid.groups, projections, strict=True)):
        # Channels vary fastest in a patch.
        weight = proj.weight.movedim(1, -1).flatten(1)
        values = patches[:, number * per_group : (number + 1) * per_group, : weight.shape[1]]
        assert weight.shape[1] == len(members) * torch.tensor(patch).prod()
        expected.append(values @ weight.T + proj.bias)
    torch.testing.assert_close(embed(pixels), torch.cat(expected, 1), atol=1e-5, rtol=1e-5)


def test_a_single_group_has_timms_names_and_several_their_own() -> None:
    def names(groups: str) -> list[str]:
        channels = tuple(Channel(name=str(i), group=g) for i, g in enumerate(groups))
        return list(
            PatchEmbed(PatchGrid.build(InputSpec(axes=("y", "x"), size=(4, 4), channels=channels), 2), 3).state_dict()
        )

    assert names("aa") == ["proj.weight", "proj.bias"]
    assert names("aba") == ["proj.0.weight", "proj.0.bias", "proj.1.weight", "proj.1.bias"]


def test_four_axes_are_refused() -> None:
    spec = InputSpec(axes=("time", "z", "y", "x"), size=(1, 2, 2, 2), channels=(Channel(name="a"),))
    with pytest.raises(UsageError, match="4 axes"):
        PatchEmbed(PatchGrid.build(spec, 1), 4)


def test_bags_are_projected_vector_by_vector() -> None:
    spec = InputSpec(axes=("y", "x"), size=(), channels=tuple(Channel(name=str(i)) for i in range(4)), bag=True)
    embed = BagEmbed(spec, 6)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(embed(x)[1, 2], embed.proj.weight @ x[1, 2] + embed.proj.bias)
