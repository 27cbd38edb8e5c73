"""At the end of ``fmsuite pretrain``: pictures of what a masked objective fills in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.pipeline import NoAugmentation, ViewPipeline, WindowDataset, collate
from fmsuite.core.data.reader import Reader
from fmsuite.core.data.sample import SampleKey
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.inputs import Normalize
from fmsuite.core.objectives.base import Objective
from fmsuite.core.reports.reconstructions import write_reconstructions
from fmsuite.core.seeding import generator
from fmsuite.core.training.monitor import evaluating
from fmsuite.core.training.run_folder import RunFolder
from fmsuite.domains.base import Domain

SAMPLES = 4


def draw_reconstructions(
    objective: Objective,
    domain: Domain,
    reader: Reader,
    index: SampleIndex,
    run: RunFolder,
    skipped: SkippedLog,
    *,
    seed: int,
    step: int,
    held_out: bool,
) -> None:
    """Of a few windows, the same at every run of one seed: cropped and masked as in training, otherwise as they are.
    Objectives that predict no pixels leave nothing.

    Args:
        index: the windows to draw from.
        held_out: they were not trained on.
    """
    if type(objective).reconstruct is Objective.reconstruct:
        return
    spec = objective.backbone.spec
    requests = [replace(request, augment="none") for request in objective.view_requests()]
    pipeline = ViewPipeline(requests, NoAugmentation(), objective.backbone.grid, spec.axes, seed)
    dataset = WindowDataset(index, reader, pipeline, seed)
    rows = np.sort(generator(seed, "reconstructions").permutation(len(index))[:SAMPLES])
    batch = collate([dataset[SampleKey(0, int(row))] for row in rows])
    for window in batch.skipped:
        skipped.add(window.source, window.stage, window.reason)
    device = next(objective.parameters()).device
    normalize = Normalize(spec).to(device)
    # Compiled blocks would be compiled once more for this batch.
    with evaluating(objective), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        found = objective.reconstruct(batch.to(device).map_views(normalize.view))
    assert found is not None
    write_reconstructions(
        found,
        normalize,
        lambda values: domain.to_rgb(values, spec),
        [index[row].source for row in batch.indices.tolist()],
        run.path,
        step=step,
        held_out=held_out,
    )
