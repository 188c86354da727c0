"""Training steps on a GPU: recorded once, replayed for every view, without the host in between."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np
import torch

from spaceport_gs import _engine, ops
from spaceport_gs.errors import BackendError
from spaceport_gs.exposure import Exposure
from spaceport_gs.gaussians import Gaussians
from spaceport_gs.types import Camera, RasterSettings, Statistics

_PROGRESS = np.dtype(
    [
        ("n_done", np.int64),
        ("n_instances", np.int64),
        ("loss_sum", np.float64),
        ("loss", np.float64),
        ("is_halted", np.uint32),
        ("n_rendered_again", np.uint32),
    ]
)
HEADROOM = 1.05
"""Memory for this many times the instances that a step needed."""
LIMITS_TRIAL = 64
"""Steps after which depth limits are given up, if more than one in sixteen was rendered again because of them."""


class UpdateRule(Enum):
    """Which rows Adam moves in a step."""

    ALL = "all"
    """Every row, every step: as `ops.update` does."""
    DEFERRED = "deferred"
    """As ALL; but the SH coefficients beyond the constant one make their steps after sixteen of them at once, or when the
    values are asked for. Each is the step of Adam that it would have been, with its own rates; but images in between are
    rendered with coefficients that are up to fifteen steps old. Moves less memory in a step, and needs 192 bytes more for
    each row."""
    CONTRIBUTING = "contributing"
    """Rows whose gradient is not zero. The others make up for it when theirs is not, or when the values are asked for:
    decay and drift of the steps that they missed, at the learning rates of now. So a row is rendered where it was left,
    not where it would have drifted to, until it contributes again."""


@dataclass(frozen=True, eq=False)
class StepView:
    """What a step looks at, and how. Made once for each view: what is prepared for it is found again by the object.

    It remembers for each tile the depth behind which its last visit saw nothing; the next lists nothing there. Where that
    proves wrong, because the image is not opaque there any more, the device renders again without it.
    """

    camera: Camera
    photo: torch.Tensor  # [H, W, 3] uint8, on the GPU
    raster: RasterSettings
    loss: ops.LossSettings
    mask: torch.Tensor | None = None  # [H, W] uint8, on the GPU; see ops.LossTarget
    exposure: Exposure | None = None
    """Of the view, on the GPU; a step moves it in place."""
    depth_limits: torch.Tensor = field(init=False)  # [n_tiles] int32

    def __post_init__(self) -> None:
        none = torch.full((ops.n_tiles(self.camera),), -1, dtype=torch.int32, device=self.photo.device)
        object.__setattr__(self, "depth_limits", none)

    @property
    def kind(self) -> _Kind:
        return _Kind(
            self.camera.width,
            self.camera.height,
            self.mask is not None,
            self.exposure is not None,
            self.raster,
            self.loss,
        )


@dataclass(frozen=True)
class _Kind:
    """What a step is recorded for."""

    width: int
    height: int
    has_mask: bool
    has_exposure: bool
    raster: RasterSettings
    loss: ops.LossSettings
    has_limits: bool = True


class TrainingStep:
    """Steps of Adam on these Gaussians, in place; when rows are added or removed, another one must be made.

    A step is queued and nobody waits for it. Whether the tiles' lists fitted their memory is seen on the device: a step
    that did not fit changed nothing, nor did those behind it; they are repeated with more memory. `n_instances` is the
    memory to begin with. Between `settle` and the next step, values and moments are what the rule says.
    """

    def __init__(
        self,
        values: Gaussians,
        moments: ops.AdamMoments,
        statistics: Statistics,
        rule: UpdateRule = UpdateRule.CONTRIBUTING,
        n_instances: int = 0,
    ) -> None:
        if not values.means.is_cuda or not hasattr(_engine, "StepGraph"):
            raise BackendError("recorded steps need a GPU, and a build with SPACEPORT_CUDA=ON")
        device, n = values.means.device, len(values)
        self.n_instances = n_instances if n_instances > 0 else max(2 * n, 1 << 16)
        self._values, self._moments, self._statistics, self._rule = values, moments, statistics, rule
        self._up_to_date: torch.Tensor | None = None
        self._sh_log: torch.Tensor | None = None
        self._last: ops.AdamSettings | None = None
        self._sums = torch.zeros(n, _engine.SPLAT_GRADIENT_STRIDE, device=device)
        if rule is UpdateRule.DEFERRED:
            n_bytes = _engine.sh_log_size(ops.backend_of(values.means), n)
            self._sh_log = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
        self._scratch = torch.empty(0, dtype=torch.uint8, device=device)
        self._progress = torch.zeros(_engine.STEP_PROGRESS_SIZE, dtype=torch.uint8, device=device)
        self._progress_on_host = torch.zeros_like(self._progress, device="cpu").pin_memory()
        self._seen = self._progress_on_host.numpy().view(_PROGRESS)
        self._n_done, self._is_halted = self._seen["n_done"], self._seen["is_halted"]
        self._graphs: dict[_Kind, _engine.StepGraph] = {}
        self._prepared: dict[StepView, tuple[_engine.StepGraph, _engine.StepView]] = {}
        self._unconfirmed: deque[tuple[StepView, ops.AdamSettings, bool]] = deque()
        self._n_confirmed = 0
        self.uses_depth_limits = True
        """Of the views (see StepView); given up where they prove wrong too often."""
        self._trial = 0, 0  # steps, and how many were rendered again, at its start

    def run(self, view: StepView, adam: ops.AdamSettings, gathers_statistics: bool = False) -> None:
        """Queues a step; `adam.step` counts up by one. Statistics: adds what the step sees of each Gaussian."""
        if self._last is None and self._rule is UpdateRule.CONTRIBUTING:
            n = len(self._values)
            self._up_to_date = torch.full((n,), adam.step - 1, dtype=torch.int32, device=self._sums.device)
        self._confirm()
        self._launch(view, adam, gathers_statistics)
        self._unconfirmed.append((view, adam, gathers_statistics))
        self._last = adam

    def wait(self) -> tuple[float, float]:
        """Waits until every step is done. Returns the sum of all losses so far, and the last."""
        while True:
            torch.cuda.current_stream().synchronize()
            self._confirm()
            if not self._unconfirmed:
                return float(self._seen["loss_sum"][0]), float(self._seen["loss"][0])

    @property
    def n_rendered_again(self) -> int:
        """Steps until the last wait whose image was rendered twice, because depth limits had proved wrong."""
        return int(self._seen["n_rendered_again"][0])

    def settle(self) -> tuple[float, float]:
        """As `wait`; and what missed steps makes up for them."""
        losses = self.wait()
        backend, moments = ops.backend_of(self._sums), self._moments
        if self._sh_log is not None:
            _engine.flush_sh(backend, self._values, moments.first, moments.second, self._sh_log)
        if self._up_to_date is not None:
            _engine.catch_up(backend, self._values, moments.first, moments.second, self._up_to_date, self._last)
        return losses

    def _confirm(self) -> None:
        """Forgets the steps that are done, and begins again with more memory where one did not fit."""
        is_halted = bool(self._is_halted[0])  # asked once: only what is read behind the wait belongs to it
        if is_halted:
            torch.cuda.current_stream().synchronize()
        n_done = int(self._n_done[0])
        while self._n_confirmed < n_done:
            self._unconfirmed.popleft()
            self._n_confirmed += 1
        self._judge_limits()
        if is_halted:
            needed = int(self._seen["n_instances"][0])
            ops.check_instances(needed)
            self.n_instances = min(int(HEADROOM * needed) + 1, ops.MOST_INSTANCES)
            self._forget()
            for view, *_ in self._unconfirmed:  # where there is no memory for it, the next call tries again
                self._prepare(view)
            self._is_halted[0] = 0
            self._progress.copy_(self._progress_on_host)
            for step in self._unconfirmed:
                self._launch(*step)

    def _judge_limits(self) -> None:
        n_again = self.n_rendered_again
        if not self.uses_depth_limits or self._n_confirmed < self._trial[0] + LIMITS_TRIAL:
            return
        if n_again - self._trial[1] > (self._n_confirmed - self._trial[0]) // 16:
            self.uses_depth_limits = False
            self._prepared.clear()
        self._trial = self._n_confirmed, n_again

    def _launch(self, view: StepView, adam: ops.AdamSettings, gathers_statistics: bool) -> None:
        graph, prepared = self._prepared.get(view) or self._prepare(view)
        graph.launch(ops.backend_of(self._sums), prepared, adam, gathers_statistics)

    def _prepare(self, view: StepView) -> tuple[_engine.StepGraph, _engine.StepView]:
        kind = replace(view.kind, has_limits=self.uses_depth_limits)
        graph = self._graphs.get(kind) or self._record(kind)
        limits = view.depth_limits if self.uses_depth_limits else None
        backend = ops.backend_of(self._sums)
        prepared = graph, _engine.StepView(backend, view.camera, view.photo, view.mask, view.exposure, limits)
        self._graphs[kind], self._prepared[view] = graph, prepared
        return prepared

    def _forget(self) -> None:
        self._graphs.clear()
        self._prepared.clear()

    def _record(self, kind: _Kind) -> _engine.StepGraph:
        backend, values, moments = ops.backend_of(self._sums), self._values, self._moments
        n_bytes = _engine.step_scratch(backend, len(values), self.n_instances, kind.width, kind.height, kind.raster)
        if len(self._scratch) < n_bytes:
            torch.cuda.current_stream().synchronize()  # recorded steps that still run have their buffers in it
            self._forget()
            self._scratch = self._scratch[:0].clone()  # before there is another
            self._scratch = torch.empty(n_bytes, dtype=torch.uint8, device=self._sums.device)
        return _engine.StepGraph(
            backend,
            values,
            moments.first,
            moments.second,
            self._sums,
            self._up_to_date,
            self._sh_log,
            self._statistics,
            self._scratch,
            self.n_instances,
            kind.width,
            kind.height,
            kind.has_mask,
            kind.has_exposure,
            kind.has_limits,
            kind.raster,
            kind.loss,
            self._progress,
            self._progress_on_host,
        )
