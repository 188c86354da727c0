"""Training: from a scene's points to Gaussians that look like its photos."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spaceport_gs import _engine, checkpoint, schedule
from spaceport_gs.checkpoint import Check, Phase, State, copied
from spaceport_gs.density import Growth, grow, logit, reset_opacities
from spaceport_gs.errors import InputError, Interrupted
from spaceport_gs.evaluate import mean_psnr
from spaceport_gs.exposure import Exposure
from spaceport_gs.gaussians import Gaussians, Rows, from_points
from spaceport_gs.preview import Preview
from spaceport_gs.progress import Listener, Progress, ignore
from spaceport_gs.scene import Scene, View, extent, farthest_views, split
from spaceport_gs.schedule import Recipe, TrainSettings
from spaceport_gs.types import DrawKey, Image, RasterSettings, Statistics

if TYPE_CHECKING:
    import torch

    from spaceport_gs.ops import AdamSettings, MomentStorage
    from spaceport_gs.step import StepView, TrainingStep

STAGE = "train"
TELL_EVERY = 25  # steps
CHECKPOINT_SECONDS = 30.0


@dataclass(frozen=True)
class TrainReport:
    """What training made."""

    gaussians: Gaussians
    """On the device that they were trained on."""
    steps: int
    seconds: float
    """Of training alone, over all resumed parts."""
    stop_reason: str
    history: tuple[Check, ...]


def train(
    scene: Scene, settings: TrainSettings, out: Path, listen: Listener = ignore, preview: Path | None = None
) -> TrainReport:
    """Trains on the views of `scene` that are not held out; goes on from the newest checkpoint in `out`/checkpoints.

    `preview`: where a picture of the scene as it stands is written every few seconds, a JPEG file.

    On the CPU the result depends on the scene and the settings alone: not on the number of threads, nor on how often the
    run was interrupted (unless `max_seconds` cuts it). Interrupted: a signal came; a checkpoint was written.
    """
    views, held_out = split(scene, settings.eval_every)
    if len(views) < 2:
        raise InputError(f"{len(views)} training views are too few; take a larger --eval-every, or 0")
    used = scene.using(views)
    if len(used.points) < 4:
        raise InputError(
            f"only {len(used.points)} points are seen by two training photos; use more photos, or --eval-every 0"
        )
    settings = settings.for_capture(len(views), _mean_pixels(views))
    run = _Run.of(views, held_out, settings)
    folder, fingerprint = out / "checkpoints", _fingerprint(used, settings)
    state = _resumed(folder, fingerprint, settings, listen) or _start(used, run)
    stepper = _Stepper(run)
    shown = Preview(preview, (*held_out, *views)[0].camera)
    saved = state.step, state.seconds

    with _signals() as stop:
        while state.phase.name != "done":
            previous = state.moment
            state.step += 1
            state.moment = _next_moment(run, state)
            if _is_check_due(run, state, previous):  # before growth, whose new rows need steps to find their place
                stepper.settle(state)
                _check(run, state)
            with _timed(state):
                stepper.step(state, previous)
            stepper.grow(state, previous)
            _advance_phase(run, state, stepper)
            if state.step % TELL_EVERY == 0 or state.phase.name == "done":
                stepper.wait(state)
                listen(_progress(run, state, stepper.last_loss))
                if shown.is_due():
                    stepper.settle(state)
                    shown.write(state.rows.values, schedule.sh_degree(run.recipe, state.moment))
            if stop:
                stepper.settle(state)
                checkpoint.save(folder, state, fingerprint)
                raise Interrupted(f"stopped by {stop[0].name} at step {state.step}; go on with --resume")
            if _is_checkpoint_due(state, saved, settings.checkpoint_every):
                stepper.settle(state)
                checkpoint.save(folder, state, fingerprint)
                saved = state.step, state.seconds
    values = state.rows.values
    return TrainReport(
        values.select(values.opacities >= logit(_engine.ALPHA_CUTOFF)),
        state.step,
        state.seconds,
        state.phase.reason,
        tuple(state.history),
    )


@dataclass(frozen=True)
class _Run:
    views: tuple[View, ...]
    """Trained on from the start."""
    probes: tuple[View, ...]
    """Training views that judge the progress, and are trained on at the end."""
    held_out: tuple[View, ...]
    settings: TrainSettings
    recipe: Recipe
    extent: float

    @staticmethod
    def of(views: Sequence[View], held_out: Sequence[View], settings: TrainSettings) -> _Run:
        recipe = settings.recipe
        assert recipe is not None
        probes: tuple[View, ...] = ()
        if recipe.plateau is not None and len(views) > recipe.plateau.min_probes + 2:
            probes = farthest_views(views, schedule.n_probes(recipe.plateau, len(views)))
        names = {probe.name for probe in probes}
        return _Run(
            tuple(view for view in views if view.name not in names),
            probes,
            tuple(held_out),
            settings,
            recipe,
            extent(views),
        )

    @property
    def pace(self) -> float:
        """Moments of the recipe in one step."""
        return self.recipe.steps / self.settings.steps

    @cached_property
    def names(self) -> list[str]:
        """Of all training views."""
        return sorted(view.name for view in self.views + self.probes)

    def views_of(self, phase: Phase) -> tuple[View, ...]:
        return self.views + self.probes if phase.name == "finish" else self.views


def _mean_pixels(views: Sequence[View]) -> int:
    return round(sum(v.camera.width * v.camera.height for v in views) / len(views))


def _fingerprint(scene: Scene, settings: TrainSettings) -> str:
    """Of everything that a checkpoint must agree with."""
    known = hashlib.sha256(json.dumps(settings.decisive(), sort_keys=True).encode())
    for view in scene.views:
        known.update(f"{view.name} {view.camera.width}x{view.camera.height}".encode())
        known.update(np.array([view.camera.fx, view.camera.fy, view.camera.cx, view.camera.cy]).tobytes())
        known.update(view.camera.cam_from_world.tobytes())
    known.update(scene.points.tobytes())
    return known.hexdigest()


def _start(scene: Scene, run: _Run) -> State:
    from spaceport_gs.ops import AdamMoments

    values = from_points(scene.points, scene.colors, run.recipe.sh_degree).torch(run.settings.device)
    moments = AdamMoments.zeros(values, _storage(run.settings))
    state = State(Rows(values, (moments.first, moments.second)), Statistics.empty(len(values), run.settings.device))
    if run.recipe.exposure_rate > 0:
        state.exposures = Exposure.identity(len(run.names), run.settings.device)
    return state


def _storage(settings: TrainSettings) -> MomentStorage:
    from spaceport_gs.ops import MomentStorage

    is_compact = settings.moments == "compact" and settings.device != "cpu"
    return MomentStorage.COMPACT if is_compact else MomentStorage.FULL


def _stored(rows: Rows, settings: TrainSettings) -> Rows:
    """The rows with their moments as these settings keep them."""
    from spaceport_gs.ops import AdamMoments

    moments = AdamMoments(*rows.companions).stored(_storage(settings))
    return Rows(rows.values, (moments.first, moments.second))


def _resumed(folder: Path, fingerprint: str, settings: TrainSettings, listen: Listener) -> State | None:
    """The newest checkpoint that can be read; InputError if there are some, but none of use."""
    failure: InputError | None = None
    for path in reversed(checkpoint.files(folder)):
        try:
            state = checkpoint.load(path, fingerprint, settings.device)
        except InputError as error:
            failure = failure or error
            listen(Progress(STAGE, 0, settings.steps, str(error)))
        else:
            state.rows = _stored(state.rows, settings)
            state.best = None if state.best is None else _stored(state.best, settings)
            return state
    if failure is not None:
        raise failure
    return None


@contextmanager
def _timed(state: State) -> Iterator[None]:
    """Counts as time of training; what a check takes does not."""
    started = time.monotonic()
    yield
    state.seconds += time.monotonic() - started


@dataclass(frozen=True)
class _Plan:
    """What a step does besides looking at its view."""

    adam: AdamSettings
    gathers: bool
    """Adds to the statistics of growth."""

    @staticmethod
    def of(run: _Run, state: State, previous: float) -> _Plan:
        gathers = state.phase.name == "main" and previous < run.recipe.growth_until
        return _Plan(_adam(run, state), gathers)


@dataclass(frozen=True)
class _Seen:
    """What a view's render is compared with."""

    photo: torch.Tensor  # [H, W, 3] uint8, on the device of the training, as all of it
    mask: torch.Tensor | None  # [H, W] uint8
    exposure: Exposure | None


