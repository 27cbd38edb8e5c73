"""Which windows an encoder finds alike: some queries, each with its nearest windows of other groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fmsuite.core.reports.exhibits import Neighbours, Picture
from fmsuite.core.reports.pictures import Pictures
from fmsuite.core.seeding import generator
from fmsuite.errors import FmsuiteError


def choose_queries(
    labels: Tensor | np.ndarray,
    held_out: Tensor | np.ndarray,
    predicted: Tensor | np.ndarray | None = None,
    *,
    count: int = 8,
    seed: int = 0,
) -> np.ndarray:
    """Positions of windows worth asking about: held out where any are, classes in turn, mistakes as often as not.

    In the first round every class gives one that was predicted right, in the second one that was not, and so on; a
    class that has none of the one kind gives one of the other. Where no prediction is known, any window will do.

    Args:
        labels: (N,) int64, -1 where there is none; only labelled windows are chosen, where there are any.
        held_out: (N,) bool.
        predicted: (N,) int64, -1 where a window was not asked.
        count: how many, at most.

    Returns:
        (Q,) int64, class after class within each round.
    """
    classes = torch.as_tensor(labels).cpu().numpy()
    eligible = torch.as_tensor(held_out).cpu().numpy().astype(bool)
    if not eligible.any():
        eligible = np.ones(len(classes), bool)
    if (classes[eligible] >= 0).any():
        eligible = eligible & (classes >= 0)
    answers = classes if predicted is None else torch.as_tensor(predicted).cpu().numpy()
    wrong = (answers >= 0) & (answers != classes)
    names = np.unique(classes[eligible])
    piles = {
        (int(name), mistaken): list(
            generator(seed, "neighbours", int(name), int(mistaken)).permutation(
                np.flatnonzero(eligible & (classes == name) & (wrong == mistaken))
            )
        )
        for name in names
        for mistaken in (False, True)
    }
    chosen: list[int] = []
    turn = False
    while len(chosen) < count and any(piles.values()):
        for name in names:
            pile = piles[int(name), turn] or piles[int(name), not turn]
            if pile and len(chosen) < count:
                chosen.append(int(pile.pop(0)))
        turn = not turn
    return np.array(chosen, dtype=np.int64)


def directions(features: Tensor, places: np.ndarray | None = None) -> Tensor:
    """Features without their mean, L2-normalised: what k-NN and prototypes compare, and what the pictures show.

    Some encoders give all their features one large common part, beside which every cosine is near 1.

    Args:
        features: (N, D) float.
        places: (P,) positions of those that are wanted; all, if not given. The mean is that of all.

    Returns:
        (N, D) or (P, D) float32. A feature that equals the mean to float32 resolution has no direction: it is zero.
    """
    values = features.detach().cpu().float()
    # NumPy's sum, unlike torch's, does not depend on the number of threads.
    mean = torch.from_numpy(values.numpy().mean(axis=0, dtype=np.float64))
    chosen = values if places is None else values[torch.from_numpy(places)]
    centred = (chosen - mean).float()
    length = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    floor = float(torch.finfo(torch.float32).eps * torch.linalg.vector_norm(mean))
    return torch.where(length > floor, centred / length, 0.0)


def nearest_of_other_groups(
    features: Tensor, groups: Tensor, queries: Sequence[int] | np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The features nearest to each query by the cosine of their ``directions``, its own group passed over.

    Args:
        features: (N, D) float.
        groups: (N,) int64.
        queries: (Q,) positions.
        k: how many, at most.

    Returns:
        Positions (Q, k) int64, nearest first (of equally near ones the first), -1 where other groups have fewer; and
        cosine distances (1 - cosine, 0 to 2) (Q, k) float64, NaN there. What has no direction is at 1 from everything.
    """
    places = torch.as_tensor(np.asarray(queries, dtype=np.int64))
    unit = directions(features)
    own = groups.cpu()
    distances = 1 - (unit[places] @ unit.T).double()
    distances = distances.masked_fill(own[places][:, None] == own[None, :], torch.inf)
    order = distances.argsort(dim=1, stable=True)[:, :k]
    found = distances.gather(1, order)
    none = found.isinf()
    return order.masked_fill(none, -1).numpy(), found.masked_fill(none, torch.nan).clamp(min=0).numpy()


