"""SimpleShot episodes on stored features, against a plain loop over scikit-learn.

    OMP_NUM_THREADS=1 python benchmarks/fewshot_episodes.py

Prints seconds, and seconds of CPU, of ``draws`` and ``run`` (predictions, five metrics, bootstrap intervals), and,
over the first episodes, the ratio of the baseline's CPU time to theirs. The baseline subtracts the mean, normalises,
fits ``sklearn.neighbors.NearestCentroid`` and takes the same five metrics from ``sklearn.metrics``; it has no
intervals, so the ratio is of predictions and metrics alone. Both must predict alike.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from sklearn import metrics as reference
from sklearn.neighbors import NearestCentroid

from fmsuite.core.evaluation import classifiers, fewshot
from fmsuite.core.evaluation.bags import Bags
from fmsuite.core.evaluation.episodes import Draw, draws
from fmsuite.core.evaluation.metrics import score


def cohort(tiles: int, dim: int, classes: int, seed: int = 0) -> Bags:
    """Gaussian classes, ten tiles a patient."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, tiles)
    centres = random.normal(size=(classes, dim)) * 0.15
    features = centres[labels] + random.normal(size=(tiles, dim)) + 3
    groups = torch.arange(tiles) // 10
    return Bags.of_single(torch.from_numpy(features).float(), torch.from_numpy(labels), groups, classes)


def ours(bags: Bags, episodes: Sequence[Draw]) -> list[np.ndarray]:
    classifier, predictions = classifiers.CLASSIFIERS["simpleshot"], []
    for draw in episodes:
        scores = classifier(bags, draw.support, draw.queries, draw.seed)
        predicted = scores.argmax(1)
        score(scores, predicted, bags.labels[draw.queries], bags.classes)
        predictions.append(predicted.numpy())
    return predictions


def baseline(bags: Bags, episodes: Sequence[Draw]) -> list[np.ndarray]:
    features, labels, predictions = bags.features.numpy(), bags.labels.numpy(), []
    for draw in episodes:
        support, queries = draw.support.numpy(), draw.queries.numpy()
        mean = features[support].mean(0)
        known, asked = (
            (x - mean) / np.linalg.norm(x - mean, axis=1, keepdims=True) for x in (features[support], features[queries])
        )
        model = NearestCentroid().fit(known, labels[support])
        predicted, target = model.predict(asked), labels[queries]
        distances = ((asked[:, None] - model.centroids_[None]) ** 2).sum(2)
        scores = np.exp(-distances) / np.exp(-distances).sum(1, keepdims=True)
        reference.balanced_accuracy_score(target, predicted)
        reference.roc_auc_score(target, scores, multi_class="ovo")
        reference.f1_score(target, predicted, average="weighted")
        reference.cohen_kappa_score(target, predicted, weights="quadratic")
        reference.accuracy_score(target, predicted)
        predictions.append(predicted)
    return predictions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--compared", type=int, default=100, help="episodes that the baseline runs too")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    bags = cohort(options.tiles, options.dim, options.classes)

    start, cpu = time.perf_counter(), time.process_time()
    drawn = draws(bags, options.shots, options.episodes, seed=0)
    at_draws = time.perf_counter()
    result = fewshot.run(bags, "simpleshot", drawn, encoder="generated", shots=options.shots, seed=0)
    end, cpu = time.perf_counter(), time.process_time() - cpu
    accuracy = result.metrics["balanced_accuracy"]
    print(
        f"{options.episodes} SimpleShot episodes, {options.shots} shots of {options.classes} classes, "
        f"{options.tiles} tiles x {options.dim}, {torch.get_num_threads()} threads"
    )
    print(f"  draws {at_draws - start:.2f} s, episodes and intervals {end - at_draws:.2f} s")
    print(f"  all {end - start:.2f} s, {cpu:.2f} s of CPU")
    print(f"  balanced accuracy {accuracy.mean:.3f} ({accuracy.low:.3f} to {accuracy.high:.3f})")

    few, seconds, predictions = drawn[: options.compared], [], []
    for run in (ours, baseline):
        start = time.process_time()
        predictions.append(run(bags, few))
        seconds.append(time.process_time() - start)
    unlike = sum(int((a != b).sum()) for a, b in zip(*predictions, strict=True))
    print(
        f"  {len(few)} episodes without intervals: {seconds[0]:.2f} s of CPU; scikit-learn loop {seconds[1]:.2f} s; "
        f"ratio {seconds[1] / seconds[0]:.1f}; {unlike} of {sum(map(len, predictions[0]))} predictions differ"
    )


if __name__ == "__main__":
    main()
