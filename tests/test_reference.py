"""The specification itself: against closed forms, other libraries and finite differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scenes import camera, random_gaussians

from spaceport_gs import reference
from spaceport_gs.gaussians import SH_DC, Gaussians
from spaceport_gs.types import Camera, RasterSettings

STEP = 1e-6  # of finite differences


def test_one_gaussian_by_hand() -> None:
    """A round Gaussian on the optical axis: variance (f s / z)^2 + low-pass, and a Gaussian profile."""
    red = torch.tensor([[[0.5 / SH_DC, -0.5 / SH_DC, 0.0]]], dtype=torch.float64)
    gaussians = Gaussians(
        torch.tensor([[0.0, 0.0, 5.0]], dtype=torch.float64),
        torch.full((1, 3), math.log(0.1), dtype=torch.float64),
        torch.tensor([[2.0, 0.0, 0.0, 0.0]], dtype=torch.float64),
        torch.tensor([0.4], dtype=torch.float64),
        red,
    )
    view = Camera(np.eye(3, 4), 100.0, 100.0, 10.0, 8.0, 20, 16)
    image = reference.render(gaussians, view, RasterSettings())
    variance = (100 * 0.1 / 5) ** 2 + 0.3
    alpha = 1 / (1 + math.exp(-0.4)) * math.exp(-0.5 * (2.5**2 + 1.5**2) / variance)
    assert float(image.color[9, 12, 0]) == pytest.approx(alpha)
    assert float(image.color[9, 12, 1]) == 0
    assert float(image.color[9, 12, 2]) == pytest.approx(alpha * 0.5)
    assert float(image.transmittance[9, 12]) == pytest.approx(1 - alpha)
    assert float(image.depth[9, 12]) == pytest.approx(alpha * 5)
    assert float(image.median_depth[9, 12]) == 0
    assert float(image.median_depth[8, 10]) == 5


def test_blending_is_front_to_back() -> None:
    near, far = random_gaussians(1, seed=1, scale=1.0), random_gaussians(1, seed=2, scale=1.0)
    near.means[:], far.means[:] = torch.tensor([0.0, 0, 3]), torch.tensor([0.0, 0, 6])
    view, settings = camera(8, 8, 10), RasterSettings(background=(1.0, 1.0, 1.0))
    one, two = (reference.render(g, view, RasterSettings()) for g in (near, far))
    both = reference.render(far.append(near), view, settings)
    behind = one.transmittance[..., None] * (two.color + two.transmittance[..., None])
    torch.testing.assert_close(both.color, one.color + behind)
    torch.testing.assert_close(both.depth, one.depth + one.transmittance * two.depth)
    near_z, far_z = (float(view.cam_from_world[2] @ [0, 0, z, 1]) for z in (3, 6))
    median = torch.where(one.transmittance < 0.5, near_z, torch.where(both.transmittance < 0.5, far_z, 0.0))
    torch.testing.assert_close(both.median_depth, median)


def test_spherical_harmonics_are_orthonormal() -> None:
    """On a Fibonacci sphere the products of the basis integrate to the identity."""
    n = 20_000
    i = np.arange(n) + 0.5
    polar, azimuth = np.arccos(1 - 2 * i / n), math.pi * (1 + 5**0.5) * i
    directions = np.stack([np.cos(azimuth) * np.sin(polar), np.sin(azimuth) * np.sin(polar), np.cos(polar)], axis=1)
    basis = reference.sh_basis(torch.tensor(directions), 3).numpy()
    np.testing.assert_allclose(basis.T @ basis * 4 * math.pi / n, np.eye(16), atol=1e-3)


def test_ssim_against_scipy() -> None:
    from scipy.ndimage import gaussian_filter

    draw = np.random.default_rng(0)
    x, y = draw.random((2, 40, 30, 3))

    def blur(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, (1.5, 1.5, 0), mode="constant", radius=(5, 5, 0))

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    expected = ((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))).mean()
    assert float(reference.ssim(torch.tensor(x), torch.tensor(y))) == pytest.approx(expected)


def test_gradients_against_finite_differences() -> None:
    """Along random directions in parameter space, in double precision."""
    gaussians = random_gaussians(4, seed=11, scale=0.5).map(lambda array: array.double())
    gaussians.opacities[:] = torch.tensor([0.5, -0.2, 0.8, 0.1])  # nothing near a cut-off in the middle of the image
    view = Camera(np.eye(3, 4), 30.0, 30.0, 4.0, 3.0, 8, 6)
    weights = torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value(arrays: Sequence[torch.Tensor]) -> torch.Tensor:
        *fields, pose = arrays
        image = reference.render(Gaussians(*fields), view, RasterSettings(), pose)
        return (torch.cat([image.color, image.depth[..., None]], dim=2) * weights).sum()

    start = [*gaussians.arrays(), torch.eye(3, 4, dtype=torch.float64)]
    leaves = [array.clone().requires_grad_() for array in start]
    value(leaves).backward()
    draw = torch.Generator().manual_seed(2)
    for k, array in enumerate(leaves):
        direction = torch.randn(array.shape, generator=draw, dtype=torch.float64)

        def moved(sign: float, k: int = k, direction: torch.Tensor = direction) -> float:
            arrays = list(start)
            arrays[k] = arrays[k] + sign * STEP * direction
            return float(value(arrays))

        slope = (moved(1) - moved(-1)) / (2 * STEP)
        assert float((array.grad * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-7)
