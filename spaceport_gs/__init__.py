"""Spaceport GS: photos in, a published 3D Gaussian-splat scene out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spaceport_gs.ops import rasterize as rasterize

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "rasterize":  # on first use: the stages without training do not need torch
        from spaceport_gs.ops import rasterize

        return rasterize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
