"""Similarity to a clicked place, against loops over patches, tokens and samples."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from fmsuite.core.backbones.base import Features
from fmsuite.core.backbones.config import ModelConfig
from fmsuite.core.backbones.vit import VisionTransformer
from fmsuite.core.data.sample import View
from fmsuite.core.encoders import Encoder
from fmsuite.core.feature_cache import read_features, write_features
from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.core.similarity import TokenMap, otsu, otsu_of, place_vector, similarity, slabs, to_samples, token_map
from fmsuite.core.tokens import PatchGrid
from fmsuite.errors import UsageError


def spec_of(*size: int, channels: int = 2) -> InputSpec:
    axes = ("z", "y", "x")[-len(size) :]
    return InputSpec(axes=axes, size=size, channels=tuple(Channel(name=f"c{n}") for n in range(channels)))


class PatchMeans:
    """An encoder whose features are the mean of each channel over a patch's valid samples: the same in every window."""

    def __init__(self, spec: InputSpec, patch: tuple[int, ...]) -> None:
        self.spec = spec
        self.backbone = SimpleNamespace(grid=PatchGrid.build(spec, patch))
        self.seen = 0

    def features(self, view: View) -> Features:
        grid, size = self.backbone.grid, tuple(view.pixels.shape[2:])
        assert size == self.spec.size
        assert view.valid is not None
        self.seen += len(view.pixels)
        channels = [
            (grid.patchify((view.pixels * view.valid)[:, [c] * self.spec.in_chans]).mean(2))
            / grid.patchify(view.valid[:, [c] * self.spec.in_chans].float()).mean(2).clamp(min=1e-9)
            for c in range(self.spec.in_chans)
        ]
        valid = grid.patchify(view.valid.float()).mean(2) > 0
        return Features(torch.stack(channels, 2), grid.layout(size, valid=valid))


