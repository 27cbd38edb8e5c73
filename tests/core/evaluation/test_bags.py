from __future__ import annotations

import pytest
import torch

from fmsuite.core.evaluation import bags as module
from fmsuite.core.evaluation.bags import Bags


@pytest.fixture
def bags() -> Bags:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(12, 3, generator=random) + 100
    return Bags(features, torch.tensor([0, 1, 8, 12]), torch.tensor([0, 1, 0]), torch.arange(3), 2)


def test_means_are_those_of_each_bag_however_they_are_cut(bags: Bags, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 5)
    expected = [bags.features[start:stop].double().mean(0) for start, stop in ((0, 1), (1, 8), (8, 12))]
    torch.testing.assert_close(bags.means, torch.stack(expected).float(), rtol=1e-7, atol=0)


def test_no_more_than_a_part_is_widened_at_once(bags: Bags, monkeypatch: pytest.MonkeyPatch) -> None:
    widened = []
    whole = torch.Tensor.double
    monkeypatch.setattr(module, "_ROWS", 5)
    monkeypatch.setattr(torch.Tensor, "double", lambda values: widened.append(len(values)) or whole(values))
    _ = bags.means
    assert widened == [5, 5, 2]


def test_other_labels_keep_the_means_that_were_computed(bags: Bags) -> None:
    other = bags.with_labels(torch.tensor([1, 1, 0]))
    assert other.labels.tolist() == [1, 1, 0]
    assert bags.labels.tolist() == [0, 1, 0]
    assert other.means is bags.means
    with pytest.raises(ValueError, match="between 0 and 1"):
        bags.with_labels(torch.tensor([0, 2, 0]))
