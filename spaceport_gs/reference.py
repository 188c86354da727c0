"""The whole method in plain torch: the specification that every backend is tested against.

Slow and plain, in any floating-point type, differentiable by autograd. The verbs carry the names of the engine's; there are
no tiles: every pixel considers every Gaussian. Sources: Zwicker et al., EWA Splatting (2002); Kerbl et al., 3D Gaussian
Splatting (2023); Wang et al., SSIM (2004); Kingma and Ba, Adam (2015).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from spaceport_gs.gaussians import Gaussians, Rows
from spaceport_gs.types import (
    SSIM_C1,
    SSIM_C2,
    SSIM_RADIUS,
    SSIM_SIGMA,
    Camera,
    DrawKey,
    GrowthSettings,
    Image,
    RasterSettings,
)

ALPHA_CUTOFF = 1 / 255
TRANSMITTANCE_STOP = 1e-4
JACOBIAN_MARGIN = 0.3
MIN_QUATERNION_NORM_SQUARED = 1e-8


@dataclass(frozen=True)
class Splats:
    """The visible Gaussians of a camera, in the order of their rows."""

    gaussian_from_splat: torch.Tensor  # [M]
    means: torch.Tensor  # [M, 2] pixels
    conics: torch.Tensor  # [M, 3] a, b, c
    opacities: torch.Tensor  # [M]
    colors: torch.Tensor  # [M, 3]
    depths: torch.Tensor  # [M]


def rotation(quaternions: torch.Tensor) -> torch.Tensor:  # [N, 4] -> [N, 3, 3]
    """Rotation matrices of w, x, y, z, normalised here."""
    w, x, y, z = (quaternions / quaternions.norm(dim=1, keepdim=True)).unbind(1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, dim=1).view(-1, 3, 3)


def sh_basis(directions: torch.Tensor, degree: int) -> torch.Tensor:  # [N, 3] -> [N, K]
    """Real spherical harmonics, with the signs of the field's files."""
    x, y, z = directions.unbind(1)
    values = [torch.full_like(x, 0.28209479177387814)]
    if degree >= 1:
        values += [-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x]
    if degree >= 2:
        values += [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (2 * z * z - x * x - y * y),
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (x * x - y * y),
        ]
    if degree >= 3:
        values += [
            -0.5900435899266435 * y * (3 * x * x - y * y),
            2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (4 * z * z - x * x - y * y),
            0.3731763325901154 * z * (2 * z * z - 3 * x * x - 3 * y * y),
            -0.4570457994644658 * x * (4 * z * z - x * x - y * y),
            1.445305721320277 * z * (x * x - y * y),
            -0.5900435899266435 * x * (x * x - 3 * y * y),
        ]
    return torch.stack(values, dim=1)


def project(
    gaussians: Gaussians, camera: Camera, settings: RasterSettings, cam_from_world: torch.Tensor | None = None
) -> Splats:
    """EWA projection of the Gaussians that are in front, bright enough, and well defined. `cam_from_world` [3, 4]: in place
    of the camera's own pose."""
    pose = torch.as_tensor(camera.cam_from_world if cam_from_world is None else cam_from_world).to(gaussians.means)
    points = gaussians.means @ pose[:, :3].T + pose[:, 3]
    with torch.no_grad():
        visible = (points[:, 2] >= settings.near) & (torch.sigmoid(gaussians.opacities) >= ALPHA_CUTOFF)
        visible &= (gaussians.quaternions**2).sum(dim=1) >= MIN_QUATERNION_NORM_SQUARED
        for array in gaussians.arrays():
            visible &= array.isfinite().reshape(len(gaussians), -1).all(dim=1)
    rows = visible.nonzero()[:, 0]
    seen, points = gaussians.select(rows), points[rows]
    x, y, z = points.unbind(1)

    axes = pose[:, :3] @ rotation(seen.quaternions) * seen.log_scales.exp()[:, None, :]  # [M, 3, 3]
    margin_x = JACOBIAN_MARGIN * 0.5 * camera.width / camera.fx
    top, bottom = -camera.above, camera.height + camera.below
    margin_y = JACOBIAN_MARGIN * 0.5 * (bottom - top) / camera.fy
    low_x, high_x = -camera.cx / camera.fx, (camera.width - camera.cx) / camera.fx
    low_y, high_y = (top - camera.cy) / camera.fy, (bottom - camera.cy) / camera.fy
    slope_x = (x / z).clamp(low_x - margin_x, high_x + margin_x)[:, None]
    slope_y = (y / z).clamp(low_y - margin_y, high_y + margin_y)[:, None]
    u = camera.fx / z[:, None] * (axes[:, 0] - slope_x * axes[:, 2])
    v = camera.fy / z[:, None] * (axes[:, 1] - slope_y * axes[:, 2])
    xx = (u * u).sum(dim=1) + settings.low_pass
    xy = (u * v).sum(dim=1)
    yy = (v * v).sum(dim=1) + settings.low_pass
    determinant = xx * yy - xy * xy

    offsets = seen.means + pose[:, :3].T @ pose[:, 3]  # from the camera's centre
    degree = min(settings.sh_degree, gaussians.sh_degree)
    basis = sh_basis(offsets / offsets.norm(dim=1, keepdim=True), degree)
    colors = 0.5 + (basis[:, :, None] * seen.sh[:, : basis.shape[1]]).sum(dim=1)
    return Splats(
        rows,
        torch.stack([camera.fx * x / z + camera.cx, camera.fy * y / z + camera.cy], dim=1),
        torch.stack([yy, -xy, xx], dim=1) / determinant[:, None],
        torch.sigmoid(seen.opacities),
        colors.clamp(min=0),
        z,
    )


