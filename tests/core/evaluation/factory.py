"""Bags with a planted difference, and their judgement, for the tests of few-shot classification."""

from __future__ import annotations

import numpy as np
import torch

from fmsuite.core.evaluation.bags import Bags
from fmsuite.core.evaluation.episodes import draws
from fmsuite.core.evaluation.fewshot import run
from fmsuite.core.evaluation.results import Evaluation


def cohort(slides: int = 60, dim: int = 64, strength: float = 4.0, classes: int = 2, sizes: tuple = (50, 200)) -> Bags:
    """Slides of noise, a tenth of whose tiles are moved along the axis of the slide's class; a patient each."""
    random = np.random.default_rng(0)
    labels = np.arange(slides) % classes
    counts = random.integers(sizes[0], sizes[1] + 1, slides)
    features = random.normal(size=(counts.sum(), dim))
    offsets = np.r_[0, counts.cumsum()]
    for start, count, label in zip(offsets, counts, labels, strict=False):
        features[start : start + max(1, count // 10), label] += strength
    labels_, groups = torch.from_numpy(labels), torch.arange(slides)
    return Bags(torch.from_numpy(features).float(), torch.from_numpy(offsets), labels_, groups, classes)


def judged(bags: Bags, method: str, shots: int, episodes: int, shuffled: bool = False, **options: object) -> Evaluation:
    drawn = draws(bags, shots, episodes, 0, shuffled=shuffled)
    return run(bags, method, drawn, encoder="generated", shots=shots, seed=0, **{"replicates": 20, **options})
