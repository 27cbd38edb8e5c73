"""Cross-validation by group, against scikit-learn's and by features that only a classifier that saw a group can use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score, confusion_matrix
from sklearn.model_selection import LeaveOneGroupOut, PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import one_hot

from fmsuite.core.evaluation.findings import judge_findings
from fmsuite.core.evaluation.folds import Folds, folds_by_group, lonely, parse_folds
from fmsuite.core.evaluation.fractions import shares_of_sides
from fmsuite.core.evaluation.numbers import judge_numbers
from fmsuite.core.evaluation.tiles import judge
from fmsuite.errors import UsageError


def cohort(groups: int = 24, each: int = 5, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    group = torch.arange(groups).repeat_interleave(each)
    labels = group % classes
    features = torch.randn(len(group), 6, generator=random) + torch.randn(groups, 6, generator=random)[group]
    features[:, 0] += 1.5 * labels
    return features, labels, group


def fold_of(folds: Folds, items: int) -> np.ndarray:
    found = np.full(items, -1)
    for number, part in enumerate(folds.parts):
        assert not set(part.train.tolist()) & set(part.test.tolist())
        assert len(part.train) + len(part.test) == items
        assert (found[part.test.numpy()] == -1).all()
        found[part.test.numpy()] = number
    assert (found >= 0).all()
    return found


@pytest.mark.parametrize("count", [2, 5, 24])
def test_every_item_is_asked_once_and_no_group_is_divided(count: int) -> None:
    _, labels, groups = cohort()
    folds = folds_by_group(one_hot(labels), groups, count, 3, ["a", "b", "c"])
    fold = fold_of(folds, len(labels))
    assert len(folds.parts) == count
    assert all(len(set(fold[groups.numpy() == group])) == 1 for group in groups.unique().tolist())
    assert folds.single == (count == 24)
    if count == 5:
        shares = np.array([np.bincount(labels[fold == number], minlength=3) for number in range(5)])
        assert shares.max() - shares.min() <= 5


def test_the_folds_follow_the_seed_and_nothing_else() -> None:
    _, labels, groups = cohort()
    kinds = one_hot(labels)
    first, again, other = (fold_of(folds_by_group(kinds, groups, 4, seed), 120) for seed in (1, 1, 2))
    renamed = fold_of(folds_by_group(kinds, groups * 10 + 3, 4, 1), 120)
    assert first.tolist() == again.tolist() == renamed.tolist()
    assert first.tolist() != other.tolist()


def test_a_class_of_two_groups_is_in_two_folds() -> None:
    groups = torch.arange(20).repeat_interleave(3)
    labels = (groups >= 18).long()
    for seed in range(20):
        fold = fold_of(folds_by_group(one_hot(labels), groups, 3, seed, ["many", "few"]), 60)
        assert len(set(fold[labels.numpy() == 1])) == 2


def test_leaving_one_group_out_gives_scikit_learns_predictions() -> None:
    features, labels, groups = cohort()
    folds = folds_by_group(one_hot(labels), groups, "groups", 0, ["a", "b", "c"])
    found = judge("linear_sklearn", features, labels, groups, folds, 3, encoder="net", seed=0)
    model = LogisticRegression(C=6 * 3 / 100, max_iter=10_000, tol=1e-10)
    expected = cross_val_predict(
        model, features.double().numpy(), labels.numpy(), groups=groups.numpy(), cv=LeaveOneGroupOut()
    )
    [episode] = found.episodes
    assert episode.predictions == expected.tolist()
    estimate = found.metrics["balanced_accuracy"]
    assert estimate.mean == pytest.approx(balanced_accuracy_score(labels.numpy(), expected))
    assert found.confusion == confusion_matrix(labels.numpy(), expected).tolist()
    assert found.settings["folds"] == 24
    assert found.settings["training_groups"] == [23, 23]
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low < estimate.mean < estimate.high


def test_what_only_a_group_tells_helps_nobody() -> None:
    """Features that name the group, and nothing else, give every class away to a classifier that saw it."""
    groups = torch.arange(30).repeat_interleave(4)
    labels = torch.randint(0, 2, (30,), generator=torch.Generator().manual_seed(5))[groups]
    features = one_hot(groups).float() * 10
    folds = folds_by_group(one_hot(labels), groups, 5, 0, ["a", "b"])
    found = judge("linear_sklearn", features, labels, groups, folds, 2, encoder="net", seed=0)
    assert found.metrics["balanced_accuracy"].mean < 0.7


@pytest.mark.parametrize("count", [4, "groups"])
def test_shuffled_labels_are_at_chance(count) -> None:
    features, labels, groups = cohort(groups=18, each=3)
    folds = folds_by_group(one_hot(labels), groups, count, 0, ["a", "b", "c"])
    found = judge("knn", features, labels, groups, folds, 3, encoder="net", seed=0, shuffled=True)
    estimate = found.metrics["balanced_accuracy"]
    assert len(found.episodes) == 20
    assert estimate.low < 1 / 3 < estimate.high


def test_numbers_are_put_together_before_they_are_scored() -> None:
    features, _, groups = cohort(groups=20)
    target = (features[:, 1] * 3 + 10).double()
    folds = folds_by_group(torch.ones(100, 1), groups, 4, 0)
    found = judge_numbers("ridge", features, target, groups, [folds.parts], encoder="net", seed=0)
    answers = np.array(found.episodes[0].answers)[:, 0]
    model = make_pipeline(StandardScaler(), Ridge(0.01))
    fold = fold_of(folds, 100)
    expected = cross_val_predict(model, features.double().numpy(), target.numpy(), cv=PredefinedSplit(fold))
    np.testing.assert_allclose(answers, expected, atol=1e-3)
    assert found.metrics["r2"].mean > 0.99


def test_findings_are_asked_once_too() -> None:
    features, labels, groups = cohort()
    target = torch.stack([labels == 0, features[:, 1] > 0], 1).double()
    folds = folds_by_group(target == 1, groups, 3, 0)
    found = judge_findings("linear", features, target, ["a", "b"], groups, [folds.parts], encoder="net", seed=0)
    assert all(len(answer) == 2 for answer in found.episodes[0].answers)
    assert found.metrics["auroc/b"].mean > 0.9


def test_shares_of_folds_are_shares_of_their_training_groups() -> None:
    _, labels, groups = cohort()
    folds = folds_by_group(one_hot(labels), groups, 4, 0)
    drawn = shares_of_sides(one_hot(labels).bool(), groups, folds, [0.5], 0)[0.5]
    assert len(drawn) == 5
    for parts in drawn:
        for part, whole in zip(parts, folds.parts, strict=True):
            assert part.test.tolist() == whole.test.tolist()
            assert set(part.train.tolist()) < set(whole.train.tolist())
            assert len(groups[part.train].unique()) == 9


def test_what_cannot_be_folded_is_refused() -> None:
    _, labels, groups = cohort(groups=6)
    with pytest.raises(UsageError, match=r"7 folds of 6 groups.*from 2 to 6"):
        folds_by_group(one_hot(labels), groups, 7, 0)
    with pytest.raises(UsageError, match=r"1 folds of 1 group.*group_column"):
        folds_by_group(one_hot(labels), groups * 0, "groups", 0)
    for text in ("1", "0", "many"):
        with pytest.raises(UsageError, match="--folds"):
            parse_folds(text)
    assert (parse_folds("5"), parse_folds("groups")) == (5, "groups")
    whole = torch.zeros(6, 2)
    whole[:, 0] = 1
    whole[:2, 1] = 1
    with pytest.raises(UsageError, match="'rare' in more than one"):
        folds_by_group(whole, torch.tensor([0, 0, 1, 2, 3, 4]), 2, 0, ["common", "rare"])


def test_classes_of_one_group_are_known() -> None:
    assert lonely(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 2, 2, 3]), 3) == [1, 2]
