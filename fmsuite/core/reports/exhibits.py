"""What a results page shows beside its numbers: feature maps, neighbours and evidence, with their pictures as files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from fmsuite.errors import FmsuiteError, UsageError

EXHIBITS = "exhibits.json"
PICTURES = "exhibits"
FORMAT = 1
JPEG_QUALITY = 85

_NAME = re.compile(r"picture-[0-9a-f]{20}\.jpg")


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Picture(Record):
    """A picture, in memory until ``Exhibits.write`` makes a file of it.

    Attributes:
        file: path relative to the results' folder, with forward slashes; empty until written.
        alt: what is on it, for those who cannot see it.
        caption: one line.
        label: position of its class, where it has one.
    """

    file: str = ""
    alt: str
    caption: str
    label: int | None = None
    _image: Image.Image | None = PrivateAttr(default=None)

    @field_validator("file")
    @classmethod
    def _inside(cls, value: str) -> str:
        folder, _, name = value.rpartition("/")
        if value and (folder != PICTURES or name in ("", ".", "..") or "\\" in value):
            raise ValueError(f"the picture '{value}' lies outside {PICTURES}/")
        return value

    @classmethod
    def of(cls, image: Image.Image | np.ndarray, alt: str, caption: str, label: int | None = None) -> Picture:
        """
        Args:
            image: or (H, W, 3) uint8.
        """
        picture = cls(alt=alt, caption=caption, label=label)
        picture._image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        return picture

    @property
    def image(self) -> Image.Image | None:
        """The picture in memory; ``None`` for one that was read back."""
        return self._image

    def content(self, folder: str | os.PathLike) -> bytes:
        """The file, byte for byte.

        Raises:
            UsageError: if the picture was never written, or its file is missing.
        """
        path = Path(folder) / self.file
        if not self.file:
            raise UsageError(f"{folder}: the picture '{self.caption}' has no file.", "Write the exhibits first.")
        try:
            return path.read_bytes()
        except OSError as error:
            raise UsageError(
                f"{path}: this picture of {EXHIBITS} cannot be read ({error.strerror}).", "Make the results again."
            ) from error


class FeatureMap(Record):
    """Features in two dimensions.

    Attributes:
        encoder: name as in ``Results.encoders``.
        method: one or two sentences on how the map was made, settings included.
        x, y: (P,) coordinates; the centre is 0 and the largest is 1 or -1. Only nearness means anything.
        labels: (P,) positions of the classes, -1 where there is none.
        held_out: (P,) whether the point is on the side that was asked.
        sampled_from: how many features there were, of which these are a sample.
    """

    encoder: str
    method: str
    x: list[float]
    y: list[float]
    labels: list[int]
    held_out: list[bool]
    sampled_from: int

    @model_validator(mode="after")
    def _equal_lengths(self) -> FeatureMap:
        if not len(self.x) == len(self.y) == len(self.labels) == len(self.held_out):
            raise ValueError("x, y, labels and held_out differ in length")
        return self


class Neighbours(Record):
    """A window and those nearest to it.

    Attributes:
        encoder: name as in ``Results.encoders``.
        nearest: nearest first, of other groups than the query's; those whose window could not be read are left out.
        distances: of each, 1 - cosine of the centred features, 0 to 2.
    """

    encoder: str
    query: Picture
    nearest: list[Picture]
    distances: list[float]

    @model_validator(mode="after")
    def _equal_lengths(self) -> Neighbours:
        if len(self.nearest) != len(self.distances):
            raise ValueError("nearest and distances differ in length")
        return self


class Evidence(Record):
    """What a prototype classifier saw on one slide.

    Attributes:
        encoder: name as in ``Results.encoders``.
        method: key of ``Results.methods``.
        item: id as in ``Results.items``.
        true, predicted: positions of the classes.
        scores: one for each class, as the classifier gave them.
        heatmap: over the slide's overview, with its legend; ``None`` where there is none to draw.
        top: class name to the windows nearest to its prototype, nearest first.
    """

    encoder: str
    method: str
    item: str
    true: int
    predicted: int
    scores: list[float]
    heatmap: Picture | None = None
    top: dict[str, list[Picture]] = Field(default_factory=dict)


class Exhibits(Record):
    """
    Attributes:
        notes: what could not be shown, and why, in sentences.
    """

    format: int = FORMAT
    maps: list[FeatureMap] = Field(default_factory=list)
    neighbours: list[Neighbours] = Field(default_factory=list)
    evidence: list[Evidence] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)

    def pictures(self) -> Iterator[Picture]:
        """Every picture, in the order of the page."""
        for shown in self.neighbours:
            yield shown.query
            yield from shown.nearest
        for evidence in self.evidence:
            if evidence.heatmap is not None:
                yield evidence.heatmap
            for pictures in evidence.top.values():
                yield from pictures

    def write(self, folder: str | os.PathLike) -> None:
        """Write the pictures as JPEG to ``exhibits/`` (equal ones once, named by their content), then
        ``exhibits.json``, which is whole or as before; pictures that an earlier ``exhibits.json`` needed are removed.

        Raises:
            FmsuiteError: if the folder cannot be written to, or a picture has neither pixels nor a file there.
        """
        folder = Path(folder)
        try:
            (folder / PICTURES).mkdir(parents=True, exist_ok=True)
            for picture in self.pictures():
                if picture.image is not None:
                    content = _jpeg(picture.image)
                    picture.file = f"{PICTURES}/picture-{hashlib.sha256(content).hexdigest()[:20]}.jpg"
                    _replace(folder / picture.file, content)
                elif not (picture.file and (folder / picture.file).is_file()):
                    raise FmsuiteError(f"{folder}: the picture '{picture.caption}' has no pixels to write.")
            _replace(folder / EXHIBITS, (self.model_dump_json(indent=1) + "\n").encode())
            needed = {Path(picture.file).name for picture in self.pictures()}
            for path in (folder / PICTURES).iterdir():
                if _NAME.fullmatch(path.name) and path.name not in needed:
                    path.unlink()
        except OSError as error:
            raise FmsuiteError(
                f"{error.filename or folder}: the exhibits cannot be written ({error.strerror}).",
                "Check the folder's permissions and the space left.",
            ) from error

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Exhibits:
        """
        Raises:
            UsageError: if there are none, or they are damaged, incomplete or of a newer version.
        """
        path = Path(folder) / EXHIBITS
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw.get("format", FORMAT) > FORMAT:
                raise UsageError(f"{path}: exhibits of a newer fmsuite.", "Upgrade fmsuite to read them.")
            exhibits = cls.model_validate(raw)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}.", "Is this a folder of results?") from error
        except (ValueError, TypeError, AttributeError, ValidationError) as error:
            raise UsageError(f"{path}: damaged exhibits ({error}).", "Make the results again.") from error
        for picture in exhibits.pictures():
            if not (picture.file and (path.parent / picture.file).is_file()):
                raise UsageError(
                    f"{path}: its picture '{picture.file or picture.caption}' is missing.", "Make the results again."
                )
        return exhibits


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # Colours at full resolution: the letters and thin edges of legends blur otherwise.
    image.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
    return buffer.getvalue()


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
