"""A scene to train on: views (camera and photo) and the points that structure from motion found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spaceport_gs.errors import InputError
from spaceport_gs.types import Camera

EXTENT_MARGIN = 1.1  # recipe of 3D Gaussian Splatting: extent = 1.1 x largest distance of a camera
MIN_VIEWS = 2  # a point must be seen by this many of the views in use
MIN_POINTS = 10
MAX_PIXELS = 500_000_000  # per photo: the largest cameras stay well below, a bomb does not
MASK_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # of Pillow, that become 8-bit grey without a loss of range
MIN_SIDE = 16  # pixels; below it D-SSIM has no window left


@dataclass(frozen=True)
class View:
    """One photo and the camera that took it, at the resolution of the scene."""

    name: str
    camera: Camera
    path: Path
    mask_path: Path | None = None

    @cached_property
    def photo(self) -> np.ndarray:
        """[H, W, 3] uint8, decoded on first use and scaled down by area to the camera's size."""
        try:
            with _opened(self.path) as file:
                photo = np.array(file.convert("RGB"), dtype=np.uint8)
        except (OSError, ValueError, SyntaxError) as error:
            raise _unreadable(self.path, error) from error
        return resize_by_area(photo, self.camera.width, self.camera.height)

    @cached_property
    def mask(self) -> np.ndarray | None:
        """[H, W] uint8, how much each pixel of the photo counts, 0 … 255; None: all of it."""
        if self.mask_path is None:
            return None
        mask = read_mask(self.mask_path)
        if mask.max() <= 1:
            raise InputError(
                f"{self.mask_path}: its brightest pixel is {mask.max()} of 255, so it hides the whole photo;"
                " make white what counts, or remove the photo"
            )
        return resize_by_area(mask, self.camera.width, self.camera.height)

    def resized(self, width: int, height: int) -> View:
        """The same view on a smaller grid; its photo and mask are made from this view's on first use."""
        if (width, height) == (self.camera.width, self.camera.height):
            return self
        return _ResizedView(self.name, self.camera.resized(width, height), self.path, self.mask_path, full=self)


@dataclass(frozen=True)
class _ResizedView(View):
    full: View = field(kw_only=True)

    @cached_property
    def photo(self) -> np.ndarray:
        return resize_by_area(self.full.photo, self.camera.width, self.camera.height)

    @cached_property
    def mask(self) -> np.ndarray | None:
        full = self.full.mask
        return None if full is None else resize_by_area(full, self.camera.width, self.camera.height)


@dataclass(frozen=True)
class Tracks:
    """Which views see which point: point p is seen by views[offsets[p]:offsets[p + 1]]."""

    offsets: np.ndarray  # [P + 1] int64
    views: np.ndarray  # [T] int32, places in Scene.views


@dataclass(frozen=True)
class Scene:
    """Views sorted by name, and points in the same world."""

    views: tuple[View, ...]
    points: np.ndarray  # [P, 3] float64
    colors: np.ndarray  # [P, 3] uint8, sRGB
    tracks: Tracks

    def using(self, views: Sequence[View]) -> Scene:
        """The scene without its other views: points that fewer than two of `views` see are gone too.

        Otherwise held-out photos would still have placed points of the initial Gaussians.
        """
        names = {view.name for view in views}
        is_used = np.array([view.name in names for view in self.views], dtype=bool)
        place = np.cumsum(is_used) - 1
        keeps_sight = is_used[self.tracks.views]
        point_from_sight = np.repeat(np.arange(len(self.points)), np.diff(self.tracks.offsets))
        n_sights = np.bincount(point_from_sight[keeps_sight], minlength=len(self.points))
        keeps_point = n_sights >= MIN_VIEWS
        keeps_sight &= keeps_point[point_from_sight]
        return Scene(
            tuple(view for view, used in zip(self.views, is_used, strict=True) if used),
            self.points[keeps_point],
            self.colors[keeps_point],
            Tracks(
                np.concatenate(([0], np.cumsum(n_sights[keeps_point]))).astype(np.int64),
                place[self.tracks.views[keeps_sight]].astype(np.int32),
            ),
        )


def split(scene: Scene, eval_every: int) -> tuple[tuple[View, ...], tuple[View, ...]]:
    """(training views, held-out views): every `eval_every`-th of the sorted names is held out; 0 = none."""
    if eval_every < 0 or eval_every == 1:
        raise InputError(f"--eval-every must be 0 (hold out none) or at least 2, not {eval_every}")
    if eval_every == 0:
        return scene.views, ()
    numbered = list(enumerate(scene.views))
    return (
        tuple(view for i, view in numbered if i % eval_every != 0),
        tuple(view for i, view in numbered if i % eval_every == 0),
    )


