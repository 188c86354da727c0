"""Structure from motion: against the true poses of a synthetic capture, on real photos, and where it cannot work."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pycolmap
import pytest
from conftest import ORBIT
from PIL import ExifTags, Image

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline import sfm
from spaceport_gs.pipeline.capture import open_capture
from spaceport_gs.pipeline.sfm import SfmReport, SfmSettings, reconstruct_cameras
from spaceport_gs.pipeline.synthesize import orbit, pose_error
from spaceport_gs.progress import Progress
from spaceport_gs.scene import load_scene

DEFAULTS = SfmSettings()


def reconstructed(photos: Path, out: Path, settings: SfmSettings = DEFAULTS) -> SfmReport:
    return reconstruct_cameras(open_capture(photos, out), out, settings)


def error_of(out: Path) -> float:
    """Of the camera centres, as a share of the orbit's radius."""
    true = {f"DJI_{i + 1:04d}": camera.center for i, camera in enumerate(orbit(ORBIT))}
    views = load_scene(out).views
    return pose_error(np.array([v.camera.center for v in views]), np.array([true[v.name[:8]] for v in views]))


def test_poses_are_the_true_ones(orbit_capture: Path, tmp_path: Path) -> None:
    report = reconstructed(orbit_capture / "photos", tmp_path)
    assert (report.photos, report.registered, report.left_out) == (16, 16, ())
    assert report.reprojection_error_px < 0.5 and report.points > 1000
    assert error_of(tmp_path) <= 0.005
    assert not (tmp_path / "work").exists()


