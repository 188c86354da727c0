"""The stages chained: photos → SfM → training → compression → page and report.

Every stage records its result in OUT/stages when it is finished. A run that is resumed takes finished stages as they are,
and redoes what depends on a setting that changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spaceport_gs import __version__
from spaceport_gs.errors import BackendError, InputError
from spaceport_gs.files import replacing, write_json
from spaceport_gs.pipeline.capture import Capture, list_photos, open_capture, stamp_of
from spaceport_gs.pipeline.compress import CompressSettings, compress, read_sog
from spaceport_gs.pipeline.doctor import cuda_missing
from spaceport_gs.pipeline.publish import opening_of, publish, up_of
from spaceport_gs.pipeline.sfm import SfmSettings, reconstruct_cameras
from spaceport_gs.pipeline.workspace import LOG, Workspace
from spaceport_gs.ply import read_ply, write_ply
from spaceport_gs.progress import Listener, Progress

MAX_PICTURES = 6  # views shown side by side in the report
PICTURE_SIDE = 960  # pixels
BYTES_OF_A_PHOTO = 4_000_000  # in a .zip, about


@dataclass(frozen=True)
class RunSettings:
    """What a user chooses."""

    device: str = "auto"
    """auto, cpu or cuda."""
    seed: int = 0
    preset: str = "standard"
    steps: int = 0
    """0 = the preset's."""
    max_seconds: float = 0.0
    """For training; 0 = no limit."""
    downscale: float = 1.0
    eval_every: int = 8
    checkpoint_every: int = 0
    """Steps between two checkpoints of the training; 0 = half a minute."""
    sfm: str = "fast"
    """fast, or deterministic: one thread and fixed seeds."""
    title: str = ""
    exposure_rate: float = 0.0
    """Learning rate of each photo's exposure; 0 = the preset's."""
    moments: str = "full"
    """full or compact: see TrainSettings."""


