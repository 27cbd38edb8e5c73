"""Pictures of what was filled in: the stages in their order, in raw values, with one contrast."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fmsuite.core.inputs import Channel, InputSpec, Normalize
from fmsuite.core.objectives.reconstruction import Reconstruction
from fmsuite.core.reports.page import render
from fmsuite.core.reports.reconstructions import FACTS, FOLDER, GAP, Reconstructions, write_reconstructions
from fmsuite.core.reports.sources import read_sources
from fmsuite.errors import UsageError
from tests.core.reports.factory import write_run


def found(*size: int, samples: int = 2) -> tuple[Reconstruction, Normalize, torch.Tensor]:
    """Raw values 0 to 1; the right half is hidden and comes back 0.25 standard deviations too high."""
    channel = Channel(name="c", mean=0.5, std=0.25)
    normalize = Normalize(InputSpec(axes=("t", "y", "x")[-len(size) :], size=size, channels=(channel,)))
    raw = torch.rand(samples, 1, *size, generator=torch.Generator().manual_seed(0))
    pixels = normalize(raw)
    hidden = torch.zeros_like(raw, dtype=torch.bool)
    hidden[..., size[-1] // 2 :] = True
    filled = torch.where(hidden, pixels + 0.25, pixels)
    return Reconstruction(pixels, hidden, filled, torch.tensor([0.25, float("nan")]), True), normalize, raw


def stretched(values: np.ndarray) -> np.ndarray:
    """As domains do that scale each picture by its own extremes; dates side by side."""
    plane = values[0] if values.ndim == 3 else np.concatenate(list(values[0]), axis=1)
    grey = (plane - plane.min()) / (plane.max() - plane.min())
    return np.repeat((grey * 255).round().astype(np.uint8)[..., None], 3, axis=2)


def write(folder: Path, *size: int) -> tuple[Reconstructions, torch.Tensor]:
    shown, normalize, raw = found(*size)
    folder.mkdir(exist_ok=True)
    facts = write_reconstructions(
        shown, normalize, stretched, ["a/one.png", "b/two.png"], folder, step=7, held_out=True
    )
    assert Reconstructions.read(folder) == facts
    return facts, raw


def test_the_three_stages_stand_side_by_side_with_one_contrast(tmp_path: Path) -> None:
    facts, raw = write(tmp_path, 40, 40)
    picture = np.asarray(Image.open(tmp_path / facts.samples[0].file))

    # 40 samples at 4 pixels each.
    assert picture.shape == (160, 3 * 160 + 2 * GAP, 4)
    assert not facts.upright
    before, seen, filled = (picture[2::4, start + 2 : start + 160 : 4, 0] for start in (0, 164, 328))
    values = raw[0, 0].numpy()
    raised = np.where(np.arange(40) >= 20, values + 0.25 * 0.25, values)
    low, high = min(values.min(), 0.5), max(values.max(), raised.max())
    for drawn, expected in ((before, values), (filled, raised), (seen, np.where(np.arange(40) >= 20, 0.5, values))):
        assert np.abs(drawn - 255 * (expected - low) / (high - low)).max() <= 0.51
    assert (picture[:, 160:164, 3] == 0).all()


def test_wide_pictures_stand_below_each_other(tmp_path: Path) -> None:
    facts, _ = write(tmp_path, 3, 20, 20)

    assert facts.upright
    assert Image.open(tmp_path / facts.samples[1].file).size == (3 * 160, 3 * 160 + 2 * GAP)
    assert [sample.error for sample in facts.samples] == [0.25, None]


def test_the_run_shows_them_and_says_whose_statistics_they_have(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 20)
    write(run, 8, 8)
    page = render(read_sources(run))

    assert "What the model fills in" in page
    assert "Windows that were not trained on, after step 7. From left to right: input" in page
    assert "these are taken from the input" in page
    assert "one.png: hidden values are off by 0.25 standard deviations" in page
    assert page.count('<figure class="filled"><img') == 2

    (run / FOLDER / "1.png").unlink()
    page = render(read_sources(run))
    assert page.count('<figure class="filled"><img') == 1
    assert "1.png is missing" in page


@pytest.mark.parametrize("text", ["{}", "[]", '{"step": 1'])
def test_damaged_facts_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / FACTS).write_text(text)
    with pytest.raises(UsageError, match=FACTS):
        Reconstructions.read(tmp_path)


def test_a_picture_that_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    facts, _ = write(tmp_path, 8, 8)
    facts.samples[0].file = "../../secret.png"
    (tmp_path / FOLDER / FACTS).write_text(facts.model_dump_json())
    with pytest.raises(UsageError, match="elsewhere"):
        Reconstructions.read(tmp_path)