def test_matching_is_looked_at_without_getting_in_its_way(
    orbit_capture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as can be: two who open the database at a time would meet, and COLMAP abort."""
    monkeypatch.setattr(sfm, "TELL_SECONDS", 0.0)
    photos = tmp_path / "photos"
    photos.mkdir()
    for photo in sorted((orbit_capture / "photos").iterdir())[:8]:
        shutil.copy(photo, photos)
    events: list[Progress] = []
    capture = open_capture(photos, tmp_path / "out")
    assert reconstruct_cameras(capture, tmp_path / "out", DEFAULTS, events.append).registered == 8
    n_matched = [event.step for event in events if event.message == "matching pairs"]
    assert n_matched == sorted(n_matched) and n_matched[-1] == 8 * 7 // 2
    assert len(n_matched) > 100


def test_pngs_are_written_with_pycolmap_loaded_first(tmp_path: Path) -> None:
    program = """
import io
import spaceport_gs.colmap
from PIL import Image
for width in range(1, 900, 30):
    Image.effect_noise((width, 400), 64).save(io.BytesIO(), "PNG")
"""
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=120, cwd=tmp_path)


def test_photos_in_no_known_order_find_their_neighbours(
    orbit_capture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sfm, "EXHAUSTIVE_UP_TO", 5)
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, photo in zip("hcpaofkbmdjgnlei", sorted((orbit_capture / "photos").iterdir()), strict=True):
        with Image.open(photo) as image:  # without its EXIF, and so its position
            image.save(photos / f"{name}.png")
    assert reconstructed(photos, tmp_path / "out").registered == 16


@pytest.mark.parametrize("keeps_positions", [True, False])
def test_many_photos_with_positions_or_frames_of_a_video(
    orbit_capture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps_positions: bool
) -> None:
    monkeypatch.setattr(sfm, "EXHAUSTIVE_UP_TO", 5)
    photos = orbit_capture / "photos"
    if not keeps_positions:
        photos = tmp_path / "frames"
        photos.mkdir()
        for photo in (orbit_capture / "photos").iterdir():
            with Image.open(photo) as image:
                image.save(photos / f"{photo.stem}.png")
    assert reconstructed(photos, tmp_path / "out").registered == 16


def test_deterministic_gives_the_same_files(orbit_capture: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for photo in sorted((orbit_capture / "photos").iterdir())[:7]:
        shutil.copy(photo, photos)
    for name in ("a", "b"):
        reconstructed(photos, tmp_path / name, SfmSettings(deterministic=True))
    for file in ("cameras.bin", "images.bin", "points3D.bin"):
        a, b = ((tmp_path / name / "sparse" / "0" / file).read_bytes() for name in ("a", "b"))
        assert a == b


def test_a_finished_stage_is_not_done_again(orbit_capture: Path, tmp_path: Path) -> None:
    shutil.copytree(orbit_capture / "truth", tmp_path / "project")
    first = reconstructed(tmp_path / "project", tmp_path / "out")
    shutil.rmtree(tmp_path / "project" / "sparse")
    assert sfm.finished_report(tmp_path / "out") == first


def test_a_given_lens_is_undistorted(orbit_capture: Path, tmp_path: Path) -> None:
    """Photos bent by a known lens come out as the pinhole photos that they were made from."""
    project = tmp_path / "project"
    shutil.copytree(orbit_capture / "truth", project)
    model = pycolmap.Reconstruction(str(project / "sparse" / "0"))
    camera = model.cameras[1]
    fx, _, cx, cy = camera.params
    k = -0.08
    camera.model, camera.params = pycolmap.CameraModelId.SIMPLE_RADIAL, [fx, cx, cy, k]
    y, x = np.mgrid[0 : camera.height, 0 : camera.width] + 0.5
    rays = np.asarray(camera.cam_from_img(np.stack([x.ravel(), y.ravel()], axis=1)))
    for photo in (project / "images").iterdir():
        with Image.open(photo) as image:
            pixels = np.asarray(image).astype(float)
        column, row = ((fx * rays[:, i] + c - 0.5).reshape(x.shape) for i, c in ((0, cx), (1, cy)))
        Image.fromarray(_sampled(pixels, column, row)).save(photo, quality=98, subsampling=0)
    model.write_binary(str(project / "sparse" / "0"))
    masked = sorted((project / "images").iterdir())[3].name
    (project / "masks").mkdir()
    Image.fromarray(255 * (x < 180).astype(np.uint8)).save(project / "masks" / f"{masked}.png")

    reconstructed(project, tmp_path / "out")
    views = load_scene(tmp_path / "out").views
    assert len(views) == 16
    view = views[3]
    with Image.open(orbit_capture / "truth" / "images" / view.name.removesuffix(".png")) as image:
        straight = np.asarray(image).astype(float)
    y, x = np.mgrid[10 : view.camera.height - 10, 10 : view.camera.width - 10] + 0.5
    column = (x - view.camera.cx) / view.camera.fx * fx + cx - 0.5
    row = (y - view.camera.cy) / view.camera.fy * fx + cy - 0.5
    inside = (column > 2) & (column < 357) & (row > 2) & (row < 237)
    error = np.abs(_sampled(straight, column, row).astype(float) - view.photo[10:-10, 10:-10])[inside]
    assert inside.mean() > 0.9 and error.mean() < 6
    # A line down the middle stays one; beside the photo nothing counts.
    assert [v.name for v in views if v.mask is not None] == [view.name]
    seen = view.mask[10:-10, 10:-10][inside] > 127
    assert (seen == (column < cx)[inside]).mean() > 0.99


def _sampled(pixels: np.ndarray, column: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Bilinear, at places in pixels from the first one's centre."""
    from scipy.ndimage import map_coordinates

    channels = [map_coordinates(pixels[..., c], [row, column], order=1, mode="nearest") for c in range(3)]
    return np.clip(np.stack(channels, axis=-1) + 0.5, 0, 255).astype(np.uint8)


def test_poses_of_a_transforms_json_get_points(orbit_capture: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(orbit_capture / "photos", tmp_path / "in")
    frames = []
    for i, camera in enumerate(orbit(ORBIT)):
        pose = np.eye(4)
        pose[:3, :3] = camera.cam_from_world[:, :3].T * [1, -1, -1]
        pose[:3, 3] = camera.center
        frames.append({"file_path": f"DJI_{i + 1:04d}.JPG", "transform_matrix": pose.tolist()})
    lens = {"fl_x": camera.fx, "fl_y": camera.fy, "cx": camera.cx, "cy": camera.cy, "w": 360, "h": 240}
    (folder / "transforms.json").write_text(json.dumps({**lens, "frames": frames}))
    report = reconstructed(folder, tmp_path / "out")
    assert report.registered == 16 and report.points > 500 and report.reprojection_error_px < 1
    for view, camera in zip(load_scene(tmp_path / "out").views, orbit(ORBIT), strict=True):
        np.testing.assert_allclose(view.camera.cam_from_world, camera.cam_from_world, atol=1e-6)


def test_sizes_and_orientations_may_differ(orbit_capture: Path, tmp_path: Path) -> None:
    """Some photos are smaller, some lie on their side and say so in their EXIF."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, photo in enumerate(sorted((orbit_capture / "photos").iterdir())):
        with Image.open(photo) as image:
            exif = image.getexif()
            changed = image.copy()
        if i % 4 == 1:
            changed = changed.resize((300, 200), Image.Resampling.LANCZOS)
        if i % 4 == 3:
            changed = changed.transpose(Image.Transpose.ROTATE_90)
            exif[ExifTags.Base.Orientation] = 6
        changed.save(photos / photo.name, quality=95, exif=exif)
    report = reconstructed(photos, tmp_path / "out")
    assert report.registered == 16
    sizes = {(v.camera.width, v.camera.height) for v in load_scene(tmp_path / "out").views}
    assert all(width > height for width, height in sizes) and len(sizes) >= 2
    assert error_of(tmp_path / "out") <= 0.01


def test_all_drone_photos_are_placed(data_folder: Path, tmp_path: Path) -> None:
    """18 photos of a beach, nadir and oblique, at half their size."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for photo in (data_folder / "brighton_beach" / "images").iterdir():
        with Image.open(photo) as image:
            image.resize((image.width // 2, image.height // 2)).save(
                photos / photo.name, quality=92, exif=image.getexif()
            )
    report = reconstructed(photos, tmp_path / "out")
    assert report.registered == 18 and report.reprojection_error_px < 1


def test_the_largest_model_wins() -> None:
    small, large = pycolmap.Reconstruction(), pycolmap.Reconstruction()
    for model, n in ((small, 3), (large, 5)):
        model.add_camera_with_trivial_rig(
            pycolmap.Camera(model="PINHOLE", width=8, height=8, params=[8, 8, 4, 4], camera_id=1)
        )
        for i in range(1, n + 1):
            model.add_image_with_trivial_frame(pycolmap.Image(name=str(i), camera_id=1, image_id=i), pycolmap.Rigid3d())
    assert sfm.largest_model([small, large]) is large and sfm.largest_model([large, small]) is large
    assert sfm.largest_model([]) is None


def test_photos_without_overlap_are_named(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (24, 36, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((360, 240), Image.Resampling.BICUBIC).save(photos / f"other {i}.png")
    with pytest.raises(InputError, match=r"do not overlap enough: no matches for other 0\.png.*60 % overlap"):
        reconstructed(photos, tmp_path / "out")


def test_a_model_that_does_not_fit_its_photos_is_refused(orbit_capture: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(orbit_capture / "truth", project)
    name = sorted((project / "images").iterdir())[0]
    with Image.open(name) as image:
        image.resize((100, 80)).save(name)
    with pytest.raises(InputError, match="DJI_0001.JPG is 100×80"):
        reconstructed(project, tmp_path / "a")
    for photo in list((project / "images").iterdir())[:14]:
        photo.unlink()
    with pytest.raises(InputError, match="usable photos|photos of 14"):
        reconstructed(project, tmp_path / "b")
    shutil.rmtree(project)
    shutil.copytree(orbit_capture / "truth", project)
    (project / "sparse" / "0" / "images.bin").write_bytes(b"\xff" * 50)
    with pytest.raises(InputError, match="not a COLMAP model"):
        reconstructed(project, tmp_path / "c")
