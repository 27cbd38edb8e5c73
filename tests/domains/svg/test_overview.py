"""Drawings as pictures of themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fmsuite.commands.indexing import build_index
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.domains.svg.domain import SvgDomain, SvgOptions
from fmsuite.errors import UsageError


def test_a_drawing_lies_where_its_units_say(tmp_path: Path) -> None:
    path = tmp_path / "square.svg"
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="-10 20 200 100">'
        '<rect x="40" y="45" width="75" height="50" fill="#102030"/></svg>'
    )
    domain = SvgDomain(SvgOptions(size=32, workers=1))
    index = build_index(domain, [path], SkippedLog())
    view = domain.overview(index, str(path))
    assert view.origin == (-30, -10)
    dark = (view.rgb == (0x10, 0x20, 0x30)).all(axis=2)
    rows, columns = np.flatnonzero(dark.any(axis=1)), np.flatnonzero(dark.any(axis=0))
    found = [
        view.origin[0] + rows[0] * view.pitch[0],
        view.origin[0] + (rows[-1] + 1) * view.pitch[0],
        view.origin[1] + columns[0] * view.pitch[1],
        view.origin[1] + (columns[-1] + 1) * view.pitch[1],
    ]
    assert found == pytest.approx([45, 95, 40, 115], abs=1.01 * view.pitch[0])
    with pytest.raises(UsageError, match=r"other\.svg: not a source of this index"):
        domain.overview(index, "other.svg")