class _Recorded:
    """The recorded step of a GPU on certain rows, with what it keeps of each view."""

    def __init__(self, rows: Rows, statistics: Statistics, d_ssim_weight: float, before: _Recorded | None) -> None:
        from spaceport_gs import ops
        from spaceport_gs.step import TrainingStep, UpdateRule

        self.rows, self.statistics = rows, statistics
        self._loss = ops.LossSettings(d_ssim_weight)
        n_instances = 0
        if before is not None:  # as many tiles a row as before
            n_instances = round(before._step.n_instances * len(rows.values) / len(before.rows.values))
        moments = ops.AdamMoments(*rows.companions)
        self._step: TrainingStep = TrainingStep(rows.values, moments, statistics, UpdateRule.CONTRIBUTING, n_instances)
        self._booked = 0.0
        self._settings: RasterSettings | None = None
        self._views: dict[str, StepView] = {}
        if before is not None:  # they remember more than their photos
            self._settings, self._views = before._settings, before._views
            self._step.uses_depth_limits = before._step.uses_depth_limits

    def run(self, view: View, seen: _Seen, settings: RasterSettings, plan: _Plan) -> None:
        from spaceport_gs.step import StepView

        if settings != self._settings:  # as they do when the resolution changes
            self._settings, self._views = settings, {}
        if view.name not in self._views:
            self._views[view.name] = StepView(view.camera, seen.photo, settings, self._loss, seen.mask, seen.exposure)
        self._step.run(self._views[view.name], plan.adam, plan.gathers)

    def wait(self) -> tuple[float, float]:
        """Sum of the losses since the last call, and the last loss."""
        total, last = self._step.wait()
        added, self._booked = total - self._booked, total
        return added, last

    def settle(self) -> None:
        self._step.settle()


