"""Growth: cloning, splitting, pruning and opacity resets, on parameters and all that goes with them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from spaceport_gs.gaussians import Gaussians
from spaceport_gs.schedule import Recipe
from spaceport_gs.types import Array

if TYPE_CHECKING:
    import torch

N_CHILDREN = 2
CHILD_SIZE = 1 / (0.8 * N_CHILDREN)  # of the parent's


@dataclass(frozen=True)
class Rows:
    """Parameters, and what has a row for each of their rows: gradient and Adam's moments."""

    values: Gaussians
    companions: tuple[Gaussians, ...]

    def select(self, rows: Array) -> Rows:
        return Rows(self.values.select(rows), tuple(c.select(rows) for c in self.companions))

    def append(self, values: Gaussians) -> Rows:
        """New rows, whose gradient and moments are zero."""
        n = len(values)
        zeros = [c.map(lambda array: array.new_zeros((n, *array.shape[1:]))) for c in self.companions]
        companions = tuple(c.append(z) for c, z in zip(self.companions, zeros, strict=True))
        return Rows(self.values.append(values), companions)


@dataclass(frozen=True)
class Growth:
    """One growth step of one scene."""

    recipe: Recipe
    extent: float
    """World units."""
    moment: float
    key: tuple[int, int]
    """Seed and step: the same key draws the same samples."""


def grow(rows: Rows, scores: torch.Tensor, growth: Growth) -> Rows:
    """Clones small and splits large Gaussians whose score [N] reaches the threshold, then prunes.

    The highest scores go first where the limit on the number of Gaussians binds. NaN rows are pruned.
    """
    recipe = growth.recipe
    grows = _within_budget(scores, recipe)
    sizes = rows.values.log_scales.amax(dim=1)
    is_large = sizes > math.log(recipe.split_size * growth.extent)
    clones = rows.values.select(grows & ~is_large)
    children = _split(rows.values.select(grows & is_large), growth.key)
    return _prune(rows.select(~(grows & is_large)).append(clones).append(children), growth)


def reset_opacities(rows: Rows, opacity: float) -> Rows:
    """No opacity stays above `opacity`; gradient and moments of all opacities become zero."""
    values = rows.values
    return Rows(
        replace(values, opacities=values.opacities.clamp(max=logit(opacity))),
        tuple(replace(c, opacities=c.opacities.new_zeros(len(c))) for c in rows.companions),
    )


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _within_budget(scores: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """[N] bool. Each that grows adds one row, by clone and by split alike."""
    import torch

    grows = scores >= recipe.growth_threshold
    if recipe.max_gaussians == 0:
        return grows
    budget = max(recipe.max_gaussians - len(scores), 0)
    best = torch.argsort(torch.where(grows, scores, -1), descending=True, stable=True)[:budget]
    chosen = torch.zeros_like(grows)
    chosen[best] = True
    return grows & chosen


def _split(parents: Gaussians, key: tuple[int, int]) -> Gaussians:
    """Two children for each: centres drawn from the parent, sizes divided by 1.6."""
    import torch

    children = parents.append(parents)
    offsets = torch.as_tensor(_draw_offsets(children.numpy(), key), device=children.means.device)
    return replace(
        children,
        means=children.means + offsets,
        log_scales=children.log_scales + math.log(CHILD_SIZE),
    )


def _draw_offsets(gaussians: Gaussians, key: tuple[int, int]) -> np.ndarray:
    """[N, 3] float32, one sample of each Gaussian around its mean.

    In NumPy, whose results do not depend on how many threads torch has.
    """
    normal = np.random.default_rng(key).standard_normal((len(gaussians), 3))
    local = normal * np.exp(gaussians.log_scales.astype(np.float64))
    quaternions = gaussians.quaternions.astype(np.float64)
    quaternions /= np.maximum(np.linalg.norm(quaternions, axis=1, keepdims=True), 1e-12)
    w, vector = quaternions[:, :1], quaternions[:, 1:]
    turn = np.cross(vector, local)
    # v' = v + 2 w (q x v) + 2 q x (q x v)
    return (local + 2 * (w * turn + np.cross(vector, turn))).astype(np.float32)


def _prune(rows: Rows, growth: Growth) -> Rows:
    recipe, values = growth.recipe, rows.values
    keeps = values.opacities >= logit(recipe.min_opacity)
    if growth.moment > recipe.prune_large_after:
        keeps &= values.log_scales.amax(dim=1) <= math.log(recipe.max_size * growth.extent)
    for array in values.arrays():
        keeps &= array.isfinite().flatten(1).all(dim=1) if array.dim() > 1 else array.isfinite()
    return rows.select(keeps)
