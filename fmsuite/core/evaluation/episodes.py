"""Few-shot episodes: which bags are shown with their labels, and which are asked, drawn alike for every method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fmsuite.core.evaluation.bags import Bags
from fmsuite.core.evaluation.splits import shuffled_labels
from fmsuite.core.seeding import derive, generator
from fmsuite.errors import UsageError

ATTEMPTS = 40
"""Draws made in search of queries of every class. The second half sets a group of each class aside for the queries."""


@dataclass(frozen=True)
class Draw:
    """One episode.

    Attributes:
        seed: 32 bits, what the draw and all that a method does at random in this episode derive from.
        support: (shots x C,) int64 positions of bags, class after class.
        queries: (Q,) int64 positions of bags, ascending. No group is among both.
        labels: (S,) int64 shuffled labels of all bags; ``None`` for the true ones.
        attempt: how many draws were given up before this one because their queries lacked a class.
    """

    seed: int
    support: Tensor
    queries: Tensor
    labels: Tensor | None = None
    attempt: int = 0


@dataclass(frozen=True)
class Sides:
    """Who may be shown and who is asked.

    Attributes:
        labels, groups: (S,) int64 of every bag; groups count from 0.
        train: positions that supports are drawn from.
        test: positions of the queries; ``None`` for the bags of all groups that gave no support.
    """

    labels: np.ndarray
    groups: np.ndarray
    classes: int
    train: np.ndarray
    test: np.ndarray | None

    @classmethod
    def of(cls, bags: Bags, train: Tensor | None, test: Tensor | None) -> Sides:
        """
        Raises:
            UsageError: if only one side is given, or a group is on both.
        """
        if (train is None) != (test is None):
            raise UsageError("Of the training and the test side only one is given.", "Give both, or neither.")
        _, groups = np.unique(bags.groups.numpy(), return_inverse=True)
        labels = bags.labels.numpy()
        if train is None or test is None:
            return cls(labels, groups, bags.classes, np.arange(len(labels)), None)
        shown, asked = train.numpy(), test.numpy()
        shared = np.intersect1d(groups[shown], groups[asked])
        if len(shared):
            where = int(np.flatnonzero(groups == shared[0])[0])
            raise UsageError(
                f"{len(shared)} groups are on the training and on the test side, one of them with bag {where}.",
                "A patient or scene must stay on one side: correct the split.",
            )
        return cls(labels, groups, bags.classes, shown, asked)

    def shuffled(self, seed: int, number: int) -> Sides:
        """Labels change places within each side, so each side keeps its count of every class."""
        labels = self.labels.copy()
        for role, side in enumerate((self.train, self.test)):
            if side is not None:
                kept, groups = torch.from_numpy(self.labels[side]), torch.from_numpy(self.groups[side])
                labels[side] = shuffled_labels(kept, groups, derive(seed, "side", role), number).numpy()
        return Sides(labels, self.groups, self.classes, self.train, self.test)

    def members(self, label: int) -> np.ndarray:
        """Training bags of a class, ascending."""
        return self.train[self.labels[self.train] == label]

    def askable(self) -> np.ndarray:
        """Classes of which bags can be among the queries. Without a test side these have bags of at least two groups,
        as the group of their supports is not asked."""
        if self.test is not None:
            return np.unique(self.labels[self.test])
        seen = np.zeros((self.classes, int(self.groups.max(initial=-1)) + 1), dtype=bool)
        seen[self.labels, self.groups] = True
        return np.flatnonzero(seen.sum(1) > 1)

    def queries(self, support: np.ndarray) -> np.ndarray:
        if self.test is not None:
            return np.sort(self.test)
        shown = np.zeros(len(self.groups), dtype=bool)
        shown[self.groups[support]] = True
        return np.flatnonzero(~shown[self.groups])

    def limit(self, label: int) -> int:
        """The most shots of a class: all of its training bags, but without a test side those of one group are left
        to be asked, where the class has more than one group."""
        members = self.members(label)
        _, counts = np.unique(self.groups[members], return_counts=True)
        return len(members) - (int(counts.min()) if self.test is None and len(counts) > 1 else 0)


def allowed_shots(
    bags: Bags,
    shots: Sequence[int],
    train: Tensor | None = None,
    test: Tensor | None = None,
    *,
    names: Sequence[str] | None = None,
    unit: str = "bag",
) -> tuple[list[int], list[str]]:
    """The shots that every class has examples for, and sentences on those that were left out.

    Args:
        shots: asked for, at least 1 each.
        train, test: as in ``draws``.
        names: of the classes, for the sentences.
        unit: what a bag is, in the singular.

    Returns:
        The allowed shots, ascending and each once; the sentences.

    Raises:
        UsageError: if no shots are allowed, naming the class that has too few examples, or none.
    """
    if not shots or min(shots) < 1:
        raise UsageError(f"Shots must be at least 1 ({', '.join(map(str, shots)) or 'none given'}).")
    sides = Sides.of(bags, train, test)
    limits = [sides.limit(label) for label in range(bags.classes)]
    fewest = int(np.argmin(limits))
    limit, of_class = limits[fewest], len(sides.members(fewest))
    wanted = sorted(set(shots))
    have = f"class {_name(fewest, names)} has {_count(of_class, unit)} to draw examples from"
    left = "" if limit == of_class else f", and {_count(of_class - limit, unit)} must be left to be asked"
    allowed = [k for k in wanted if k <= limit]
    if not allowed:
        raise UsageError(
            f"No few-shot episode of {wanted[0]} a class can be drawn: {have}{left}.",
            "Label more, ask for fewer shots, or take that class out of the labels.",
        )
    out = [str(k) for k in wanted if k > limit]
    notes = [f"Shots {', '.join(out)} were left out: {have}{left}."] if out else []
    return allowed, notes


def draws(
    bags: Bags,
    shots: int,
    episodes: int,
    seed: int,
    train: Tensor | None = None,
    test: Tensor | None = None,
    *,
    shuffled: bool = False,
    names: Sequence[str] | None = None,
) -> list[Draw]:
    """Episodes that depend on labels, groups, sides and the seed only: equal for every method and encoder.

    In each, ``shots`` bags of every class are drawn without replacement from the training side, and the whole test
    side is asked. Without sides, supports are drawn from all bags, and every bag of the groups (patients) that gave
    none is asked; a draw whose queries lack a class that could be asked is made again (``Draw.attempt``), and after
    ``ATTEMPTS`` draws the one with most classes is taken. Episode e of more shots contains the supports of episode e
    of fewer, unless one was made again.

    Args:
        train, test: int64 positions of bags; both or neither.
        shuffled: labels change places anew in every episode, within each side and with groups kept together as far as
            their sizes allow (``splits.shuffled_labels``): the control that must be at chance.
        names: of the classes, for messages.

    Raises:
        UsageError: if a class has fewer training bags than ``shots``, a group is on both sides, or fewer than two
            classes can be asked.
    """
    if shots < 1 or episodes < 1:
        raise UsageError(f"Few-shot episodes need at least one shot and one episode ({shots} and {episodes} asked).")
    sides = Sides.of(bags, train, test)
    for label in range(bags.classes):
        if len(sides.members(label)) < shots:
            raise UsageError(
                f"Class {_name(label, names)} has {_count(len(sides.members(label)), 'example')} to draw from, fewer "
                f"than {shots} shots.",
                "Label more, or ask for fewer shots.",
            )
    askable = sides.askable()
    if len(askable) < 2:
        lacking = ", ".join(_name(label, names) for label in range(bags.classes) if label not in askable)
        raise UsageError(
            f"Nothing of class {lacking} can be asked, as all of it belongs to "
            + ("the training side." if test is not None else "one group (patient), which gives the examples."),
            "Label examples of another patient, or give a test side that has every class.",
        )
    return [_draw(sides, shots, derive(seed, "episode", number) >> 31, shuffled, names) for number in range(episodes)]


def _draw(sides: Sides, shots: int, seed: int, shuffled: bool, names: Sequence[str] | None) -> Draw:
    best: tuple[int, Draw] | None = None
    for attempt in range(ATTEMPTS):
        labelled = sides.shuffled(seed, attempt) if shuffled else sides
        random = generator(seed, "support", attempt)
        support = _support(labelled, shots, random, set_aside=attempt >= ATTEMPTS // 2)
        if support is None:
            continue
        queries = labelled.queries(support)
        asked = np.unique(labelled.labels[queries])
        if best is None or len(asked) > best[0]:
            labels = torch.from_numpy(labelled.labels) if shuffled else None
            draw = Draw(seed, torch.from_numpy(support), torch.from_numpy(queries), labels, attempt)
            best = (len(asked), draw)
        if len(np.setdiff1d(labelled.askable(), asked)) == 0:
            break
    if best is None or best[0] < 2:
        raise UsageError(
            f"After {shots} examples of each class fewer than two classes are left to be asked: too few groups "
            "(patients) remain.",
            "Label more patients, or ask for fewer shots.",
        )
    return best[1]


def _support(sides: Sides, shots: int, random: np.random.Generator, set_aside: bool) -> np.ndarray | None:
    """(shots x C,) positions, or ``None`` if the groups that were set aside leave too few bags of a class."""
    members = [sides.members(label) for label in range(sides.classes)]
    if set_aside and sides.test is None:
        kept = [int(random.choice(sides.groups[members[label]])) for label in sides.askable()]
        members = [bags[~np.isin(sides.groups[bags], kept)] for bags in members]
    if min(map(len, members)) < shots:
        return None
    # A permutation of all, cut off: more shots extend the draw of fewer.
    return np.concatenate([random.permutation(bags)[:shots] for bags in members])


def _name(label: int, names: Sequence[str] | None) -> str:
    return f"'{names[label]}'" if names is not None else str(label)


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"
