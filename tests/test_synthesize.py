"""The synthetic capture is what it says: poses, depth and EXIF are exact, textures as rich as a real drone's photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline import synthesize as synthetic
from spaceport_gs.pipeline.capture import open_capture
from spaceport_gs.pipeline.synthesize import SynthesizeSettings, World, orbit, render, synthesize
from spaceport_gs.scene import load_scene

SMALL = SynthesizeSettings(n_photos=4, width=96, height=64)


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("capture")
    synthesize(out, SMALL)
    return out


def test_the_same_bytes_again(capture: Path, tmp_path: Path) -> None:
    synthesize(tmp_path, SMALL)
    files = sorted(p.relative_to(capture) for p in capture.rglob("*") if p.is_file())
    assert files and all((capture / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)


def test_depth_is_the_surface(capture: Path) -> None:
    """Straight down on the ground away from everything, depth is the height above it."""
    pose = np.array([[1.0, 0, 0, -40], [0, -1, 0, 40], [0, 0, -1, 30]])
    down = synthetic.Camera(pose, 500.0, 500.0, 8.0, 8.0, 16, 16)
    _, depth = render(World(0), down)
    np.testing.assert_allclose(depth, 30.0, rtol=1e-6)


def test_depth_and_poses_agree_between_views(capture: Path) -> None:
    """Places of one view, seen from another that sees them too, show what its own depth says."""
    cameras = orbit(SynthesizeSettings(n_photos=40, width=96, height=64))[:3:2]
    depths = [render(World(0), camera)[1] for camera in cameras]
    y, x = np.mgrid[0:64, 0:96] + 0.5
    origin, direction = synthetic.rays(cameras[0], x.ravel(), y.ravel())
    ahead = direction @ cameras[0].cam_from_world[2, :3]
    places = origin + (depths[0].ravel() / ahead)[:, None] * direction
    local = places @ cameras[1].cam_from_world[:, :3].T + cameras[1].cam_from_world[:, 3]
    column = np.floor(cameras[1].fx * local[:, 0] / local[:, 2] + cameras[1].cx).astype(int)
    row = np.floor(cameras[1].fy * local[:, 1] / local[:, 2] + cameras[1].cy).astype(int)
    inside = (column >= 0) & (column < 96) & (row >= 0) & (row < 64)
    seen = depths[1][row[inside], column[inside]]
    ratio = seen / local[inside, 2]
    assert inside.mean() > 0.5
    assert np.median(np.abs(ratio - 1)) < 0.005 and (ratio < 1.05).mean() > 0.97


def test_exif_tells_the_true_place(capture: Path, tmp_path: Path) -> None:
    photos = open_capture(capture / "photos", tmp_path).photos
    for photo, camera in zip(photos, orbit(SMALL), strict=True):
        assert photo.position == pytest.approx(synthetic.geodetic(camera.center), abs=1e-4)
        assert photo.focal_px == pytest.approx(camera.fx, rel=0.02)
    log = (capture / "flight_log.csv").read_text().splitlines()
    assert len(log) == 5 and log[1].startswith("DJI_0001.JPG,2026:01:15")


def test_the_true_model_is_a_project(capture: Path) -> None:
    scene = load_scene(capture / "truth")
    assert len(scene.views) == 4 and len(scene.points) > 500
    for view, camera in zip(scene.views, orbit(SMALL), strict=True):
        np.testing.assert_allclose(view.camera.cam_from_world, camera.cam_from_world, atol=1e-9)


def test_pose_error_ignores_the_frame() -> None:
    true = np.random.default_rng(0).normal(size=(9, 3)) * 40
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    assert synthetic.pose_error(0.1 * true @ turn.T + 5, true) == pytest.approx(0, abs=1e-12)
    moved = true.copy()
    moved[0, 0] += 9 * synthetic.ORBIT_RADIUS / 100
    assert 0.01 < synthetic.pose_error(moved, true) < 0.04


def mean_gradient(photo: Path, width: int) -> float:
    with Image.open(photo) as image:
        grey = image.convert("L").resize((width, round(image.height * width / image.width)), Image.Resampling.BOX)
    dy, dx = np.gradient(np.asarray(grey, dtype=float))
    return float(np.hypot(dx, dy).mean())


def test_as_rich_as_a_real_capture(data_folder: Path, tmp_path: Path) -> None:
    real = sorted((data_folder / "brighton_beach" / "images").iterdir())
    settings = SynthesizeSettings(n_photos=3)
    synthesize(tmp_path, settings)
    ours = sorted((tmp_path / "photos").iterdir())
    gradients = [np.mean([mean_gradient(p, settings.width) for p in photos]) for photos in (ours, real)]
    assert gradients[0] >= gradients[1]


def test_bad_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 3"):
        synthesize(tmp_path, SynthesizeSettings(n_photos=2))
