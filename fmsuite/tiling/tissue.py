"""Where the tissue is on a slide's thumbnail, and where glass, ink and dark borders are.

Stained tissue is told from everything else by how it absorbs light. Absorbance (Beer-Lambert, relative to the glass)
of haematoxylin, eosin and DAB differs between the three colour channels, so its spread over them is large on tissue
and near zero on glass, grey shadow, dust and black borders, however bright the scanner made the background. Marker
ink is coloured too, but in ways that stains are not: blue and green ink absorb red most of all, red ink absorbs green
and blue alike and lets red through, black ink absorbs all three alike.

Needs ``scipy``, which comes with the pathology extra.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy import ndimage


class TissueConfig(BaseModel):
    """Thresholds of the tissue mask; areas are physical, so they mean the same at every thumbnail resolution.

    Attributes:
        min_spread, max_spread: limits of the automatic threshold on the absorbance spread (natural logarithm).
        smoothing: standard deviation of the blur that JPEG noise is averaged over, in um.
        min_area: smaller specks are not tissue, in um^2.
        max_hole: smaller holes in tissue are filled, in um^2.
        artefacts: look for ink and dark borders, and leave them out.
        ink_margin: ink is widened by this before it is cut out, in um: strokes have soft edges.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_spread: float = Field(default=0.05, gt=0)
    max_spread: float = Field(default=0.10, gt=0)
    smoothing: float = Field(default=8.0, ge=0)
    min_area: float = Field(default=10_000.0, ge=0)
    max_hole: float = Field(default=40_000.0, ge=0)
    artefacts: bool = True
    ink_margin: float = Field(default=24.0, ge=0)


@dataclass(frozen=True)
class TissueMask:
    """What was found.

    Attributes:
        mask: (H, W) bool, True on tissue.
        background: (3,) float, the glass's colour, 0 to 255.
        threshold: the absorbance spread above which a pixel counted as stained.
        shares: share of the thumbnail taken by ``"tissue"``, ``"ink"``, ``"dark"`` (borders, black marker) and
            ``"outside"`` (never scanned); the rest is glass.
        reason: why the mask is empty, with what could be done; empty where there is tissue.
    """

    mask: np.ndarray
    background: np.ndarray
    threshold: float
    shares: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason


def find_tissue(
    rgb: np.ndarray,
    mpp: tuple[float, float],
    valid: np.ndarray | None = None,
    config: TissueConfig | None = None,
) -> TissueMask:
    """The tissue on a thumbnail of a stained, bright-field slide.

    Args:
        rgb: (H, W, 3) uint8.
        mpp: length of one thumbnail pixel along (y, x), in um.
        valid: (H, W) bool, False where nothing was scanned or nothing could be read; all valid if not given.
        config: thresholds.

    Returns:
        A mask that is never empty without a reason.

    Raises:
        ValueError: if the shapes do not match or the resolution is not positive.
    """
    config = config or TissueConfig()
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"expected an (H, W, 3) uint8 thumbnail, got {rgb.shape} {rgb.dtype}")
    if min(mpp) <= 0:
        raise ValueError(f"a thumbnail of {mpp} um per pixel is not possible")
    scanned = np.ones(rgb.shape[:2], bool) if valid is None else np.asarray(valid, bool)
    if scanned.shape != rgb.shape[:2]:
        raise ValueError(f"valid has shape {scanned.shape}, the thumbnail {rgb.shape[:2]}")
    area = mpp[0] * mpp[1]
    scanned = scanned & ~_black_outside(rgb)
    background = glass_colour(rgb, scanned)
    absorbance = _absorbance(_smoothed(rgb, scanned, background, mpp, config.smoothing), background)
    spread = absorbance.max(axis=-1) - absorbance.min(axis=-1)
    spread[~scanned] = 0.0
    threshold = float(np.clip(_otsu(spread[scanned], upper=0.5), config.min_spread, config.max_spread))
    stained = spread > threshold

    ink = dark = np.zeros_like(stained)
    if config.artefacts:
        core, loose = _ink(absorbance)
        ink = _grown(core & stained, loose & stained, mpp, config.ink_margin, config.min_area / area) & scanned
        dark = _dark(absorbance) & scanned
        dark = _widened(dark, mpp, config.ink_margin / 2) & scanned
    artefact = ink | dark
    tissue = _cleaned(stained & ~artefact, artefact | ~scanned, config.min_area / area, config.max_hole / area)
    shares = {
        "tissue": float(tissue.mean()),
        "ink": float(ink.mean()),
        "dark": float(dark.mean()),
        "outside": float(1 - scanned.mean()),
    }
    reason = "" if tissue.any() else _why_empty(stained, artefact, scanned, config, area, shares)
    return TissueMask(tissue, background, threshold, shares, reason)


