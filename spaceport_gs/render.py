"""Pictures of a trained scene."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from spaceport_gs.gaussians import Gaussians
from spaceport_gs.types import Camera, Image, RasterSettings


def render(gaussians: Gaussians, camera: Camera, settings: RasterSettings | None = None) -> Image:
    """The image of `gaussians`, NumPy or torch, that `camera` sees; settings None = all SH bands, black background."""
    from spaceport_gs import ops

    settings = settings or RasterSettings()
    if isinstance(gaussians.means, np.ndarray):
        gaussians = gaussians.torch()
    degree = min(settings.sh_degree, gaussians.sh_degree)
    return ops.render(gaussians, camera, replace(settings, sh_degree=degree))


def render_8bit(gaussians: Gaussians, camera: Camera, settings: RasterSettings | None = None) -> np.ndarray:
    """[H, W, 3] uint8, rounded to nearest: what a viewer would show and what is evaluated."""
    return to_8bit(render(gaussians, camera, settings))


def to_8bit(image: Image) -> np.ndarray:
    """[H, W, 3] uint8 of a rendered image: clipped to 0 … 1, rounded to nearest."""
    color = image.color
    if not isinstance(color, np.ndarray):
        color = color.detach().cpu().numpy()
    return (np.clip(color, 0, 1) * 255 + 0.5).astype(np.uint8)