def extent(views: Sequence[View]) -> float:
    """World units: 1.1 x the largest distance of a camera from the mean of all; the learning rate of means and
    the sizes for growth and pruning are relative to it."""
    centers = np.array([view.camera.center for view in views])
    radius = float(np.linalg.norm(centers - centers.mean(axis=0), axis=1).max())
    if not radius > 0:
        raise InputError(f"all {len(views)} cameras stand at one place: a scene needs photos from several places")
    return EXTENT_MARGIN * radius


def farthest_views(views: Sequence[View], n_chosen: int) -> tuple[View, ...]:
    """`n_chosen` views spread over the capture: farthest-point order of camera centres, from the most central one."""
    centers = np.array([view.camera.center for view in views])
    distances = np.linalg.norm(centers - centers.mean(axis=0), axis=1)
    chosen = [int(np.argmin(distances))]
    nearest = np.linalg.norm(centers - centers[chosen[0]], axis=1)
    while len(chosen) < min(n_chosen, len(views)):
        chosen.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, np.linalg.norm(centers - centers[chosen[-1]], axis=1))
    return tuple(views[i] for i in sorted(chosen[:n_chosen]))


def load_scene(project: Path, downscale: float = 1) -> Scene:
    """Reads a COLMAP project: cameras and points from sparse/0 (or sparse), photos from images, masks from masks.

    Photos become round(size / downscale) pixels. InputError where the model, a photo or a mask cannot be used. Of a photo
    without a mask (see `mask_of`) everything counts.
    """
    project = Path(project)
    if not (math.isfinite(downscale) and downscale >= 1):
        raise InputError(f"--downscale must be a number of at least 1, not {downscale}")
    folder = next((f for f in (project / "sparse" / "0", project / "sparse") if _holds_model(f)), None)
    if folder is None:
        raise InputError(f"{project}: no COLMAP model in sparse/0 or sparse; make one from photos with `spaceport sfm`")
    model = _read_model(folder)
    images = sorted((model.image(i) for i in model.reg_image_ids()), key=lambda image: image.name)
    views = tuple(_view(model, image, project / "images", downscale) for image in images)
    if (project / "masks").is_dir() and all(view.mask_path is None for view in views):
        raise InputError(
            f"{project / 'masks'}: no mask has the name of a photo; call that of {views[0].name} {views[0].name}.png"
        )
    if len(views) < MIN_VIEWS:
        raise InputError(f"{folder}: {len(views)} photos with a pose; at least {MIN_VIEWS} are needed")
    view_from_id = {image.image_id: i for i, image in enumerate(images)}
    points, colors, tracks = _points(model, view_from_id)
    if len(points) < MIN_POINTS:
        raise InputError(
            f"{folder}: {len(points)} usable points; at least {MIN_POINTS} are needed, run `spaceport sfm` again"
        )
    return Scene(views, points, colors, tracks)


def mask_of(masks: Path, photo: str) -> Path | None:
    """The mask in the folder `masks` of the photo of this name, NAME.EXT: NAME.EXT.png, as COLMAP calls it, or NAME.png;
    None if there is none."""
    candidates = (masks / f"{photo}.png", (masks / photo).with_suffix(".png"))
    return next((path for path in candidates if path.is_file()), None)


def check_mask(path: Path, width: int, height: int) -> None:
    """InputError if the file is no mask for a photo of this size; its pixels are not read yet."""
    with _opened(path) as file:
        if file.size != (width, height):
            raise InputError(
                f"{path}: {file.width}x{file.height} pixels, but its photo has {width}x{height};"
                " a mask has the size of its photo"
            )
        if file.mode not in MASK_MODES:
            raise InputError(f"{path}: pixels of kind {file.mode}; save the mask as 8-bit grey")


def read_mask(path: Path) -> np.ndarray:
    """[H, W] uint8, converted to grey."""
    try:
        with _opened(path) as file:
            return np.array(file.convert("L"), dtype=np.uint8)
    except (OSError, ValueError, SyntaxError) as error:
        raise _unreadable(path, error) from error


