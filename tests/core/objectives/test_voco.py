"""VoCo's labels against counted pixels, its terms against the public modules and loops, on one process and on two."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from fmsuite.core.data.crop import cell_box
from fmsuite.core.data.pipeline import NoAugmentation, ViewPipeline
from fmsuite.core.data.sample import ArraySample, Batch, SampleKey
from fmsuite.core.objectives.voco import (
    VoCoConfig,
    assignment_loss,
    next_sample,
    orthogonality,
    position_labels,
    similarities,
    voco_terms,
)
from fmsuite.errors import UsageError
from tests.ranks import averaged

SMALL = {"voco": {"random_crops": 2, "head_hidden": 32, "head_out": 16}}


def grid_boxes(size, cells):
    random = np.random.default_rng(0)
    count = int(np.prod(cells))
    return torch.tensor([cell_box(size, cells, number, random) for number in range(count)])


def test_labels_equal_the_reference(load):
    reference = load("medical_losses")
    corners = reference["centres"] - 32.0
    boxes = torch.stack([corners, torch.full_like(corners, 64.0)], dim=1) / 192
    labels = position_labels(boxes, grid_boxes((192, 192), (3, 3)) / 192)
    torch.testing.assert_close(labels, reference["labels"].to(labels.dtype), atol=1e-6, rtol=0)
    assert torch.equal(labels == 0, reference["labels"] == 0)


def test_loss_and_regulariser_equal_the_reference(load):
    reference = load("medical_losses")
    labels, found = reference["labels"], reference["similarities"]
    loss = assignment_loss(labels, found, torch.ones_like(labels, dtype=torch.bool))
    torch.testing.assert_close(loss, reference["ce_loss"], atol=1e-6, rtol=1e-6)
    usable = torch.ones(1, 9, dtype=torch.bool)
    torch.testing.assert_close(
        orthogonality(reference["base"][None], usable), reference["regularization"], atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("size", "cells"), [((12, 18), (2, 3)), ((6, 12, 12), (1, 3, 3)), ((8, 8, 6), (2, 2, 3)), ((3, 12, 9), (1, 2, 3))]
)
def test_labels_equal_counted_voxels(size, cells):
    random = np.random.default_rng(3)
    bases = grid_boxes(size, cells)
    crops = torch.tensor([cell_box(size, cells, None, random) for _ in range(20)])

    def inside(box):
        mask = np.zeros(size, dtype=bool)
        start, extent = box.round().int().tolist()
        mask[tuple(slice(begin, begin + side) for begin, side in zip(start, extent))] = True
        return mask

    expected = [[(inside(crop) & inside(base)).sum() / inside(crop).sum() for base in bases] for crop in crops]
    labels = position_labels(crops, bases)
    torch.testing.assert_close(labels, torch.tensor(np.array(expected), dtype=labels.dtype), atol=1e-6, rtol=0)
    torch.testing.assert_close(labels.sum(1), torch.ones(20, dtype=labels.dtype), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["rgb", "volume", "series"])
def test_labels_of_views_from_the_pipeline_are_the_overlap_of_what_was_cut(toys, kind):
    objective, spec = toys.objective("voco", kind), toys.toys[kind].spec
    size = tuple(12 if axis in spec.spatial else length for axis, length in enumerate(spec.size))
    numbers = np.arange(np.prod(size), dtype=np.float64).reshape(1, *size)
    values = np.broadcast_to(numbers, (spec.in_chans, *size)).copy()
    requests = []
    for request in objective.view_requests():
        cell = tuple(length // count for length, count in zip(size, request.cells, strict=True))
        requests.append(request.__class__(**{**vars(request), "size": cell, "augment": "none"}))
    pipeline = ViewPipeline(requests, NoAugmentation(), None, spec.axes, seed=1)
    views = pipeline(ArraySample(values, coords=toys.toys[kind].coords), SampleKey(0, 0))
    base, random = (np.stack([view.box for view in views[name]]) for name in ("base", "random"))
    labels = position_labels(torch.from_numpy(random), torch.from_numpy(base))
    for row, crop in enumerate(views["random"]):
        here = set(crop.values[0].ravel().tolist())
        shares = [len(here & set(cell.values[0].ravel().tolist())) / len(here) for cell in views["base"]]
        torch.testing.assert_close(labels[row].double(), torch.tensor(shares).double(), atol=1e-6, rtol=0)


def by_hand(student, taught, usable, labels, cells):
    """The three terms, sample by sample and pair by pair."""

    def cosine(a, b):
        return max(0.0, float(a @ b / (a.norm() * b.norm())))

    def loss(asked, found):
        positive = sum(-y * np.log(1 - abs(y - s) + 1e-6) for y, s in zip(asked, found))
        negative = [-np.log(1 - s + 1e-6) for y, s in zip(asked, found) if y == 0]
        return positive / (sum(asked) + 1e-6) + sum(negative) / (len(negative) + 1e-6)

    kept = [i for i in range(len(student)) if usable[i, :cells].any() and usable[i, cells:].any()]
    intra, inter, apart = [], [], []
    for position, i in enumerate(kept):
        rows = [r for r in range(student.shape[1] - cells) if usable[i, cells + r]]
        mine = [k for k in range(cells) if usable[i, k]]
        asked = [float(labels[i, r, k]) for r in rows for k in mine]
        intra.append(loss(asked, [cosine(student[i, cells + r], taught[i, k]) for r in rows for k in mine]))
        j = kept[(position + 1) % len(kept)]
        theirs = [k for k in range(cells) if usable[j, k]]
        asked = [cosine(taught[i, cells + r], taught[j, k]) for r in rows for k in theirs]
        inter.append(loss(asked, [cosine(student[i, cells + r], student[j, k]) for r in rows for k in theirs]))
        pairs = [cosine(student[i, a], student[i, b]) ** 2 for a in mine for b in mine if a < b]
        apart.append(sum(pairs) / len(pairs))
    return {"intra": np.mean(intra), "inter": np.mean(inter), "orthogonality": np.mean(apart)}


@pytest.mark.parametrize("all_usable", [True, False])
def test_the_terms_equal_loops_over_samples_and_pairs(all_usable):
    generator = torch.Generator().manual_seed(0)
    student, taught = torch.randn(2, 4, 12, 8, generator=generator)
    boxes = torch.tensor([cell_box((1.0, 1.0), (3, 3), None, np.random.default_rng(i), False) for i in range(12)])
    labels = position_labels(boxes.view(4, 3, 2, 2).float(), grid_boxes((1.0, 1.0), (3, 3)).float())
    usable = torch.ones(4, 12, dtype=torch.bool)
    if not all_usable:
        usable[1] = False
        usable[0, [2, 10]] = False
    terms = voco_terms(student, taught, usable, labels)
    expected = by_hand(student, taught, usable, labels, 9)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-5)


def test_only_the_students_side_takes_gradients():
    student, taught = (torch.rand(3, 11, 8).requires_grad_() for _ in range(2))
    labels = torch.rand(3, 2, 9)
    usable = torch.ones(3, 11, dtype=torch.bool)
    terms = voco_terms(student, taught.detach(), usable, labels)
    (gradient,) = torch.autograd.grad(terms["intra"], student, retain_graph=True)
    assert not gradient[:, :9].any()
    (gradient,) = torch.autograd.grad(terms["orthogonality"], student)
    assert not gradient[:, 8:].any()
    assert gradient[:, :8].any(2).all()


def test_the_next_sample_is_the_next_that_counts():
    rows, has_next = next_sample(torch.tensor([True, False, True, True]))
    assert rows[[0, 2, 3]].tolist() == [2, 3, 0]
    assert has_next.tolist() == [True, False, True, True]
    assert not next_sample(torch.tensor([False, True]))[1].any()


def step(rank, ranks):
    """The gradient of the terms with respect to embeddings, of this rank's share of four samples."""
    generator = torch.Generator().manual_seed(2)
    student, taught = torch.randn(2, 4, 11, 8, generator=generator)
    labels = torch.rand(4, 2, 9, generator=generator)
    usable = torch.ones(4, 11, dtype=torch.bool)
    usable[1], usable[3, 4] = False, False
    share = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    scale = torch.ones(8, requires_grad=True)
    terms = voco_terms(student[share] * scale, taught[share], usable[share], labels[share])
    sum(terms.values()).backward()
    return {**{name: term.detach() for name, term in terms.items()}, "gradient": scale.grad}


