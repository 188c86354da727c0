"""Pictures of a trained scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from spaceport_gs.gaussians import Gaussians
from spaceport_gs.types import Array, Camera, Depth, Image, RasterSettings


def render(gaussians: Gaussians, camera: Camera, settings: RasterSettings | None = None) -> Image:
    """The image of `gaussians`, NumPy or torch, that `camera` sees; settings None = all SH bands, black background."""
    from spaceport_gs import ops

    if isinstance(gaussians.means, np.ndarray):
        gaussians = gaussians.torch()
    return ops.render(gaussians, camera, _known_to(gaussians, settings))


def render_8bit(gaussians: Gaussians, camera: Camera, settings: RasterSettings | None = None) -> np.ndarray:
    """[H, W, 3] uint8, rounded to nearest: what a viewer would show and what is evaluated."""
    return to_8bit(render(gaussians, camera, settings))


def to_8bit(image: Image) -> np.ndarray:
    """[H, W, 3] uint8 of a rendered image: clipped to 0 … 1, rounded to nearest."""
    if isinstance(image.color, np.ndarray):
        return (np.clip(image.color, 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.asarray(on_device_8bit(image).cpu().numpy())


def on_device_8bit(image: Image) -> Array:
    """As `to_8bit`, of an image in torch, where that is."""
    import torch

    return (image.color.detach().clamp(0, 1) * 255 + 0.5).to(torch.uint8)


class Renderer:
    """Images of Gaussians that stay as they are, for one camera after the other.

    On a GPU each is made by a recorded sequence, and nobody waits before a batch of them is queued; without one this is
    `render` for each camera. The images are the same to the bit.
    """

    def __init__(self, gaussians: Gaussians, settings: RasterSettings | None = None) -> None:
        self._gaussians = gaussians.torch() if isinstance(gaussians.means, np.ndarray) else gaussians
        self._settings = _known_to(self._gaussians, settings)
        self._recorded: _Recorded | None = None
        if self._gaussians.means.is_cuda and len(gaussians) > 0 and self._settings.depth == Depth.NONE:
            self._recorded = _Recorded(self._gaussians, self._settings)

    def render(self, cameras: Sequence[Camera]) -> list[Image]:
        """The image that each camera sees."""
        from spaceport_gs import ops

        if self._recorded is not None:
            return self._recorded.render(cameras)
        return [ops.render(self._gaussians, camera, self._settings) for camera in cameras]


class _Recorded:
    """A recorded sequence for each size of image; all use one piece of memory, one after the other."""

    def __init__(self, gaussians: Gaussians, settings: RasterSettings) -> None:
        import torch

        device = gaussians.means.device
        self._gaussians, self._settings = gaussians, settings
        self._n_instances = max(6 * len(gaussians), 1 << 16)
        self._scratch = torch.empty(0, dtype=torch.uint8, device=device)
        self._most = torch.zeros(1, dtype=torch.int64, device=device)
        self._graphs: dict[tuple[int, int], Any] = {}

    def render(self, cameras: Sequence[Camera]) -> list[Image]:
        from spaceport_gs import ops

        while True:
            images = [self._queue(camera) for camera in cameras]
            needed = int(self._most)  # waits for them
            if needed <= self._n_instances:
                return images
            if needed > ops.MOST_INSTANCES:
                return [ops.render(self._gaussians, camera, self._settings) for camera in cameras]
            self._make_room(needed)

    def _queue(self, camera: Camera) -> Image:
        import torch

        from spaceport_gs import ops

        backend, device = ops.backend_of(self._most), self._most.device
        graph = self._graphs.get((camera.width, camera.height)) or self._record(camera.width, camera.height)
        out = Image(
            torch.empty(camera.height, camera.width, 3, device=device),
            torch.empty(camera.height, camera.width, device=device),
        )
        graph.launch(backend, camera, out)
        return out

    def _make_room(self, needed: int) -> None:
        from spaceport_gs import ops

        self._n_instances = min(needed + needed // 10, ops.MOST_INSTANCES)
        self._graphs.clear()

    def _record(self, width: int, height: int) -> Any:
        import torch

        from spaceport_gs import _engine, ops

        backend, n = ops.backend_of(self._most), len(self._gaussians)
        n_bytes = _engine.render_scratch(backend, n, self._n_instances, width, height)
        if len(self._scratch) < n_bytes:
            torch.cuda.current_stream().synchronize()  # sequences that still run have their buffers in it
            self._graphs.clear()
            self._scratch = self._scratch[:0].clone()  # before there is another
            self._scratch = torch.empty(n_bytes, dtype=torch.uint8, device=self._most.device)
        graph = self._graphs[width, height] = _engine.RenderGraph(
            backend,
            self._gaussians,
            self._scratch,
            self._n_instances,
            width,
            height,
            self._settings,
            self._most,
        )
        return graph


def _known_to(gaussians: Gaussians, settings: RasterSettings | None) -> RasterSettings:
    """No more SH bands than there are."""
    settings = settings or RasterSettings()
    return replace(settings, sh_degree=min(settings.sh_degree, gaussians.sh_degree))
