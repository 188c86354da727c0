"""The verbs for users: they check, allocate, and run the backend of their tensors' device.

`project`, `tile`, `blend` and `loss` go forward, `loss` giving its gradient at once; `blend_vjp` and `project_vjp` go back;
`update` is Adam. `rasterize` chains them for torch's autograd. Tensors are float32 and C-contiguous.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch

from spaceport_gs import _engine
from spaceport_gs.errors import BackendError
from spaceport_gs.gaussians import Gaussians, Rows
from spaceport_gs.types import (
    Camera,
    Depth,
    DrawKey,
    GrowthSettings,
    Image,
    Projected,
    RasterSettings,
    Statistics,
    Tiles,
)

MOST_INSTANCES = _engine.MOST_INSTANCES  # of one list

_cpu = _engine.Cpu()
_kept = threading.local()


def use_cpu(n_threads: int = 0, simd: str = "auto") -> None:
    """Sets how the CPU backend runs: threads (0: every core), and `auto`, `portable` or `avx2`. Results are the same
    bytes with any number of threads."""
    global _cpu
    _cpu = _engine.Cpu(n_threads, simd)


def cpu() -> Any:
    """The CPU backend in use, for verbs on NumPy arrays."""
    return _cpu


def backend_of(tensor: torch.Tensor) -> Any:
    """The backend of a tensor's device."""
    if tensor.device.type == "cpu":
        return _cpu
    if tensor.device.type == "cuda" and hasattr(_engine, "Cuda"):
        if tensor.device.index != torch.cuda.current_device():
            raise BackendError(f"tensors are on {tensor.device}: make it the current device with torch.cuda.device")
        return _engine.Cuda(torch.cuda.current_stream().cuda_stream)
    raise BackendError(
        f"no {tensor.device.type} backend in this build: move the tensors to the CPU, or build with SPACEPORT_CUDA=ON"
    )


