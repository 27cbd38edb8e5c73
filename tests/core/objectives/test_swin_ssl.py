"""The three tasks of Swin UNETR's pretraining against the public contrast, loops, and numpy's turns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from fmsuite.core.inputs import Channel, InputSpec
from fmsuite.core.objectives.simclr import nt_xent
from fmsuite.core.objectives.swin_ssl import SwinSSL, SwinSSLConfig, block_mask, blocks_needed, turn
from fmsuite.errors import UsageError

SMALL = {"swin_ssl": {"contrast_width": 16}}
FITS = {"swin_ssl": ("rgb", "two_channels", "volume", "series")}


def test_the_contrast_equals_the_reference(load):
    reference = load("medical_losses")
    found = nt_xent(reference["contrast_a"], reference["contrast_b"], SwinSSLConfig().temperature)
    torch.testing.assert_close(found, reference["contrast"], atol=1e-6, rtol=1e-6)


def test_turns_are_numpys_in_the_last_two_axes():
    values = torch.randn(8, 2, 3, 5, 5)
    turns = torch.arange(8) % 4
    for row, found in enumerate(turn(values, turns)):
        expected = np.rot90(values[row].numpy(), int(turns[row]), axes=(2, 3))
        np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("size", [(20, 30), (8, 12, 16)])
def test_blocks_equal_a_loop_that_stops_at_the_share(size):
    count = blocks_needed(0.3, 0.05, 0.25, len(size))
    draws = torch.rand(20, 1 + count * 2 * len(size), generator=torch.Generator().manual_seed(0))
    masks = block_mask(draws, size, 0.3, 0.05, 0.25)
    shares = []
    for row, found in zip(draws.tolist(), masks.numpy(), strict=True):
        expected = np.zeros(size, dtype=bool)
        total, numbers = 0, iter(row[1:])
        while total < row[0] * 0.3 * np.prod(size):
            corner = [next(numbers) for _ in size]
            side = [next(numbers) for _ in size]
            box = []
            for axis, length in enumerate(size):
                low, high = max(1, int(0.05 * length)), max(1, int(0.25 * length))
                start = int(np.float32(corner[axis]) * (length - low + 1))
                box.append(slice(start, min(length, start + low + int(np.float32(side[axis]) * (high - low + 1)))))
            expected[tuple(box)] = True
            total += np.prod([part.stop - part.start for part in box])
        np.testing.assert_array_equal(found, expected)
        shares.append(found.mean())
    assert 0.05 < np.mean(shares) < 0.2
    assert max(shares) < 0.4


@pytest.mark.parametrize("kind", ["rgb", "volume"])
def test_what_is_damaged_is_noise_or_another_sample_and_the_rest_is_the_turned_view(toys, kind):
    objective = toys.objective("swin_ssl", kind)
    view = toys.batch(objective, kind).views["image"][0]
    damaged, whole, turns = objective.damage(view, 0)
    assert torch.equal(whole.pixels, turn(view.pixels, turns))
    changed = (damaged.pixels != whole.pixels).any(1)
    share = changed.flatten(1).float().mean(1)
    assert 0 < share.max() < 0.7
    # Every channel at once, and from another sample's picture, its noise, or noise of its own.
    others = torch.stack([damaged.pixels[row] == whole.pixels for row in range(4)]).any(1)
    noise = objective._normal(view, 1)
    known = others | (damaged.pixels == noise) | (damaged.pixels[:, None] == noise[None]).any(1)
    assert known[:, :, ...][changed[:, None].expand_as(known)].all()


def test_draws_follow_from_the_key_and_copies_differ(toys):
    objective = toys.objective("swin_ssl")
    view = toys.batch(objective, batch=16).views["image"][0]
    again = objective.damage(view, 0)
    for first, second in zip(objective.damage(view, 0)[0].pixels, again[0].pixels, strict=True):
        assert torch.equal(first, second)
    turns = [objective.damage(view, number)[2] for number in range(2)]
    assert not torch.equal(*turns)
    many = replace(view[:1], keys=torch.arange(4000), pixels=view.pixels[:1, :, :8, :8].expand(4000, -1, -1, -1))
    rates = torch.bincount((objective._draws(many, 0, 1)[:, 0] * 4).long(), minlength=4) / 4000
    assert (rates - 0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5
    normal = objective._normal(many, 1)
    assert normal.mean().abs() < 0.01
    assert normal.std().item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("read", ["tokens", "mean"])
@pytest.mark.parametrize("invalid", [False, True])
def test_the_losses_equal_loops_over_samples(toys, read, invalid, context):
    objective = toys.objective("swin_ssl", read=read, rotation_weight=2.0, contrast_weight=0.5, inpainting_weight=3.0)
    batch = toys.batch(objective, invalid=invalid)
    view = batch.views["image"][0]
    losses = objective(batch, context)
    entropies, differences, vectors, heard = [], [], [[], []], []
    for number in range(2):
        damaged, whole, turns = objective.damage(view, number)
        features = objective.backbone(damaged)
        grid = features.patches.transpose(1, 2).unflatten(2, (4, 4))
        for row in range(4):
            valid = torch.ones(1, 16, 16, dtype=torch.bool) if whole.valid is None else whole.valid[row]
            decoded = objective.decoder(grid[row : row + 1])[0]
            differences.append((decoded - whole.pixels[row]).abs()[valid.expand(3, -1, -1)].mean())
            tokens = features.patches[row]
            here = torch.ones(16, dtype=torch.bool) if features.layout.valid is None else features.layout.valid[row]
            first, second = (tokens[0], tokens[1]) if read == "tokens" else (tokens[here].mean(0),) * 2
            heard.append(bool(here[:2].all()) if read == "tokens" else True)
            vectors[number].append(objective.contrast_head(second))
            entropies.append(functional.cross_entropy(objective.rotation_head(first), turns[row]))
    counted = [heard[row] and heard[row + 4] for row in range(4)]
    kept = [entropy for entropy, count in zip(entropies, counted * 2) if count]
    rotation = torch.stack(kept).mean() if kept else torch.zeros(())
    assert losses["rotation"].item() == pytest.approx(rotation.item(), rel=1e-5)
    assert losses["inpainting"].item() == pytest.approx(torch.stack(differences).mean().item(), rel=1e-5)
    contrast = nt_xent(*(torch.stack(each) for each in vectors), 0.5, torch.tensor(counted))
    assert losses["contrast"].item() == pytest.approx(contrast.item(), rel=1e-5)
    total = 2.0 * losses["rotation"] + 0.5 * losses["contrast"] + 3.0 * losses["inpainting"]
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-6)


def test_the_spacing_turns_with_the_view(toys):
    objective = toys.objective("swin_ssl", "volume")
    view = toys.batch(objective, "volume", batch=8).views["image"][0]
    view.spacing = torch.tensor([5.0, 1.0, 2.0]).expand(8, 3)
    _, whole, turns = objective.damage(view, 0)
    for row, quarter in enumerate(turns.tolist()):
        assert whole.spacing[row].tolist() == ([5.0, 2.0, 1.0] if quarter % 2 else [5.0, 1.0, 2.0])
    assert set((turns % 2).tolist()) == {0, 1}


@pytest.mark.parametrize("patch", [12, 14])
def test_the_decoder_gives_pictures_of_the_views_size_for_any_patch(toys, patch):
    spec = InputSpec(axes=("y", "x"), size=(2 * patch, 2 * patch), channels=(Channel(name="a"),))
    toy = replace(toys.toys["rgb"], spec=spec, patch=patch)
    objective = SwinSSL(SwinSSLConfig(), toys.model(toy))
    assert objective.decoder(torch.randn(2, 24, 2, 2)).shape == (2, 1, 2 * patch, 2 * patch)


def test_a_short_run_learns_to_fill_in(toys):
    objective = toys.objective("swin_ssl", rotation_weight=0.0, contrast_weight=0.0)
    losses = toys.train(objective, [toys.batch(objective)], steps=25, lr=2e-2)
    assert losses[-1] < 0.8 * losses[0]


def test_unsuitable_views_and_options_are_refused(toys):
    with pytest.raises(UsageError, match="square views"):
        toys.objective("swin_ssl", size=(8, 16))
    with pytest.raises(UsageError, match="is one patch"):
        toys.objective("swin_ssl", size=4)
    with pytest.raises(UsageError, match="exceeds"):
        toys.objective("swin_ssl", min_block=0.3)
    with pytest.raises(UsageError, match="channel groups"):
        toys.objective("swin_ssl", "thirteen_grouped")
    with pytest.raises(UsageError, match="batch of one"):
        toys.objective("swin_ssl").check_batch(1)
