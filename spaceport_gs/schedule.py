"""What training does when: presets, and pure functions of the moment of a run.

A moment is a number of steps on the recipe's own scale, 0 … recipe.steps, whatever the true length of the run: a run of
half as many steps, or one that has to end within a time, passes through the same moments faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from spaceport_gs.errors import InputError
from spaceport_gs.types import RasterSettings

LEVELS = 16  # resolutions are multiples of 1/16, so that no level jumps far
FEW_VIEWS = 60  # fewer photos than this overfit, and get schedules of their own
VERY_FEW_VIEWS = 25
MOMENTS = ("full", "compact")


@dataclass(frozen=True)
class PlateauRule:
    """When to stop by the PSNR of probe views, and how to finish; counts in moments, gains in dB."""

    check_every: int = 500
    """Distance of two checks."""
    arm_at: int = 16_000
    """First check that counts: full resolution, and neither growth nor opacity resets disturb the curve any more."""
    window: int = 4
    """Checks over which a gain is measured."""
    min_gain: float = 0.05
    """A smaller gain over the window is flat."""
    flat_patience: int = 2
    """Consecutive flat checks that end the main phase; 0 = never."""
    max_decline: float = 1.0
    """A larger fall below the best check is a decline."""
    decline_patience: int = 2
    """Consecutive declines that end the main phase."""
    cool_down: int = 1_500
    """Length of the cool-down, and of the finish on all training photos after it."""
    cool_down_share: float = 0.0
    """At least this share of the moment at which the cool-down starts."""
    final_rate: float = 0.3
    """What is left at the end of the cool-down of all learning rates but that of the means."""
    max_loss: float = 0.05
    """The cooled model is replaced by the best snapshot if its probes are worse by more than this."""
    probe_share: float = 0.1
    """Probe views per training view."""
    max_probes: int = 16
    min_probes: int = 2


@dataclass(frozen=True)
class Recipe:
    """The method's numbers; step counts are moments. The defaults are those of 3D Gaussian Splatting (Kerbl et al. 2023)."""

    steps: int = 30_000
    """Length of the run that the other counts are made for."""
    d_ssim_weight: float = 0.2
    """Weight of 1 - SSIM in the loss; the rest is L1."""
    means_rate: float = 1.6e-4
    """First learning rate of the means, per unit of the scene's extent."""
    final_means_rate: float = 1.6e-6
    """Last learning rate of the means, reached log-linearly."""
    dc_rate: float = 2.5e-3
    """Learning rate of the constant colour."""
    sh_rate: float = 1.25e-4
    """Learning rate of the other SH coefficients."""
    opacity_rate: float = 0.05
    scale_rate: float = 5e-3
    rotation_rate: float = 1e-3
    exposure_rate: float = 0.0
    """Learning rate of each photo's exposure, an affine change of colour that the scene is seen through in training (and
    only there: photos of one scene with different exposures cannot all be right). 0 = photos have none."""
    sh_degree: int = 3
    """Highest SH degree."""
    sh_every: int = 1_000
    """The degree in use rises by one this often."""
    growth_from: int = 500
    """Growth happens after this …"""
    growth_until: int = 15_000
    """… and before this."""
    growth_every: int = 100
    growth_threshold: float = 2e-4
    """Mean norm of the gradient by the screen position (in units of half the image) from which a Gaussian grows."""
    split_size: float = 0.01
    """Larger Gaussians are split, smaller ones cloned; share of the extent."""
    min_opacity: float = 0.005
    """Fainter Gaussians are pruned."""
    max_size: float = 0.1
    """Larger Gaussians are pruned; share of the extent."""
    prune_large_after: int = 3_000
    max_gaussians: int = 0
    """Growth stops here; 0 = no limit."""
    reset_every: int = 3_000
    """Opacities are reset this often while growth lasts; 0 = never."""
    reset_opacity: float = 0.01
    full_resolution_at: int = 0
    """Resolution rises until here; 0 = full resolution from the start."""
    first_side: int = 0
    """Pixels of the shorter side at the start."""
    evaluate_every: int = 2_500
    """Distance of two evaluations of the held-out views, which are for the record only."""
    plateau: PlateauRule | None = None
    """None = always run to the end."""


