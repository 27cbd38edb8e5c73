from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from fmsuite.core.evaluation import statistics
from fmsuite.core.evaluation.metrics import METRICS, class_scores, score
from fmsuite.core.evaluation.statistics import ENOUGH_GROUPS, MIN_GROUPS, Scored, bootstrap, describe, summarise
from fmsuite.core.seeding import generator
from fmsuite.errors import UsageError


def binary(right: np.ndarray, seed: int = 0) -> Scored:
    """An episode of two alternating classes that predicts some items right."""
    target = torch.arange(len(right)) % 2
    predicted = torch.where(torch.from_numpy(right), target, 1 - target)
    noise = torch.from_numpy(np.random.default_rng(seed).random(len(right)))
    second = (predicted + noise) / 2
    return Scored(torch.arange(len(right)), torch.stack([1 - second, second], 1), predicted, target)


def test_accuracy_of_single_items_has_binomial_quantiles() -> None:
    items, hits = 200, 150
    episode = binary(np.arange(items) < hits)
    bounds = bootstrap([episode], torch.arange(items), 2, replicates=20_000, confidence=0.9, seed=0)["accuracy"]
    assert bounds is not None
    expected = stats.binom.ppf([0.05, 0.95], items, hits / items) / items
    assert bounds == pytest.approx(expected, abs=1.01 / items)


def episodes_of_many_kinds() -> tuple[list[Scored], torch.Tensor]:
    """Three classes, groups of uneven size, one with items of two classes, and episodes that ask different items."""
    rng = np.random.default_rng(3)
    groups = torch.from_numpy(rng.integers(0, 14, 70))
    target = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 1])[groups]
    # Group 3 has items of two classes.
    target[(groups == 3).nonzero()[0]] = 2
    episodes = []
    for supports in ((), (0, 1), (1, 2)):
        items = torch.from_numpy(rng.permutation(70))
        items = items[~torch.isin(groups[items], torch.tensor(supports))]
        size = len(items)
        raw = rng.random((size, 3)) + 0.4 * np.eye(3)[target[items].numpy()]
        scores = torch.from_numpy(np.ceil(raw * 5))
        episodes.append(Scored(items, scores, scores.argmax(1), target[items]))
    return episodes, groups


def test_bounds_equal_a_loop_that_repeats_items() -> None:
    episodes, groups = episodes_of_many_kinds()
    replicates = 80
    found = bootstrap(episodes, groups, 3, replicates, 0.8, seed=5)
    names = groups[torch.cat([episode.items for episode in episodes])].unique()
    drawn = generator(5, "bootstrap").multinomial(len(names), np.full(len(names), 1 / len(names)), replicates)
    averages, asked = [], set()
    for counts in drawn:
        times = dict(zip(names.tolist(), counts.tolist()))
        values = []
        for episode in episodes:
            rows = torch.tensor([r for r, i in enumerate(episode.items) for _ in range(times[int(groups[i])])])
            target = episode.target[rows]
            if len(target.unique()) == len(episode.target.unique()):
                values.append(score(episode.scores[rows], episode.predicted[rows], target, 3))
        asked.add(len(values))
        if len(values) >= len(episodes) / 2:
            averages.append([np.mean([value[name] for value in values]) for name in METRICS])
    assert asked == {0, 1, 2, 3}
    low, high = np.quantile(np.array(averages), [0.1, 0.9], axis=0)
    for i, name in enumerate(METRICS):
        assert found[name] == pytest.approx((low[i], high[i]), abs=1e-6)


def test_chunks_do_not_change_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    episodes, groups = episodes_of_many_kinds()
    whole = bootstrap(episodes, groups, 3, 50, seed=0)
    monkeypatch.setattr(statistics, "_CHUNK_VALUES", 7 * 70)
    parts = bootstrap(episodes, groups, 3, 50, seed=0)
    for name in METRICS:
        assert parts[name] == pytest.approx(whole[name], abs=1e-6)


def test_items_of_one_group_count_as_one_observation() -> None:
    rng = np.random.default_rng(0)
    single = binary(rng.random(40) < 0.7)
    once = bootstrap([single], torch.arange(40), 2, 200, seed=1)
    rows = torch.arange(40).repeat_interleave(7)
    copied = Scored(torch.arange(280), single.scores[rows], single.predicted[rows], single.target[rows])
    copies = bootstrap([copied], rows, 2, 200, seed=1)
    for name in METRICS:
        assert copies[name] == pytest.approx(once[name], abs=1e-6)


def test_intervals_cover_a_known_share_with_groups_and_fail_to_without() -> None:
    rng = np.random.default_rng(0)
    share, patients, slides, trials = 0.7, 60, 4, 100
    patient = torch.arange(patients).repeat_interleave(slides)
    covered = {"patients": 0, "slides": 0}
    for trial in range(trials):
        # The slides of a patient are all right or all wrong.
        episode = binary(np.repeat(rng.random(patients) < share, slides), trial)
        for name, groups in (("patients", patient), ("slides", torch.arange(len(patient)))):
            bounds = bootstrap([episode], groups, 2, 200, seed=trial)["accuracy"]
            assert bounds is not None
            covered[name] += bounds[0] <= share <= bounds[1]
    assert 0.90 <= covered["patients"] / trials <= 0.99
    assert covered["slides"] / trials < 0.75


