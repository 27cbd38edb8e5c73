"""Few-label curves: a metric by how many of the training groups were labelled."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fmsuite.core.evaluation.results import Evaluation, Results
from fmsuite.core.reports.blocks import Figure
from fmsuite.core.reports.charts import Curve, shot_curves
from fmsuite.core.reports.wording import chance_level, method_name, metric_name, of


def share_figures(results: Results, marks: dict[str, int], keys: Iterator[str]) -> list[Figure]:
    """For each method that was judged with shares of the training groups, a chart with a curve for each encoder.

    Args:
        marks: colour and shape of each encoder.
        keys: unique ones, for the charts.
    """
    metric = metric_name(results.primary)
    figures = []
    for method in dict.fromkeys(e.method for e in results.evaluations if e.fraction is not None):
        curves = []
        for encoder in results.encoders:
            rows = [
                e
                for e in results.evaluations
                if (e.encoder, e.method, e.shots, e.shuffled) == (encoder.name, method, None, False)
            ]
            # Shares that come to the same number of groups are the same items.
            sizes = {_groups(results, e): e for e in sorted(rows, key=lambda e: e.fraction or 1.0)}
            points = [(size, of(e, results.primary)) for size, e in sorted(sizes.items())]
            points = [(size, estimate) for size, estimate in points if math.isfinite(estimate.mean)]
            if len(points) > 1:
                curves.append(
                    Curve(
                        encoder.name,
                        [float(size) for size, _ in points],
                        [estimate.mean for _, estimate in points],
                        [estimate.low for _, estimate in points],
                        [estimate.high for _, estimate in points],
                        marks[encoder.name],
                        "encoder" if encoder.kind == "encoder" else "control",
                    )
                )
        if curves:
            title = f"{metric} by number of labelled groups, {method_name(method)}"
            chance = chance_level(results.primary, len(results.classes))
            svg = shot_curves(next(keys), curves, title=title, y_label=metric, x_label="labelled groups", chance=chance)
            figures.append(Figure(svg, heading=f"{method_name(method)}, shares of the training groups"))
    return figures


def _groups(results: Results, evaluation: Evaluation) -> float:
    """How many groups the first draw trained on; of folds, in the middle between the fewest and the most."""
    fewest_and_most = evaluation.settings.get("training_groups")
    if fewest_and_most:
        return sum(fewest_and_most) / 2
    support = evaluation.episodes[0].support
    if support is None:
        return len({item.group for item in results.items if item.split == "train"})
    return len({results.items[number].group for number in support})