def resize_by_area(photo: np.ndarray, width: int, height: int) -> np.ndarray:
    """[H, W, 3] uint8 to [height, width, 3] uint8, not larger: the mean over each target pixel's exact area. [H, W] alike.

    Source pixels that an edge cuts count by their covered part. Integers throughout, rounded once, half up.
    """
    full_height, full_width = photo.shape[:2]
    if (full_width, full_height) == (width, height):
        return photo
    if width > full_width or height > full_height:
        raise ValueError(f"photo is {full_width}x{full_height}; cannot be enlarged to {width}x{height}")
    columns = _axis_sums(photo, height, np.uint32)
    both = _axis_sums(columns.swapaxes(0, 1), width, np.uint64).swapaxes(0, 1)
    area = np.uint64(full_width * full_height)
    return np.ascontiguousarray(((2 * both + area) // (2 * area)).astype(np.uint8))


def _axis_sums(values: np.ndarray, n_target: int, dtype: Any) -> np.ndarray:
    """[n_source, …] to [n_target, …]: sums in units of 1 / n_target source pixels along the first axis.

    Running sums may wrap around in unsigned arithmetic; their differences are exact all the same.
    """
    n_source = values.shape[0]
    running = np.zeros((n_source + 1, *values.shape[1:]), dtype=dtype)
    np.cumsum(values, axis=0, dtype=dtype, out=running[1:])
    whole, part = np.divmod(np.arange(n_target + 1) * n_source, n_target)
    shape = (-1,) + (1,) * (values.ndim - 1)
    cut = values[np.minimum(whole, n_source - 1)].astype(dtype) * part.astype(dtype).reshape(shape)
    edges = running[whole] * dtype(n_target) + cut
    return edges[1:] - edges[:-1]


def _holds_model(folder: Path) -> bool:
    names = ("cameras", "images", "points3D")
    return any(all((folder / f"{n}{e}").is_file() for n in names) for e in (".bin", ".txt"))


def _read_model(folder: Path) -> Any:
    from spaceport_gs.colmap import pycolmap

    try:
        return pycolmap.Reconstruction(str(folder))
    except Exception as error:
        raise InputError(f"{folder}: not a readable COLMAP model; copy it again or run `spaceport sfm`") from error


def _view(model: Any, image: Any, photos: Path, downscale: float) -> View:
    path = photos / image.name
    if Path(image.name).is_absolute() or ".." in Path(image.name).parts:
        raise InputError(f"{image.name}: the COLMAP model names a photo outside of {photos}")
    if not path.is_file():
        raise InputError(f"{path}: photo of the COLMAP model is missing; put it back or run `spaceport sfm`")
    camera = _camera(model.camera(image.camera_id), image.cam_from_world().matrix(), image.name)
    with _opened(path) as file:
        if file.size != (camera.width, camera.height):
            raise InputError(
                f"{path}: {file.width}x{file.height} pixels, but its camera has {camera.width}x{camera.height};"
                " put back the photo that the COLMAP model was made from"
            )
    width = max(1, round(camera.width / downscale))
    height = max(1, round(camera.height / downscale))
    if min(width, height) < MIN_SIDE:
        raise InputError(
            f"{path}: {width}x{height} pixels after --downscale {downscale:g}; use a smaller --downscale"
            f" (sides of at least {MIN_SIDE} pixels)"
        )
    mask = mask_of(photos.parent / "masks", image.name)
    if mask is not None:
        check_mask(mask, camera.width, camera.height)
    return View(image.name, camera.resized(width, height), path, mask)


def _camera(intrinsics: Any, cam_from_world: np.ndarray, name: str) -> Camera:
    kind = intrinsics.model.name
    if kind == "PINHOLE":
        fx, fy, cx, cy = (float(p) for p in intrinsics.params)
    elif kind == "SIMPLE_PINHOLE":
        fx, cx, cy = (float(p) for p in intrinsics.params)
        fy = fx
    else:
        raise InputError(
            f"{name}: camera model {kind} has lens distortion; `spaceport sfm` on this project undistorts it"
        )
    numbers = np.array([fx, fy, cx, cy, *np.ravel(cam_from_world)])
    if not (np.isfinite(numbers).all() and fx > 0 and fy > 0):
        raise InputError(f"{name}: its camera is not finite or has no focal length; run `spaceport sfm`")
    pose = np.array(cam_from_world, dtype=np.float64)
    return Camera(pose, fx, fy, cx, cy, int(intrinsics.width), int(intrinsics.height))


def _points(model: Any, view_from_id: dict[int, int]) -> tuple[np.ndarray, np.ndarray, Tracks]:
    places, colors, sights = [], [], []
    for _, point in sorted(model.points3D.items()):
        seen_by = {view_from_id[e.image_id] for e in point.track.elements if e.image_id in view_from_id}
        if len(seen_by) >= MIN_VIEWS and np.isfinite(point.xyz).all():
            places.append(point.xyz)
            colors.append(point.color)
            sights.append(sorted(seen_by))
    offsets = np.cumsum([0, *(len(s) for s in sights)], dtype=np.int64)
    views = np.array([v for s in sights for v in s], dtype=np.int32)
    points = np.array(places, dtype=np.float64).reshape(-1, 3)
    return points, np.array(colors, dtype=np.uint8).reshape(-1, 3), Tracks(offsets, views)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The photo as a Pillow image whose pixels are not read yet."""
    from PIL import Image as Pillow

    Pillow.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses what is larger than twice this
    try:
        file = Pillow.open(path)
    except Pillow.DecompressionBombError as error:
        raise InputError(f"{path}: {error}; scale the photo down first") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise _unreadable(path, error) from error
    with file:
        yield file


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: not a readable photo ({error}); copy it again")
