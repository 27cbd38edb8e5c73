"""The ``data:`` section of pathology recipes."""

from __future__ import annotations

from pydantic import Field, field_validator

from fmsuite.domains.base import DomainOptions
from fmsuite.domains.pathology.slides import IMAGE_SUFFIXES, SLIDE_SUFFIXES
from fmsuite.tiling.grid import Edges
from fmsuite.tiling.labels import LabelOptions
from fmsuite.tiling.tissue import TissueConfig

AUGMENTATION = frozenset({"stain_jitter", "greyscale"})
"""Options that decide nothing about windows: an index made with other values of them serves as well."""


class PathologyOptions(DomainOptions, LabelOptions):
    """How slides become windows, and what is known about the slides (``LabelOptions``; a group is a patient).

    Attributes:
        mpp: resolution of what comes out, um per pixel. Slides are read at exactly this, whatever they were scanned at.
        size, stride: of windows, in pixels at ``mpp``; windows lie side by side if no stride is given.
        edges: whether windows may reach beyond a slide's far borders (``cover``), lie inside (``inside``), or are moved
            back to end there (``shift``).
        min_tissue: share of a window that must be tissue.
        mpp_override: resolution of the files' finest level, in um per pixel, instead of what they say (``--mpp``).
        max_upsampling: a slide may be this much coarser than ``mpp``; beyond, enlarging would invent detail.
        max_windows: at most so many windows of a slide, drawn at random with ``seed``; ``None`` takes all.
        seed: of that draw.
        thumbnail_mpp: resolution at which tissue is looked for, um per pixel.
        tissue: thresholds of the tissue mask.
        suffixes: files that are looked for in folders.
        stain_jitter: how far ``augment: strong`` changes stain, brightness, contrast and saturation, as a multiple of
            the default ranges. Contrastive objectives on few slides need 2 or more, or they match windows by their
            stain; where colour tells classes apart, less keeps more of it.
        greyscale: probability that ``augment: strong`` drops colour altogether.
        largest_tile: a TIFF without pyramid up to this many pixels wide and high, which OpenSlide does not know as a
            slide, is a tile image.
    """

    mpp: float = Field(default=0.5, gt=0)
    size: int = Field(default=256, ge=8)
    stride: int | None = Field(default=None, ge=1)
    edges: Edges = "inside"
    min_tissue: float = Field(default=0.25, ge=0, le=1)
    mpp_override: float | None = Field(default=None, gt=0)
    max_upsampling: float = Field(default=1.25, ge=1)
    max_windows: int | None = Field(default=None, ge=1)
    seed: int = 0
    thumbnail_mpp: float = Field(default=8.0, gt=0)
    tissue: TissueConfig = TissueConfig()
    suffixes: tuple[str, ...] = (*SLIDE_SUFFIXES, *IMAGE_SUFFIXES)
    stain_jitter: float = Field(default=1.0, ge=0, le=5)
    greyscale: float = Field(default=0.0, ge=0, le=1)
    largest_tile: int = Field(default=2048, ge=1)

    @field_validator("suffixes")
    @classmethod
    def _dotted(cls, suffixes: tuple[str, ...]) -> tuple[str, ...]:
        if not suffixes or not all(suffix.startswith(".") and len(suffix) > 1 for suffix in suffixes):
            raise ValueError("suffixes are written with their dot, such as .svs, and there must be one")
        return suffixes

    @property
    def step(self) -> int:
        """The stride in force."""
        return self.stride or self.size
