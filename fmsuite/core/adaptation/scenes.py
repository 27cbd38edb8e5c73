"""What a segmentation network says of a whole source, in overlapping windows, on the input's grid."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fmsuite.core.adaptation.sliding_window import Blend, stream_windows
from fmsuite.core.adaptation.task import Segmentation
from fmsuite.core.data.sample import Array, View
from fmsuite.core.data.scene import Scene
from fmsuite.core.inputs import SPATIAL_AXES, InputSpec, Normalize
from fmsuite.errors import UsageError


def scene_scores(
    task: Segmentation,
    spec: InputSpec,
    scene: Scene,
    *,
    overlap: float = 0.5,
    blend: Blend = "gaussian",
    batch: int = 4,
    device: torch.device | str = "cpu",
) -> Array:
    """(K, *size) float32 probabilities of every sample of a scene.

    Windows have the size that the network was trained at. Where the scene is smaller, what is missing is invalid, as
    in training. A scene whose samples know their spacing tells it to the network.

    Args:
        task: on ``device``, in evaluation mode.
        spec: how its input is normalised.
        overlap, blend, batch: see ``sliding_window``.

    Raises:
        ReadFailure: if the source cannot be read.
        UsageError: for an input with axes that are not spatial.
    """
    others = [axis for axis in spec.axes if axis not in SPATIAL_AXES]
    if others:
        raise UsageError(
            f"Whole sources are predicted along spatial axes, and this input has '{others[0]}'.",
            "Judge the task by its windows instead.",
        )
    normalize = Normalize(spec).to(device)
    spacing: tuple[float, ...] | None = None

    def read(start: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        nonlocal spacing
        sample = scene.read(start, extent)
        spacing = sample.spacing
        values = torch.from_numpy(np.ascontiguousarray(sample.values, dtype=np.float32))
        valid = torch.ones_like(values) if sample.valid is None else torch.from_numpy(sample.valid).expand_as(values)
        return torch.cat([values, valid.float()])

    def network(windows: Tensor) -> Tensor:
        # What stands around a small scene is 0, and so is its validity.
        values, valid = windows.chunk(2, dim=1)
        view = View(values, valid > 0, spacing=None if spacing is None else torch.tensor([spacing] * len(values)))
        return task.predict(normalize.view(view.to(torch.device(device))))

    whole = np.empty((task.config.classes, *scene.size), dtype=np.float32)
    stripes = stream_windows(
        network, read, scene.size, task.size, overlap=overlap, blend=blend, batch=batch, device=device
    )
    for stripe in stripes:
        whole[:, stripe.start : stripe.start + stripe.values.shape[1]] = stripe.values.cpu().numpy()
    return whole