def _empty(like: torch.Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _scratch(like: torch.Tensor, n_bytes: int) -> torch.Tensor:
    """Bytes that one verb uses and nobody keeps. On the CPU one buffer per thread, because fresh pages cost more than the
    work on them; on a GPU torch's own pool knows which stream is done with what."""
    if like.device.type != "cpu":
        return _empty(like, n_bytes, dtype=torch.uint8)
    buffer = getattr(_kept, "buffer", None)
    if buffer is None or len(buffer) < n_bytes:
        buffer = _kept.buffer = _empty(like, n_bytes + n_bytes // 4, dtype=torch.uint8)
    return buffer[:n_bytes]


def empty_like(gaussians: Gaussians) -> Gaussians:
    """Gaussians of the same sizes, with nothing in them yet."""
    return Gaussians(*(torch.empty_like(array) for array in gaussians.arrays()))


def zeros_like(gaussians: Gaussians) -> Gaussians:
    """Gaussians of the same sizes, all zero: the moments before the first step."""
    return Gaussians(*(torch.zeros_like(array) for array in gaussians.arrays()))


def project(gaussians: Gaussians, camera: Camera, settings: RasterSettings) -> Projected:
    """The visible Gaussians as splats on the image plane (EWA splatting; see types.Projected)."""
    like, n = gaussians.means, len(gaussians)
    out = Projected(
        splats=_empty(like, n, _engine.SPLAT_STRIDE),
        gaussian_from_splat=_empty(like, n, dtype=torch.int32),
        instance_offsets=_empty(like, n + 1, dtype=torch.int64),
    )
    if like.is_cuda:
        out.touched = _empty(like, n, _engine.TILE_SET_STRIDE, dtype=torch.int32)
        out.depth_keys = _empty(like, n, dtype=torch.int32)
    backend = backend_of(like)
    scratch = _scratch(like, _engine.project_scratch(backend, n))
    n_splats, n_instances = _engine.project(backend, gaussians, camera, settings, scratch, out)
    return Projected(
        out.splats[:n_splats],
        out.gaussian_from_splat[:n_splats],
        out.instance_offsets[: n_splats + 1],
        n_instances,
        None if out.touched is None else out.touched[:n_splats],
        None if out.depth_keys is None else out.depth_keys[:n_splats],
    )


def project_vjp(
    gaussians: Gaussians,
    camera: Camera,
    settings: RasterSettings,
    projected: Projected,
    d_splats: torch.Tensor,  # what blend_vjp returned; of absolute gradients nothing is read
    out: Gaussians | None = None,
    d_cam_from_world: torch.Tensor | None = None,  # [3, 4] float64
) -> Gaussians:
    """Gradient by the raw parameters; zero in the rows that are not visible. `out`: buffers to write it to;
    `d_cam_from_world` gets the gradient by the camera's pose, with which its centre moves."""
    d_gaussians, backend = empty_like(gaussians) if out is None else out, backend_of(d_splats)
    scratch = None
    if d_cam_from_world is not None:
        scratch = _scratch(d_splats, _engine.project_vjp_scratch(backend, len(projected.splats)))
    _engine.project_vjp(
        backend, gaussians, camera, settings, projected, d_splats, d_gaussians, d_cam_from_world, scratch
    )
    return d_gaussians


def n_tiles(camera: Camera) -> int:
    size = _engine.TILE_SIZE
    return -(-camera.width // size) * -(-camera.height // size)


class TooManyInstances(MemoryError):
    """Of one image, for one list of them."""


def check_instances(n: int) -> None:
    """TooManyInstances if there are too many for one list."""
    if n > MOST_INSTANCES:
        raise TooManyInstances(f"{n} pairs of splats and tiles in one image; at most {MOST_INSTANCES} are possible")


def tile(projected: Projected, camera: Camera) -> Tiles:
    """For every tile its instances, front to back; TooManyInstances if they are more than MOST_INSTANCES."""
    like, n = projected.splats, projected.n_instances
    check_instances(n)
    out = Tiles(
        offsets=_empty(like, n_tiles(camera) + 1, dtype=torch.int64),
        splat_from_instance=_empty(like, n, dtype=torch.int32),
        number_from_instance=None if like.is_cuda else _empty(like, n, dtype=torch.int32),
    )
    backend = backend_of(like)
    scratch = _scratch(like, _engine.tile_scratch(backend, len(projected.splats), n, camera))
    _engine.tile(backend, projected, camera, scratch, out)
    return out


def blend(projected: Projected, tiles: Tiles, camera: Camera, settings: RasterSettings) -> Image:
    """Front-to-back blending of every tile's list; depths as the settings ask for."""
    like, backend = projected.splats, backend_of(projected.splats)
    n_hits = _engine.hits_size(backend, len(tiles.splat_from_instance), camera)
    out = Image(
        color=_empty(like, camera.height, camera.width, 3),
        transmittance=_empty(like, camera.height, camera.width),
        hits=_empty(like, n_hits, dtype=torch.int32),
    )
    if Depth.EXPECTED in settings.depth:
        out.depth = torch.empty_like(out.transmittance)
    if Depth.MEDIAN in settings.depth:
        out.median_depth = torch.empty_like(out.transmittance)
    _engine.blend(backend, projected, tiles, camera, settings, out)
    return out


def blend_vjp(
    projected: Projected,
    tiles: Tiles,
    camera: Camera,
    settings: RasterSettings,
    image: Image,  # what blend returned
    d_image: Image,
) -> torch.Tensor:  # [M, 9], [M, 10], or two more
    """Gradient by the first nine columns of the splats; by ten, the last being their depth, if d_image has a depth. Behind
    them, if the settings ask for it, two columns of absolute gradients."""
    like = projected.splats
    backend = backend_of(like)
    sees_depth = d_image.depth is not None
    n_columns = _engine.SPLAT_DEPTH_GRADIENT_STRIDE if sees_depth else _engine.SPLAT_GRADIENT_STRIDE
    n_columns += _engine.ABSOLUTE_COLUMNS if settings.absolute_gradients else 0
    n_splats, n_instances = len(projected.splats), len(tiles.splat_from_instance)
    scratch = _scratch(like, _engine.blend_vjp_scratch(backend, n_splats, n_instances, n_columns, settings))
    d_splats = _empty(like, n_splats, n_columns)
    _engine.blend_vjp(backend, projected, tiles, camera, settings, image, d_image, scratch, d_splats)
    return d_splats


class SsimPadding(Enum):
    """What SSIM does at the border of the image."""

    ZERO = "zero"
    """Outside all is zero, and every pixel counts: as in the 3D Gaussian Splatting literature."""
    VALID = "valid"
    """Only pixels whose window of 11×11 lies inside the image count; the image must not be smaller than one."""


@dataclass(frozen=True)
class LossSettings:
    """(1 - ssim_weight) · L1 + ssim_weight · (1 - SSIM)."""

    ssim_weight: float = 0.2
    padding: SsimPadding = SsimPadding.ZERO


@dataclass(frozen=True)
class LossTarget:
    """What an image is compared with, and how.

    A mask multiplies both colours before they are compared, and weighs each pixel in the means of L1 and of SSIM. So what
    it hides has no influence, not even through the windows of its neighbours; no gradient reaches it. Where everything is
    hidden, the loss is zero.
    """

    photo: torch.Tensor  # [H, W, 3] uint8, 0 … 255 standing for 0 … 1
    mask: torch.Tensor | None = None  # [H, W] uint8, 0 ignores a pixel, 255 counts it fully; None: all count
    exposure: torch.Tensor | None = (
        None  # [3, 4] A | b: the image's colours become A · colour + b first; None: they stay
    )


@dataclass(frozen=True)
class Loss:
    """A loss and its gradient. Its figures stay on the device until somebody asks for them."""

    settings: LossSettings
    means: torch.Tensor  # [2] float64, of L1 and of SSIM
    d_color: torch.Tensor  # [H, W, 3]
    d_exposure: torch.Tensor | None = None  # [3, 4]; None without an exposure

    @property
    def value(self) -> float:
        return values_of([self.means], self.settings)[0]

    @property
    def ssim(self) -> float:
        return float(self.means[1])


def values_of(means: Sequence[torch.Tensor], settings: LossSettings) -> list[float]:
    """The values of losses with these means, read from the device at once."""
    if not means:
        return []
    weight = settings.ssim_weight
    return [(1 - weight) * l1 + weight * (1 - ssim) for l1, ssim in torch.stack(list(means)).tolist()]


def loss(color: torch.Tensor, target: torch.Tensor | LossTarget, settings: LossSettings) -> Loss:
    """Loss of an image [H, W, 3] against a target, or a photo [H, W, 3] alone, with its gradient.

    SSIM: 11×11 Gaussian window of sigma 1.5, mean over pixels and channels (Wang et al., 2004).
    """
    if not isinstance(target, LossTarget):
        target = LossTarget(target)
    backend, (height, width) = backend_of(color), color.shape[:2]
    scratch = _scratch(color, _engine.loss_scratch(backend, width, height))
    d_exposure = None if target.exposure is None else torch.empty_like(target.exposure)
    out = Loss(settings, _empty(color, 2, dtype=torch.float64), torch.empty_like(color), d_exposure)
    _engine.loss(backend, color, target, settings, scratch, out)
    return out


@dataclass(frozen=True)
class AdamSettings:
    """Learning rates of the fields, and Adam's constants (Kingma and Ba, 2015)."""

    means: float
    log_scales: float
    quaternions: float
    opacities: float
    sh_dc: float
    sh_rest: float
    step: int
    """1 for the first step."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-15
    exposure: float = 0.0
    """Learning rate of the view's exposure, if it has one."""


def update(
    values: Gaussians,
    gradient: Gaussians,
    first_moment: Gaussians,
    second_moment: Gaussians,
    settings: AdamSettings,
) -> None:
    """One step of Adam over every row, in place. The moments may be compact ones."""
    _engine.update(backend_of(values.means), values, gradient, first_moment, second_moment, settings)


class MomentStorage(Enum):
    """How Adam's moments of the SH coefficients lie in memory; those of all else are float32."""

    FULL = "full"
    """float32."""
    COMPACT = "compact"
    """bfloat16, on a GPU alone: 180 bytes less for each Gaussian of degree 3. Rounded up or down at random, in proportion to
    how near the two lie, so that averages are right in the mean; those of the constant coefficient stay float32."""


@dataclass(frozen=True)
class AdamMoments:
    """Adam's averages of the gradient and of its square; they start at zero.

    Compact ones: `first.sh` is [N, K, 3] int32, each two bfloat16 of the first moment (the upper half) and of the second.
    But of the constant coefficient it holds the bits of the first moment, and `second.sh` [N, 1, 3] the second.
    """

    first: Gaussians
    second: Gaussians

    @staticmethod
    def zeros(values: Gaussians, storage: MomentStorage = MomentStorage.FULL) -> AdamMoments:
        """Before the first step on these values."""
        if storage is MomentStorage.FULL:
            return AdamMoments(zeros_like(values), zeros_like(values))
        constant = zeros_like(replace(values, sh=values.sh[:, :1]))  # not of all, which would take memory
        words = torch.zeros_like(values.sh, dtype=torch.int32)
        return AdamMoments(replace(zeros_like(constant), sh=words), constant)

    @property
    def storage(self) -> MomentStorage:
        return MomentStorage.COMPACT if self.first.sh.dtype == torch.int32 else MomentStorage.FULL

    def stored(self, storage: MomentStorage) -> AdamMoments:
        """The same moments, rounded to the nearest where they become compact."""
        if storage is self.storage:
            return self
        first, second = self.first.sh, self.second.sh
        if storage is MomentStorage.COMPACT:
            halves = (moment.bfloat16().view(torch.int16).to(torch.int32) for moment in (first, second))
            words = (next(halves) << 16) | (next(halves) & 0xFFFF)
            words[:, 0] = first[:, 0].view(torch.int32)
            first, second = words, second[:, :1].clone()
        else:
            words, constant = first, second
            first, second = (words & -0x10000).view(torch.float32), (words << 16).view(torch.float32)
            first[:, 0], second[:, :1] = words[:, 0].view(torch.float32), constant
        return AdamMoments(replace(self.first, sh=first), replace(self.second, sh=second))


def project_vjp_update(
    values: Gaussians,
    camera: Camera,
    settings: RasterSettings,
    projected: Projected,
    d_splats: torch.Tensor,  # [M, 9]
    moments: AdamMoments,
    adam: AdamSettings,
) -> None:
    """`project_vjp` and `update` in one, in place: on a GPU the gradient never goes through memory."""
    backend = backend_of(d_splats)
    scratch = _scratch(d_splats, _engine.project_vjp_update_scratch(backend, values))
    _engine.project_vjp_update(
        backend, values, camera, settings, projected, d_splats, moments.first, moments.second, adam, scratch
    )


def density(projected: Projected, d_splats: torch.Tensor, camera: Camera, statistics: Statistics) -> None:
    """Adds to the statistics, in place, what one step saw of each Gaussian."""
    _engine.density(backend_of(d_splats), projected, d_splats, camera, statistics)


def _rows_like(rows: Rows, n: int) -> Rows:
    """Room for `n` rows with all that these have."""

    def room(gaussians: Gaussians) -> Gaussians:
        return gaussians.map(lambda array: array.new_empty((n, *array.shape[1:])))

    return Rows(room(rows.values), tuple(map(room, rows.companions)))


def grow(rows: Rows, scores: torch.Tensor, settings: GrowthSettings) -> Rows:
    """Clones small and splits large rows with a high score [N], and drops faint, huge and broken ones (Kerbl et al. 2023).

    Rows that stay, then clones, first and second children, each in the order of what they come from; companions of new
    rows are zero. A GPU is waited for once, for the number of rows.
    """
    n, backend = len(rows.values), backend_of(scores)
    sources = _empty(scores, _engine.GROWTH_LISTS, n, dtype=torch.int32)
    scratch = _scratch(scores, _engine.plan_growth_scratch(backend, n))
    counts = _engine.plan_growth(backend, rows.values, scores, settings, scratch, sources)
    kept, clones, parents = counts
    grown = _rows_like(rows, kept + clones + 2 * parents)
    _engine.grow(backend, rows, sources, counts, settings.key, grown)
    return grown


def select_rows(rows: Rows, numbers: torch.Tensor) -> Rows:
    """The rows that `numbers` [M] int32 names, which only the CPU checks."""
    selected = _rows_like(rows, len(numbers))
    _engine.select_rows(backend_of(numbers), rows, numbers, selected)
    return selected


def morton_order(means: torch.Tensor) -> torch.Tensor:
    """Row numbers [N] int32 along a Morton curve through the box of the means [N, 3]; rows that are not finite go last."""
    backend = backend_of(means)
    scratch = _scratch(means, _engine.morton_order_scratch(backend, len(means)))
    order = _empty(means, len(means), dtype=torch.int32)
    _engine.morton_order(backend, means, scratch, order)
    return order


def relocate(rows: Rows, min_opacity: float, key: DrawKey) -> None:
    """Moves rows that are fainter than `min_opacity` (logit) or broken, in place, onto others that are drawn by opacity.

    Those that then coincide share opacity and size so that the image stays as it was (Kheradmand et al., 3D Gaussian
    Splatting as Markov chain Monte Carlo, 2024); the moments of rows that changed become zero.
    """
    like = rows.values.means
    backend = backend_of(like)
    scratch = _scratch(like, _engine.relocate_scratch(backend, len(rows.values)))
    _engine.relocate(backend, rows, min_opacity, key, scratch)


def cluster_assign(points: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels [N] int32, the nearest of `centroids` [K, D] to each of `points` [N, D] and the lowest of several, and squared
    distances [N]. On a GPU at most 45 dimensions."""
    backend = backend_of(points)
    scratch = _scratch(points, _engine.cluster_assign_scratch(backend, centroids))
    labels, distances = _empty(points, len(points), dtype=torch.int32), _empty(points, len(points))
    _engine.cluster_assign(backend, points, centroids, scratch, labels, distances)
    return labels, distances


def cluster_update(
    points: torch.Tensor,  # [N, D]
    labels: torch.Tensor,  # [N] int32
    weights: torch.Tensor,  # [N]
    centroids: torch.Tensor,  # [K, D]
) -> torch.Tensor:  # [K]
    """Moves every centroid, in place, to the weighted mean of its points; returns the sums of their weights. Centroids
    without weight stay; a GPU leaves out points with a label that is no row of the centroids."""
    backend = backend_of(points)
    scratch = _scratch(points, _engine.cluster_update_scratch(backend, points, centroids))
    centroid_weights = _empty(points, len(centroids))
    _engine.cluster_update(backend, points, labels, weights, centroids, scratch, centroid_weights)
    return centroid_weights


def render(gaussians: Gaussians, camera: Camera, settings: RasterSettings) -> Image:
    """The image of a camera, without what a gradient needs."""

    def whole(camera: Camera) -> Image:
        projected = project(gaussians, camera, settings)
        return blend(projected, tile(projected, camera), camera, settings)

    with torch.no_grad():
        return _in_bands(whole, camera)


def _in_bands(image_of: Callable[[Camera], Image], camera: Camera) -> Image:
    """The image of a camera; where it has more instances than one list takes, band by band of its rows of tiles."""
    try:
        return image_of(camera)
    except TooManyInstances:
        n_rows = -(-camera.height // _engine.TILE_SIZE)
        if n_rows == 1:
            raise
    middle = n_rows // 2 * _engine.TILE_SIZE
    bands = [_in_bands(image_of, camera.band(*rows)) for rows in ((0, middle), (middle, camera.height))]

    def together(name: str) -> Any:
        parts = [getattr(band, name) for band in bands]
        return None if parts[0] is None else torch.cat(parts)

    return Image(together("color"), together("transmittance"), None, together("depth"), together("median_depth"))


def rasterize(
    gaussians: Gaussians,
    camera: Camera,
    settings: RasterSettings | None = None,
    cam_from_world: torch.Tensor | None = None,  # [3, 4]
) -> Image:
    """As `render`, differentiable by torch in all five fields of the Gaussians; the median depth has no gradient.

    Settings None = all SH bands, black background.

    `cam_from_world` stands for the camera's own pose and gets a gradient as well: by each of its numbers alone, so keep it
    a rotation by how you parametrise it. Its values are read by the host: on a GPU this waits for them.
    """
    settings = settings or RasterSettings(sh_degree=gaussians.sh_degree)
    if cam_from_world is not None:
        if cam_from_world.shape != (3, 4):
            raise ValueError(f"cam_from_world: expected shape [3, 4], got {list(cam_from_world.shape)}")
        cam_from_world = cam_from_world.to(gaussians.means.device, torch.float64)
        camera = replace(camera, cam_from_world=cam_from_world.detach().cpu().numpy())

    def whole(camera: Camera) -> Image:
        color, transmittance, *depths = _Rasterize.apply(camera, settings, cam_from_world, *gaussians.arrays())
        return Image(color, transmittance, None, *depths)

    return _in_bands(whole, camera)


class _Rasterize(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, camera: Camera, settings: RasterSettings, _: torch.Tensor | None, *arrays: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        gaussians = Gaussians(*(array.detach().contiguous() for array in arrays))
        projected = project(gaussians, camera, settings)
        tiles = tile(projected, camera)
        image = blend(projected, tiles, camera, settings)
        ctx.camera, ctx.settings = camera, settings
        ctx.n_instances = projected.n_instances
        ctx.save_for_backward(
            *gaussians.arrays(),
            projected.splats,
            projected.gaussian_from_splat,
            projected.instance_offsets,
            projected.touched,
            projected.depth_keys,
            tiles.offsets,
            tiles.splat_from_instance,
            tiles.number_from_instance,
            image.color,
            image.transmittance,
            image.hits,
            image.depth,
        )
        if image.median_depth is not None:
            ctx.mark_non_differentiable(image.median_depth)
        return image.color, image.transmittance, image.depth, image.median_depth

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, d_color: torch.Tensor, d_transmittance: torch.Tensor, d_depth: torch.Tensor | None, _: Any
    ) -> Any:
        saved = ctx.saved_tensors
        gaussians = Gaussians(*saved[:5])
        splats, gaussian_from_splat, instance_offsets, touched, depth_keys = saved[5:10]
        projected = Projected(splats, gaussian_from_splat, instance_offsets, ctx.n_instances, touched, depth_keys)
        tiles, image = Tiles(*saved[10:13]), Image(*saved[13:])
        d_splats = blend_vjp(
            projected,
            tiles,
            ctx.camera,
            ctx.settings,
            image,
            Image(
                d_color.contiguous(),
                d_transmittance.contiguous(),
                depth=None if d_depth is None else d_depth.contiguous(),
            ),
        )
        d_pose = _empty(splats, 3, 4, dtype=torch.float64) if ctx.needs_input_grad[2] else None
        d_gaussians = project_vjp(gaussians, ctx.camera, ctx.settings, projected, d_splats, d_cam_from_world=d_pose)
        return None, None, d_pose, *d_gaussians.arrays()
