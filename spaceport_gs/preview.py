"""A picture of the scene while it is trained, every few seconds."""

from __future__ import annotations

import time
from pathlib import Path

from spaceport_gs.files import replacing
from spaceport_gs.gaussians import Gaussians
from spaceport_gs.types import Camera, RasterSettings

SECONDS = 5.0
SIDE = 960  # pixels at most


class Preview:
    """What a camera sees, as a JPEG file; without a path, nothing."""

    def __init__(self, path: Path | None, camera: Camera) -> None:
        self._path, self._written = path, time.monotonic()
        share = min(SIDE / max(camera.width, camera.height), 1.0)
        self._camera = camera.resized(max(1, round(camera.width * share)), max(1, round(camera.height * share)))

    def is_due(self) -> bool:
        return self._path is not None and time.monotonic() - self._written >= SECONDS

    def write(self, gaussians: Gaussians, sh_degree: int) -> None:
        from PIL import Image as Pillow

        from spaceport_gs.render import render_8bit

        assert self._path is not None
        with replacing(self._path) as temporary:
            picture = Pillow.fromarray(render_8bit(gaussians, self._camera, RasterSettings(sh_degree=sh_degree)))
            picture.save(temporary, "JPEG", quality=85)
        self._written = time.monotonic()
