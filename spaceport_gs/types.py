"""The nouns of the engine, as in csrc/types.h. Arrays are NumPy or torch; nothing here imports torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Flag
from typing import Any

import numpy as np

SSIM_RADIUS, SSIM_SIGMA = 5, 1.5  # window of 11 x 11 pixels (Wang et al. 2004)
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2

Array = Any
"""A NumPy array or a torch tensor: C-contiguous, on the device of the verb that uses it."""


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: x right, y down, z forward; pixel (i, j) has its centre at (i + 0.5, j + 0.5)."""

    cam_from_world: np.ndarray
    """[3, 4] float64, rotation | translation."""
    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int
    above: float = 0.0
    """Rows of pixels of the whole image above this band of it; they count where projection becomes a linear one."""
    below: float = 0.0
    """And below it."""

    @property
    def center(self) -> np.ndarray:
        """[3], the camera's position in the world."""
        return -self.cam_from_world[:, :3].T @ self.cam_from_world[:, 3]

    def resized(self, width: int, height: int) -> Camera:
        """The same view on another grid; intrinsics follow the true ratio of the integer sizes."""
        x_ratio, y_ratio = width / self.width, height / self.height
        return replace(
            self,
            fx=self.fx * x_ratio,
            fy=self.fy * y_ratio,
            cx=self.cx * x_ratio,
            cy=self.cy * y_ratio,
            width=width,
            height=height,
            above=self.above * y_ratio,
            below=self.below * y_ratio,
        )

    def band(self, begin: int, end: int) -> Camera:
        """The rows begin … end - 1 of this image, which show what they show in it."""
        return replace(
            self,
            cy=self.cy - begin,
            height=end - begin,
            above=self.above + begin,
            below=self.below + self.height - end,
        )


class Depth(Flag):
    """Which depths an image is asked for."""

    NONE = 0
    EXPECTED = 1
    MEDIAN = 2
    BOTH = 3


@dataclass(frozen=True)
class RasterSettings:
    """Fixed properties of the rendering equation; the defaults are those of 3D Gaussian Splatting."""

    sh_degree: int = 3
    """Degree of the spherical harmonics that is evaluated, 0 … 3; the Gaussians may hold more."""
    near: float = 0.2
    """Gaussians whose centre lies nearer than this (world units along z) are culled."""
    low_pass: float = 0.3
    """Variance in px² that is added to every projected covariance."""
    alpha_max: float = 0.99
    background: tuple[float, float, float] = (0.0, 0.0, 0.0)
    depth: Depth = Depth.NONE
    """What `render`, `rasterize` and `blend` give besides the colour; training does without."""
    deterministic: bool = False
    """Gradients, and with them training, are the same bits from run to run on a GPU too, which takes more time and memory
    there. On a CPU they always are."""
    absolute_gradients: bool = False
    """`blend_vjp` gives two more columns: sums over the pixels of the absolute gradients by a splat's x and y (Ye et al.,
    AbsGS, 2024), behind all others."""


@dataclass
class Projected:
    """The visible Gaussians of one camera, in the order of their rows.

    `splats` [M, 12] float32: x, y | conic a, b, c | opacity | r, g, b | depth | half extents of the box where alpha >= 1/255.
    A gradient of it holds the first nine columns; ten where the loss sees the image's depth.
    """

    splats: Array  # [M, 12] float32
    gaussian_from_splat: Array  # [M] int32
    instance_offsets: Array  # [M + 1] int64: splat m owns the instances [m], [m] + 1, … [m + 1] - 1
    n_instances: int = 0
    """The last of the offsets."""
    touched: Array | None = None  # [M, 4] int32: the tiles of each splat, as a GPU lists them (TileSet)
    depth_keys: Array | None = None  # [M] int32: what a GPU sorts the splats by, in the lower 24 bits


@dataclass
class Tiles:
    """For every 16×16 tile, row by row, its instances from front to back."""

    offsets: Array  # [n_tiles + 1] int64
    splat_from_instance: Array  # [I] int32
    number_from_instance: Array | None = None  # [I] int32, place in the order of emission; None on a GPU


@dataclass
class Image:
    """A rendered image, or the gradient of a loss by one."""

    color: Array  # [H, W, 3] float32, background blended in
    transmittance: Array  # [H, W] float32, what is left of the light from behind
    hits: Array | None = None  # int32: which splats reached which pixels, kept on a GPU for the backward pass
    depth: Array | None = (
        None  # [H, W] float32, expected: z of the splats by their weights, which sum to 1 - transmittance
    )
    median_depth: Array | None = None  # [H, W] float32, z of the splat that takes transmittance below 0.5; 0: none does


@dataclass
class Statistics:
    """What Gaussians went through since the last growth."""

    gradient_sums: Array  # [N] float32, norms of the gradients by the screen position, in units of half the image
    n_visible: Array  # [N] float32, steps in which the Gaussian was visible

    @staticmethod
    def empty(n_gaussians: int, device: Any = "cpu") -> Statistics:
        import torch

        return Statistics(torch.zeros(n_gaussians, device=device), torch.zeros(n_gaussians, device=device))

    def scores(self) -> Array:
        """[N], mean norm over the steps in which the Gaussian was visible; 0 if there was none."""
        return self.gradient_sums / self.n_visible.clip(min=1)


@dataclass(frozen=True)
class DrawKey:
    """The same key draws the same samples."""

    seed: int
    """0 … 2^64 - 1."""
    step: int
    """0 … 2^32 - 1."""


@dataclass(frozen=True)
class GrowthSettings:
    """Which rows grow, and which are dropped."""

    threshold: float
    """Of the score, 0 or more, from which a row grows."""
    split_log_scale: float
    """A row that grows is split in two if its largest log-scale is above this, else cloned."""
    min_opacity: float
    """Logit; fainter rows are dropped."""
    key: DrawKey
    max_log_scale: float = math.inf
    """Rows with a larger one are dropped."""
    max_rows: int = 0
    """The highest scores go first where growth alone would lead beyond; 0 = no limit."""