def blend(splats: Splats, camera: Camera, settings: RasterSettings) -> Image:
    """Front-to-back blending, by depth and then by row; with both depths, whatever was asked for."""
    like = splats.means
    y, x = torch.meshgrid(
        torch.arange(camera.height).to(like) + 0.5,
        torch.arange(camera.width).to(like) + 0.5,
        indexing="ij",
    )
    color = torch.zeros(camera.height, camera.width, 3).to(like)
    depth, median_depth = torch.zeros(2, camera.height, camera.width).to(like)
    transmittance = torch.ones(camera.height, camera.width).to(like)
    stopped = torch.zeros_like(transmittance, dtype=torch.bool)
    # Sorted as the engine's single precision does, so that ties are ties in both.
    for i in torch.argsort(splats.depths.detach().float(), stable=True).tolist():
        a, b, c = splats.conics[i]
        dx, dy = x - splats.means[i, 0], y - splats.means[i, 1]
        falloff = torch.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)
        alpha = (splats.opacities[i] * falloff).clamp(max=settings.alpha_max)
        reached = (alpha >= ALPHA_CUTOFF) & ~stopped
        behind = transmittance * (1 - alpha)
        stopped = stopped | (reached & (behind < TRANSMITTANCE_STOP))
        reached = reached & ~stopped
        weight = torch.where(reached, alpha * transmittance, torch.zeros_like(alpha))
        color = color + weight[..., None] * splats.colors[i]
        depth = depth + weight * splats.depths[i]
        is_median = reached & (transmittance >= 0.5) & (behind < 0.5)
        median_depth = torch.where(is_median, splats.depths[i].detach(), median_depth)
        transmittance = torch.where(reached, behind, transmittance)
    background = torch.tensor(settings.background).to(like)
    return Image(color + transmittance[..., None] * background, transmittance, None, depth, median_depth)


def render(
    gaussians: Gaussians, camera: Camera, settings: RasterSettings, cam_from_world: torch.Tensor | None = None
) -> Image:
    return blend(project(gaussians, camera, settings, cam_from_world), camera, settings)


def ssim_map(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # [H, W, 3] each, 0 … 1
    """SSIM of every pixel and channel; zero padding."""
    taps = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1).to(x)
    window = torch.exp(-(taps**2) / (2 * SSIM_SIGMA**2))
    window = window / window.sum()
    kernel = (window[:, None] * window[None, :]).expand(3, 1, -1, -1)

    def blur(image: torch.Tensor) -> torch.Tensor:
        planes = image.permute(2, 0, 1)[None]
        return torch.nn.functional.conv2d(planes, kernel, padding=SSIM_RADIUS, groups=3)[0].permute(1, 2, 0)

    mean_x, mean_y = blur(x), blur(y)
    variance_x = blur(x * x) - mean_x * mean_x
    variance_y = blur(y * y) - mean_y * mean_y
    covariance = blur(x * y) - mean_x * mean_y
    return (
        (2 * mean_x * mean_y + SSIM_C1)
        * (2 * covariance + SSIM_C2)
        / ((mean_x**2 + mean_y**2 + SSIM_C1) * (variance_x + variance_y + SSIM_C2))
    )


def ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # [H, W, 3] each, 0 … 1
    """Mean over all pixels and channels; zero padding."""
    return ssim_map(x, y).mean()


