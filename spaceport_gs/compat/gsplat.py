"""gsplat's `rasterization` on this engine: a program written for it (version 1.5.3) changes one import.

Pinhole cameras, on CPU and CUDA tensors, with gsplat's limits: alpha from 1/255 up to 0.999, and a pixel stops at a
transmittance of 1e-4. What gsplat has and this has not raises NotImplementedError. Differences that stay:

- A Gaussian is visible if it reaches the centre of a pixel, of the image or of what its last tiles hang over its edge; for
  gsplat a box around it has to meet the image.
- `tile_size`, `channel_chunk` and `segmented` say how, not what, and are not looked at. The entries of `meta` about tiles
  hold only those that a Gaussian reaches, and there is no `isect_ids`.
- Seen from SH colours the camera's centre is -Rᵀt, where gsplat inverts the viewmat. Along rotations and translations,
  which are all that a pose can do, the gradients by both are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from spaceport_gs import _engine, ops
from spaceport_gs.gaussians import Gaussians
from spaceport_gs.types import Camera, Depth, Image, Projected, RasterSettings, Tiles

ALPHA_MAX = 0.999
FAR_PLANE = 1e10  # the default, behind which nothing is taken to lie
NEAREST_PLANE = 1e-6  # in place of none: the engine looks only at what is in front of the camera
SMALLEST_SCALE = 1e-12  # in place of zero, which has no logarithm
SMALLEST_ALPHA = 1e-10  # that a depth is divided by
SMALLEST_COMPENSATION_SQUARED = 1e-12  # the root has a slope there
LARGEST_OPACITY = 1 - 2**-24  # for the engine's logits; blending takes an opacity as it is
MOST_CHANNELS = 4  # of one blending: three colours, and the depth's column
MAX_SH_DEGREE = 3


def rasterization(
    means: torch.Tensor,  # [..., N, 3]
    quats: torch.Tensor,  # [..., N, 4] w, x, y, z
    scales: torch.Tensor,  # [..., N, 3]
    opacities: torch.Tensor,  # [..., N]
    colors: torch.Tensor,  # [..., (C,) N, D], or with sh_degree [..., (C,) N, K, 3]
    viewmats: torch.Tensor,  # [..., C, 4, 4]
    Ks: torch.Tensor,  # [..., C, 3, 3]
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = FAR_PLANE,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    packed: bool = True,
    tile_size: int = 16,
    backgrounds: torch.Tensor | None = None,  # [..., C, D]
    render_mode: str = "RGB",
    sparse_grad: bool = False,
    absgrad: bool = False,
    rasterize_mode: str = "classic",
    channel_chunk: int = 32,
    distributed: bool = False,
    camera_model: str = "pinhole",
    segmented: bool = False,
    covars: torch.Tensor | None = None,
    with_ut: bool = False,
    with_eval3d: bool = False,
    radial_coeffs: torch.Tensor | None = None,
    tangential_coeffs: torch.Tensor | None = None,
    thin_prism_coeffs: torch.Tensor | None = None,
    ftheta_coeffs: Any = None,
    rolling_shutter: Any = None,
    viewmats_rs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Colours [..., C, height, width, X], alphas [..., C, height, width, 1], and what lies in between.

    X is D (RGB), 1 (D, ED) or D + 1 (RGB+D, RGB+ED). Every tensor but Ks gets a gradient. `meta["means2d"]` lies on the way
    to the image: it keeps its own after `retain_grad()`, and with `absgrad` the backward pass gives it an attribute of
    that name. `viewmats` and `Ks` are read by the host: on a GPU this waits for them.
    """
    _refuse(
        camera_model=camera_model != "pinhole",
        sparse_grad=sparse_grad,
        distributed=distributed,
        covars=covars is not None,
        with_ut=with_ut,
        with_eval3d=with_eval3d,
        radial_coeffs=radial_coeffs is not None,
        tangential_coeffs=tangential_coeffs is not None,
        thin_prism_coeffs=thin_prism_coeffs is not None,
        ftheta_coeffs=ftheta_coeffs is not None,
        rolling_shutter=rolling_shutter is not None and getattr(rolling_shutter, "name", None) != "GLOBAL",
        viewmats_rs=viewmats_rs is not None,
        sh_degree=sh_degree is not None and sh_degree > MAX_SH_DEGREE,
    )
    _check_choice("render_mode", render_mode, ("RGB", "D", "ED", "RGB+D", "RGB+ED"))
    _check_choice("rasterize_mode", rasterize_mode, ("classic", "antialiased"))
    inputs = _Inputs(means, quats, scales, opacities, colors, viewmats, Ks, sh_degree)
    inputs.check(backgrounds)
    settings = RasterSettings(
        sh_degree=sh_degree or 0,
        near=max(near_plane, NEAREST_PLANE),
        low_pass=eps2d,
        alpha_max=ALPHA_MAX,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        absolute_gradients=absgrad,
    )
    limits = _Limits(far_plane, radius_clip, is_antialiased=rasterize_mode == "antialiased")
    poses, cameras = viewmats.reshape(-1, 4, 4), _cameras(viewmats, Ks, width, height)
    views = [
        _View.of(scene, pose, camera, settings, limits)
        for scene, pose, camera in zip(inputs.scenes(), poses, cameras, strict=True)
    ]
    layout = _Layout([view.seen.rows for view in views], (*viewmats.shape[:-2], means.shape[-2]), packed)
    means2d = layout.joined([view.means2d for view in views])
    parts = []
    for number, view in enumerate(views):
        channels = view.channels(render_mode)
        if absgrad and channels.shape[1] > MOST_CHANNELS:
            raise NotImplementedError(f"absgrad: with at most {MOST_CHANNELS} channels, got {channels.shape[1]}")
        absolute = _AbsoluteGradient(layout, means2d, number) if absgrad else None
        columns = layout.own(means2d, number), view.conics, view.opacities, channels
        parts.append(_Blend.apply(view.seen, absolute, *columns))
    render, transmittance = (_stacked(images).unflatten(0, viewmats.shape[:-2]) for images in zip(*parts, strict=True))
    if backgrounds is not None and "RGB" in render_mode:
        behind = torch.nn.functional.pad(backgrounds, (0, render.shape[-1] - backgrounds.shape[-1]))
        render = render + transmittance * behind[..., None, None, :]
    alphas = 1 - transmittance
    if render_mode.endswith("ED"):
        expected = render[..., -1:] / alphas.clamp(min=SMALLEST_ALPHA)
        render = torch.cat([render[..., :-1], expected], dim=-1)
    return render, alphas, {"means2d": means2d, **_about_splats(views, layout), **_about_tiles(views, layout)}