def device_of(wanted: str) -> str:
    """The device to train and to compress on; BackendError if it is not there."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {wanted}: choose auto, cpu or cuda")
    missing = "" if wanted == "cpu" else cuda_missing()
    if wanted == "cuda" and missing:
        raise BackendError(f"--device cuda: {missing}; use --device cpu (see `spaceport doctor`)")
    return "cpu" if wanted == "cpu" or missing else "cuda"


def reconstruct(source: Path, workspace: Workspace, settings: RunSettings, listen: Listener) -> dict[str, Any]:
    """The main job; returns the report."""
    device_of(settings.device)
    sfm_stage(source, workspace, settings, listen)
    train_stage(workspace, settings, listen)
    compress_stage(workspace, settings, listen)
    publish_stage(workspace, settings, listen)
    return write_report(workspace, settings)


def train_project(source: Path, workspace: Workspace, settings: RunSettings, listen: Listener) -> dict[str, Any]:
    """SfM's result to scene.ply; the project's lens distortion, if any, is taken out first."""
    device_of(settings.device)
    if not (source / "sparse").is_dir() and not (source / "transforms.json").is_file():
        raise InputError(f"{source}: not a COLMAP project (no folder sparse); make one with `spaceport sfm`")
    sfm_stage(source, workspace, settings, listen)
    train_stage(workspace, settings, listen)
    report = report_of(workspace, settings)
    write_json(workspace.folder / "report.json", report)
    return report


def check(settings: RunSettings) -> None:
    """InputError or BackendError for settings that no run can have, before anything is touched."""
    from spaceport_gs.schedule import MOMENTS, preset

    device_of(settings.device)
    preset(settings.preset, 1, 1)
    if settings.moments not in MOMENTS:
        raise InputError(f"--moments {settings.moments}: choose {' or '.join(MOMENTS)}")
    if settings.eval_every == 1:
        raise InputError("--eval-every 1 would hold out every photo: give 0 (none) or at least 2")


@dataclass(frozen=True)
class Cost:
    """A coarse model of a run on the CPU, made from runs on two cores of an AMD EPYC (2.6 GHz, AVX2)."""

    sfm_per_photo: float = 1.2
    """Seconds of finding features, and of placing the camera."""
    sfm_per_pair: float = 0.15
    """Seconds of matching two photos."""
    step_fixed: float = 0.008
    """Seconds of a training step beside its pixels."""
    step_per_megapixel: float = 0.16
    """Seconds of a training step for a million pixels."""
    disk_per_megapixel: float = 6e6
    """Bytes for undistorted photos and prepared ones."""
    disk_fixed: float = 3e8
    memory_fixed: float = 6e8
    memory_per_megapixel: float = 5.7e6
    """Bytes; every photo is held decoded, three to a pixel, and smaller once more while the resolution rises."""
    memory_to_decode: float = 1e8
    """Bytes for a million pixels of the one photo that is being decoded and made smaller."""

    def memory(self, n_photos: int, megapixels: float, downscale: float) -> float:
        """Bytes of a training on these photos, each of `megapixels` in its file."""
        held = self.memory_per_megapixel * n_photos * megapixels / downscale**2
        return self.memory_fixed + held + self.memory_to_decode * megapixels


def estimate(source: Path, settings: RunSettings, out: Path) -> str:
    """One line on what a run will need; it warns where the disk may be too small."""
    import os

    from spaceport_gs.schedule import preset

    cost = Cost()
    files = list_photos(source)
    n, megapixels = len(files), megapixels_of(files)
    if source.is_file():
        n = max(3, source.stat().st_size // BYTES_OF_A_PHOTO)
    is_given = (source / "sparse").is_dir()
    trained = megapixels / settings.downscale**2
    recipe = preset(settings.preset, max(n, 1), round(trained * 1e6))
    steps = settings.steps or recipe.steps
    cores = len(os.sched_getaffinity(0)) / 2
    sfm = 0.1 * n if is_given else (cost.sfm_per_photo * n + cost.sfm_per_pair * min(n * (n - 1) / 2, 40 * n)) / cores
    train = steps * (cost.step_fixed + cost.step_per_megapixel * trained) / cores
    if settings.max_seconds:
        train = min(train, settings.max_seconds)
    disk = cost.disk_fixed + cost.disk_per_megapixel * n * megapixels
    memory = cost.memory(n, megapixels, settings.downscale)
    free = shutil.disk_usage(out).free
    warning = f"; only {free / 1e9:.1f} GB are free" if disk > free else ""
    minutes = max(1, round((sfm + train) / 60))
    return (
        f"{n} photos of {megapixels:.1f} megapixels: about {minutes} min,"
        f" {memory / 1e9:.1f} GB memory, {disk / 1e9:.1f} GB disk{warning}{_fallback(settings.device)}"
    )


def _fallback(device: str) -> str:
    """A line on why a build that could use a GPU does not."""
    from spaceport_gs import _engine

    if device != "auto" or "cuda" not in _engine.build_info()["backends"] or device_of(device) == "cuda":
        return ""
    return f"\ntraining runs on the CPU: {cuda_missing()}"


def megapixels_of(files: Sequence[Path]) -> float:
    """Of the first file that is a photo; those of a usual drone if there is none."""
    from PIL import Image

    for path in files[:10]:
        try:
            with Image.open(path) as image:
                return image.width * image.height / 1e6
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
    return 12.0


def _sfm_key(source: Path, settings: RunSettings) -> dict[str, Any]:
    key: dict[str, Any] = {"photos": stamp_of(source), "sfm": settings.sfm}
    return {**key, "seed": settings.seed} if settings.sfm == "deterministic" else key


def sfm_alone(source: Path, workspace: Workspace, settings: RunSettings, listen: Listener) -> dict[str, Any]:
    """SfM's result in the workspace itself; returns its report."""
    work = partial(_reconstruct_cameras, source, workspace.folder, settings, listen)
    return workspace.stage("sfm", _sfm_key(source, settings), work, outputs=("sparse/0", "images")).result


def _reconstruct_cameras(source: Path, out: Path, settings: RunSettings, listen: Listener) -> dict[str, Any]:
    capture = open_capture(source, out, listen)
    for photo in capture.skipped:
        LOG.warning("%s: not used: %s", photo.name, photo.reason)
    report = reconstruct_cameras(capture, out, SfmSettings(settings.sfm == "deterministic", settings.seed), listen)
    for name in report.left_out:
        LOG.warning("%s: not placed", name)
    _drop_copies(capture, out)
    return asdict(report)