def expose(color: torch.Tensor, exposure: torch.Tensor) -> torch.Tensor:  # [H, W, 3], [3, 4]
    """A · colour + b."""
    return color @ exposure[:, :3].T + exposure[:, 3]


def loss(color: torch.Tensor, photo: torch.Tensor, ssim_weight: float) -> torch.Tensor:
    """(1 - w) L1 + w (1 - SSIM) of an image [H, W, 3] and an 8-bit photo [H, W, 3]."""
    target = photo.to(color) / 255
    return (1 - ssim_weight) * (color - target).abs().mean() + ssim_weight * (1 - ssim(color, target))


def masked_loss(
    color: torch.Tensor, photo: torch.Tensor, mask: torch.Tensor, ssim_weight: float, is_padded: bool = True
) -> torch.Tensor:
    """As `loss`, of both images multiplied by the mask [H, W] (255 standing for 1), which also weighs each pixel in the
    means. Not padded: SSIM of those pixels alone whose window lies inside the image."""
    weights = (mask.to(color) / 255)[..., None].expand_as(color)
    x, y = color * weights, photo.to(color) / 255 * weights
    difference, similarity = (x - y).abs().sum(), ssim_map(x, y)
    counted = slice(None) if is_padded else slice(SSIM_RADIUS, -SSIM_RADIUS)
    similarity, ssim_weights = similarity[counted, counted], weights[counted, counted]
    l1 = difference / weights.sum() if weights.any() else 0 * difference
    dissimilar = ((1 - similarity) * ssim_weights).sum() / ssim_weights.sum() if ssim_weights.any() else 0 * difference
    return (1 - ssim_weight) * l1 + ssim_weight * dissimilar


@dataclass(frozen=True)
class Moments:
    """Adam's averages of the gradient and of its square."""

    first: torch.Tensor
    second: torch.Tensor


def update(
    value: torch.Tensor, gradient: torch.Tensor, moments: Moments, rate: float, step: int
) -> tuple[torch.Tensor, Moments]:
    """One step of Adam with beta 0.9 and 0.999, epsilon 1e-15; `step` is 1 for the first."""
    first = 0.9 * moments.first + 0.1 * gradient
    second = 0.999 * moments.second + 0.001 * gradient**2
    unbiased = first / (1 - 0.9**step), second / (1 - 0.999**step)
    return value - rate * unbiased[0] / (unbiased[1].sqrt() + 1e-15), Moments(first, second)


CHILD_SIZE = 1 / (0.8 * 2)  # of the parent's


def philox(counter: np.ndarray, key: int) -> np.ndarray:  # [N, 4] uint64, words of 32 bits -> the same
    """Philox 4x32-10: numbers that look random, of a counter and a key (Salmon et al., Parallel random numbers, 2011)."""
    a, b, c, d = counter.astype(np.uint64).T
    low, high = key & 0xFFFFFFFF, key >> 32
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        x, y = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b, c, d = y >> half ^ b ^ np.uint64(low), y & mask, x >> half ^ d ^ np.uint64(high), x & mask
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([a, b, c, d], axis=1)


def draw(rows: torch.Tensor, number: int, key: DrawKey, stream: int) -> np.ndarray:  # [M] -> [M, 4] uint64
    counter = [rows.numpy(), *(np.full(len(rows), word) for word in (number, key.step, stream))]
    return philox(np.stack(counter, axis=1), key.seed)


def child_offsets(gaussians: Gaussians, rows: torch.Tensor, child: int, key: DrawKey) -> torch.Tensor:  # [M, 3]
    """A sample of each of the Gaussians `rows` [M] around its mean, by the transform of Box and Muller (1958)."""
    uniform = torch.from_numpy((draw(rows, child, key, 0).astype(np.float64) + 0.5) / 2**32).to(gaussians.means)
    radius, angle = torch.sqrt(-2 * torch.log(uniform[:, 0::2])), 2 * math.pi * uniform[:, 1::2]
    normal = torch.stack([radius[:, 0] * angle[:, 0].cos(), radius[:, 0] * angle[:, 0].sin(),
                          radius[:, 1] * angle[:, 1].cos()], dim=1)  # fmt: skip
    local = normal * gaussians.log_scales[rows].exp()
    return (rotation(gaussians.quaternions[rows]) @ local[:, :, None])[:, :, 0]


def is_finite(gaussians: Gaussians) -> torch.Tensor:  # [N] bool
    finite = [array.isfinite().view(len(array), math.prod(array.shape[1:])).all(dim=1) for array in gaussians.arrays()]
    return torch.stack(finite).all(dim=0)


