"""Vector graphics: SVG drawings, rendered at whatever region and resolution a view asks for.

``SvgDomain`` is imported on first use: the process that renders untrusted files imports this package too, and it must
start in a fraction of a second, without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fmsuite.domains.svg.domain import SvgDomain

__all__ = ["SvgDomain"]


def __getattr__(name: str) -> object:
    if name == "SvgDomain":
        from fmsuite.domains.svg.domain import SvgDomain

        return SvgDomain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
