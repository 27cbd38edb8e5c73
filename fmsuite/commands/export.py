"""``fmsuite export``: an encoder as one safetensors file that timm loads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fmsuite.core.encoders import export_encoder, load_encoder


def export(what: str, out: Path, layout: Literal["timm", "native"] = "timm") -> Path:
    """Write the weights with the input's description in the file's metadata.

    Args:
        what: anything ``load_encoder`` opens.
        out: the ``.safetensors`` file.
        layout: see ``export_encoder``.

    Raises:
        UsageError: if there is no such encoder, or timm cannot hold it.
    """
    export_encoder(load_encoder(what), out, layout)
    return out
