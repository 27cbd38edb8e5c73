"""Named ways in which raw values become what a network takes, as functions of an input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fmsuite.core.evaluation.value_statistics import Statistics
from fmsuite.core.input_words import OWN, normalisation_sentence, physical_sentence
from fmsuite.core.inputs import IMAGENET_MEAN, IMAGENET_STD, Channel, InputSpec, Quantification
from fmsuite.errors import UsageError, nearest

TRAINED = "trained"
ALL = "all"
_COLOURS = (("red", "r"), ("green", "g"), ("blue", "b"))
_LONGEST_VISIBLE = 700.0


@dataclass(frozen=True)
class Normalised:
    """What a normalisation makes of an encoder's input.

    Attributes:
        spec: raw values to network values.
        said: one sentence on it.
        by_window: ``spec`` ends at physical values, which are standardised in every window by itself.
    """

    spec: InputSpec
    said: str
    by_window: bool = False


@dataclass(frozen=True)
class Normalisation:
    """
    Attributes:
        title: what it is, in a few words.
        apply: ``apply(spec, statistics)`` of the encoder's own input. Raises ``UsageError`` where it means nothing.
    """

    title: str
    apply: Callable[[InputSpec, Statistics], Normalised]


def trained(spec: InputSpec, data: Statistics) -> Normalised:
    """What the encoder was trained with."""
    return Normalised(spec, normalisation_sentence(spec, OWN))


def mean_std(spec: InputSpec, data: Statistics) -> Normalised:
    """Minus the data's mean, divided by its standard deviation, channel by channel."""
    new = _with(spec, spec.quantifications, data.mean, data.std)
    return Normalised(new, normalisation_sentence(new, f"the data's, {data.said}"))


def two_sigma(spec: InputSpec, data: Statistics) -> Normalised:
    """Clipped to the data's mean plus and minus two standard deviations, which become 0 and 1 (Cong et al. 2022,
    "SatMAE")."""
    return _stretched(spec, data.mean - 2 * data.std, data.mean + 2 * data.std, "mean ± 2 standard deviations", data)


def min_max(spec: InputSpec, data: Statistics) -> Normalised:
    """The data's least and greatest value become 0 and 1."""
    return _stretched(spec, data.least, data.most, "least and greatest value", data)


def percentiles(spec: InputSpec, data: Statistics) -> Normalised:
    """The data's percentiles 2 and 98 become 0 and 1; what is outside is clipped."""
    return _stretched(spec, data.low, data.high, "percentiles 2 and 98", data)


def by_window(spec: InputSpec, data: Statistics) -> Normalised:
    """Every channel of every window minus its own mean, divided by its own standard deviation."""
    new = _with(spec, spec.quantifications, np.zeros(spec.in_chans), np.ones(spec.in_chans))
    return Normalised(new, f"{physical_sentence(new)}; then each channel of each window standardised by itself.", True)


def scale(spec: InputSpec, data: Statistics) -> Normalised:
    """Physical values as they are: raw ones times their scale."""
    if all(q == Quantification() for q in spec.quantifications):
        raise UsageError("raw values have no scale here, so that it would be 'raw'")
    new = _with(spec, spec.quantifications, np.zeros(spec.in_chans), np.ones(spec.in_chans))
    return Normalised(new, normalisation_sentence(new, OWN))


def raw(spec: InputSpec, data: Statistics) -> Normalised:
    """Raw values as they are stored."""
    new = _with(spec, [Quantification()] * spec.in_chans, np.zeros(spec.in_chans), np.ones(spec.in_chans))
    return Normalised(new, normalisation_sentence(new, OWN))


def imagenet(spec: InputSpec, data: Statistics) -> Normalised:
    """ImageNet's mean and standard deviation of red, green and blue on 0 to 1."""
    if spec.in_chans != 3:
        raise UsageError(f"ImageNet's constants are of red, green and blue, and there are {spec.in_chans} channels")
    if data.low.min() < 0 or data.high.max() > 1 + 1e-6:
        raise UsageError(
            "ImageNet's constants are of values from 0 to 1, and these run from "
            f"{data.low.min():.4g} to {data.high.max():.4g} (percentiles 2 and 98)"
        )
    order = _colours(spec.channels)
    quantifications = [
        q if q.clip is not None else Quantification(scale=q.scale, offset=q.offset, clip=(0, 1))
        for q in spec.quantifications
    ]
    if spec.eight_bit:
        quantifications = list(spec.quantifications)
    new = _with(spec, quantifications, np.array(IMAGENET_MEAN)[order], np.array(IMAGENET_STD)[order])
    return Normalised(new, normalisation_sentence(new, "ImageNet's"))