def reading(values: Tensor, valid: Tensor | None = None):
    whole = torch.cat([values, torch.ones_like(values) if valid is None else valid.expand_as(values).float()])

    def read(start: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        assert all(s >= 0 and s + e <= n for s, e, n in zip(start, extent, whole.shape[1:], strict=True))
        return whole[(slice(None), *(slice(s, s + e) for s, e in zip(start, extent, strict=True)))]

    return read


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
@pytest.mark.parametrize("size", [(11, 9, 14), (5, 16, 8), (3, 3, 3)])
def test_patch_means_are_those_of_a_loop_over_patches(size: tuple[int, ...], overlap: float, tmp_path: Path) -> None:
    patch, values = (2, 3, 2), torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    encoder = PatchMeans(spec_of(8, 6, 8), patch)

    found = token_map(encoder, reading(values), size, overlap=overlap, batch=3)  # type: ignore[arg-type]
    kept = token_map(encoder, reading(values), size, overlap=overlap, batch=3, panel=1, folder=tmp_path)  # type: ignore[arg-type]
    assert torch.equal(kept.features, found.features)
    assert torch.equal(kept.valid, found.valid)
    assert not list(tmp_path.iterdir())

    assert found.valid.shape == tuple(-(-n // p) for n, p in zip(size, patch, strict=True))
    assert found.valid.all()
    for token in np.ndindex(*found.valid.shape):
        box = tuple(slice(t * p, t * p + p) for t, p in zip(token, patch, strict=True))
        expected = values[(slice(None), *box)].flatten(1).mean(1)
        torch.testing.assert_close(found.features[(slice(None), *token)], expected, atol=1e-5, rtol=1e-5)


def test_tokens_without_a_valid_sample_are_not_valid_and_count_nowhere() -> None:
    values = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(1, 8, 12, dtype=torch.bool)
    valid[:, :, 6:9] = False
    found = token_map(PatchMeans(spec_of(4, 4), (2, 2)), reading(values, valid), (8, 12))  # type: ignore[arg-type]

    assert (~found.valid).nonzero()[:, 1].unique().tolist() == [3]
    half = values[:, 0:2, 9:10].flatten(1).mean(1)
    torch.testing.assert_close(found.features[:, 0, 4], half, atol=1e-6, rtol=1e-5)
    assert not found.features[:, ~found.valid].any()


def test_without_overlap_windows_are_what_the_encoder_says_of_each_alone() -> None:
    spec = spec_of(8, 8, 8, channels=1)
    torch.manual_seed(0)
    config = ModelConfig(width=24, depth=1, heads=2, patch_size=4, positions="sincos")
    encoder = Encoder(VisionTransformer(config, spec), spec, "mean", {})
    values = torch.randn(1, 16, 8, 24, generator=torch.Generator().manual_seed(1))

    found = token_map(encoder, reading(values), (16, 8, 24), overlap=0.0, batch=4)

    for z, x in itertools.product(range(2), range(3)):
        window = values[:, 8 * z : 8 * z + 8, :, 8 * x : 8 * x + 8]
        alone = encoder.features(window[None]).patches[0].unflatten(0, (2, 2, 2)).movedim(-1, 0)
        mine = found.features[:, 2 * z : 2 * z + 2, :, 2 * x : 2 * x + 2]
        torch.testing.assert_close(mine, alone, atol=1e-5, rtol=1e-5)


def some_tokens(*shape: int, patch: tuple[int, ...], size: tuple[int, ...]) -> TokenMap:
    features = torch.randn(5, *shape, generator=torch.Generator().manual_seed(2)) + 1
    valid = torch.ones(shape, dtype=torch.bool)
    valid[(0,) * len(shape)] = False
    return TokenMap(torch.where(valid, features, 0.0), valid, patch, size)


def interpolated(values: np.ndarray, valid: np.ndarray, patch: tuple[int, ...], place: tuple[int, ...]) -> np.ndarray:
    """Of (..., *tokens), by the weights' definition, over the valid tokens."""
    total, weights = np.zeros(values.shape[: values.ndim - valid.ndim]), 0.0
    for token in np.ndindex(*valid.shape):
        weight = 1.0
        for t, n, p, at in zip(token, valid.shape, patch, place, strict=True):
            weight *= max(0.0, 1 - abs(min(max((at + 0.5) / p - 0.5, 0), n - 1) - t))
        if valid[token]:
            total, weights = total + weight * values[(..., *token)], weights + weight
    return total / weights if weights > 0 else total * np.nan


@pytest.mark.parametrize(
    ("shape", "patch", "size"),
    [((3, 2, 4), (2, 3, 4), (5, 6, 14)), ((4, 3), (4, 2), (15, 6)), ((1, 2), (2, 2), (2, 4))],
)
def test_every_sample_gets_the_cosine_that_a_loop_gives(shape, patch, size) -> None:
    tokens = some_tokens(*shape, patch=patch, size=size)
    directions, valid = tokens.directions(), tokens.valid.numpy()
    click = tuple(length - 2 for length in size)
    query = place_vector(tokens, click)

    expected = interpolated(directions.numpy(), valid, patch, click)
    torch.testing.assert_close(query, torch.from_numpy(expected / np.linalg.norm(expected)).float())
    scores = to_samples(similarity(tokens, [query]), tokens).numpy()
    assert scores.shape == size
    parts = list(slabs(similarity(tokens, [query]), tokens, samples=1))
    assert [first for first, _ in parts] == list(range(0, size[0], patch[0]))
    np.testing.assert_allclose(np.concatenate([part for _, part in parts]), scores, atol=2e-6)
    for place in np.ndindex(*size):
        cosine = query.numpy() @ interpolated(directions.numpy(), valid, patch, place)
        np.testing.assert_allclose(scores[place], cosine, atol=2e-6)


def test_a_click_where_nothing_is_valid_is_refused() -> None:
    tokens = some_tokens(3, 3, patch=(4, 4), size=(12, 12))
    with pytest.raises(UsageError, match="no valid sample"):
        place_vector(tokens, (0, 0))


def test_clicks_move_scores_one_way_only() -> None:
    tokens = some_tokens(4, 5, patch=(1, 1), size=(4, 5))
    off = tokens.mean()
    directions = tokens.directions(off=off)
    queries = [directions[:, 1, 1], directions[:, 2, 3], directions[:, 3, 0]]
    one = similarity(tokens, queries[:1], off=off)
    two = similarity(tokens, queries[:2], off=off)
    less = similarity(tokens, queries[:2], queries[2:], off=off)
    least = similarity(tokens, queries[:2], [queries[2], directions[:, 0, 3]], off=off)

    assert float(one[1, 1]) == pytest.approx(1)
    assert float(two[2, 3]) == pytest.approx(1)
    assert bool((two >= one).all())
    assert bool((less <= two).all())
    assert bool((least <= less).all())
    assert float((least - two).abs().max()) > 0.1
    mean = similarity(tokens, queries[:2], combine="mean", off=off)
    torch.testing.assert_close(mean, (one + similarity(tokens, queries[1:2], off=off)) / 2)


def test_centred_directions_have_lost_what_all_tokens_share() -> None:
    tokens = some_tokens(4, 5, patch=(1, 1), size=(4, 5))
    shifted = TokenMap(torch.where(tokens.valid, tokens.features + 50, 0.0), tokens.valid, (1, 1), (4, 5))

    torch.testing.assert_close(tokens.mean(), tokens.features[:, tokens.valid].mean(1))
    centred = tokens.directions(off=tokens.mean())
    torch.testing.assert_close(shifted.directions(off=shifted.mean()), centred, atol=1e-4, rtol=1e-3)
    assert not centred[:, 0, 0].any()
    torch.testing.assert_close(tokens.directions((2,), tokens.mean()), centred[:, 2])
    np.testing.assert_allclose(tokens.directions().norm(dim=0)[tokens.valid], 1, rtol=1e-6)


def test_the_threshold_is_the_one_of_least_variance_within() -> None:
    stream = np.random.default_rng(0)
    values = np.concatenate([stream.normal(0.2, 0.08, 900), stream.normal(0.8, 0.05, 300)])
    counts, borders = np.histogram(values, 256)
    binned = np.repeat((borders[:-1] + borders[1:]) / 2, counts)
    parts = [(binned[binned < b], binned[binned >= b]) for b in borders[1:-1]]
    within = [a.var() * len(a) + b.var() * len(b) if len(a) and len(b) else np.inf for a, b in parts]

    threshold = otsu(values)
    chosen = [
        a.var() * len(a) + b.var() * len(b) for a, b in [(binned[binned < threshold], binned[binned >= threshold])]
    ]
    assert chosen[0] == pytest.approx(min(within))
    assert otsu(np.full(5, 0.3)) == pytest.approx(0.3)
    assert otsu_of(lambda: iter([values[:7], values[:0], values[7:]])) == threshold


def test_another_kind_of_input_is_refused() -> None:
    spec = InputSpec(axes=("time", "y", "x"), size=(2, 4, 4), channels=(Channel(name="c"),))
    with pytest.raises(UsageError, match="spatial axes"):
        token_map(PatchMeans(spec, (1, 2, 2)), reading(torch.zeros(1, 2, 4, 4)), (2, 4, 4))  # type: ignore[arg-type]


def test_kept_features_are_the_same_and_those_of_something_else_are_refused(tmp_path: Path) -> None:
    tokens, facts = some_tokens(3, 2, 4, patch=(2, 3, 4), size=(5, 6, 14)), {"encoder": "a", "overlap": 0.5}
    folder = tmp_path / "features.zarr"
    write_features(folder, tokens, facts)

    again = read_features(folder, facts)
    assert torch.equal(again.features, tokens.features)
    assert torch.equal(again.valid, tokens.valid)
    assert (again.patch, again.size) == (tokens.patch, tokens.size)
    assert [path.name for path in tmp_path.iterdir()] == ["features.zarr"]
    with pytest.raises(UsageError, match="encoder 'a', now 'b'"):
        read_features(folder, {"encoder": "b", "overlap": 0.5})
    chunk = next(path for path in sorted((folder / "features" / "c").rglob("*")) if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"\0")
    with pytest.raises(UsageError, match="damaged"):
        read_features(folder, facts)
    (tmp_path / "other.zarr").mkdir()
    with pytest.raises(UsageError, match="no features of"):
        read_features(tmp_path / "other.zarr", facts)
