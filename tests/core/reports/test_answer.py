"""The sentences of the answer in cases where it is known."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fmsuite.core.evaluation.results import Episode, Estimate, Results
from fmsuite.core.reports.answer import answer, chance_of, relation
from fmsuite.core.reports.tables import encoder_line
from tests.core.reports import factory
from tests.core.reports.factory import HISTOGRAM, MINE, OWN_CONTROL, encoder_facts, estimate

Scores = dict[tuple[str, str, int | None, bool], Estimate]


def make_results(*arguments: Any, **options: Any) -> Results:
    """Results whose predictions were not kept, so that the intervals of each are all there is to compare."""
    results = factory.make_results(*arguments, **options)
    for evaluation in results.evaluations:
        for episode in evaluation.episodes:
            episode.predictions = []
    return results


def predicted(results: Results, number: int, wrong: int) -> None:
    """Evaluation ``number`` gets every item right but the first ``wrong``."""
    labels = [item.label for item in results.items]
    answers = [(label + 1) % 3 if place < wrong else label for place, label in enumerate(labels)]
    results.evaluations[number].episodes[:] = [Episode(seed=0, metrics={}, predictions=answers)]


def scores(mine: Estimate, untrained: Estimate, histogram: Estimate, shuffled: Estimate | None) -> Scores:
    found: Scores = {
        (MINE, "mi_simpleshot", 16, False): mine,
        (OWN_CONTROL, "mi_simpleshot", 16, False): untrained,
        (HISTOGRAM, "mi_simpleshot", 16, False): histogram,
    }
    if shuffled is not None:
        found[MINE, "mi_simpleshot", 16, True] = shuffled
    return found


def test_it_beats_both_controls() -> None:
    said = answer(
        make_results(scores(estimate(0.912, 0.02), estimate(0.85, 0.02), estimate(0.80, 0.02), estimate(0.34)))
    )

    assert said.headline == (
        "uni-mini reaches a balanced accuracy of 0.912 (0.892–0.932) from 16 labelled slides a class (MI-SimpleShot), "
        "0.062 above the same network untrained and 0.112 above the colour histogram."
    )
    assert said.support == [
        "Its interval lies wholly above those of the same network untrained and the colour histogram.",
        "With shuffled labels it is at chance: 0.340 (0.310–0.370), where chance is 0.333.",
    ]
    assert [finding.kind for finding in said.findings] == ["good", "good"]
    assert said.findings[0].text == (
        "The same network untrained (uni-mini untrained): 0.850 (0.830–0.870), 0.062 lower; "
        "the intervals do not overlap."
    )


def test_it_loses_to_the_histogram() -> None:
    said = answer(make_results(scores(estimate(0.89, 0.02), estimate(0.80, 0.02), estimate(0.911, 0.02), None)))

    assert said.headline.endswith(
        ", but does NOT beat the colour histogram: it is 0.021 below the colour histogram and 0.090 above the same "
        "network untrained."
    )
    assert "The intervals of the two overlap, so the colour histogram may be better by chance." in said.support
    assert [finding.kind for finding in said.findings] == ["good", "bad"]


def test_it_loses_clearly() -> None:
    said = answer(make_results(scores(estimate(0.80, 0.01), estimate(0.85, 0.01), estimate(0.911, 0.01), None)))

    assert "but does NOT beat the same network untrained or the colour histogram" in said.headline
    assert "The interval of the colour histogram lies wholly above it." in said.support


def test_a_difference_that_vanishes_in_three_decimals_is_level() -> None:
    said = answer(make_results(scores(estimate(0.9), estimate(0.8997), estimate(0.7, 0.01), None)))

    assert said.headline.endswith(
        "but does NOT beat the same network untrained: it is level with the same network untrained and 0.200 above "
        "the colour histogram."
    )


def test_intervals_that_overlap_are_said_to() -> None:
    said = answer(make_results(scores(estimate(0.90, 0.05), estimate(0.86, 0.05), estimate(0.70, 0.05), None)))

    assert said.support[:2] == [
        "Its interval lies wholly above that of the colour histogram.",
        "It overlaps that of the same network untrained, so this difference may be chance.",
    ]
    assert [finding.kind for finding in said.findings] == ["open", "good"]


def test_without_intervals_nothing_is_claimed() -> None:
    said = answer(make_results(scores(estimate(0.9, None), estimate(0.8, None), estimate(0.7, None), None)))

    assert "0.900 (no interval)" in said.headline
    assert said.support[0] == "There are no intervals to say whether these differences may be chance."


def test_missing_controls_are_said() -> None:
    said = answer(make_results({(MINE, "knn", None, False): estimate(0.9)}))

    assert said.headline == (
        "uni-mini reaches a balanced accuracy of 0.900 (0.870–0.930) with the whole training side (kNN)."
    )
    assert said.support == [
        "Neither an untrained network nor a histogram was judged beside it, so nothing says how much of this the "
        "training gave.",
        "No control with shuffled labels was run.",
    ]


def test_one_missing_control_is_said() -> None:
    said = answer(
        make_results({(MINE, "knn", None, False): estimate(0.9), (HISTOGRAM, "knn", None, False): estimate(0.8)})
    )

    assert "No untrained network was judged beside it." in [finding.text for finding in said.findings]


def test_shuffled_labels_above_chance_cast_doubt_on_everything() -> None:
    said = answer(
        make_results(scores(estimate(0.9, 0.02), estimate(0.8, 0.02), estimate(0.7, 0.02), estimate(0.5, 0.02)))
    )

    assert said.support[-1] == (
        "With shuffled labels it is NOT at chance but above it: 0.500 (0.480–0.520) instead of 0.333. Until that is "
        "explained, labels may leak and no number here should be trusted."
    )


def test_shuffled_labels_below_chance_are_no_leak() -> None:
    said = answer(make_results(scores(estimate(0.9), estimate(0.8), estimate(0.7), estimate(0.2, 0.02))))

    assert "NOT at chance but below it: 0.200 (0.180–0.220) instead of 0.333." in said.support[-1]
    assert "A leak would lift it" in said.support[-1]


def test_many_shuffled_rows_are_counted() -> None:
    found = scores(estimate(0.9), estimate(0.8), estimate(0.7), estimate(0.33, 0.02))
    found[MINE, "mi_simpleshot", 1, True] = estimate(0.5, 0.02)
    said = answer(make_results(found))

    assert "it is at chance" in said.support[-1]
    finding = next(finding for finding in said.findings if "Shuffled" in finding.text)
    assert finding.kind == "open"
    assert finding.text.startswith("Shuffled labels, all 2 rows: 1 above chance")


@pytest.mark.parametrize(("shots", "luck"), [(4, "0.5"), (None, "0.1")])
def test_how_many_shuffled_rows_miss_by_luck_goes_by_their_intervals(shots: int | None, luck: str) -> None:
    """Few-shot rows have 95% intervals, those of the whole training side 99%."""
    found: Scores = {("e", f"m{n}", shots, True): estimate(0.5 if n == 0 else 0.33, 0.02) for n in range(20)}
    found["e", "m0", shots, False] = estimate(0.9)
    finding = next(finding for finding in answer(make_results(found)).findings if "Shuffled" in finding.text)

    assert finding.text == (
        f"Shuffled labels, all 20 rows: 1 above chance (intervals miss it upwards in about {luck} rows by luck)."
    )


def test_the_nearest_shuffled_row_is_named_if_it_is_not_the_best_ones() -> None:
    found = scores(estimate(0.9), estimate(0.8), estimate(0.7), None)
    found[HISTOGRAM, "logistic", 4, True] = estimate(0.34)

    assert (
        "With shuffled labels colour histogram (logistic regression) is at chance"
        in answer(make_results(found)).support[-1]
    )


def test_the_best_of_several_is_named_with_the_next() -> None:
    found = scores(estimate(0.86, 0.05), estimate(0.8), estimate(0.7), None)
    found["other", "mi_simpleshot", 16, False] = estimate(0.91, 0.04)
    found["third", "mi_simpleshot", 16, False] = estimate(0.5)
    said = answer(make_results(found))

    assert said.headline.startswith("Of 3 encoders, other is best, with a balanced accuracy of 0.910 (0.870–0.950)")
    assert "above an untrained network of another encoder" in said.headline
    assert said.support[-2] == (
        "The next encoder, uni-mini, reaches 0.860 (0.810–0.910); the intervals overlap, so the order of the two may "
        "be chance."
    )


def test_encoders_are_compared_where_all_of_them_were_judged() -> None:
    found: Scores = {
        (MINE, "knn", 4, False): estimate(0.7),
        (MINE, "knn", 16, False): estimate(0.95),
        ("other", "knn", 4, False): estimate(0.8),
    }
    said = answer(make_results(found))

    assert "Of 2 encoders, other is best" in said.headline
    assert "from 4 labelled slides a class" in said.headline


def test_the_whole_training_side_counts_as_more_than_any_shots() -> None:
    found: Scores = {(MINE, "knn", 16, False): estimate(0.95), (MINE, "linear_torch", None, False): estimate(0.9)}
    said = answer(make_results(found))

    assert "with the whole training side (linear probe, torch form)" in said.headline
    assert "From 16 labelled slides a class it reaches 0.950 (0.920–0.980) (kNN)." in [f.text for f in said.findings]


def test_a_control_stands_against_the_best_with_its_own_best_method() -> None:
    found: Scores = {
        (MINE, "knn", None, False): estimate(0.90, 0.001),
        (MINE, "linear_torch", None, False): estimate(0.89, 0.001),
        (HISTOGRAM, "knn", None, False): estimate(0.80, 0.001),
        (HISTOGRAM, "linear_torch", None, False): estimate(0.91, 0.001),
    }
    said = answer(make_results(found))

    assert "but does NOT beat the colour histogram: it is 0.010 below" in said.headline
    assert said.findings[0].text == (
        "The colour histogram: 0.910 (0.909–0.911) with linear probe, torch form, 0.010 higher; "
        "the intervals do not overlap."
    )
    assert "highest of 2 rows" in said.findings[-1].text


def test_controls_alone_are_called_controls() -> None:
    said = answer(make_results({(HISTOGRAM, "knn", None, False): estimate(0.8)}))

    assert said.headline.startswith("Only controls were judged. colour histogram reaches a balanced accuracy of 0.800")


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (estimate(0.5, 0.2), ["Its interval reaches down to chance, which is 0.333, so it may be guessing."]),
        (estimate(0.3, 0.2), ["It is NOT above chance, which is 0.333."]),
        (estimate(0.3, None), ["It is NOT above chance, which is 0.333."]),
        (estimate(0.5, 0.1), []),
        (estimate(0.5, None), []),
    ],
)
def test_an_encoder_that_may_be_guessing_is_said_to(score: Estimate, said: list[str]) -> None:
    support = answer(make_results({(MINE, "knn", None, False): score})).support

    assert [sentence for sentence in support if "chance, which" in sentence] == said


def test_the_article_fits_the_metric() -> None:
    results = make_results({(MINE, "knn", None, False): estimate(0.8)})
    results.primary = "auroc"

    assert "reaches an AUROC of 0.900" in answer(results).headline


def test_nothing_judged_is_said() -> None:
    results = make_results({(MINE, "knn", None, True): estimate(0.3)})
    assert answer(results).headline == "Nothing was judged: there are no evaluations with true labels."

    results = make_results({(MINE, "knn", None, False): estimate(math.nan, None)})
    assert answer(results).best is None


def test_an_untrained_network_is_that_of_its_encoder() -> None:
    facts = [
        encoder_facts(MINE),
        encoder_facts("other"),
        encoder_facts("a0", "untrained", "other"),
        encoder_facts("b0", "untrained", MINE),
    ]
    found: Scores = {
        (MINE, "knn", None, False): estimate(0.9, 0.01),
        ("other", "knn", None, False): estimate(0.8, 0.01),
        ("a0", "knn", None, False): estimate(0.7, 0.01),
        ("b0", "knn", None, False): estimate(0.6, 0.01),
    }

    assert "0.300 above the same network untrained." in answer(make_results(found, encoders=facts)).headline


def test_an_untrained_network_may_be_the_control_of_several() -> None:
    shared = encoder_facts("a0", "untrained", "other").model_copy(
        update={"provenance": {"control_of": ["other", MINE]}}
    )
    facts = [encoder_facts(MINE), encoder_facts("other"), shared]
    found: Scores = {(name, "knn", None, False): estimate(mean, 0.01) for name, mean in ((MINE, 0.9), ("a0", 0.7))}

    assert "0.200 above the same network untrained." in answer(make_results(found, encoders=facts)).headline
    assert encoder_line(shared).kind == f"control: untrained, of other and {MINE}"


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        (estimate(0.9, 0.05), estimate(0.8, 0.05 + 1e-9), "overlap"),
        (estimate(0.9, 0.04), estimate(0.8, 0.05), "apart"),
        (estimate(0.8, 0.01), estimate(0.8, 0.5), "overlap"),
        (estimate(0.8, None), estimate(0.8, 0.5), "unknown"),
    ],
)
def test_intervals_overlap_if_they_have_a_value_in_common(one: Estimate, other: Estimate, wanted: str) -> None:
    assert relation(one, other) == relation(other, one) == wanted


@pytest.mark.parametrize(
    ("score", "wanted"),
    [
        (estimate(0.53, 0.04), "at"),
        (estimate(0.55, 0.04), "above"),
        (estimate(0.45, 0.04), "below"),
        (estimate(0.54, None), "at"),
        (estimate(0.56, None), "above"),
    ],
)
def test_chance_is_within_the_interval_or_near(score: Estimate, wanted: str) -> None:
    assert chance_of(score, 0.5) == wanted


@pytest.mark.parametrize("classes", [5, 10, 19, 21])
def test_a_classifier_that_always_gives_one_answer_is_at_chance(classes: int) -> None:
    """Its interval has no width, and sums of its recalls are off by a rounding error or two."""
    chance = 1 / classes
    for mean in (chance - 3e-17, chance, chance + 3e-17):
        assert chance_of(Estimate(mean=mean, std=0.0, low=mean, high=mean), chance) == "at"


def test_what_was_predicted_for_the_same_items_settles_differences_that_intervals_leave_open() -> None:
    results = make_results(scores(estimate(0.90, 0.05), estimate(0.88, 0.05), estimate(0.89, 0.05), None))
    assert "may be chance" in answer(results).support[0]
    for number, wrong in enumerate((0, 30, 1)):
        predicted(results, number, wrong)
    said = answer(results)
    assert said.support[:2] == [
        "On the same items, the interval of its difference from the same network untrained excludes zero.",
        "On the same items, the interval of its difference from the colour histogram holds zero: it may be chance.",
    ]
    assert [finding.kind for finding in said.findings] == ["good", "open"]
    assert "0.020 lower; on the same items the difference is within (0." in said.findings[0].text


def test_a_difference_to_its_disadvantage_is_told_from_chance_in_the_same_way() -> None:
    results = make_results(scores(estimate(0.90, 0.05), estimate(0.80, 0.05), estimate(0.92, 0.05), None))
    for number, wrong in enumerate((30, 40, 0)):
        predicted(results, number, wrong)
    said = answer(results)
    assert "On the same items, the interval of the difference from the colour histogram excludes zero." in said.support
    assert said.findings[1].kind == "bad"
    assert "0.020 higher; on the same items the difference is within (0." in said.findings[1].text


def test_the_next_encoder_is_compared_on_the_same_items() -> None:
    results = make_results(
        {(MINE, "knn", None, False): estimate(0.90, 0.05), ("other", "knn", None, False): estimate(0.85, 0.05)}
    )
    predicted(results, 0, 0)
    predicted(results, 1, 25)
    assert any(
        "on the same items it is 0.050 (0." in line and "excludes zero" in line for line in answer(results).support
    )
