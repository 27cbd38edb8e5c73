"""``fmsuite map``: what an encoder tells apart in whole rasters, as colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fmsuite.commands.embed import data_as_seen
from fmsuite.commands.predict import Predicted, stems_of
from fmsuite.commands.setup import open_encoder, open_index
from fmsuite.commands.similar import opened_domain
from fmsuite.core.adaptation.scenes import PANEL, SceneViews
from fmsuite.core.data.forgiving import ForgivingScene
from fmsuite.core.data.index import SampleIndex
from fmsuite.core.data.packed import open_reader
from fmsuite.core.data.packed_scenes import open_scene
from fmsuite.core.data.pipeline import IMAGE, WholeWindows
from fmsuite.core.data.scene_maps import MapKind
from fmsuite.core.data.skipped import FILE_NAME, SkippedLog
from fmsuite.core.encoders import Encoder
from fmsuite.core.similarity import stream_tokens
from fmsuite.core.training.precision import choose_device
from fmsuite.domains.base import Domain, Progress, no_progress
from fmsuite.errors import ReadFailure, UsageError
from fmsuite.tiling.table import spread_rows

WINDOWS = 128
"""Of all files together, evenly spread: the components are those of their patches."""
PERCENTILES = (2.0, 98.0)
"""Of each component: where its colour begins and ends."""


@dataclass(frozen=True)
class Colours:
    """Three principal components as red, green and blue.

    Attributes:
        components: (D, 3) float32.
        low, high: (3,) of their values: drawn black and full.
        shares: (3,) of the features' variance.
    """

    components: Tensor
    low: Tensor
    high: Tensor
    shares: tuple[float, ...]

    @classmethod
    def of(cls, features: Tensor) -> Colours:
        """
        Args:
            features: (N, D), at least 4.

        Raises:
            UsageError: if there are fewer, or all are equal.
        """
        values = features.double()
        if len(values) < 4 or values.shape[1] < 3:
            raise UsageError(f"{len(values)} patches of {values.shape[1]} features have no three colours.")
        centred = values - values.mean(0)
        variances, vectors = torch.linalg.eigh(centred.T @ centred / len(values))
        if float(variances[-1]) <= 0:
            raise UsageError("All patches have the same features: there is nothing to see.", "Take another encoder.")
        components = vectors.flip(1)[:, :3]
        # Either direction is a principal one.
        signs = components.gather(0, components.abs().argmax(0, keepdim=True)).sign()
        components = (components * signs).float()
        seen = np.percentile((features.float() @ components).numpy(), PERCENTILES, axis=0)
        low, high = torch.from_numpy(seen).float()
        shares = variances.flip(0)[:3] / variances.sum()
        return cls(components, low, torch.maximum(high, low + 1e-12), tuple(shares.tolist()))

    def drawn(self, projected: Tensor) -> np.ndarray:
        """(3, ...) components to 1 to 255; 0 is kept for what has no data."""
        low, high = (end.reshape(3, *[1] * (projected.dim() - 1)) for end in (self.low, self.high))
        return (1 + 254 * ((projected - low) / (high - low)).clamp(0, 1)).numpy()


def feature_pictures(
    encoder: str,
    sources: Sequence[Path],
    out: Path,
    *,
    overlap: float = 0.5,
    batch: int = 4,
    device: str = "auto",
    domain: str | None = None,
    overrides: Sequence[str] = (),
    strict: bool = False,
    progress: Progress = no_progress,
) -> Predicted:
    """The first three principal components of the patch features, ``NAME-features``: one pixel a patch, the same
    colours in all files. Memory does not grow with a raster.

    Args:
        encoder: anything ``open_encoder`` opens; with ``domain`` where it does not say how its files were read.
        overlap, batch: see ``stream_tokens``.
        domain, overrides: how to read the files, where the encoder does not say so, or in another way.

    Raises:
        UsageError: if encoder and files do not fit, or the domain has no such maps.
        FmsuiteError: if a map cannot be written.
    """
    if not 0 <= overlap < 1:
        raise UsageError(f"An overlap of {overlap} is out of range.", "Use 0 to less than 1; 0.5 is common.")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: this is a file.", "Choose another folder with --out.")
    model = open_encoder(encoder)
    reading = opened_domain(encoder, model, domain, overrides)
    out.mkdir(parents=True, exist_ok=True)
    (out / FILE_NAME).unlink(missing_ok=True)
    skipped = SkippedLog(out / FILE_NAME, strict)
    opened, index = open_index(reading, list(sources), skipped, progress)
    model.check_input(data_as_seen(opened.input_spec(index), model))
    plain = choose_device(device)  # type: ignore[arg-type]
    model.to(plain)
    colours = Colours.of(_some_features(model, opened, index, batch, plain))
    kind = MapKind(
        "picture",
        [f"component {number}, {share:.1%} of the variance" for number, share in enumerate(colours.shares, start=1)],
        {"ENCODER": model.identity},
    )
    files, stems = [], stems_of(index, out)
    for source, stem in progress(list(zip(index.sources, stems, strict=True)), len(stems), "Mapping"):
        writer = None
        try:
            scene = ForgivingScene(open_scene(opened, index, source))
            views = SceneViews(scene, model.spec.axes)
            spacing = scene.read((0,) * len(scene.size), (1,) * len(scene.size)).spacing
            grid = model.backbone.grid
            assert grid is not None
            writer = scene.coarse_writer(out / f"{stem}-features", kind, grid.patch_size)
            for stripe in stream_tokens(
                model,
                views.read,
                scene.size,
                spacing=spacing,
                overlap=overlap,
                batch=batch,
                device=plain,
                project=colours.components.to(plain),
                panel=PANEL,
            ):
                writer.add(stripe.start, colours.drawn(stripe.features), stripe.valid.numpy())
            files.append(writer.finish())
        except ReadFailure as failure:
            skipped.add_failure(failure)
            continue
        finally:
            if writer is not None:
                writer.discard()
        scene.note(skipped)
    return Predicted(files, skipped.summary())


@torch.no_grad()
def _some_features(encoder: Encoder, domain: Domain, index: SampleIndex, batch: int, device: torch.device) -> Tensor:
    """(N, D) of valid patches of windows that are spread over all files."""
    rows = [int(row) for row in spread_rows(len(index), WINDOWS)]
    windows = WholeWindows(index, open_reader(domain, index), encoder.spec, encoder.spec.size, encoder.backbone.grid)
    found = []
    for start in range(0, len(rows), batch):
        read, _ = windows[rows[start : start + batch]]
        if read is None:
            continue
        (view,) = read.views[IMAGE]
        features = encoder.features(view.to(device))
        shown = features.layout.valid
        patches = features.patches.float()
        found.append((patches.flatten(0, 1) if shown is None else patches[shown]).cpu())
    return torch.cat(found) if found else torch.zeros(0, encoder.backbone.width)