def _refuse(**is_asked_for: bool) -> None:
    for name, is_asked in is_asked_for.items():
        if is_asked:
            raise NotImplementedError(f"{name}: this engine has only the default of what gsplat has here")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value}")


def _check(name: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
    if tensor.shape != tuple(shape) or tensor.dtype != torch.float32:
        got = f"{tensor.dtype} of shape {list(tensor.shape)}"
        raise ValueError(f"{name}: expected torch.float32 of shape {list(shape)}, got {got}")


def _as_kernels_read_it(array: torch.Tensor) -> torch.Tensor:
    array = array.detach().contiguous()
    return array if array.data_ptr() % 16 == 0 else array.clone()


def _stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))


def _concatenated(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def _cameras(viewmats: torch.Tensor, Ks: torch.Tensor, width: int, height: int) -> list[Camera]:
    numbers = torch.cat([viewmats.reshape(-1, 16), Ks.reshape(-1, 9)], dim=1).detach().double().cpu().numpy()
    cameras = []
    for row in numbers:
        pose, (fx, _, cx, _, fy, cy, *_) = row[:12].reshape(3, 4), row[16:].tolist()
        cameras.append(Camera(np.ascontiguousarray(pose), fx, fy, cx, cy, width, height))
    return cameras


@dataclass(frozen=True)
class _Limits:
    """What is left out besides what the engine culls."""

    far_plane: float
    radius_clip: float
    is_antialiased: bool

    def are_idle(self) -> bool:
        return self.far_plane >= FAR_PLANE and self.radius_clip <= 0 and not self.is_antialiased


@dataclass(frozen=True)
class _Scene:
    """The Gaussians of one view."""

    means: torch.Tensor  # [N, 3]
    log_scales: torch.Tensor  # [N, 3]
    quats: torch.Tensor  # [N, 4]
    sh: torch.Tensor  # [N, K, 3], zeros where there are
    colors: torch.Tensor | None  # [N, D]
    opacities: torch.Tensor  # [N]

    def raw(self) -> Gaussians:
        logits = self.opacities.clamp(max=LARGEST_OPACITY).logit()
        arrays = self.means, self.log_scales, self.quats, logits, self.sh
        return Gaussians(*map(_as_kernels_read_it, arrays))


@dataclass(frozen=True)
class _Inputs:
    """The arguments that hold scenes and cameras; scenes may come in batches."""

    means: torch.Tensor
    quats: torch.Tensor
    scales: torch.Tensor
    opacities: torch.Tensor
    colors: torch.Tensor
    viewmats: torch.Tensor
    Ks: torch.Tensor
    sh_degree: int | None

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(self.means.shape[:-2])

    @property
    def has_colors_by_camera(self) -> bool:
        return self.colors.dim() == len(self.batch) + (3 if self.sh_degree is None else 4)

    def check(self, backgrounds: torch.Tensor | None) -> None:
        rows, cameras = (*self.batch, self.means.shape[-2]), (*self.batch, self.viewmats.shape[-3])
        _check("means", self.means, (*rows, 3))
        _check("quats", self.quats, (*rows, 4))
        _check("scales", self.scales, (*rows, 3))
        _check("opacities", self.opacities, rows)
        _check("viewmats", self.viewmats, (*cameras, 4, 4))
        _check("Ks", self.Ks, (*cameras, 3, 3))
        colored = (*cameras, rows[-1]) if self.has_colors_by_camera else rows
        if self.sh_degree is None:
            _check("colors", self.colors, (*colored, self.colors.shape[-1]))
        else:
            _check("colors", self.colors, (*colored, *self.colors.shape[-2:-1], 3))
            if (self.sh_degree + 1) ** 2 > self.colors.shape[-2]:
                raise ValueError(
                    f"colors: too few SH coefficients for sh_degree {self.sh_degree}: {self.colors.shape[-2]}"
                )
        if backgrounds is not None:
            _check("backgrounds", backgrounds, (*cameras, self.colors.shape[-1]))
        if 0 in cameras:
            raise ValueError(f"viewmats: expected at least one camera, got shape {list(self.viewmats.shape)}")

    def scenes(self) -> Iterator[_Scene]:
        """One after the other, and each once for every camera that sees it."""
        log_scales = self.scales.abs().clamp(min=SMALLEST_SCALE).log()
        by_scene = map(self._unbound, (self.means, log_scales, self.quats, self.opacities, self._held_colors()))
        for means, log_scales, quats, opacities, colors in zip(*by_scene, strict=True):
            n_cameras = self.viewmats.shape[-3]
            for own_colors in colors.unbind(0) if self.has_colors_by_camera else [colors] * n_cameras:
                if self.sh_degree is None:
                    sh, plain = means.new_zeros(len(means), 1, 3), own_colors
                else:
                    sh, plain = own_colors, None
                yield _Scene(means, log_scales, quats, sh, plain, opacities)

    def _held_colors(self) -> torch.Tensor:
        """Colours; SH coefficients with a number of them that belongs to a degree up to three."""
        if self.sh_degree is None:
            return self.colors
        whole = [(degree + 1) ** 2 for degree in range(self.sh_degree, MAX_SH_DEGREE + 1)]
        return self.colors if self.colors.shape[-2] in whole else self.colors[..., : whole[0], :]

    def _unbound(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """Scene by scene; without a batch as it is, so that its gradient is not copied."""
        return tensor.flatten(0, len(self.batch) - 1).unbind(0) if self.batch else [tensor]


@dataclass(frozen=True)
class _Seen:
    """What one camera sees of a scene, as the engine has it."""

    raw: Gaussians
    camera: Camera
    settings: RasterSettings
    projected: Projected
    tiles: Tiles
    rows: torch.Tensor  # [M] int64, of the Gaussians
    radii: torch.Tensor  # [M, 2] int32

    @staticmethod
    @torch.no_grad()
    def of(scene: _Scene, camera: Camera, settings: RasterSettings, limits: _Limits) -> _Seen:
        raw = scene.raw()
        projected, radii = _limited(ops.project(raw, camera, settings), scene.opacities, settings, limits)
        if projected.depth_keys is not None:
            projected.depth_keys = _depth_keys(projected.splats[:, 9].contiguous())
        rows = projected.gaussian_from_splat.long()
        return _Seen(raw, camera, settings, projected, ops.tile(projected, camera), rows, radii)

    def paint(self, opacities: torch.Tensor, channels: torch.Tensor) -> None:
        """Gives the splats, before they are blended, other opacities [M] and colours: up to three channels [M, X], and a
        fourth in place of the depth."""
        splats, n = self.projected.splats, channels.shape[1]
        splats[:, 5] = opacities
        splats[:, 6 : 6 + n] = channels
        splats[:, 6 + n : 9] = 0


@dataclass(frozen=True)
class _View:
    """The splats of one camera as parts of torch's graph."""

    seen: _Seen
    means2d: torch.Tensor  # [M, 2]
    conics: torch.Tensor  # [M, 3]
    depths: torch.Tensor  # [M]
    opacities: torch.Tensor  # [M]
    colors: torch.Tensor  # [M, D]

    @staticmethod
    def of(scene: _Scene, pose: torch.Tensor, camera: Camera, settings: RasterSettings, limits: _Limits) -> _View:
        seen = _Seen.of(scene, camera, settings, limits)
        shapes = scene.means, scene.log_scales, scene.quats, scene.sh
        means2d, conics, colors, depths = _Project.apply(seen, *shapes, pose)
        opacities = scene.opacities.index_select(0, seen.rows)
        if limits.is_antialiased:
            opacities = opacities * _compensation(conics, settings.low_pass)
        if scene.colors is not None:
            colors = scene.colors.index_select(0, seen.rows)
        return _View(seen, means2d, conics, depths, opacities, colors)

    def channels(self, render_mode: str) -> torch.Tensor:  # [M, X]
        depths = self.depths[:, None]
        parts = {"RGB": self.colors, "D": depths, "ED": depths}
        return _concatenated([parts[part] for part in render_mode.split("+")], dim=1)


def _compensation(conics: torch.Tensor, low_pass: float) -> torch.Tensor:  # [M, 3] -> [M]
    """sqrt(det S / det(S + low_pass)) of the inverses of S + low_pass (Yu et al., Mip-Splatting, 2024)."""
    a, b, c = conics.unbind(1)
    squared = 1 - low_pass * (a + c) + low_pass**2 * (a * c - b * b)
    return squared.clamp(min=SMALLEST_COMPENSATION_SQUARED).sqrt()


def _limited(
    projected: Projected, opacities: torch.Tensor, settings: RasterSettings, limits: _Limits
) -> tuple[Projected, torch.Tensor]:
    """What is within the limits, and its radii: half sizes of the box in which alpha reaches 1/255, in whole pixels."""
    extents, depths = projected.splats[:, 10:12], projected.splats[:, 9]
    if limits.are_idle():
        return projected, extents.ceil().int()
    is_within = depths <= limits.far_plane
    if limits.is_antialiased:
        full = opacities.index_select(0, projected.gaussian_from_splat) / _engine.ALPHA_CUTOFF
        left = full * _compensation(projected.splats[:, 2:5], settings.low_pass)
        is_within &= left >= 1
        extents = extents * (left.clamp(min=1).log() / full.log()).nan_to_num(1).clamp(max=1).sqrt()[:, None]
    radii = extents.ceil()
    is_within &= (radii > limits.radius_clip).any(dim=1)
    return _selected(projected, is_within), radii[is_within].int()


def _selected(projected: Projected, keeps: torch.Tensor) -> Projected:  # [M] bool
    offsets = torch.nn.functional.pad(projected.instance_offsets.diff()[keeps].cumsum(0), (1, 0))
    return Projected(
        projected.splats[keeps],
        projected.gaussian_from_splat[keeps],
        offsets,
        int(offsets[-1]),
        None if projected.touched is None else projected.touched[keeps],
        None if projected.depth_keys is None else projected.depth_keys[keeps],
    )


def _depth_keys(depths: torch.Tensor) -> torch.Tensor:  # [M] -> [M] int32
    """What a GPU sorts by, from the nearest splat on: its own keys begin at the near plane, and gsplat's is so near that
    they would end in the middle of a large scene."""
    if len(depths) == 0:
        return depths.int()
    bits = depths.view(torch.int32)
    keys = (bits - bits.amin()).double()
    most = (1 << _engine.DEPTH_KEY_BITS) - 3  # the two above it stand for no depth
    return (keys * (most / keys.amax().clamp(min=most))).int()


@dataclass(frozen=True)
class _Layout:
    """Packed: the rows of all views one behind the other. Else every row of every view, zeros where nothing is visible."""

    rows: Sequence[torch.Tensor]  # [M] of each view
    shape: Sequence[int]  # [..., C, N]
    is_packed: bool

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:  # [M, X] of each view
        values = _concatenated(parts)
        if self.is_packed:
            return values
        places = _concatenated([self.places(number) for number in range(len(parts))])
        every = values.new_zeros(math.prod(self.shape), *values.shape[1:])
        return every.index_copy(0, places, values).view(*self.shape, *values.shape[1:])

    def own(self, joined: torch.Tensor, number: int) -> torch.Tensor:  # [M, X]
        if self.is_packed:
            return joined.narrow(0, self.begin(number), len(self.rows[number]))
        return joined.flatten(0, -2).index_select(0, self.places(number))

    def put(self, joined: torch.Tensor, number: int, values: torch.Tensor) -> None:  # [M, X]
        if self.is_packed:
            self.own(joined, number).copy_(values)
        else:
            joined.flatten(0, -2).index_copy_(0, self.places(number), values)

    def begin(self, number: int) -> int:
        """Of a view, where packed."""
        return sum(len(rows) for rows in self.rows[:number])

    def places(self, number: int) -> torch.Tensor:
        """Of a view, where not."""
        return self.rows[number] + number * self.shape[-1]


@dataclass(frozen=True)
class _AbsoluteGradient:
    """Where that of a view goes."""

    layout: _Layout
    means2d: torch.Tensor
    number: int

    def put(self, values: torch.Tensor) -> None:  # [M, 2]
        if not hasattr(self.means2d, "absgrad"):
            self.means2d.absgrad = torch.zeros_like(self.means2d)  # type: ignore[attr-defined]
        self.layout.put(self.means2d.absgrad, self.number, values)  # type: ignore[attr-defined]


class _Project(torch.autograd.Function):
    """From a scene's means, log-scales, quaternions and SH coefficients, and a pose, to the columns of a view's splats."""

    @staticmethod
    def forward(ctx: Any, seen: _Seen, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        ctx.seen = seen
        ctx.save_for_backward(*seen.raw.arrays())  # so that torch notices when they change before the backward pass
        means2d, conics, _opacity, colors, depths, _extents = seen.projected.splats.split([2, 3, 1, 3, 1, 2], dim=1)
        return means2d.clone(), conics.clone(), colors.clone(), depths[:, 0].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *d_columns: torch.Tensor) -> Any:  # type: ignore[override]
        seen, raw = ctx.seen, Gaussians(*ctx.saved_tensors)
        d_means2d, d_conics, d_colors, d_depths = d_columns
        d_opacities = torch.zeros_like(d_depths)  # they pass by this node
        columns = d_means2d, d_conics, d_opacities[:, None], d_colors, d_depths[:, None]
        d_pose = d_depths.new_empty(3, 4, dtype=torch.float64) if ctx.needs_input_grad[5] else None
        d_raw = ops.project_vjp(
            raw, seen.camera, seen.settings, seen.projected, torch.cat(columns, dim=1), d_cam_from_world=d_pose
        )
        if d_pose is not None:
            d_pose = torch.nn.functional.pad(d_pose.float(), (0, 0, 0, 1))
        return None, d_raw.means, d_raw.log_scales, d_raw.quaternions, d_raw.sh, d_pose


class _Blend(torch.autograd.Function):
    """From the columns of a view's splats to the channels of its image [H, W, X] and its transmittance [H, W, 1]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        seen: _Seen,
        absolute: _AbsoluteGradient | None,
        _means2d: torch.Tensor,  # [M, 2] those of the splats, as the conics are
        _conics: torch.Tensor,  # [M, 3]
        opacities: torch.Tensor,  # [M]
        channels: torch.Tensor,  # [M, X]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.seen, ctx.absolute = seen, absolute
        images = []
        for few in channels.split(MOST_CHANNELS, dim=1):
            settings = _settings_of(few.shape[1], seen.settings)
            seen.paint(opacities, few)
            images.append(ops.blend(seen.projected, seen.tiles, seen.camera, settings))
        planes = [(i.color, i.transmittance, i.hits, i.depth) for i in images]
        ctx.save_for_backward(opacities, channels, *(plane for of_image in planes for plane in of_image))
        colors = [i.color if i.depth is None else torch.cat([i.color, i.depth[..., None]], dim=-1) for i in images]
        render = _concatenated(colors, dim=-1)[..., : channels.shape[1]]
        # Copied: what the backward pass reads is not what the caller may change in place.
        return render.clone(memory_format=torch.contiguous_format), images[0].transmittance[..., None].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_render: torch.Tensor, d_transmittance: torch.Tensor) -> Any:  # type: ignore[override]
        seen, (opacities, channels, *planes) = ctx.seen, ctx.saved_tensors
        d_shapes, d_channels = [], []
        d_transmittance = d_transmittance[..., 0].contiguous()
        for few, d_few in zip(channels.split(MOST_CHANNELS, dim=1), d_render.split(MOST_CHANNELS, dim=-1), strict=True):
            n, image = few.shape[1], Image(*planes[:4])
            d_color = torch.nn.functional.pad(d_few[..., :3], (0, max(3 - n, 0))).contiguous()
            d_fourth = d_few[..., 3].contiguous() if n == MOST_CHANNELS else None
            seen.paint(opacities, few)
            d_splats = ops.blend_vjp(
                seen.projected,
                seen.tiles,
                seen.camera,
                _settings_of(n, seen.settings),
                image,
                Image(d_color, d_transmittance, depth=d_fourth),
            )
            d_shapes.append(d_splats[:, :6])
            d_channels.append(d_splats[:, 6 : 6 + n])
            if ctx.absolute is not None:
                ctx.absolute.put(d_splats[:, -2:])
            planes, d_transmittance = planes[4:], torch.zeros_like(d_transmittance)
        d_means2d, d_conics, d_opacities = sum(d_shapes[1:], d_shapes[0]).split([2, 3, 1], dim=1)
        return None, None, d_means2d, d_conics, d_opacities[:, 0], _concatenated(d_channels, dim=1)


def _settings_of(n_channels: int, settings: RasterSettings) -> RasterSettings:
    return replace(settings, depth=Depth.EXPECTED) if n_channels == MOST_CHANNELS else settings


def _about_splats(views: Sequence[_View], layout: _Layout) -> dict[str, Any]:
    seen, n_cameras = [view.seen for view in views], layout.shape[-2]
    ids: dict[str, torch.Tensor | None] = dict.fromkeys(["batch_ids", "camera_ids", "gaussian_ids"])
    if layout.is_packed:
        batch_ids = [torch.full_like(s.rows, number // n_cameras) for number, s in enumerate(seen)]
        camera_ids = [torch.full_like(s.rows, number % n_cameras) for number, s in enumerate(seen)]
        parts = batch_ids, camera_ids, [s.rows for s in seen]
        ids = dict(zip(ids, map(_concatenated, parts), strict=True))
    return {
        **ids,
        "radii": layout.joined([s.radii for s in seen]),
        "depths": layout.joined([view.depths for view in views]),
        "conics": layout.joined([view.conics for view in views]),
        "opacities": layout.joined([view.opacities for view in views]),
        "n_batches": len(views) // n_cameras,
        "n_cameras": n_cameras,
    }


def _about_tiles(views: Sequence[_View], layout: _Layout) -> dict[str, Any]:
    camera, size = views[0].seen.camera, _engine.TILE_SIZE
    tile_width, tile_height = -(-camera.width // size), -(-camera.height // size)
    offsets, flat_ids, n_instances = [], [], 0
    for number, view in enumerate(views):
        tiles, splats = view.seen.tiles, view.seen.tiles.splat_from_instance
        offsets.append(tiles.offsets[:-1] + n_instances)
        flat_ids.append(splats + layout.begin(number) if layout.is_packed else layout.places(number)[splats.long()])
        n_instances += len(splats)
    return {
        "tiles_per_gauss": layout.joined([view.seen.projected.instance_offsets.diff().int() for view in views]),
        "isect_offsets": torch.stack(offsets).int().view(*layout.shape[:-1], tile_height, tile_width),
        "flatten_ids": _concatenated(flat_ids).int(),
        "tile_size": size,
        "tile_width": tile_width,
        "tile_height": tile_height,
        "width": camera.width,
        "height": camera.height,
    }
