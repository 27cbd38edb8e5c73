"""What a segmentation network says of a whole source, in overlapping windows, on the input's grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fmsuite.core.adaptation.sliding_window import Blend, stream_windows
from fmsuite.core.adaptation.task import Segmentation
from fmsuite.core.data.sample import Array, ArraySample, View
from fmsuite.core.data.scene import Scene
from fmsuite.core.inputs import SPATIAL_AXES, InputSpec, Normalize
from fmsuite.errors import UsageError

PANEL = 32
"""Width of a panel in windows."""


@dataclass(frozen=True)
class SceneBox:
    """What is said of a part of a scene.

    Attributes:
        start: where it begins, in samples.
        scores: (K, *extent) float32 probabilities.
        valid: (*extent) bool, where a channel has data (of a change, at both dates).
    """

    start: tuple[int, ...]
    scores: Array
    valid: Array


class SceneViews:
    """Boxes of a scene as tensors that windows can be put together from, and the views that these are.

    Args:
        axes: of the network's input; dates, where it has them, are read whole.
    """

    def __init__(self, scene: Scene, axes: tuple[str, ...]) -> None:
        self.scene = scene
        others = [axis for axis in axes if axis not in SPATIAL_AXES]
        if others not in ([], ["time"]) or axes[: len(others)] != tuple(others):
            raise UsageError(
                f"Whole sources are predicted along spatial axes, and this input has '{others[0]}'.",
                "Judge the task by its windows instead.",
            )
        self._dated = bool(others)
        self._like: ArraySample | None = None

    def read(self, start: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        """(2C, *extent) float32, or (2C * dates, *extent): raw values and then their validity."""
        sample = self.scene.read(start, extent)
        self._like = sample
        values = torch.from_numpy(np.ascontiguousarray(sample.values, dtype=np.float32))
        valid = torch.ones_like(values) if sample.valid is None else torch.from_numpy(sample.valid).expand_as(values)
        both = torch.cat([values, valid.float()])
        return both.flatten(0, 1) if self._dated else both

    def view(self, windows: Tensor, device: torch.device | str) -> View:
        """(N, 2C, *window) of what ``read`` gave. What stands around a small scene is 0, and so is its validity."""
        assert self._like is not None
        count = len(windows)
        if self._dated:
            windows = windows.unflatten(1, (-1, self._like.values.shape[1]))
        values, valid = windows.chunk(2, dim=1)
        spacing = self._like.spacing
        coords = {
            axis: torch.from_numpy(np.asarray(places, np.float32)).expand(count, -1)
            for axis, places in self._like.coords.items()
        }
        spaces = None if spacing is None else torch.tensor([list(spacing)] * count, dtype=torch.float32)
        return View(values, valid > 0, coords=coords, spacing=spaces).to(torch.device(device))


def stream_scene(
    task: Segmentation,
    spec: InputSpec,
    scene: Scene,
    *,
    overlap: float = 0.5,
    blend: Blend = "gaussian",
    batch: int = 4,
    device: torch.device | str = "cpu",
    panel: int | None = PANEL,
) -> Iterator[SceneBox]:
    """Probabilities of every sample of a scene, part by part, each sample once. Memory does not grow with the scene.

    Windows have the size that the network was trained at. Where the scene is smaller, what is missing is invalid, as
    in training. A scene whose samples know their spacing tells it to the network.

    Args:
        task: on ``device``, in evaluation mode.
        spec: how its input is normalised.
        overlap, blend, batch: see ``sliding_window``.
        panel: width of a panel in windows, see ``stream_windows``; ``None`` for the scene's own width. What is said
            does not depend on it.

    Raises:
        ReadFailure: if the source cannot be read.
        UsageError: for an input with axes that are neither spatial nor time.
    """
    views = SceneViews(scene, spec.axes)
    normalize = Normalize(spec).to(device)
    window = task.size[-len(scene.size) :]

    def network(windows: Tensor) -> Tensor:
        view = views.view(windows, device)
        assert view.valid is not None
        seen = task.seen(view.valid.any(1))[:, None].float()
        return torch.cat([task.predict(normalize.view(view)).float(), seen], dim=1)

    for stripe in stream_windows(
        network,
        views.read,
        scene.size,
        window,
        overlap=overlap,
        blend=blend,
        batch=batch,
        device=device,
        panel=None if panel is None else panel * window[min(1, len(window) - 1)],
    ):
        values = stripe.values.cpu().numpy()
        start = (stripe.start, stripe.left, *[0] * len(scene.size))[: len(scene.size)]
        yield SceneBox(start, values[:-1], values[-1] > 0)


def scene_scores(
    task: Segmentation,
    spec: InputSpec,
    scene: Scene,
    *,
    overlap: float = 0.5,
    blend: Blend = "gaussian",
    batch: int = 4,
    device: torch.device | str = "cpu",
) -> SceneBox:
    """The whole scene at once; see ``stream_scene``."""
    scores = np.empty((task.config.classes, *scene.size), dtype=np.float32)
    valid = np.empty(scene.size, dtype=bool)
    for box in stream_scene(task, spec, scene, overlap=overlap, blend=blend, batch=batch, device=device, panel=None):
        place = tuple(slice(s, s + n) for s, n in zip(box.start, box.valid.shape, strict=True))
        scores[(slice(None), *place)] = box.scores
        valid[place] = box.valid
    return SceneBox((0,) * len(scene.size), scores, valid)
