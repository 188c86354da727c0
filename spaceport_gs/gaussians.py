"""Gaussians: the raw parameters that are trained, one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from spaceport_gs.types import Array

SH_DC = 0.28209479177387814  # the constant spherical harmonic, 1 / (2 sqrt(pi))

INITIAL_OPACITY = 0.1
MIN_SQUARED_SPACING = 1e-7  # world units squared; points that coincide still get a size


@dataclass(frozen=True)
class Gaussians:
    """Raw parameters; activations happen inside `project`. float32, NumPy or torch."""

    means: Array  # [N, 3] world units
    log_scales: Array  # [N, 3] natural logarithm of the standard deviations
    quaternions: Array  # [N, 4] w, x, y, z, not normalised
    opacities: Array  # [N] logit
    sh: Array  # [N, K, 3] K = 1, 4, 9 or 16; colour = 0.5 + SH_DC * sh[:, 0] + …

    def __len__(self) -> int:
        return int(self.means.shape[0])

    @property
    def sh_degree(self) -> int:
        """Degree that the rows hold, 0 … 3."""
        return round(self.sh.shape[1] ** 0.5) - 1

    def arrays(self) -> tuple[Array, ...]:
        """The row arrays, in the order of the fields."""
        return (self.means, self.log_scales, self.quaternions, self.opacities, self.sh)

    def numpy(self) -> Gaussians:
        """The same rows as NumPy arrays (shared memory where that is possible)."""
        return Gaussians(*(a if isinstance(a, np.ndarray) else a.detach().cpu().numpy() for a in self.arrays()))

    def map(self, function: Callable[[Array], Array]) -> Gaussians:
        """`function` applied to each of the five arrays."""
        return Gaussians(*(function(array) for array in self.arrays()))

    def select(self, rows: Array) -> Gaussians:
        """The rows that `rows` names: a mask [N] or row numbers [M]."""
        return self.map(lambda array: array[rows])

    def append(self, other: Gaussians) -> Gaussians:
        """These rows, then those of `other`, which has as many SH coefficients."""
        if isinstance(self.means, np.ndarray):
            join: Callable[..., Array] = np.concatenate
        else:
            import torch

            join = torch.cat
        return Gaussians(*(join((a, b)) for a, b in zip(self.arrays(), other.arrays(), strict=True)))

    def torch(self, device: Any = "cpu") -> Gaussians:
        """A copy of the rows as torch tensors on `device`."""
        import torch

        return self.map(lambda array: torch.as_tensor(array, device=device).clone())


@dataclass(frozen=True)
class Rows:
    """Gaussians, and what has a row for each of theirs: Adam's two moments. Rows are added, moved and removed in all of
    them together."""

    values: Gaussians
    companions: tuple[Gaussians, ...]  # at most two


def from_points(points: np.ndarray, colors: np.ndarray, sh_degree: int) -> Gaussians:
    """Initial Gaussians, NumPy, of `points` [P, 3] world units, P >= 4, and `colors` [P, 3] uint8.

    Round, as large as the root mean square distance of the three nearest points, alpha 0.1, colour in the constant SH
    (3D Gaussian Splatting, Kerbl et al. 2023).
    """
    from scipy.spatial import cKDTree

    distances, _ = cKDTree(points).query(points, k=4)
    squared_spacing = np.maximum((distances[:, 1:] ** 2).mean(axis=1), MIN_SQUARED_SPACING)
    n_points = len(points)
    quaternions = np.zeros((n_points, 4), dtype=np.float32)
    quaternions[:, 0] = 1
    sh = np.zeros((n_points, (sh_degree + 1) ** 2, 3), dtype=np.float32)
    sh[:, 0] = (colors / 255.0 - 0.5) / SH_DC
    return Gaussians(
        points.astype(np.float32),
        np.repeat(0.5 * np.log(squared_spacing)[:, None], 3, axis=1).astype(np.float32),
        quaternions,
        np.full(n_points, np.log(INITIAL_OPACITY / (1 - INITIAL_OPACITY)), dtype=np.float32),
        sh,
    )