def test_too_few_groups_give_no_interval() -> None:
    episode = binary(np.arange(40) % 3 > 0)
    enough = bootstrap([episode], torch.arange(40) % MIN_GROUPS, 2, 50, seed=0)
    assert all(bounds is not None and bounds[0] < bounds[1] for bounds in enough.values())
    few = bootstrap([episode], torch.arange(40) % (MIN_GROUPS - 1), 2, 50, seed=0)
    assert few == dict.fromkeys(METRICS)


def test_a_class_of_one_group_gives_no_interval() -> None:
    episode = binary(np.arange(40) % 3 > 0)
    groups = torch.arange(40).where(episode.target == 0, 100)
    assert set(bootstrap([episode], groups, 2, 50, seed=0).values()) == {None}


def test_classes_too_rare_to_be_drawn_give_no_interval() -> None:
    target = torch.arange(40) % 20
    scores = torch.eye(20)[target]
    episode = Scored(torch.arange(40), scores, target, target)
    # Two groups a class: a draw that has all 20 classes is one in some thousands.
    assert set(bootstrap([episode], torch.arange(40), 20, 200, seed=0).values()) == {None}


def test_draws_follow_the_seed() -> None:
    episode = binary(np.random.default_rng(0).random(60) < 0.7)
    first = bootstrap([episode], torch.arange(60), 2, 100, seed=0)
    assert bootstrap([episode], torch.arange(60), 2, 100, seed=0) == first
    assert bootstrap([episode], torch.arange(60), 2, 100, seed=1) != first


def test_a_wider_confidence_holds_the_narrower() -> None:
    episode = binary(np.random.default_rng(0).random(60) < 0.7)
    narrow = bootstrap([episode], torch.arange(60), 2, 300, 0.5, seed=0)
    wide = bootstrap([episode], torch.arange(60), 2, 300, 0.95, seed=0)
    for name in METRICS:
        inner, outer = narrow[name], wide[name]
        assert inner is not None
        assert outer is not None
        assert outer[0] < inner[0] < inner[1] < outer[1]


def test_wrong_use_is_refused() -> None:
    episode = binary(np.arange(40) % 3 > 0)
    for scored, replicates, confidence in (([], 10, 0.9), ([episode], 0, 0.9), ([episode], 10, 1.0)):
        with pytest.raises(UsageError, match="A bootstrap needs"):
            bootstrap(scored, torch.arange(40), 2, replicates, confidence, seed=0)


def test_summaries_and_their_description() -> None:
    assert summarise([0.5]) == (0.5, None)
    mean, std = summarise([0.2, 0.4, 0.9])
    assert (mean, std) == pytest.approx((0.5, np.std([0.2, 0.4, 0.9], ddof=1)))
    assert "95%" in describe()
    assert "2,000 times" in describe(2000)


def test_intervals_of_few_groups_are_too_narrow_as_their_description_says() -> None:
    random = np.random.default_rng(0)

    def held(groups: int) -> float:
        """How often the interval of independent answers, 0.8 of them right, holds 0.8."""
        target = torch.arange(2).repeat_interleave(groups)
        count = 0
        for trial in range(200):
            right = torch.from_numpy(random.random(len(target)) < 0.8)
            predicted = torch.where(right, target, 1 - target)
            scored = Scored(torch.arange(len(target)), torch.eye(2)[predicted], predicted, target)
            bounds = bootstrap([scored], torch.arange(len(target)), 2, 200, seed=trial)["balanced_accuracy"]
            assert bounds is not None
            count += bounds[0] - 1e-9 <= 0.8 <= bounds[1] + 1e-9
        return count / 200

    assert held(3) < 0.82
    assert held(2 * ENOUGH_GROUPS) > 0.88
    assert f"Too narrow with fewer than {ENOUGH_GROUPS} groups" in describe()


def test_every_class_has_the_bounds_of_repeated_items() -> None:
    episodes, groups = episodes_of_many_kinds()
    episode = episodes[0]
    found = bootstrap([episode], groups, 3, 60, 0.8, seed=5, names=["a", "b", "c"])
    names = groups[episode.items].unique()
    drawn = generator(5, "bootstrap").multinomial(len(names), np.full(len(names), 1 / len(names)), 60)
    values = []
    for counts in drawn:
        times = torch.from_numpy(counts)[torch.searchsorted(names, groups[episode.items])]
        rows = torch.arange(len(episode.items)).repeat_interleave(times)
        if len(episode.target[rows].unique()) == 3:
            values.append(class_scores(episode.predicted[rows], episode.target[rows], ["a", "b", "c"]))
    for name in ("iou/a", "recall/b", "precision/c"):
        expected = np.quantile([one[name] for one in values], [0.1, 0.9])
        assert found[name] == pytest.approx(tuple(expected))
    assert set(found) - set(METRICS) == {f"{m}/{n}" for m in ("recall", "precision", "f1", "iou") for n in "abc"}
