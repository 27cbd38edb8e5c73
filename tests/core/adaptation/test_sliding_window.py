"""Sliding windows: an identity returns its input, and a network's answers equal a naive computation and MONAI's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmsuite.core.adaptation.sliding_window import WindowPlan, sliding_window, stream_windows
from fmsuite.errors import UsageError


def network(x: Tensor) -> Tensor:
    """Two outputs that depend on the place in the window and on its neighbours."""
    torch.manual_seed(0)
    place = torch.rand(x.shape[2:])
    mean = x.mean(dim=tuple(range(2, x.dim())), keepdim=True)
    return torch.cat([x[:, :1] * place + mean[:, :1], x.sum(1, keepdim=True) - place], dim=1)


def naive(pixels: Tensor, window: tuple[int, ...], overlap: float, blend: str) -> Tensor:
    """In float64, window by window over a canvas that holds everything."""
    plan = WindowPlan(tuple(pixels.shape[2:]), window, overlap)
    axes = range(len(window))
    before = [max(0, -plan.starts(axis)[0]) for axis in axes]
    canvas = [max(n, w) for n, w in zip(plan.size, window)]
    whole = pixels.new_zeros(*pixels.shape[:2], *canvas)
    inside = tuple(slice(b, b + n) for b, n in zip(before, plan.size))
    whole[(..., *inside)] = pixels
    total, weight = np.zeros((len(pixels), 2, *canvas)), np.zeros(canvas)
    weights = plan.weights(blend).double().numpy()
    for place in itertools.product(*(plan.starts(axis) for axis in axes)):
        box = tuple(slice(s + b, s + b + w) for s, b, w in zip(place, before, window))
        total[(..., *box)] += network(whole[(..., *box)]).double().numpy() * weights
        weight[box] += weights
    return torch.from_numpy((total / weight)[(..., *inside)]).float()


SIZES = [((13,), (5,)), ((11, 17), (4, 6)), ((3, 20), (5, 8)), ((2, 3), (4, 8)), ((7, 9, 5), (4, 4, 8))]


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
@pytest.mark.parametrize(("size", "window"), SIZES)
def test_equals_a_naive_computation_and_monai(size, window, blend):
    torch.manual_seed(1)
    pixels = torch.randn(3, 2, *size)
    for overlap, batch in ((0.5, 1), (0.25, 4), (0.0, 7)):
        ours = sliding_window(network, pixels, window, overlap=overlap, blend=blend, batch=batch)
        torch.testing.assert_close(ours, naive(pixels, window, overlap, blend), rtol=1e-6, atol=1e-6)
        inferers = pytest.importorskip("monai.inferers")
        theirs = inferers.sliding_window_inference(pixels, window, 2, network, overlap=overlap, mode=blend)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_identity_returns_its_input(data):
    dims = data.draw(st.integers(1, 3))
    size = data.draw(st.tuples(*[st.integers(1, 14)] * dims))
    window = data.draw(st.tuples(*[st.integers(1, 7)] * dims))
    overlap = data.draw(st.floats(0, 0.9))
    batch = data.draw(st.integers(1, 5))
    blend = data.draw(st.sampled_from(["gaussian", "constant"]))
    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
    out = sliding_window(lambda x: x, pixels, window, overlap=overlap, blend=blend, batch=batch)
    assert out.shape == pixels.shape
    # Hundreds of windows may cover a place: that many float32 roundings.
    assert (out - pixels).abs().max() <= 3e-6


def test_rows_come_finished_and_memory_does_not_grow_with_the_height():
    width, window = 30, (8, 12)
    picture = torch.rand(2, 400, width)
    most, reads = 0, []

    def read(start: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        assert all(s >= 0 and s + e <= n for s, e, n in zip(start, extent, (400, width)))
        reads.append(start[0])
        return picture[:, start[0] : start[0] + extent[0], start[1] : start[1] + extent[1]]

    expected = sliding_window(network, picture[None], window, batch=3)[0]
    row = 0
    for stripe in stream_windows(network, read, (400, width), window, batch=3):
        assert stripe.start == row
        assert stripe.values.dtype == torch.float32
        # Nothing further than a window below what is finished has been read.
        assert max(reads) <= row
        most = max(most, stripe.values.shape[1])
        torch.testing.assert_close(stripe.values, expected[:, row : row + stripe.values.shape[1]])
        row += stripe.values.shape[1]
    assert row == 400
    assert most <= window[0]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_panels_change_nothing(data):
    """Not a bit, whatever their width; and no panel is wider than it is said."""
    dims = data.draw(st.integers(1, 3))
    size = data.draw(st.tuples(*[st.integers(1, 12), st.integers(1, 40), st.integers(1, 6)][:dims]))
    window = data.draw(st.tuples(*[st.integers(1, 6)] * dims))
    panel, batch = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 5))
    options = {"overlap": data.draw(st.sampled_from([0.0, 0.3, 0.5])), "batch": batch}
    pixels = torch.rand(2, *size, generator=torch.Generator().manual_seed(3))

    def read(start: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        return pixels[(..., *(slice(s, s + e) for s, e in zip(start, extent)))]

    expected = sliding_window(network, pixels[None], window, **options)[0]
    found = torch.full_like(expected, torch.nan)
    for stripe in stream_windows(network, read, size, window, panel=panel, **options):
        rows = slice(stripe.start, stripe.start + stripe.values.shape[1])
        if dims == 1:
            part = found[:, rows]
        else:
            assert stripe.values.shape[2] <= panel + batch * window[1]
            part = found[:, rows, stripe.left : stripe.left + stripe.values.shape[2]]
        assert part.isnan().all()
        part[:] = stripe.values
    assert torch.equal(found, expected)


def test_plans():
    assert WindowPlan((10,), (4,)).starts(0) == [0, 2, 4, 6]
    assert WindowPlan((11,), (4,)).starts(0) == [0, 2, 4, 6, 7]
    assert WindowPlan((3,), (8,)).starts(0) == [-2]
    assert WindowPlan((9,), (3,), 0.99).starts(0) == list(range(7))
    assert WindowPlan((9, 9), (3, 3), (0.0, 0.5)).starts(0) == [0, 3, 6]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": (4,)}, "does not fit"),
        ({"window": (4, 0)}, "does not fit"),
        ({"window": (4, 4), "overlap": 1.0}, "out of range"),
        ({"window": (4, 4), "batch": 0}, "batch of 0"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        list(stream_windows(lambda x: x, lambda start, extent: torch.zeros(1, *extent), (9, 9), **options))
    with pytest.raises(UsageError, match=words):
        sliding_window(lambda x: x, torch.zeros(1, 1, 9, 9), **options)


def test_a_network_that_changes_the_size_is_refused():
    with pytest.raises(UsageError, match="as large as its input"):
        sliding_window(lambda x: x[..., ::2], torch.zeros(1, 1, 8, 8), (4, 4))
