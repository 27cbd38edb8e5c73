"""What objectives fill in: visible pixels stay, a decoder that is right gives the input back, statistics are the hidden
patch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fmsuite.core.objectives.base import OBJECTIVES, Objective
from fmsuite.core.objectives.crossmae import CrossMAE
from fmsuite.core.objectives.mae import pixel_targets
from fmsuite.core.objectives.reconstruction import fill_in

PIXELS = ("mae", "simmim", "crossmae", "dmae", "hi_end_mae", "multimae")
KINDS = ("rgb", "thirteen_grouped", "volume")


def test_these_objectives_and_no_others_predict_pixels():
    own = {name for name, cls in OBJECTIVES.items() if cls.reconstruct is not Objective.reconstruct}
    assert own == set(PIXELS)


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in PIXELS for k in KINDS if n != "multimae" or k == "thirteen_grouped"]
)
def test_only_hidden_pixels_change(toys, name, kind):
    objective = toys.objective(name, kind).eval()
    batch = toys.batch(objective, kind)
    view = batch.views["image"][0]

    found = objective.reconstruct(batch)

    hidden = objective.grid.unpatchify(
        view.mask[..., None].expand_as(objective.grid.patchify(view.pixels)), tuple(view.pixels.shape[2:])
    )
    assert torch.equal(found.hidden, hidden)
    assert torch.equal(found.filled[~hidden], view.pixels[~hidden])
    assert (found.filled[hidden] != view.pixels[hidden]).float().mean() > 0.99
    for row in range(len(view.pixels)):
        apart = (found.filled[row] - view.pixels[row])[hidden[row]].numpy().astype(np.float64)
        assert float(found.error[row]) == pytest.approx(np.sqrt((apart**2).mean()), rel=1e-5)


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("name", ["mae", "hi_end_mae", "dmae"])
def test_a_decoder_that_gives_the_target_gives_the_input_back(toys, name, norm_pix, monkeypatch):
    objective = toys.objective(name, norm_pix=norm_pix).eval()
    batch = toys.batch(objective, invalid=True)
    view = batch.views["image"][0]
    patches = objective.grid.patchify(view.pixels).numpy().astype(np.float64)
    valid = objective.grid.patchify(view.valid.expand_as(view.pixels).float()).numpy() > 0
    perfect = patches.copy()
    for place in np.ndindex(*patches.shape[:2]):
        values = patches[place][valid[place]]
        if norm_pix and len(values):
            # MAE takes the unbiased variance, Hi-End-MAE a layer norm's.
            variance = values.var(ddof=0 if name == "hi_end_mae" else min(1, len(values) - 1))
            perfect[place] = (patches[place] - values.mean()) / np.sqrt(variance + 1e-6)
    monkeypatch.setattr(objective, "predict", lambda view: (torch.from_numpy(perfect).float(), view.mask))

    found = objective.reconstruct(batch)

    here = view.valid.expand_as(view.pixels)
    torch.testing.assert_close(found.filled[here], view.pixels[here], atol=1e-5, rtol=1e-5)
    assert found.given_statistics == norm_pix
    assert float(found.error.nan_to_num().max()) < 1e-5


@pytest.mark.parametrize("norm_pix", [True, False])
def test_crossmae_puts_every_prediction_in_its_place(toys, norm_pix, monkeypatch):
    objective = toys.objective("crossmae", "thirteen_grouped", norm_pix=norm_pix).eval()
    batch = toys.batch(objective, "thirteen_grouped")
    view = batch.views["image"][0]
    monkeypatch.setattr(
        CrossMAE, "decode", lambda self, visible, maps, ids: pixel_targets(self.grid, view, norm_pix, ids)[0]
    )

    torch.testing.assert_close(objective.reconstruct(batch).filled, view.pixels, atol=1e-5, rtol=1e-5)


def test_simmim_predicts_pixels_as_they_are(toys, monkeypatch):
    objective = toys.objective("simmim").eval()
    batch = toys.batch(objective)
    view = batch.views["image"][0]
    monkeypatch.setattr(objective, "predict", lambda view: (objective.grid.patchify(view.pixels), view.mask))

    found = objective.reconstruct(batch)
    torch.testing.assert_close(found.filled, view.pixels, atol=0, rtol=0)
    assert not found.given_statistics


def test_a_view_without_hidden_tokens_has_no_error(toys):
    objective = toys.objective("mae")
    view = toys.batch(objective).views["image"][0]
    patches = objective.grid.patchify(view.pixels)

    found = fill_in(objective.grid, view, patches + 1, torch.zeros_like(view.mask))

    assert torch.equal(found.filled, view.pixels)
    assert bool(found.error.isnan().all())


def test_other_objectives_fill_in_nothing(toys):
    objective = toys.objective("simclr")
    assert objective.reconstruct(toys.batch(objective)) is None