def neighbours(
    features: Tensor,
    rows: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    groups: Tensor,
    queries: Sequence[int] | np.ndarray,
    pictures: Pictures,
    *,
    encoder: str,
    classes: Sequence[str],
    names: Sequence[str],
    notes: list[str],
    predicted: Tensor | np.ndarray | None = None,
    k: int = 5,
) -> list[Neighbours]:
    """Queries beside their nearest windows of other groups, as pictures.

    A query without a readable window, or without a window of another group, is left out and noted; of the neighbours,
    those whose window cannot be read.

    Args:
        features: (N, D) float, finite.
        rows: (N,) rows of the index, for ``pictures``.
        labels: (N,) int64, positions in ``classes``, -1 where there is none.
        groups: (N,) int64.
        queries: (Q,) positions among the N, from ``choose_queries``.
        pictures: index rows to pictures.
        encoder: name that goes with them.
        names: (N,) what each window belongs to, for the captions: its slide, file or scene.
        notes: what is left out is said here.
        predicted: (N,) int64, -1 where a window was not asked; a query's caption says what it was taken for.

    Raises:
        FmsuiteError: if a feature is not finite.
    """
    if not bool(torch.isfinite(features).all()):
        bad = int((~torch.isfinite(features)).any(dim=1).nonzero()[0])
        raise FmsuiteError(
            f"Feature {bad} of '{encoder}' ({names[bad]}) is not finite, so it has no neighbours.",
            "Embed again, or look at what the encoder makes of that window.",
        )
    index_rows = torch.as_tensor(rows).cpu().numpy()
    codes = torch.as_tensor(labels).cpu().numpy()
    answers = None if predicted is None else torch.as_tensor(predicted).cpu().numpy()
    near, distances = nearest_of_other_groups(features, groups, queries, k)
    wanted = np.concatenate([np.asarray(queries, dtype=np.int64), near[near >= 0]])
    images = pictures([int(row) for row in index_rows[wanted]])

    def named(place: int) -> str:
        return classes[codes[place]] if codes[place] >= 0 else "no label"

    def shown(place: int, title: str, remark: str) -> Picture | None:
        image: Image.Image | None = images.get(int(index_rows[place]))
        if image is None:
            return None
        label = int(codes[place]) if codes[place] >= 0 else None
        caption = f"{names[place]}{remark}" if label is not None else f"no label, {names[place]}"
        return Picture.of(image, f"{title}: {named(place)}{remark}, {names[place]}", caption, label)

    found: list[Neighbours] = []
    alone = unreadable = 0
    for query, places, apart in zip(map(int, queries), near, distances, strict=True):
        remark = ""
        if answers is not None and answers[query] >= 0 and answers[query] != codes[query]:
            remark = f" (taken for {classes[answers[query]]})"
        asked = shown(query, "Query", remark)
        if places[0] < 0:
            alone += 1
            continue
        if asked is None:
            unreadable += 1
            continue
        beside = [
            (picture, float(distance))
            for rank, (place, distance) in enumerate(zip(places, apart, strict=True), 1)
            if place >= 0 and (picture := shown(int(place), f"Neighbour {rank}", "")) is not None
        ]
        unreadable += int((places >= 0).sum()) - len(beside)
        found.append(
            Neighbours(
                encoder=encoder,
                query=asked,
                nearest=[picture for picture, _ in beside],
                distances=[round(distance, 6) for _, distance in beside],
            )
        )
    if alone:
        notes.append(f"{encoder}: all windows are of one group, so none has neighbours to show.")
    if unreadable:
        notes.append(f"{encoder}: {unreadable} of the neighbours' windows could not be read and are not shown.")
    return found