NORMALISATIONS: dict[str, Normalisation] = {
    TRAINED: Normalisation("as trained", trained),
    "mean-std": Normalisation("mean and std of the data", mean_std),
    "two-sigma": Normalisation("mean ± 2 std clipped to 0–1", two_sigma),
    "min-max": Normalisation("least and greatest to 0–1", min_max),
    "percentiles": Normalisation("percentiles 2–98 to 0–1", percentiles),
    "window": Normalisation("each window by itself", by_window),
    "scale": Normalisation("scale only", scale),
    "raw": Normalisation("raw values", raw),
    "imagenet": Normalisation("ImageNet's constants", imagenet),
}
"""By name, in the order in which they are shown."""


def check_names(names: Sequence[str]) -> None:
    """
    Raises:
        UsageError: naming one that is not known.
    """
    for name in names:
        if name not in (ALL, *NORMALISATIONS):
            raise UsageError(f"There is no normalisation '{name}'.", nearest(name, (ALL, *NORMALISATIONS)))


def _with(spec: InputSpec, quantifications: Sequence[Quantification], mean: np.ndarray, std: np.ndarray) -> InputSpec:
    """The same input with other values. A channel keeps the input's quantification where it is that."""
    usual = Quantification(scale=spec.scale, offset=spec.offset, clip=spec.clip)
    channels = tuple(
        channel.model_copy(update={"mean": float(m), "std": float(s), "quantification": None if q == usual else q})
        for channel, q, m, s in zip(spec.channels, quantifications, mean, std, strict=True)
    )
    return spec.model_copy(update={"channels": channels})


def _stretched(spec: InputSpec, low: np.ndarray, high: np.ndarray, what: str, data: Statistics) -> Normalised:
    """``low`` and ``high`` of the physical values become 0 and 1, what is outside is clipped."""
    reach = np.where(high - low > 1e-12 * np.abs(high), high - low, 1.0)
    quantifications = []
    for q, start, length in zip(spec.quantifications, low, reach, strict=True):
        # What was clipped before stays clipped: of two clips by rising maps, the narrower ends decide.
        ends = (0.0, 1.0)
        if q.clip is not None:
            first, last = ((end - start) / length for end in q.clip)
            ends = max(0.0, min(first, 1.0)), min(1.0, max(last, 0.0))
        if not ends[0] < ends[1]:
            ends = (0.0, 1.0)
        quantifications.append(
            Quantification(scale=q.scale / length, offset=float((q.offset - start) / length), clip=ends)
        )
    new = _with(spec, quantifications, np.zeros(len(low)), np.ones(len(low)))
    each = ", ".join(f"{c.name} {a:.4g} to {b:.4g}" for c, a, b in zip(spec.channels, low, high, strict=True))
    if len({*zip(low.tolist(), high.tolist(), strict=True)}) == 1:
        each = f"{low[0]:.4g} to {high[0]:.4g}"
    return Normalised(
        new,
        f"{physical_sentence(spec)}; then the {what} of the data ({data.said}) become 0 and 1, what is outside is "
        f"clipped: {each}.",
    )


def _colours(channels: Sequence[Channel]) -> list[int]:
    """Of each channel the position of its colour in red, green, blue: by name, else by wavelength, else as they
    stand."""
    names = [channel.name.lower() for channel in channels]
    by_name = [next((n for n, known in enumerate(_COLOURS) if name in known), None) for name in names]
    if None not in by_name and len(set(by_name)) == 3:
        return [n for n in by_name if n is not None]
    waves = [channel.wavelength for channel in channels]
    known = [wave for wave in waves if wave is not None]
    if len(known) < 3:
        return [0, 1, 2]
    if max(known) > _LONGEST_VISIBLE:
        name = channels[int(np.argmax(known))].name
        raise UsageError(f"ImageNet's constants are of red, green and blue, and {name} is none of them")
    return np.argsort(np.argsort(-np.array(known))).tolist()