class _Stepper:
    """Does steps; holds the photos of the current resolution, nothing that a result depends on."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._level = 0.0
        self._order_key: tuple[int, int, int] | None = None
        self._order = np.empty(0, dtype=np.int64)
        self._resized: dict[str, View] = {}
        self._seen: dict[str, _Seen] = {}
        self._losses: list[torch.Tensor] = []
        self._recorded: _Recorded | None = None
        self.last_loss = math.nan

    def step(self, state: State, previous: float) -> None:
        """One step. `previous`: the moment before it."""
        recipe, view = self._run.recipe, self._view(state, previous)
        settings = RasterSettings(schedule.sh_degree(recipe, previous), low_pass=schedule.low_pass(self._level))
        plan = _Plan.of(self._run, state, previous)
        if state.rows.values.means.is_cuda:
            self._record(state).run(view, self._seen_of(view, state), settings, plan)
        else:
            self._step_by_verbs(state, view, settings, plan)

    def grow(self, state: State, previous: float) -> None:
        """The growth and the reset of opacities that are due behind the step from moment `previous`."""
        recipe = self._run.recipe
        is_due = schedule.grows(recipe, previous, state.moment)
        is_reset_due = schedule.resets_opacity(recipe, previous, state.moment)
        if state.phase.name != "main" or not (is_due or is_reset_due):
            return
        self.settle(state)
        with _timed(state):
            if is_due:
                key = DrawKey(self._run.settings.seed % 2**64, state.step)
                growth = Growth(recipe, self._run.extent, state.moment, key)
                state.rows = grow(state.rows, state.statistics.scores(), growth)
                state.statistics = Statistics.empty(len(state.rows.values), self._run.settings.device)
            if is_reset_due:
                state.rows = reset_opacities(state.rows, recipe.reset_opacity)
        if len(state.rows.values) == 0:
            raise InputError(
                "training lost every Gaussian: the cameras or points cannot be right; check the SfM report"
            )

    def _step_by_verbs(self, state: State, view: View, settings: RasterSettings, plan: _Plan) -> None:
        from spaceport_gs import ops

        camera, values = view.camera, state.rows.values
        projected = ops.project(values, camera, settings)
        tiles = ops.tile(projected, camera)
        image = ops.blend(projected, tiles, camera, settings)
        seen = self._seen_of(view, state)
        exposure = None if seen.exposure is None else seen.exposure.values
        target = ops.LossTarget(seen.photo, seen.mask, exposure)
        loss = ops.loss(image.color, target, ops.LossSettings(self._run.recipe.d_ssim_weight))
        d_image = Image(loss.d_color, image.transmittance.new_zeros(image.transmittance.shape))
        d_splats = ops.blend_vjp(projected, tiles, camera, settings, image, d_image)
        self._losses.append(loss.means)
        if seen.exposure is not None and loss.d_exposure is not None:
            seen.exposure.update(loss.d_exposure, plan.adam)
        if plan.gathers:
            ops.density(projected, d_splats, camera, state.statistics)
        moments = ops.AdamMoments(*state.rows.companions)
        ops.project_vjp_update(values, camera, settings, projected, d_splats, moments, plan.adam)

    def _record(self, state: State) -> _Recorded:
        """The recorded step on these rows; another where they were replaced."""
        recorded = self._recorded
        if recorded is None or recorded.rows is not state.rows or recorded.statistics is not state.statistics:
            weight = self._run.recipe.d_ssim_weight
            recorded = self._recorded = _Recorded(state.rows, state.statistics, weight, recorded)
        return recorded

    def wait(self, state: State) -> None:
        """Adds the losses since the last call to the state; a GPU is waited for here, and not at every step."""
        from spaceport_gs import ops

        with _timed(state):
            values = ops.values_of(self._losses, ops.LossSettings(self._run.recipe.d_ssim_weight))
            for value in values:
                state.loss_sum += value
                self.last_loss = value
            self._losses = []
            if self._recorded is not None:
                added, self.last_loss = self._recorded.wait()
                state.loss_sum += added

    def settle(self, state: State) -> None:
        """As `wait`; and the state's rows may be read."""
        self.wait(state)
        if self._recorded is not None:
            with _timed(state):
                self._recorded.settle()

    def _view(self, state: State, moment: float) -> View:
        """This step's view at this step's resolution: views in shuffled epochs, the same for the same seed and step."""
        run = self._run
        views = run.views_of(state.phase)
        epoch, place = divmod(state.step - 1 - state.phase.step, len(views))
        key = (run.settings.seed, state.phase.step, epoch)
        if key != self._order_key:
            self._order_key, self._order = key, np.random.default_rng(key).permutation(len(views))
        view = views[int(self._order[place])]
        shorter = min(view.camera.width, view.camera.height)
        level = schedule.resolution(run.recipe, moment, shorter)
        if level != self._level:
            self._level, self._resized, self._seen = level, {}, {}
        if view.name not in self._resized:
            self._resized[view.name] = view.resized(
                max(1, round(view.camera.width * level)), max(1, round(view.camera.height * level))
            )
        return self._resized[view.name]

    def _seen_of(self, view: View, state: State) -> _Seen:
        import torch

        if view.name not in self._seen:
            device, exposures = self._run.settings.device, state.exposures
            mask = None if view.mask is None else torch.from_numpy(view.mask).to(device)
            exposure = None if exposures is None else exposures.of(self._run.names.index(view.name))
            self._seen[view.name] = _Seen(torch.from_numpy(view.photo).to(device), mask, exposure)
        return self._seen[view.name]