def test_two_ranks_give_what_one_process_gives(two_ranks):
    found, expected = averaged(two_ranks(step, 2)), step(0, 1)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=2e-6)


def test_the_teacher_is_the_projectors_average_and_the_encoder_has_none(toys, context):
    objective = toys.objective("voco")
    before = copy.deepcopy(objective.teacher_head.state_dict())
    with torch.no_grad():
        for parameter in objective.head.parameters():
            parameter += 1.0
    objective.after_update(context)
    for name, value in objective.teacher_head.state_dict().items():
        torch.testing.assert_close(value, before[name] + 0.1)
    assert objective.encoder is objective.backbone
    assert not any(parameter.requires_grad for parameter in objective.teacher_head.parameters())


@pytest.mark.parametrize("kind", ["rgb", "volume"])
def test_base_crops_tile_the_plane(toys, kind):
    base, random = toys.objective("voco", kind).view_requests()
    assert base.cells == random.cells == ((3, 3) if kind == "rgb" else (1, 3, 3))
    assert (base.count, base.tiled, random.count, random.tiled) == (9, True, 2, False)
    base, random = toys.objective("voco", kind, grid=(2,) * len(base.size), random_crops=3).view_requests()
    assert (base.count, random.count) == (2 ** len(base.size), 3)


def test_a_short_run_learns_where_crops_lie(toys):
    objective = toys.objective("voco")
    losses = toys.train(objective, [toys.batch(objective)], steps=10)
    assert losses[-1] < 0.8 * losses[0]