def grow(rows: Rows, scores: torch.Tensor, settings: GrowthSettings) -> Rows:
    """Clones small and splits large rows whose score [N] reaches the threshold; then drops faint, huge and broken rows."""
    values, n = rows.values, len(scores)
    grows = scores >= settings.threshold
    if settings.max_rows > 0:
        budget = max(settings.max_rows - n, 0)
        best = torch.argsort(torch.where(grows, scores, -1), descending=True, stable=True)[:budget]
        grows = grows & torch.zeros_like(grows).index_fill(0, best, True)
    is_split = grows & (values.log_scales.amax(dim=1) > settings.split_log_scale)
    stay, clones, parents = (mask.nonzero()[:, 0] for mask in (~is_split, grows & ~is_split, is_split))

    children = [
        replace(
            values.select(parents),
            means=values.means[parents] + child_offsets(values, parents, child, settings.key),
            log_scales=values.log_scales[parents] + math.log(CHILD_SIZE),
        )
        for child in (0, 1)
    ]
    grown = values.select(stay).append(values.select(clones)).append(children[0]).append(children[1])
    n_new = len(grown) - len(stay)
    companions = [
        c.select(stay).append(Gaussians(*(a.new_zeros(n_new, *a.shape[1:]) for a in c.arrays())))
        for c in rows.companions
    ]
    keeps = (grown.opacities >= settings.min_opacity) & is_finite(grown)
    keeps &= grown.log_scales.amax(dim=1) <= settings.max_log_scale
    return Rows(grown.select(keeps), tuple(c.select(keeps) for c in companions))


def relocated(opacity: float, n: int) -> tuple[float, float]:
    """Opacity, and size in parts of what it was, of each of n Gaussians in one place that together look as one of
    `opacity` did (Kheradmand et al., 3D Gaussian Splatting as Markov chain Monte Carlo, 2024, eq. 9)."""
    shared = 1 - (1 - opacity) ** (1 / n)
    total = sum(
        math.comb(i - 1, k) * (-1) ** k / math.sqrt(k + 1) * shared ** (k + 1)
        for i in range(1, n + 1)
        for k in range(i)
    )
    return shared, opacity / total


def relocate(rows: Rows, min_opacity: float, key: DrawKey) -> Rows:
    """Rows that are fainter than `min_opacity` (logit) or broken move onto others, drawn by opacity in steps of 2^-20."""
    moved = Rows(*(rows.values.map(torch.clone), tuple(c.map(torch.clone) for c in rows.companions)))
    values, n = rows.values, len(rows.values)
    stays = (values.opacities >= min_opacity) & is_finite(values)
    opacities = values.opacities.double().sigmoid()
    sums = np.cumsum([int(opacities[i] * 2**20) + 1 if stays[i] else 0 for i in range(n)])
    moving = (~stays).nonzero()[:, 0]
    words = draw(moving, 0, key, 1)
    drawn = [((int(w[0]) << 32 | int(w[1])) * int(sums[-1])) >> 64 for w in words]
    sources = torch.from_numpy(np.searchsorted(sums, drawn, side="right"))
    counts = torch.bincount(sources, minlength=n)
    for row, source in [*zip(moving.tolist(), sources.tolist(), strict=True), *((s, s) for s in set(sources.tolist()))]:
        for to, array in zip(moved.values.arrays(), values.arrays(), strict=True):
            to[row] = array[source]
        opacity, size = relocated(float(opacities[source]), 1 + int(counts[source]))
        moved.values.opacities[row] = math.log(opacity / (1 - opacity))
        moved.values.log_scales[row] += math.log(size)
        for companion in moved.companions:
            for to in companion.arrays():
                to[row] = 0
    return moved


def cluster_assign(points: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row of the nearest of `centroids` [K, D] to each of `points` [N, D], the first of several, and the squared distance."""
    distances = ((points[:, None] - centroids) ** 2).sum(dim=2)
    labels = distances.argmin(dim=1)
    return labels, distances.gather(1, labels[:, None])[:, 0]


def cluster_update(
    points: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted means of the points [N, D] of each label, and sums of their weights; centroids without weight stay."""
    totals = weights.new_zeros(len(centroids)).index_add(0, labels, weights)
    sums = torch.zeros_like(centroids).index_add(0, labels, weights[:, None] * points)
    return torch.where(totals[:, None] > 0, sums / totals[:, None], centroids), totals