def glass_colour(rgb: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """The colour of empty glass: the most frequent brightness among bright, nearly colourless pixels.

    Args:
        rgb: (H, W, 3) uint8.
        valid: (H, W) bool.

    Returns:
        (3,) float64, 0 to 255; near white (245) where less than 1 % of the picture could be glass.
    """
    pixels = rgb.reshape(-1, 3) if valid is None else rgb[valid]
    low, high = pixels.min(axis=1), pixels.max(axis=1)
    candidates = pixels[(high - low <= 20) & (high >= 150)]
    if len(candidates) < max(4, 0.01 * len(pixels)):
        return np.full(3, 245.0)
    brightness = candidates.max(axis=1)
    # A little smoothing, so that one full bin (pure white padding, a quantised JPEG level) does not decide alone.
    counts = np.convolve(np.bincount(brightness, minlength=256), [1, 2, 3, 2, 1], mode="same")
    mode = int(counts.argmax())
    near = candidates[np.abs(brightness.astype(int) - mode) <= 4]
    return np.median(near, axis=0).astype(np.float64)


def _absorbance(rgb: np.ndarray, background: np.ndarray) -> np.ndarray:
    """(H, W, 3) natural-logarithm absorbance relative to glass, at least 0."""
    return np.maximum(np.log(background + 1.0) - np.log(rgb + 1.0), 0.0).astype(np.float32)


def _smoothed(
    rgb: np.ndarray, valid: np.ndarray, background: np.ndarray, mpp: tuple[float, float], smoothing: float
) -> np.ndarray:
    """(H, W, 3) float32, blurred by ``smoothing`` um, with glass where nothing was scanned."""
    picture = np.where(valid[..., None], rgb, background).astype(np.float32)
    sigma = (min(smoothing / mpp[0], 8.0), min(smoothing / mpp[1], 8.0), 0.0)
    return ndimage.gaussian_filter(picture, sigma)


def _black_outside(rgb: np.ndarray) -> np.ndarray:
    """Black that touches the picture's edge and is too black for a photograph of anything: padding of the format."""
    black = rgb.max(axis=-1) <= 4
    labels, count = ndimage.label(black)
    if not count:
        return black
    edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    return np.isin(labels, edge[edge > 0])


def _ink(absorbance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blue, green and red marker: what is certainly ink, and what may be beside such.

    Of the stains in use none absorbs red much more than green: haematoxylin comes nearest, at a ratio of up to 1.15,
    but it absorbs at least 0.4 times as much blue, where blue ink absorbs hardly any. And none that lets red through
    absorbs blue like green: eosin absorbs a third to two thirds as much blue; DAB absorbs more blue than green, and
    red as well.
    """
    red, green, blue = np.moveaxis(absorbance, -1, 0)
    cool = (red > 1.35 * green + 0.08) & (red > 0.2)
    cool |= (red > 1.05 * green) & (blue < 0.33 * red) & (red > 0.3)
    warm = (green > 0.6) & (blue > 0.70 * green) & (blue < 1.15 * green) & (red < 0.38 * green)
    mean = absorbance.mean(axis=-1)
    loose = (red > 1.15 * green) | ((blue > 0.66 * green) & (red < 0.5 * green))
    loose |= (mean > 0.9) & (absorbance.max(axis=-1) - absorbance.min(axis=-1) < 0.7 * mean)
    return cool | warm, loose


def _dark(absorbance: np.ndarray) -> np.ndarray:
    """Black marker, the slide's edge, a coverslip's border: hardly any light, and no colour."""
    mean = absorbance.mean(axis=-1)
    spread = absorbance.max(axis=-1) - absorbance.min(axis=-1)
    return (mean > 0.9) & (spread < 0.3 * mean)


def _grown(
    core: np.ndarray, loose: np.ndarray, mpp: tuple[float, float], margin: float, min_pixels: float
) -> np.ndarray:
    """Ink cores that are large enough for a stroke, what looks a little like ink close to them, and a margin.

    Small cores are red blood cells, pigment or chromatic aberration inside tissue. What is ``loose`` (thin or mixed
    ink, which alone could be tissue) counts only within five margins of a core.
    """
    strokes = _without_small(core, min_pixels)
    return _widened(strokes | (loose & _widened(strokes, mpp, 5 * margin)), mpp, margin)


def _widened(mask: np.ndarray, mpp: tuple[float, float], margin: float) -> np.ndarray:
    """All points within ``margin`` um of the mask."""
    if margin <= 0 or not mask.any():
        return mask
    return ndimage.distance_transform_edt(~mask, sampling=mpp) <= margin


def _without_small(mask: np.ndarray, min_pixels: float) -> np.ndarray:
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if not count:
        return mask
    keep = np.bincount(labels.reshape(-1)) >= min_pixels
    keep[0] = False
    return keep[labels]


def _cleaned(tissue: np.ndarray, blocked: np.ndarray, min_pixels: float, max_hole: float) -> np.ndarray:
    """Without specks, with small holes filled; what is ``blocked`` stays out."""
    tissue = _without_small(tissue, min_pixels)
    labels, count = ndimage.label(~tissue)
    if count:
        small = np.bincount(labels.reshape(-1)) <= max_hole
        small[0] = False
        small[np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))] = False
        tissue = tissue | small[labels]
    return tissue & ~blocked


def _otsu(values: np.ndarray, upper: float) -> float:
    """The threshold that best separates two classes (Otsu 1979, eq. 12), over 256 bins from 0 to ``upper``."""
    if not len(values):
        return 0.0
    counts, edges = np.histogram(np.minimum(values, upper), bins=256, range=(0.0, upper))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    between = np.zeros(256)
    both = (below > 0) & (above > 0)
    mean_gap = sums[both] / below[both] - (sums[-1] - sums[both]) / above[both]
    between[both] = below[both] * above[both] * mean_gap**2
    return float(edges[int(between.argmax()) + 1])


def _why_empty(
    stained: np.ndarray,
    artefact: np.ndarray,
    scanned: np.ndarray,
    config: TissueConfig,
    area: float,
    shares: Mapping[str, float],
) -> str:
    if not scanned.any():
        return "no tissue found: nothing on this slide was scanned, or nothing could be read."
    if _cleaned(stained, ~scanned, config.min_area / area, config.max_hole / area).any():
        return (
            f"no tissue found: all that is coloured looks like marker ink ({shares['ink']:.0%} of the slide) or a dark "
            f"border ({shares['dark']:.0%}). If it is tissue, switch the filter off with tissue.artefacts=false."
        )
    if (stained & ~artefact).any():
        return (
            f"no tissue found: only specks smaller than {config.min_area:g} um^2. "
            "If they are tissue, lower tissue.min_area."
        )
    return (
        f"no tissue found: nothing is more coloured than glass (absorbance spread above {config.min_spread:g}). "
        "If the stain is very pale, lower tissue.min_spread and tissue.max_spread."
    )
