"""Pictures of class maps: what is collected part by part is what lies at every n-th sample."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fmsuite.core.reports.class_maps import LONGEST, MAPS, Thinned, draw_class_map, read_maps
from fmsuite.errors import UsageError


@pytest.mark.parametrize("size", [(5, 3), (1500, 700), (40, 2100), (3000, 1)])
def test_classes_are_those_of_every_nth_sample_whatever_the_parts(size) -> None:
    random = np.random.default_rng(0)
    scores, valid = random.random((3, *size), dtype=np.float32), random.random(size) < 0.8
    small = Thinned(size)
    for top in range(0, size[0], 333):
        for left in range(0, size[1], 257):
            box = np.s_[top : top + 333, left : left + 257]
            small.add((top, left), scores[(slice(None), *box)], valid[box])
    whole = np.where(valid, scores.argmax(0), -1)
    assert max(small.labels.shape) <= LONGEST
    rows, columns = (slice(first, None, small.step) for first in small.first)
    np.testing.assert_array_equal(small.labels, whole[rows, columns])
    shares, known = small.shares(3)
    assert known == pytest.approx((small.labels >= 0).mean())
    assert sum(shares) == pytest.approx(1)


def test_a_map_is_drawn_as_large_as_its_source_and_white_where_unknown() -> None:
    rgb = np.full((20, 30, 3), 7, np.uint8)
    page = np.asarray(draw_class_map(rgb, np.array([[0, -1], [1, 2]]), 3))
    assert page.shape == (20, 68, 3)
    assert (page[:, :30] == 7).all()
    assert (page[:10, 53:] == 255).all()
    assert len(np.unique(page[:, 38:].reshape(-1, 3), axis=0)) == 4


def test_a_damaged_record_is_refused_by_name(tmp_path) -> None:
    (tmp_path / MAPS).write_text(json.dumps({"format": 1, "domain": "x"}))
    with pytest.raises(UsageError, match=MAPS):
        read_maps(tmp_path)
