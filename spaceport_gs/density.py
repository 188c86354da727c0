"""Growth: cloning, splitting, pruning and opacity resets, on parameters and all that goes with them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from spaceport_gs.gaussians import Rows
from spaceport_gs.schedule import Recipe
from spaceport_gs.types import DrawKey, GrowthSettings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Growth:
    """One growth step of one scene."""

    recipe: Recipe
    extent: float
    """World units."""
    moment: float
    key: DrawKey

    def settings(self) -> GrowthSettings:
        """The recipe's numbers as the engine takes them."""
        recipe = self.recipe
        drops_large = self.moment > recipe.prune_large_after
        return GrowthSettings(
            threshold=recipe.growth_threshold,
            split_log_scale=math.log(recipe.split_size * self.extent),
            min_opacity=logit(recipe.min_opacity),
            key=self.key,
            max_log_scale=math.log(recipe.max_size * self.extent) if drops_large else math.inf,
            max_rows=recipe.max_gaussians,
        )


def grow(rows: Rows, scores: torch.Tensor, growth: Growth) -> Rows:
    """Clones small and splits large Gaussians whose score [N] reaches the threshold, and prunes.

    The highest scores go first where the limit on the number of Gaussians binds. Rows with NaN are pruned. On a GPU rows
    come in an order that keeps neighbours in space together, on the CPU in that of `ops.grow`.
    """
    from spaceport_gs import ops

    grown = ops.grow(rows, scores, growth.settings())
    if not scores.is_cuda:
        return grown
    return ops.select_rows(grown, ops.morton_order(grown.values.means))


def reset_opacities(rows: Rows, opacity: float) -> Rows:
    """No opacity stays above `opacity`; moments of all opacities become zero."""
    values = rows.values
    return Rows(
        replace(values, opacities=values.opacities.clamp(max=logit(opacity))),
        tuple(replace(c, opacities=c.opacities.new_zeros(len(c))) for c in rows.companions),
    )


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