def _next_moment(run: _Run, state: State) -> float:
    following = state.moment + _pace(run, state)
    is_last = following > run.recipe.steps - 1e-3 * run.pace  # what rounding leaves over is no step of its own
    return run.recipe.steps if is_last else following


def _pace(run: _Run, state: State) -> float:
    """Moments that the next step takes; more than usual where the time would not suffice."""
    if run.settings.max_seconds <= 0 or state.step <= 1:
        return run.pace
    left = max(run.settings.max_seconds - state.seconds, 1e-3)
    steps_left = max(left / (state.seconds / (state.step - 1)), 1.0)
    return max(run.pace, (run.recipe.steps - state.moment) / steps_left)


def _adam(run: _Run, state: State) -> AdamSettings:
    from spaceport_gs.ops import AdamSettings

    recipe, rule, phase = run.recipe, run.recipe.plateau, state.phase
    means, others = schedule.means_rate(recipe, state.moment), 1.0
    if rule is not None and phase.name in ("cool", "finish"):
        share = 1.0
        if phase.name == "cool":
            length = schedule.cool_down_length(rule, phase.moment)
            share = min((state.moment - phase.moment) / length, 1.0)
        first = schedule.means_rate(recipe, phase.moment if phase.name == "cool" else recipe.steps)
        means = first ** (1 - share) * recipe.final_means_rate**share
        others = rule.final_rate + (1 - rule.final_rate) * 0.5 * (1 + math.cos(math.pi * share))
    return AdamSettings(
        means=means * run.extent,
        log_scales=recipe.scale_rate * others,
        quaternions=recipe.rotation_rate * others,
        opacities=recipe.opacity_rate * others,
        sh_dc=recipe.dc_rate * others,
        sh_rest=recipe.sh_rate * others,
        exposure=recipe.exposure_rate * others,
        step=state.step,
    )


