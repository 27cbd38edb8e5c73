"""``fmsuite export``: an encoder as one safetensors file that timm loads."""

from __future__ import annotations

from pathlib import Path

from fmsuite.core.encoders import export_encoder, load_encoder


def export(what: str, out: Path) -> Path:
    """Write the weights under timm's names, with the input's description in the file's metadata.

    Args:
        what: anything ``load_encoder`` opens.
        out: the ``.safetensors`` file.

    Raises:
        UsageError: if there is no such encoder, or timm cannot hold it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    export_encoder(load_encoder(what), out)
    return out