@dataclass(frozen=True)
class TrainSettings:
    """Everything that a run of the trainer depends on, beside the scene."""

    preset: str = "standard"
    """`standard`, or `baseline` = 3D Gaussian Splatting as published."""
    steps: int = 0
    """Most steps; every step count of the recipe scales with it. 0 = the recipe's."""
    max_seconds: float = 0.0
    """Time for training; the schedule speeds up so that it completes. 0 = no limit."""
    seed: int = 0
    eval_every: int = 8
    """Every so-many-th photo is held out for evaluation; 0 = none."""
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0 = whenever half a minute of training has passed."""
    device: str = "cpu"
    """Where to train: cpu or cuda."""
    exposure_rate: float = 0.0
    """Learning rate of each photo's exposure, such as 0.001; 0 = the recipe's."""
    moments: str = "full"
    """How Adam's moments of the SH coefficients are kept on a GPU: `full`, or `compact` in half of the memory."""
    recipe: Recipe | None = None
    """None = the preset's recipe for the capture."""

    def for_capture(self, n_views: int, n_pixels: int) -> TrainSettings:
        """The settings with recipe and steps filled in, for training views of `n_pixels` pixels each."""
        _check(self)
        recipe = self.recipe or preset(self.preset, n_views, n_pixels)
        if self.exposure_rate > 0:
            recipe = replace(recipe, exposure_rate=self.exposure_rate)
        return replace(self, recipe=recipe, steps=self.steps or recipe.steps)

    def to_json(self) -> dict[str, Any]:
        """A JSON object of all fields."""
        return asdict(self)

    def decisive(self) -> dict[str, Any]:
        """The part of `to_json` that a resumed run must agree with; it may go on on another device, in another storage."""
        return {
            name: value
            for name, value in self.to_json().items()
            if name not in ("checkpoint_every", "device", "moments")
        }


def preset(name: str, n_views: int, n_pixels: int) -> Recipe:
    """The recipe called `name` for a capture of `n_views` training views of `n_pixels` pixels each."""
    if name == "baseline":
        return Recipe()
    if name == "standard":
        return _few_photos(n_views, n_pixels) if n_views < FEW_VIEWS else STANDARD
    raise InputError(f"unknown preset {name!r}: choose standard or baseline")


STANDARD = Recipe(
    max_gaussians=1_000_000,
    full_resolution_at=15_000,
    first_side=256,
    plateau=PlateauRule(),
)