def _is_check_due(run: _Run, state: State, previous: float) -> bool:
    """Checks fall on multiples of their distance, and on the last step."""
    every = run.recipe.plateau.check_every if run.recipe.plateau else run.recipe.evaluate_every
    return schedule.passes(previous, state.moment, every) is not None or state.moment >= run.recipe.steps


def _is_checkpoint_due(state: State, saved: tuple[int, float], every: int) -> bool:
    """`saved`: step and seconds of the last one. What took less than half a minute is done again as quickly."""
    is_done = state.phase.name == "done"
    if every > 0:
        return is_done or state.step - saved[0] >= every
    return state.seconds - (0.0 if is_done else saved[1]) >= CHECKPOINT_SECONDS


def _check(run: _Run, state: State) -> None:
    """Adds a line to the history, and keeps a snapshot of the main phase's best."""
    since = state.step - (state.history[-1].step if state.history else 1)
    values, in_main = state.rows.values, state.phase.name == "main"
    settings = RasterSettings(sh_degree=schedule.sh_degree(run.recipe, state.moment))
    probes = mean_psnr(values, run.probes, settings) if state.phase.name != "finish" else None
    state.history.append(
        Check(
            step=state.step,
            moment=state.moment,
            seconds=state.seconds,
            loss=state.loss_sum / max(since, 1),
            psnr_probes=probes,
            psnr_held_out=mean_psnr(values, run.held_out, settings),
            gaussians=len(values),
        )
    )
    state.loss_sum = 0.0
    armed = _armed_probes(run, state, until=state.step)
    if in_main and armed and armed[-1] >= max(armed):
        state.best = copied(state.rows)
        state.best_exposures = None if state.exposures is None else state.exposures.copy()


def _armed_probes(run: _Run, state: State, until: int) -> list[float]:
    """PSNR of the probes at the checks that count, up to step `until`: of these the best snapshot is taken."""
    rule = run.recipe.plateau
    if rule is None:
        return []
    armed = [check for check in state.history if check.moment >= rule.arm_at and check.step <= until]
    return [check.psnr_probes for check in armed if check.psnr_probes is not None]


