"""An input's normalisation in words."""

from __future__ import annotations

from fmsuite.core.inputs import InputSpec, Quantification

OWN = "the encoder's own"
DATA = "the data's"


def normalisation_sentence(spec: InputSpec, whose: str) -> str:
    """What raw values become before a network takes them, and whose mean and standard deviation it is."""
    pairs = [(channel.mean, channel.std) for channel in spec.channels]
    if all(pair == (0.0, 1.0) for pair in pairs):
        return f"{physical_sentence(spec)}; no mean is taken off and nothing is divided by a standard deviation."
    if len(set(pairs)) == 1:
        return f"{physical_sentence(spec)}; minus {pairs[0][0]:.4g}, divided by {pairs[0][1]:.4g} ({whose})."
    each = ", ".join(f"{c.name} {c.mean:.4g} ± {c.std:.4g}" for c in spec.channels)
    return f"{physical_sentence(spec)}; minus mean, divided by standard deviation of each channel ({whose}): {each}."


def physical_sentence(spec: InputSpec) -> str:
    """What raw values become before mean and standard deviation apply, without a full stop: what the reader does
    to an image, and scale, offset and clip."""
    by_values: dict[str, list[str]] = {}
    for name, quantification in zip(spec.channel_names, spec.quantifications, strict=True):
        by_values.setdefault(_quantified(quantification), []).append(name)
    if len(by_values) == 1:
        (values,) = by_values
    else:
        values = "by channel: " + "; ".join(f"{', '.join(names)}: {each}" for each, names in by_values.items())
    found = values[0].upper() + values[1:]
    if spec.reading is not None and spec.reading.plan != "window":
        return f"Each image is brought to a range of its own when it is read ({spec.reading.said()}); then {values}"
    return found


def _quantified(of: Quantification) -> str:
    if of == Quantification():
        return "raw values as they are"
    written = "raw values"
    if abs(of.scale * 255 - 1) < 1e-6:
        written += " / 255"
    elif of.scale != 1:
        written += f" x {of.scale:.4g}"
    if of.offset:
        written += f" {'+' if of.offset > 0 else '−'} {abs(of.offset):.4g}"
    return written if of.clip is None else f"{written}, clipped to {of.clip[0]:.4g} to {of.clip[1]:.4g}"
