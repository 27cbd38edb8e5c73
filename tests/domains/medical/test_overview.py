"""Volumes have no one picture on which all windows could be placed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmsuite.core.data.index import SampleIndex, Window
from fmsuite.domains.medical import MedicalDomain
from fmsuite.domains.medical.options import MedicalOptions
from fmsuite.errors import UsageError


def test_the_domain_says_that_it_draws_none(tmp_path: Path) -> None:
    source = str(tmp_path / "head.nii.gz")
    index = SampleIndex.from_windows([Window(source, "head", (0, 0, 0), (8, 8, 8))])
    with pytest.raises(UsageError, match="'medical' draws no overview"):
        MedicalDomain(MedicalOptions()).overview(index, source)
