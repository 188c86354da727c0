"""Image quality: PSNR and SSIM of renders against photos."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spaceport_gs.gaussians import Gaussians
from spaceport_gs.scene import View
from spaceport_gs.types import SSIM_C1, SSIM_C2, SSIM_RADIUS, SSIM_SIGMA, RasterSettings

MAX_PSNR = 100.0  # dB; what identical images score, so that means and JSON stay finite


@dataclass(frozen=True)
class Score:
    """How well one view is rendered."""

    name: str
    psnr: float
    """dB."""
    ssim: float


@dataclass(frozen=True)
class Evaluation:
    """Scores of views, and their means; None where there are no views."""

    psnr: float | None
    ssim: float | None
    views: tuple[Score, ...]


def evaluate(gaussians: Gaussians, views: Sequence[View], settings: RasterSettings | None = None) -> Evaluation:
    """PSNR and SSIM of each view's render, rounded to 8 bits, against its photo; means over the views.

    What a view's mask hides does not count here either: it was not trained on, and would be noise in the scores. Renders
    are taken as they are: the scene has no exposure of a photo in it.
    """
    from spaceport_gs.render import Renderer, to_8bit

    scores = []
    images = Renderer(gaussians, settings)
    for view in views:
        render = to_8bit(images.render([view.camera])[0])
        scores.append(Score(view.name, psnr(render, view.photo, view.mask), ssim(render, view.photo, view.mask)))
    return Evaluation(_mean([s.psnr for s in scores]), _mean([s.ssim for s in scores]), tuple(scores))


def mean_psnr(gaussians: Gaussians, views: Sequence[View], settings: RasterSettings | None = None) -> float | None:
    """Mean PSNR of the views as in `evaluate`; None without views."""
    import torch

    from spaceport_gs.render import Renderer, on_device_8bit

    images, scores = Renderer(gaussians, settings), []
    for view in views:
        render = on_device_8bit(images.render([view.camera])[0])
        difference = render.int() - torch.from_numpy(view.photo).to(render.device).int()
        squares, n_values = difference * difference, float(difference.numel())
        if view.mask is not None:
            squares = squares.long() * torch.from_numpy(view.mask).to(render.device)[..., None]
            n_values = 3.0 * int(view.mask.sum(dtype=np.int64))
        scores.append(_psnr(int(squares.sum()), n_values))
    return _mean(scores)


def psnr(image: np.ndarray, photo: np.ndarray, mask: np.ndarray | None = None) -> float:
    """dB; two uint8 images of one shape. Identical images score 100. A mask [H, W] uint8 weighs the pixels."""
    _check(image, photo, mask)
    difference = image.astype(np.int32) - photo
    squares, n_values = difference * difference, float(image.size)
    if mask is not None:
        squares, n_values = squares * mask[..., None].astype(np.int64), 3.0 * int(mask.sum(dtype=np.int64))
    return _psnr(int(np.sum(squares, dtype=np.int64)), n_values)


def _psnr(squared_errors: int, n: float) -> float:
    if squared_errors == 0:
        return MAX_PSNR
    return min(10 * math.log10(255.0**2 * n / squared_errors), MAX_PSNR)


def ssim(image: np.ndarray, photo: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Structural similarity of two uint8 images [H, W, 3], mean over all pixels and channels.

    Gaussian window 11 x 11, sigma 1.5, borders padded with zeros, as in the 3D Gaussian Splatting literature
    (Wang et al. 2004). A mask [H, W] uint8 multiplies both images and weighs the pixels, as in `ops.LossTarget`.
    """
    _check(image, photo, mask)
    x, y = image / 255.0, photo / 255.0
    if mask is not None:
        weights = mask[..., None] / 255.0
        x, y = x * weights, y * weights
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x * mean_x
    variance_y = _blur(y * y) - mean_y * mean_y
    covariance = _blur(x * y) - mean_x * mean_y
    similarity = ((2 * mean_x * mean_y + SSIM_C1) * (2 * covariance + SSIM_C2)) / (
        (mean_x * mean_x + mean_y * mean_y + SSIM_C1) * (variance_x + variance_y + SSIM_C2)
    )
    if mask is None:
        return float(similarity.mean())
    return float((similarity * weights).sum() / (3 * weights.sum())) if mask.any() else 1.0


def _blur(image: np.ndarray) -> np.ndarray:
    from scipy.ndimage import correlate1d

    taps = np.exp(-(np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1) ** 2) / (2 * SSIM_SIGMA**2))
    taps /= taps.sum()
    for axis in (0, 1):
        image = correlate1d(image, taps, axis=axis, mode="constant")
    return image


def _check(image: np.ndarray, photo: np.ndarray, mask: np.ndarray | None) -> None:
    if mask is not None and (mask.shape != photo.shape[:2] or mask.dtype != np.uint8):
        raise ValueError(f"mask must be uint8{list(photo.shape[:2])}, not {mask.dtype}{list(mask.shape)}")
    if image.shape != photo.shape or image.dtype != np.uint8 or photo.dtype != np.uint8:
        raise ValueError(
            f"image and photo must be uint8 of one shape, not {image.dtype}{list(image.shape)}"
            f" and {photo.dtype}{list(photo.shape)}"
        )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