def _few_photos(n_views: int, n_pixels: int) -> Recipe:
    steps = 4_000 if n_views < VERY_FEW_VIEWS else 7_000
    megapixels = n_pixels / 1e6
    return Recipe(
        steps=steps,
        growth_from=300,
        growth_until=steps // 2,
        max_gaussians=round(min(max(4_000 * n_views * megapixels / 2, 40_000), 500_000)),
        prune_large_after=steps,  # background Gaussians are large; losing them costs dBs and time here
        reset_every=0,
        full_resolution_at=steps * 3 // 10,
        first_side=128,
        evaluate_every=250,
        plateau=PlateauRule(
            check_every=250,
            arm_at=max(1_000, steps * 3 // 10),
            flat_patience=1,
            max_decline=0.1,
            decline_patience=3,
            cool_down=500,
            cool_down_share=0.2,
            final_rate=0.1,
            max_loss=0.03,
            max_probes=4,
        ),
    )


def means_rate(recipe: Recipe, moment: float) -> float:
    """Learning rate of the means, per unit of extent: log-linear from first to last."""
    share = min(moment / recipe.steps, 1.0)
    return math.exp((1 - share) * math.log(recipe.means_rate) + share * math.log(recipe.final_means_rate))


def sh_degree(recipe: Recipe, moment: float) -> int:
    """SH degree in use."""
    return min(recipe.sh_degree, int(moment // recipe.sh_every))


def resolution(recipe: Recipe, moment: float, shorter_side: int) -> float:
    """Share of the full resolution, a multiple of 1/16: geometric from the first side to 1."""
    if moment >= recipe.full_resolution_at:
        return 1.0
    first = min(recipe.first_side / shorter_side, 1.0)
    share = first ** (1 - moment / recipe.full_resolution_at)
    return min(math.ceil(share * LEVELS) / LEVELS, 1.0)


def low_pass(level: float) -> float:
    """Variance in px² to add to projected covariances at a resolution, so that a scene looks alike at all of them.

    What full resolution adds, in the larger pixels of `level`, and the variance of averaging over their area. Without it
    Gaussians shrink while pixels are large, and the scene dims when they become small.
    """
    return RasterSettings.low_pass * level**2 + (1 - level**2) / 12


def passes(previous: float, moment: float, every: int) -> float | None:
    """The multiple of `every` in (previous, moment], the last one if there are several; None without one."""
    if every <= 0 or moment // every <= previous // every:
        return None
    return moment // every * every


def grows(recipe: Recipe, previous: float, moment: float) -> bool:
    """Whether the step from moment `previous` to `moment` clones, splits and prunes."""
    due = passes(previous, moment, recipe.growth_every)
    return due is not None and recipe.growth_from < due < recipe.growth_until


def resets_opacity(recipe: Recipe, previous: float, moment: float) -> bool:
    """Whether the step from moment `previous` to `moment` resets the opacities."""
    due = passes(previous, moment, recipe.reset_every)
    return due is not None and due < recipe.growth_until


def n_probes(rule: PlateauRule, n_views: int) -> int:
    """How many of the training views judge the progress."""
    return min(max(math.ceil(rule.probe_share * n_views), rule.min_probes), rule.max_probes)


def cool_down_length(rule: PlateauRule, moment: float) -> float:
    """Length of a cool-down that starts at `moment`."""
    return max(rule.cool_down, rule.cool_down_share * moment)


def last_main_moment(recipe: Recipe) -> float:
    """Where the main phase ends if no plateau ended it: cool-down and finish then fit into the run."""
    rule = recipe.plateau
    if rule is None:
        return recipe.steps
    return min(recipe.steps - 2 * rule.cool_down, recipe.steps / (1 + 2 * rule.cool_down_share))


def smoothed(probes: Sequence[float]) -> list[float]:
    """Each value's median with the two before it."""
    return [median(probes[max(i - 2, 0) : i + 1]) for i in range(len(probes))]


def plateau(rule: PlateauRule, probes: Sequence[float]) -> str | None:
    """Why the main phase should end after the checks `probes` (mean PSNR, dB, since arming); None = it should not."""
    curve = smoothed(probes)
    falls = [max(curve[: i + 1]) - value for i, value in enumerate(curve)]
    recent = falls[-rule.decline_patience :]
    if len(recent) == rule.decline_patience and all(fall > rule.max_decline for fall in recent):
        return f"probes {-falls[-1]:+.2f} dB from best"
    gains = [b - a for a, b in zip(curve, curve[rule.window :], strict=False)]
    recent = gains[-rule.flat_patience :] if rule.flat_patience else []
    if recent and len(recent) == rule.flat_patience and all(g < rule.min_gain for g in recent):
        return f"probes {gains[-1]:+.2f} dB over {rule.window * rule.check_every} steps"
    return None


def _check(settings: TrainSettings) -> None:
    if settings.moments not in MOMENTS:
        raise InputError(f"--moments must be {' or '.join(MOMENTS)}, not {settings.moments}")
    for name, least in (
        ("steps", 0),
        ("max_seconds", 0),
        ("exposure_rate", 0),
        ("seed", 0),
        ("eval_every", 0),
        ("checkpoint_every", 0),
    ):
        value = getattr(settings, name)
        if not (value >= least and math.isfinite(value)):
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
