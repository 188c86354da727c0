"""The whole method in plain torch: the specification that every backend is tested against.

Slow and plain, in any floating-point type, differentiable by autograd. The verbs carry the names of the engine's; there are
no tiles: every pixel considers every Gaussian. Sources: Zwicker et al., EWA Splatting (2002); Kerbl et al., 3D Gaussian
Splatting (2023); Wang et al., SSIM (2004); Kingma and Ba, Adam (2015).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spaceport_gs.gaussians import Gaussians
from spaceport_gs.types import SSIM_C1, SSIM_C2, SSIM_RADIUS, SSIM_SIGMA, Camera, Image, RasterSettings

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


def project(gaussians: Gaussians, camera: Camera, settings: RasterSettings) -> Splats:
    """EWA projection of the Gaussians that are in front, bright enough, and well defined."""
    pose = torch.as_tensor(camera.cam_from_world).to(gaussians.means)
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
    margin_y = JACOBIAN_MARGIN * 0.5 * camera.height / camera.fy
    low_x, high_x = -camera.cx / camera.fx, (camera.width - camera.cx) / camera.fx
    low_y, high_y = -camera.cy / camera.fy, (camera.height - camera.cy) / camera.fy
    slope_x = (x / z).clamp(low_x - margin_x, high_x + margin_x)[:, None]
    slope_y = (y / z).clamp(low_y - margin_y, high_y + margin_y)[:, None]
    u = camera.fx / z[:, None] * (axes[:, 0] - slope_x * axes[:, 2])
    v = camera.fy / z[:, None] * (axes[:, 1] - slope_y * axes[:, 2])
    xx = (u * u).sum(dim=1) + settings.low_pass
    xy = (u * v).sum(dim=1)
    yy = (v * v).sum(dim=1) + settings.low_pass
    determinant = xx * yy - xy * xy

    center = torch.as_tensor(camera.center).to(gaussians.means)
    offsets = seen.means - center
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
    """Front-to-back blending, by depth and then by row."""
    like = splats.means
    y, x = torch.meshgrid(
        torch.arange(camera.height).to(like) + 0.5,
        torch.arange(camera.width).to(like) + 0.5,
        indexing="ij",
    )
    color = torch.zeros(camera.height, camera.width, 3).to(like)
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
        transmittance = torch.where(reached, behind, transmittance)
    background = torch.tensor(settings.background).to(like)
    return Image(color + transmittance[..., None] * background, transmittance)


def render(gaussians: Gaussians, camera: Camera, settings: RasterSettings) -> Image:
    return blend(project(gaussians, camera, settings), camera, settings)


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