def test_unsuitable_grids_batches_and_views_are_refused(toys, context):
    for grid in ((3,), (1, 1), (0, 3)):
        with pytest.raises(UsageError, match=r"objective\.grid"):
            toys.objective("voco", grid=grid)
    with pytest.raises(UsageError, match=r"objective\.grid"):
        toys.objective("voco", "series", grid=(3, 3, 3))
    objective = toys.objective("voco")
    with pytest.raises(UsageError, match="batch of one"):
        objective.check_batch(1)
    batch: Batch = toys.batch(objective)
    for view in batch.views["base"]:
        view.box = None
    with pytest.raises(ValueError, match="do not say where"):
        objective(batch, context)
    assert VoCoConfig().momentum == 0.9


def test_similarities_are_cosines_without_their_negative_half():
    crops, bases = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [-1.0, 1.0]])
    expected = torch.tensor([[1.0, 0.0], [0.0, 0.5**0.5]])
    torch.testing.assert_close(similarities(crops, bases), expected)


def test_the_loss_is_not_the_variant_that_squares_what_lies_apart(load):
    """nnssl averages s^2 over pairs without overlap, and does not square the regulariser's similarities."""
    reference = load("medical_losses")
    labels, found = reference["labels"], reference["similarities"]
    apart = labels == 0
    near = (-labels * torch.log(1 - (labels - found).abs() + 1e-6)).sum() / labels.sum()
    variant = near + (found[apart] ** 2).mean()
    loss = assignment_loss(labels, found, torch.ones_like(labels, dtype=torch.bool))
    assert loss.item() == pytest.approx((near - torch.log(1 - found[apart] + 1e-6).mean()).item(), rel=1e-5)
    assert abs(loss - variant) > 0.1
    flat = similarities(reference["base"], reference["base"]).triu(diagonal=1).sum() / 36
    squared = orthogonality(reference["base"][None], torch.ones(1, 9, dtype=torch.bool))
    assert squared < 0.8 * flat