def _advance_phase(run: _Run, state: State, stepper: _Stepper) -> None:
    """main → cool → finish → done; without a plateau rule main → done."""
    recipe, rule, phase = run.recipe, run.recipe.plateau, state.phase

    def enter(name: str, reason: str) -> None:
        state.phase = Phase(name, state.moment, state.step, reason)

    is_over = state.moment >= recipe.steps
    if phase.name == "main":
        if rule is None:
            if is_over:
                enter("done", _limit(run, state))
            return
        armed = _armed_probes(run, state, until=state.step)
        checked_now = bool(state.history) and state.history[-1].step == state.step
        reason = schedule.plateau(rule, armed) if checked_now and armed else None
        if reason is not None:
            reason = f"plateau at step {state.step}: {reason}"
            stepper.settle(state)
            _restore_better(state, max(armed), armed[-1], rule.max_decline)
        elif state.moment >= schedule.last_main_moment(recipe):
            reason = _limit(run, state)
        if reason is not None:
            enter("cool", reason)
    elif rule is not None and phase.name == "cool":
        if is_over or state.moment - phase.moment >= schedule.cool_down_length(rule, phase.moment):
            before = _armed_probes(run, state, until=phase.step)
            stepper.settle(state)
            cooled = mean_psnr(state.rows.values, run.probes) if state.best is not None else None
            if before and cooled is not None:
                _restore_better(state, max(before), cooled, rule.max_loss)
            state.best = state.best_exposures = None
            enter("finish" if run.probes and not is_over else "done", phase.reason)
    elif rule is not None and phase.name == "finish":
        if is_over or state.moment - phase.moment >= rule.cool_down:
            if not state.history or state.history[-1].step != state.step:
                stepper.settle(state)
                _check(run, state)
            enter("done", phase.reason)


def _restore_better(state: State, best: float, now: float, tolerance: float) -> None:
    if state.best is not None and now < best - tolerance:
        state.rows = copied(state.best)
        if state.exposures is not None and state.best_exposures is not None:
            state.exposures.restore(state.best_exposures)
        state.statistics = Statistics.empty(len(state.rows.values), state.rows.values.means.device)


def _limit(run: _Run, state: State) -> str:
    in_time = run.settings.max_seconds > 0 and state.step < run.settings.steps * 0.99
    return f"time budget of {run.settings.max_seconds:g} s" if in_time else "all steps of the schedule"


def _progress(run: _Run, state: State, loss: float) -> Progress:
    figures: dict[str, float | int] = {"loss": loss, "gaussians": len(state.rows.values)}
    shown = next((c for c in reversed(state.history) if c.psnr_probes or c.psnr_held_out), None)
    if shown is not None:
        figures["psnr"] = shown.psnr_held_out or shown.psnr_probes or 0.0
    n_steps = run.settings.steps
    done = n_steps if state.phase.name == "done" else min(_expected_share(run, state), 1.0) * n_steps
    return Progress(STAGE, round(done), n_steps, f"step {state.step}", figures)


def _expected_share(run: _Run, state: State) -> float:
    """How much of the run is behind: a cool-down that started early ends early."""
    rule, phase = run.recipe.plateau, state.phase
    if rule is None or phase.name == "main":
        return state.moment / run.recipe.steps
    end = phase.moment + rule.cool_down
    if phase.name == "cool":
        end = phase.moment + schedule.cool_down_length(rule, phase.moment) + rule.cool_down
    return state.moment / min(end, run.recipe.steps)


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """A list that SIGINT and SIGTERM append themselves to, instead of ending the process."""
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    wanted = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda n, _: received.append(signal.Signals(n))) for number in wanted]
    try:
        yield received
    finally:
        for number, handler in zip(wanted, before, strict=True):
            signal.signal(number, handler)
