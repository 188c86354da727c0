"""Scenes for tests, and how their results are compared."""

from __future__ import annotations

import math

import numpy as np
import torch

from spaceport_gs.gaussians import Gaussians
from spaceport_gs.types import Camera, DrawKey, GrowthSettings

GROWTH = GrowthSettings(
    threshold=0.6, split_log_scale=math.log(0.08), min_opacity=-2.0, key=DrawKey(2**40 + 3, 7), max_log_scale=-1.9
)


def random_gaussians(n: int, seed: int = 0, sh_degree: int = 3, scale: float = 0.08) -> Gaussians:
    """A cloud around (0, 0, 4)."""
    draw = torch.Generator().manual_seed(seed)
    return Gaussians(
        means=torch.randn(n, 3, generator=draw) * torch.tensor([1.5, 1.0, 0.7]) + torch.tensor([0.0, 0.0, 4.0]),
        log_scales=0.5 * torch.randn(n, 3, generator=draw) + math.log(scale),
        quaternions=torch.randn(n, 4, generator=draw),
        opacities=2 * torch.randn(n, generator=draw),
        sh=0.3 * torch.randn(n, (sh_degree + 1) ** 2, 3, generator=draw),
    )


def camera(width: int = 64, height: int = 48, focal: float = 50.0) -> Camera:
    """A little turned, with an off-centre principal point."""
    c, s = math.cos(0.1), math.sin(0.1)
    pose = np.array([[c, 0, s, 0.1], [0, 1, 0, -0.05], [-s, 0, c, 0.2]], dtype=np.float64)
    return Camera(pose, focal, 1.05 * focal, 0.45 * width, 0.55 * height, width, height)


def assert_close(value: torch.Tensor, truth: torch.Tensor, flips: float = 0.0, size_of_flips: float = 0.0) -> None:
    """Every entry within 1e-4 of the largest; but a share `flips` of them, which a cut-off may have decided otherwise, only
    within `size_of_flips` of the largest."""
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    assert value.shape == truth.shape
    if truth.numel() == 0:
        return
    largest = truth.abs().max().clamp(min=1e-12)
    error = (value - truth).abs() / largest
    assert bool(error.isfinite().all())
    outside = error > 1e-4
    assert outside.double().mean() <= flips, f"{int(outside.sum())} of {error.numel()} entries are off"
    assert error.max() <= max(size_of_flips, 1e-4), f"off by {float(error.max()):.2g} of the largest"


def leaves(gaussians: Gaussians, dtype: torch.dtype, device: str = "cpu") -> Gaussians:
    return gaussians.map(lambda array: array.detach().to(device, dtype).clone().requires_grad_())


def on(device: str, gaussians: Gaussians) -> Gaussians:
    return gaussians.map(lambda array: array.to(device))


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    """To the bit; on a GPU, where sums are made in no fixed order, nearly."""
    if a.device.type == "cpu":
        assert torch.equal(a, b)
    else:
        assert_close(a, b)