def sfm_stage(source: Path, workspace: Workspace, settings: RunSettings, listen: Listener) -> None:
    work = partial(_reconstruct_cameras, source, workspace.folder / "sfm", settings, listen)
    workspace.stage("sfm", _sfm_key(source, settings), work, outputs=("sfm/sparse/0", "sfm/images"))


def _drop_copies(capture: Capture, out: Path) -> None:
    """The prepared photos have served; `images` holds them undistorted."""
    for name in ("photos", "unzipped", "given"):
        shutil.rmtree(out / name, ignore_errors=True)


def train_stage(workspace: Workspace, settings: RunSettings, listen: Listener, preview: Path | None = None) -> None:
    """`preview`: see `train`; None: preview.jpg in the workspace."""
    from spaceport_gs.schedule import TrainSettings
    from spaceport_gs.train import train

    before = workspace.record_of("sfm")
    assert before is not None
    chosen = TrainSettings(
        preset=settings.preset,
        steps=settings.steps,
        max_seconds=settings.max_seconds,
        seed=settings.seed,
        eval_every=settings.eval_every,
        checkpoint_every=settings.checkpoint_every,
        device=device_of(settings.device),
        exposure_rate=settings.exposure_rate,
        moments=settings.moments,
    )

    def work() -> dict[str, Any]:
        from spaceport_gs.evaluate import evaluate
        from spaceport_gs.scene import load_scene, split

        scene = load_scene(workspace.folder / "sfm", settings.downscale)
        trained = train(scene, chosen, workspace.folder, listen, preview or workspace.folder / "preview.jpg")
        write_ply(trained.gaussians, workspace.folder / "scene.ply")
        views, held_out = split(scene, settings.eval_every)
        score = evaluate(trained.gaussians, held_out)
        _save_pictures(workspace, trained.gaussians, held_out or views)
        return {
            "gaussians": len(trained.gaussians),
            "psnr": score.psnr,
            "ssim": score.ssim,
            "views": [asdict(view) for view in score.views],
            "stop_reason": trained.stop_reason,
            "steps": trained.steps,
            "training_seconds": round(trained.seconds, 3),
            "history": [asdict(check) for check in trained.history],
            "device": chosen.device,
        }

    key = {"sfm": before.fingerprint, "downscale": settings.downscale, **chosen.decisive()}
    workspace.stage("train", key, work, outputs=("scene.ply", "pictures"))


def compress_stage(workspace: Workspace, settings: RunSettings, listen: Listener, scores: bool = True) -> None:
    """`scores`: of the held-out views as the compressed scene shows them; they need torch, and the scene's photos."""
    before = workspace.record_of("train")
    assert before is not None
    sog = workspace.folder / "scene.sog"

    def work() -> dict[str, Any]:
        chosen = CompressSettings(seed=settings.seed, device=device_of(settings.device))
        figures: dict[str, Any] = compress(read_ply(workspace.folder / "scene.ply"), sog, chosen, listen)
        figures["device"] = chosen.device
        if not scores:
            return figures
        from spaceport_gs.evaluate import evaluate
        from spaceport_gs.scene import load_scene, split

        _, held_out = split(load_scene(workspace.folder / "sfm", settings.downscale), settings.eval_every)
        score = evaluate(read_sog(sog), held_out)
        return {**figures, "psnr": score.psnr, "ssim": score.ssim}

    workspace.stage("compress", {"train": before.fingerprint}, work, outputs=("scene.sog",))


def publish_stage(workspace: Workspace, settings: RunSettings, listen: Listener) -> None:
    before = workspace.record_of("compress")
    assert before is not None

    def work() -> dict[str, Any]:
        listen(Progress("publish", 0, 1, "writing the page"))
        view = opening_of(workspace.folder, settings.title or "Scene")
        figures = publish(workspace.folder / "scene.sog", workspace.folder / "index.html", view)
        listen(Progress("publish", 1, 1, "done"))
        return figures

    key = {"compress": before.fingerprint, "title": settings.title}
    workspace.stage("publish", key, work, outputs=("index.html",))


