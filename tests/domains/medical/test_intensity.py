"""Plans against MONAI's, on volumes and X-rays; what they leave in the index, the input and the encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms import NormalizeIntensity, ScaleIntensity, ScaleIntensityRangePercentiles
from PIL import Image

from fmsuite.commands.indexing import build_index
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.inputs import InputSpec, Normalize
from fmsuite.domains.medical import MedicalDomain, MedicalOptions
from fmsuite.errors import UsageError

RANDOM = np.random.default_rng(0)
BODY = np.zeros((14, 14, 14), dtype=bool)
BODY[2:12, 3:12, 2:13] = True
MR = np.where(BODY, RANDOM.normal(200, 30, BODY.shape), 0).astype(np.float32)
CT = np.where(BODY, RANDOM.normal(40, 80, BODY.shape), -1000).astype(np.float32)
XRAY = RANDOM.integers(3, 250, (20, 14)).astype(np.uint8)


def opened(folder: Path, **options: object) -> tuple[MedicalDomain, SampleIndex]:
    return (domain := MedicalDomain(MedicalOptions(**options))), build_index(domain, [folder], SkippedLog())


@pytest.fixture
def scans(save, tmp_path: Path) -> Path:
    save("mr/a.nii", MR)
    save("ct/a.nii", CT)
    (tmp_path / "xray").mkdir()
    Image.fromarray(XRAY).save(tmp_path / "xray" / "a.png")
    return tmp_path


def monai(values: np.ndarray, plan: str, percentiles: tuple[float, float], inside: np.ndarray) -> np.ndarray:
    """The plan, with its statistics over ``inside``, by MONAI's transforms."""
    image = torch.from_numpy(values[None].astype(np.float32))
    if plan == "minmax":
        return np.asarray(ScaleIntensity(0.0, 1.0)(image))[0]
    low, high = percentiles
    if plan == "percentile":
        # It has no mask: it is given what counts alone, then its result is one line of the whole.
        scale = ScaleIntensityRangePercentiles(low, high, 0, 1, clip=False)
        some = np.asarray(scale(torch.from_numpy(values[inside][None].astype(np.float32))))[0]
        slope, shift = np.polyfit(values[inside].astype(float), some, 1)
        return np.clip(values * slope + shift, 0, 1)
    clipped = np.clip(values, *np.percentile(values[inside], percentiles))
    kept = torch.from_numpy(clipped[inside][None].astype(np.float32))
    some = np.asarray(NormalizeIntensity()(kept))[0]
    slope, shift = np.polyfit(clipped[inside].astype(float), some, 1)
    return clipped * slope + shift


@pytest.mark.parametrize("plan", ["zscore", "percentile", "minmax"])
@pytest.mark.parametrize("modality", ["mr", "ct", "xray"])
def test_plans_are_monais(scans: Path, modality: str, plan: str) -> None:
    percentiles = (0.5, 99.5) if plan == "minmax" else (2.0, 97.0)
    size = {"image_size": 14} if modality == "xray" else {"size": 14}
    domain, index = opened(
        scans / modality, modality=modality, intensity=plan, percentiles=percentiles, min_foreground=0.1, **size
    )
    sample = domain.reader(index).read(index[0])
    values = XRAY if modality == "xray" else {"mr": MR, "ct": CT}[modality].transpose(2, 1, 0)
    inside = np.ones(values.shape, bool) if modality == "xray" else BODY.transpose(2, 1, 0)
    np.testing.assert_allclose(sample.values[0], monai(values, plan, percentiles, inside), atol=2e-4)

    spec = domain.input_spec(index)
    assert spec.reading is not None
    assert (spec.reading.plan, spec.reading.modality, spec.reading.domain) == (plan, modality, "medical")
    assert spec.reading.foreground == (modality != "xray" and plan != "minmax")
    assert spec.reading.percentiles == (None if plan == "minmax" else percentiles)
    normal = Normalize(spec)(torch.from_numpy(sample.values[None]))[0, 0].numpy()
    np.testing.assert_allclose([normal[inside].mean(), normal[inside].std()], [0, 1], atol=2e-2)


@pytest.mark.parametrize(("modality", "plan"), [("mr", "zscore"), ("ct", "window"), ("xray", "minmax")])
def test_every_modality_has_its_usual_plan(modality: str, plan: str) -> None:
    options = MedicalOptions(modality=modality)
    assert options.plan == plan
    assert MedicalOptions(modality=modality, intensity=plan).reading == options.reading


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"intensity": "window"}, "intensity 'window' is for values that have a unit"),
        ({"modality": "xray", "intensity": "window"}, "intensity 'window'"),
        ({"percentiles": (90.0, 10.0)}, "percentiles"),
        ({"modality": "ct", "percentiles": (1.0, 99.0)}, "percentiles is not for intensity 'window'"),
        ({"hu_window": (0.0, 80.0)}, "hu_window is not for intensity 'zscore'"),
        ({"modality": "xray", "size": 64}, "size is not for modality 'xray'"),
        ({"modality": "xray", "spacing": 2.0}, "spacing is not for modality 'xray'"),
        ({"modality": "xray", "maps": {"label": "masks"}}, "maps is not for modality 'xray'"),
        ({"modality": "xray", "channels": ("a", "b")}, "one channel"),
        ({"image_size": 64}, "image_size is not for modality 'mr'"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MedicalOptions(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"modality": "ct", "hu_window": (-175.0, 250.0), "size": (4, 8, 8), "spacing": (3.0, 0.7, 0.7)},
        {"modality": "mr", "percentiles": (1.0, 99.0), "channels": ("t1",), "spacing": None, "size": 8},
        {"modality": "mr", "intensity": "percentile", "size": 8},
        {"modality": "xray", "image_size": 32, "framing": "centre"},
    ],
)
def test_options_are_found_again_in_the_input_that_they_gave(options: dict) -> None:
    """Through JSON, and at another size of the network."""
    domain = MedicalDomain(MedicalOptions(**options))
    index = SampleIndex.from_windows([], {"domain": "medical", "options": domain._fixed()})
    spec = domain.input_spec(index)
    stored = InputSpec.model_validate_json(spec.resized(16).model_dump_json())
    again = MedicalDomain(MedicalOptions(**MedicalOptions.like(stored)))
    assert again.input_spec(SampleIndex.from_windows([], {**index.metadata, "options": again._fixed()})) == spec


def test_an_index_made_with_another_plan_or_before_there_were_plans(scans: Path) -> None:
    domain, index = opened(scans / "mr", size=14)
    with pytest.raises(UsageError, match=r"data.intensity=zscore, and data.intensity=minmax is asked"):
        MedicalDomain(MedicalOptions(size=14, intensity="minmax")).reader(index)
    before = {key: value for key, value in index.metadata["options"].items() if key not in ("intensity", "percentiles")}
    old = SampleIndex(index.table, {**index.metadata, "options": before})
    np.testing.assert_array_equal(domain.reader(old).read(old[0]).values, domain.reader(index).read(index[0]).values)
    with pytest.raises(UsageError, match=r"data.intensity=zscore, and data.intensity=minmax is asked"):
        MedicalDomain(MedicalOptions(size=14, intensity="minmax")).reader(old)
