"""The patch grid against loops, einsum-free brute force and hand-computed coordinates."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.core.tokens import PatchGrid, TokenLayout
from fmsuite.errors import UsageError


def spec_of(axes: tuple[str, ...], size: tuple[int, ...], groups: list[str | None]) -> InputSpec:
    channels = tuple(Channel(name=f"c{i}", group=group) for i, group in enumerate(groups))
    return InputSpec(axes=axes, size=size, channels=channels)


CASES = [
    (("x",), (12,), (3,), [None]),
    (("y", "x"), (8, 12), (4, 2), [None, None, None]),
    (("y", "x"), (8, 12), (4, 4), ["a", "b", "a", "b", "b"]),
    (("z", "y", "x"), (4, 6, 8), (2, 3, 4), [None]),
    (("time", "y", "x"), (3, 4, 4), (1, 2, 2), ["a", "b"]),
]


@pytest.mark.parametrize(("axes", "size", "patch", "groups"), CASES)
def test_patchify_agrees_with_loops(axes: tuple, size: tuple, patch: tuple, groups: list) -> None:
    grid = PatchGrid.build(spec_of(axes, size, groups), patch)
    values = torch.randn(2, len(groups), *size, generator=torch.Generator().manual_seed(0))
    got = grid.patchify(values)
    assert got.shape == (2, int(np.prod(grid.shape(size))), grid.patch_values)
    token = 0
    for members in grid.groups:
        for corner in itertools.product(*(range(0, s, p) for s, p in zip(size, patch, strict=True))):
            place = 0
            for offset in itertools.product(*(range(p) for p in patch)):
                for channel in members:
                    where = tuple(c + o for c, o in zip(corner, offset, strict=True))
                    assert torch.equal(got[:, token, place], values[(slice(None), channel, *where)])
                    place += 1
            assert not got[:, token, place:].any()
            token += 1


@pytest.mark.parametrize(("axes", "size", "patch", "groups"), CASES)
def test_unpatchify_inverts_patchify(axes: tuple, size: tuple, patch: tuple, groups: list) -> None:
    grid = PatchGrid.build(spec_of(axes, size, groups), patch)
    values = torch.randn(3, len(groups), *size, generator=torch.Generator().manual_seed(1))
    assert torch.equal(grid.unpatchify(grid.patchify(values), size), values)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), grouped=st.booleans(), per_channel=st.booleans())
def test_valid_shares_agree_with_counting(seed: int, grouped: bool, per_channel: bool) -> None:
    groups: list[str | None] = ["a", "b", "a"] if grouped else [None] * 3
    grid = PatchGrid.build(spec_of(("y", "x"), (6, 4), groups), 2, min_valid=0.5)
    valid = np.random.default_rng(seed).random((2, 3 if per_channel else 1, 6, 4)) < 0.5
    share = grid.valid_share(torch.from_numpy(valid))
    full = np.broadcast_to(valid, (2, 3, 6, 4))
    expected = np.array(
        [
            [
                full[b, list(members), y : y + 2, x : x + 2].mean()
                for members in grid.groups
                for y in range(0, 6, 2)
                for x in range(0, 4, 2)
            ]
            for b in range(2)
        ]
    )
    np.testing.assert_allclose(share.numpy(), expected, atol=1e-6)
    tokens = grid.valid_tokens(torch.from_numpy(valid)).numpy()
    clear = np.abs(expected - 0.5) > 1e-6
    assert (tokens == (expected >= 0.5))[clear].all()


def test_a_token_without_any_valid_value_is_invalid_whatever_the_threshold() -> None:
    grid = PatchGrid(("y", "x"), (2, 2), ((0,),), min_valid=0.0)
    assert not grid.valid_tokens(torch.zeros(1, 1, 4, 4, dtype=torch.bool)).any()


def test_coordinates_count_patches_row_major() -> None:
    grid = PatchGrid.build(spec_of(("y", "x"), (8, 12), ["a", "b"]), 4)
    layout = grid.layout((8, 12))
    assert layout.axes == ("group", "y", "x")
    assert layout.shape == (2, 2, 3)
    expected = list(itertools.product(range(2), range(2), range(3)))
    assert layout.coords.tolist() == [[float(v) for v in row] for row in expected]


def test_dates_replace_the_index_along_time_and_differ_between_samples() -> None:
    grid = PatchGrid.build(spec_of(("time", "y", "x"), (4, 4, 4), [None]), (2, 2, 2))
    dates = torch.tensor([[0.0, 10.0, 100.0, 130.0], [1.0, 3.0, 5.0, 7.0]])
    layout = grid.layout((4, 4, 4), coords={"time": dates})
    assert layout.coords.shape == (2, 8, 3)
    assert layout.along("time")[0].tolist() == [5.0] * 4 + [115.0] * 4
    assert layout.along("time")[1].tolist() == [2.0] * 4 + [6.0] * 4
    assert layout.along("x")[1].tolist() == [0.0, 1.0] * 4


def test_physical_positions_follow_the_spacing_of_each_sample() -> None:
    grid = PatchGrid.build(spec_of(("z", "y", "x"), (4, 4, 4), ["a", "b"]), 2)
    spacing = torch.tensor([[5.0, 0.7, 0.7], [1.0, 1.0, 1.0]])
    layout = grid.layout((4, 4, 4), spacing=spacing)
    z = layout.along("z", physical=True)
    assert z.shape == (2, 16)
    torch.testing.assert_close(z[0].unique(), torch.tensor([0.0, 10.0]))
    torch.testing.assert_close(z[1].unique(), torch.tensor([0.0, 2.0]))
    assert layout.along("group", physical=True)[0].unique().tolist() == [0.0, 1.0]


def test_dates_are_in_days_in_physical_units_too() -> None:
    grid = PatchGrid.build(spec_of(("time", "y", "x"), (2, 4, 4), [None]), 2)
    layout = grid.layout((2, 4, 4), {"time": torch.tensor([[3.0, 50.0]])}, torch.tensor([9.0, 10.0, 10.0]))
    assert layout.along("time", physical=True).unique().tolist() == [3.0, 50.0]
    assert layout.along("y", physical=True).unique().tolist() == [0.0, 20.0]


def test_unknown_axes_and_unknown_spacing_are_refused_by_name() -> None:
    layout = PatchGrid.build(spec_of(("y", "x"), (4, 4), [None]), 2).layout((4, 4))
    with pytest.raises(UsageError, match="no axis 'time'"):
        layout.along("time")
    with pytest.raises(UsageError, match="spacing is unknown"):
        layout.along("y", physical=True)


@pytest.mark.parametrize("per_sample", [False, True])
def test_select_picks_coordinates_and_validity(per_sample: bool) -> None:
    coords = torch.arange(12.0).view(6, 2)
    valid = torch.tensor([[True, False] * 3, [False, True] * 3])
    both = torch.stack([coords, coords + 100]) if per_sample else coords
    ids = torch.tensor([[5, 0], [1, 1]])
    picked = TokenLayout(("y", "x"), both, (2, 3), None, valid).select(ids)
    assert picked.shape is None
    assert picked.valid is not None
    for sample, row in enumerate(ids.tolist()):
        for place, token in enumerate(row):
            source = both[sample, token] if per_sample else both[token]
            assert torch.equal(picked.coords[sample, place], source)
            assert picked.valid[sample, place] == valid[sample, token]


def test_an_integer_patch_size_leaves_time_alone() -> None:
    grid = PatchGrid.build(spec_of(("time", "y", "x"), (3, 8, 8), [None]), 4)
    assert grid.patch_size == (1, 4, 4)


@pytest.mark.parametrize("patch", [3, (4, 4, 4), (0, 4), 16])
def test_patch_sizes_that_do_not_fit_are_refused(patch: int | tuple[int, ...]) -> None:
    with pytest.raises(UsageError):
        PatchGrid.build(spec_of(("y", "x"), (8, 8), [None]), patch)