def _save_pictures(workspace: Workspace, gaussians: Any, views: Any) -> None:
    """Side by side: render, photo, error; as JPEG files in OUT/pictures."""
    from PIL import Image

    from spaceport_gs.render import render_8bit

    folder = workspace.folder / "pictures"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    chosen = views[:: max(1, len(views) // MAX_PICTURES)][:MAX_PICTURES]
    for i, view in enumerate(chosen):
        render = render_8bit(gaussians, view.camera)
        error = np.abs(render.astype(np.int16) - view.photo).mean(axis=2)
        pictures = {"render": render, "photo": view.photo, "error": _heat(error)}
        for kind, pixels in pictures.items():
            image = Image.fromarray(pixels)
            image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            with replacing(folder / f"{i}_{kind}.jpg") as temporary:
                image.save(temporary, "JPEG", quality=88)


def _heat(error: np.ndarray) -> np.ndarray:
    """[H, W] mean absolute error in 0 … 255 as black, red, yellow, white; white from 64 on."""
    level = np.clip(error / 64.0, 0, 1)[..., None] * 3
    return (np.clip(level - np.array([0.0, 1.0, 2.0]), 0, 1) * 255).astype(np.uint8)


def report_of(workspace: Workspace, settings: RunSettings) -> dict[str, Any]:
    """What report.json holds; stages that did not run are left out."""
    records = {name: workspace.record_of(name) for name in ("sfm", "train", "compress", "publish")}
    results: dict[str, dict[str, Any]] = {n: r.result for n, r in records.items() if r is not None}
    sfm, train, packed = (results.get(name, {}) for name in ("sfm", "train", "compress"))
    report: dict[str, Any] = {
        "photos": sfm.get("photos"),
        "registered": sfm.get("registered"),
        "left_out": sfm.get("left_out", []),
        "skipped": sfm.get("skipped", {}),
        "points": sfm.get("points"),
        "reprojection_error_px": sfm.get("reprojection_error_px"),
        "gaussians": train.get("gaussians"),
        "psnr": train.get("psnr"),
        "ssim": train.get("ssim"),
        "views": train.get("views", []),
        "steps": train.get("steps"),
        "stop_reason": train.get("stop_reason"),
        "training_seconds": train.get("training_seconds"),
        "history": train.get("history", []),
        "ply_bytes": _size(workspace.folder / "scene.ply"),
        "sog_bytes": _size(workspace.folder / "scene.sog"),
        "psnr_after_compression": packed.get("psnr"),
        "stages": {
            name: {"seconds": record.seconds, "peak_bytes": record.peak_bytes}
            for name, record in records.items()
            if record is not None
        },
        "settings": {**asdict(settings), "title": settings.title or "Scene"},
        "device": train.get("device"),
        "version": __version__,
    }
    return report


def write_report(workspace: Workspace, settings: RunSettings) -> dict[str, Any]:
    """report.html and report.json of a finished run; returns what the latter holds."""
    report = report_of(workspace, settings)
    _write_report_page(workspace, report)
    write_json(workspace.folder / "report.json", report)
    return report


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def _write_report_page(workspace: Workspace, report: Mapping[str, Any]) -> None:
    from spaceport_gs.pipeline.report import ReportPictures, write_report
    from spaceport_gs.scene import load_scene

    scene = load_scene(workspace.folder / "sfm")
    folder = workspace.folder / "pictures"
    n_pictures = len(list(folder.glob("*_render.jpg")))
    pictures = ReportPictures(
        rows=[
            [(folder / f"{i}_{kind}.jpg").read_bytes() for kind in ("render", "photo", "error")]
            for i in range(n_pictures)
        ],
        centers=np.array([view.camera.center for view in scene.views]),
        directions=np.array([view.camera.cam_from_world[2, :3] for view in scene.views]),
        points=scene.points,
        colors=scene.colors,
        up=np.array(up_of([view.camera for view in scene.views])),
    )
    write_report(report, pictures, workspace.folder / "report.html")
