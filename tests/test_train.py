"""Training: schedules, growth, and that an interrupted run ends where an undisturbed one does."""

from __future__ import annotations

import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from spaceport_gs import checkpoint, ops, schedule
from spaceport_gs.density import Growth, grow, logit, reset_opacities
from spaceport_gs.errors import InputError
from spaceport_gs.evaluate import evaluate, psnr, ssim
from spaceport_gs.gaussians import Gaussians, Rows, from_points
from spaceport_gs.pipeline.capture import open_capture
from spaceport_gs.pipeline.sfm import reconstruct_cameras
from spaceport_gs.pipeline.synthesize import SynthesizeSettings, synthesize
from spaceport_gs.scene import load_scene, resize_by_area, split
from spaceport_gs.schedule import PlateauRule, Recipe, TrainSettings
from spaceport_gs.train import train
from spaceport_gs.types import DrawKey, Statistics

STEPS = 240
SPACEPORT = str(Path(sys.executable).parent / "spaceport")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("capture")
    synthesize(out, SynthesizeSettings(n_photos=12, width=96, height=64))
    return out / "truth"


def settings(**changes: object) -> TrainSettings:
    recipe = Recipe(
        steps=STEPS, growth_from=20, growth_until=160, growth_every=20, sh_every=40, reset_every=90, max_gaussians=6000,
        growth_threshold=1e-4, full_resolution_at=60, first_side=32, evaluate_every=60,
        plateau=PlateauRule(check_every=20, arm_at=100, cool_down=30, min_gain=-9.0),
    )  # fmt: skip
    return replace(TrainSettings(recipe=recipe, steps=STEPS, checkpoint_every=70), **changes)


def same(a: Gaussians, b: Gaussians) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.arrays(), b.arrays(), strict=True))


def test_training_improves_and_does_not_depend_on_threads(project: Path, tmp_path: Path) -> None:
    scene = load_scene(project)
    reports = []
    for n_threads in (1, 2, 3):
        ops.use_cpu(n_threads)
        reports.append(train(scene, settings(), tmp_path / str(n_threads)))
    ops.use_cpu()
    assert all(same(reports[0].gaussians, report.gaussians) for report in reports[1:])
    _, held_out = split(scene, 8)
    first = from_points(scene.points, scene.colors, 3).torch()
    start, end = (evaluate(g, held_out).psnr for g in (first, reports[0].gaussians))
    assert start is not None and end is not None and start <= 20 and end > start + 2
    assert len(reports[0].gaussians) > len(scene.points) / 2


def test_real_photos_are_learnt(data_folder: Path, tmp_path: Path) -> None:
    """fox at 1/8 resolution, given poses, a short run: far above what its points alone give."""
    reconstruct_cameras(open_capture(data_folder / "fox", tmp_path), tmp_path)  # takes the distortion out
    scene = load_scene(tmp_path, downscale=8)
    report = train(scene, TrainSettings(steps=700), tmp_path)
    _, held_out = split(scene, 8)
    first = from_points(scene.points, scene.colors, 3).torch()
    start, end = (evaluate(g, held_out).psnr for g in (first, report.gaussians))
    assert start is not None and end is not None and start < 20 and end > 24.5


class _Stop(Exception):
    pass


def test_interrupted_at_any_step_the_end_is_the_same(project: Path, tmp_path: Path) -> None:
    scene = load_scene(project)
    whole = train(scene, settings(checkpoint_every=10**6), tmp_path / "whole")
    times = iter([75, 150, 225])
    limit = next(times)

    def stop_at(progress: object) -> None:
        nonlocal limit
        if int(getattr(progress, "message", "step 0").split()[-1]) >= limit:
            limit = next(times, 10**9)
            raise _Stop

    for _ in range(3):
        with pytest.raises(_Stop):
            train(scene, settings(), tmp_path / "parts", stop_at)
    resumed = train(scene, settings(), tmp_path / "parts")
    assert same(whole.gaussians, resumed.gaussians)
    assert [replace(c, seconds=0) for c in whole.history] == [replace(c, seconds=0) for c in resumed.history]


def test_a_signal_saves_and_the_kill_of_a_save_loses_nothing(project: Path, tmp_path: Path) -> None:
    """SIGTERM in the middle; then a checkpoint cut short, as a kill while it is written over would leave it."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[3]); from pathlib import Path; from test_train import *; "
        "train(load_scene(Path(sys.argv[1])), settings(), Path(sys.argv[2]), lambda p: print(p.step, flush=True))"
    )
    command = [sys.executable, "-c", code, str(project), str(tmp_path / "out"), str(Path(__file__).parent)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "Interrupted: stopped by SIGTERM" in errors
    saved = checkpoint.files(tmp_path / "out" / "checkpoints")
    assert saved
    (saved[-1].with_name(".step_99999999.npz.1.partial")).write_bytes(saved[-1].read_bytes()[:1000])
    scene = load_scene(project)
    resumed = train(scene, settings(), tmp_path / "out")
    assert same(train(scene, settings(), tmp_path / "whole").gaussians, resumed.gaussians)


def test_damaged_and_foreign_checkpoints(project: Path, tmp_path: Path) -> None:
    scene = load_scene(project)
    train(scene, settings(), tmp_path)
    with pytest.raises(InputError, match="other settings"):
        train(scene, settings(seed=5), tmp_path)
    for path in checkpoint.files(tmp_path / "checkpoints"):
        with np.load(path) as archive:
            arrays = dict(archive)
        arrays["rows/0/means"][5, 1] = np.nan
        np.savez(path, **arrays)
    with pytest.raises(InputError, match="NaN"):
        train(scene, settings(), tmp_path)
    for path in checkpoint.files(tmp_path / "checkpoints"):
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="not a usable checkpoint"):
        train(scene, settings(), tmp_path)


def test_held_out_photos_change_nothing(project: Path, tmp_path: Path) -> None:
    """Training with the held-out photos replaced by black ones gives the same bytes."""
    scene = load_scene(project)
    plain = train(scene, settings(), tmp_path / "plain")
    _, held_out = split(scene, 8)
    for view in held_out:
        view.__dict__["photo"] = np.zeros_like(view.photo)
    assert same(plain.gaussians, train(scene, settings(), tmp_path / "black").gaussians)


def test_a_preview_shows_the_scene_and_changes_nothing(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spaceport_gs.preview.SECONDS", 0.0)
    scene = load_scene(project)
    plain = train(scene, settings(), tmp_path / "plain")
    shown = train(scene, settings(), tmp_path / "shown", preview=tmp_path / "preview.jpg")
    assert same(plain.gaussians, shown.gaussians)
    with Pillow.open(tmp_path / "preview.jpg") as picture:
        assert psnr(np.array(picture), split(scene, 8)[1][0].photo) > 18


def test_a_time_budget_is_kept_and_the_schedule_completes(project: Path, tmp_path: Path) -> None:
    scene = load_scene(project)
    report = train(scene, settings(steps=10**6, max_seconds=2.0), tmp_path)
    assert report.seconds < 4
    assert "time budget" in report.stop_reason
    assert report.history[-1].moment == pytest.approx(STEPS, rel=0.3)
    hasty = train(scene, settings(max_seconds=0.15), tmp_path / "hasty")
    moments = [check.moment // 20 for check in hasty.history]
    assert hasty.history and len(set(moments)) == len(moments) and hasty.stop_reason


def test_baseline_schedule() -> None:
    recipe = schedule.preset("baseline", 100, 10**6)
    assert recipe.plateau is None and recipe.steps == 30_000
    assert schedule.means_rate(recipe, 0) == pytest.approx(1.6e-4)
    assert schedule.means_rate(recipe, 15_000) == pytest.approx(1.6e-5)
    assert schedule.means_rate(recipe, 30_000) == pytest.approx(1.6e-6)
    assert [schedule.sh_degree(recipe, s) for s in (0, 999, 1000, 2500, 3000, 9000)] == [0, 0, 1, 2, 3, 3]
    grown = [s for s in range(1, 30_001) if schedule.grows(recipe, s - 1, s)]
    assert grown == list(range(600, 15_000, 100))
    reset = [s for s in range(1, 30_001) if schedule.resets_opacity(recipe, s - 1, s)]
    assert reset == [3000, 6000, 9000, 12_000]


def test_plateau_rule() -> None:
    rule = PlateauRule(window=4, min_gain=0.05, flat_patience=2, max_decline=0.1, decline_patience=3)
    assert schedule.plateau(rule, [20 + 0.1 * i for i in range(20)]) is None
    assert "over" in str(schedule.plateau(rule, [25.0] * 8))
    assert "from best" in str(schedule.plateau(rule, [25, 25.5, 25.5, 25.5, 25.2, 25.1, 25.0, 25.0]))


def rows_of(values: Gaussians) -> Rows:
    ones = values.map(torch.ones_like)
    return Rows(values, (ones, ones))


def test_growth_by_hand() -> None:
    """Four rows: one to clone, one to split, one to prune, one to keep."""
    values = Gaussians(
        torch.arange(12.0).view(4, 3),
        torch.log(torch.tensor([0.005, 0.05, 0.005, 0.005]))[:, None].expand(4, 3).contiguous(),
        torch.tensor([[1.0, 0, 0, 0]]).expand(4, 4).contiguous(),
        torch.tensor([0.0, 0.0, -7.0, 0.0]),
        torch.zeros(4, 1, 3),
    )
    scores = torch.tensor([3e-4, 3e-4, 0.0, 1e-4])
    grown = grow(rows_of(values), scores, Growth(Recipe(), extent=1.0, moment=600, key=DrawKey(0, 1)))
    means = grown.values.means
    assert len(means) == 5
    assert torch.equal(means[0], values.means[0]) and torch.equal(means[2], values.means[0])
    assert torch.equal(means[1], values.means[3])
    assert torch.allclose(grown.values.log_scales[3:], torch.log(torch.tensor(0.05 / 1.6)))
    assert bool((means[3:] - values.means[1]).abs().max() < 0.25)
    assert torch.equal(grown.companions[0].opacities, torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]))
    limited = grow(rows_of(values), scores, Growth(Recipe(max_gaussians=5), 1.0, 600, DrawKey(0, 1)))
    assert len(limited.values) == 4


def test_compact_moments_grow_and_are_saved(project: Path, tmp_path: Path) -> None:
    values = from_points(np.random.default_rng(0).normal(size=(50, 3)), np.zeros((50, 3), np.uint8), 3).torch()
    ones = values.map(torch.ones_like)
    moments = ops.AdamMoments(ones, ones).stored(ops.MomentStorage.COMPACT)
    rows = Rows(values, (moments.first, moments.second))
    grown = grow(rows, torch.arange(50) * 1e-5, Growth(Recipe(), extent=1.0, moment=600, key=DrawKey(0, 1)))
    n_new = len(grown.values) - len(values)
    assert n_new > 0
    full = ops.AdamMoments(*grown.companions).stored(ops.MomentStorage.FULL)
    for moment in (full.first, full.second):
        assert moment.sh.shape == grown.values.sh.shape
        assert (moment.sh.flatten(1) == 0).all(dim=1).sum() >= n_new and (moment.sh == 1).all(dim=2).all(dim=1).any()
    state = checkpoint.State(grown, Statistics.empty(len(grown.values)), best=grown)
    loaded = checkpoint.load(checkpoint.save(tmp_path, state, "mark"), "mark", "cpu")
    for a, b in zip(loaded.rows.companions, grown.companions, strict=True):
        assert same(a, b)


def test_opacity_reset() -> None:
    values = from_points(np.random.default_rng(0).normal(size=(9, 3)), np.zeros((9, 3), np.uint8), 0).torch()
    reset = reset_opacities(rows_of(values), 0.01)
    assert torch.allclose(reset.values.opacities, torch.tensor(logit(0.01)))
    assert not reset.companions[0].opacities.any() and reset.companions[0].means.all()


def test_area_downscale_is_the_mean_of_the_area() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (7, 10, 3), dtype=np.uint8)
    fine = np.repeat(np.repeat(photo, 3, axis=0), 4, axis=1).astype(float)
    expected = fine.reshape(3, 7, 4, 10, 3).mean(axis=(1, 3))
    assert np.abs(resize_by_area(photo, 4, 3) - expected).max() <= 0.5 + 1e-9


def test_metrics() -> None:
    photo = np.random.default_rng(0).integers(0, 200, (20, 30, 3), dtype=np.uint8)
    assert psnr(photo + np.uint8(10), photo) == pytest.approx(20 * math.log10(25.5))
    assert psnr(photo, photo) == 100
    from spaceport_gs import reference

    other = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    expected = reference.ssim(torch.tensor(other / 255.0), torch.tensor(photo / 255.0))
    assert ssim(other, photo) == pytest.approx(float(expected))
    half = np.zeros((20, 30), np.uint8)
    half[:, :15] = 255
    assert psnr(other, photo, half) == pytest.approx(psnr(other[:, :15], photo[:, :15]))
    mask = np.random.default_rng(2).integers(0, 256, (20, 30), dtype=np.uint8)
    dissimilar = reference.masked_loss(torch.tensor(other / 255.0), torch.tensor(photo), torch.tensor(mask), 1.0)
    assert ssim(other, photo, mask) == pytest.approx(1 - float(dissimilar))


def with_masks(project: Path, out: Path, mask: np.ndarray) -> Path:
    """The project with this mask for each photo, named as COLMAP does it and by the photo's stem in turn."""
    shutil.copytree(project, out)
    (out / "masks").mkdir()
    for i, photo in enumerate(sorted((out / "images").iterdir())):
        name = f"{photo.name}.png" if i % 2 else f"{photo.stem}.png"
        Pillow.fromarray(mask).save(out / "masks" / name)
    return out


def test_what_masks_hide_changes_nothing(project: Path, tmp_path: Path) -> None:
    mask = np.full((64, 96), 255, np.uint8)
    mask[20:50, 30:70] = 0
    short = settings(steps=60, recipe=replace(settings().recipe, full_resolution_at=0))
    masked, reports, scores = with_masks(project, tmp_path / "masked", mask), [], []
    for level in (0, 255):
        scene = load_scene(masked)
        for view in scene.views:
            hidden = view.photo.copy()
            hidden[mask == 0] = level
            view.__dict__["photo"] = hidden
        reports.append(train(scene, short, tmp_path / str(level)))
        scores.append(evaluate(reports[-1].gaussians, scene.views))
    assert same(reports[0].gaussians, reports[1].gaussians)
    assert scores[0] == scores[1]
    assert not same(reports[0].gaussians, train(load_scene(project), short, tmp_path / "unmasked").gaussians)


def test_masks_follow_the_size_of_their_view(project: Path, tmp_path: Path) -> None:
    mask = np.zeros((64, 96), np.uint8)
    mask[:, 50:] = 255
    view = load_scene(with_masks(project, tmp_path / "masked", mask), downscale=2).views[0].resized(24, 16)
    assert view.mask is not None and view.mask.shape == view.photo.shape[:2] == (16, 24)
    assert (view.mask[:, :12] == 0).all() and (view.mask[:, 12] == 128).all() and (view.mask[:, 13:] == 255).all()
    assert load_scene(project).views[0].mask is None


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((60, 96), np.uint8), "96x60 pixels, but its photo has 96x64"),
        (np.zeros((64, 96), np.uint16), "8-bit grey"),
        (np.ones((64, 96), np.uint8), "hides the whole photo"),
    ],
)
def test_wrong_masks_are_named(project: Path, tmp_path: Path, mask: np.ndarray, message: str) -> None:
    masked = with_masks(project, tmp_path / "masked", mask)
    with pytest.raises(InputError, match=message):
        _ = load_scene(masked).views[0].mask
    for path in (masked / "masks").iterdir():
        path.rename(path.with_name(f"of {path.name}"))
    with pytest.raises(InputError, match="no mask has the name of a photo"):
        load_scene(masked)


def test_exposures_are_learnt_and_survive_interruptions(project: Path, tmp_path: Path) -> None:
    """Half of the photos are too dark: their exposures explain it, and the photos are matched better than without."""
    scene = load_scene(project)
    for view in scene.views[::2]:
        view.__dict__["photo"] = (view.photo * 0.6).astype(np.uint8)
    learning = settings(exposure_rate=2e-2, eval_every=0)
    whole = train(scene, learning, tmp_path / "whole")
    exposures = checkpoint_arrays(tmp_path / "whole")["exposures/values"]
    greys = (0.5 * exposures[:, :, :3].sum(axis=2) + exposures[:, :, 3]).mean(axis=1)  # what becomes of medium grey
    assert np.median(greys[::2]) < 0.75 * np.median(greys[1::2])
    plain = train(scene, settings(eval_every=0), tmp_path / "plain")
    assert whole.history[-2].loss < 0.8 * plain.history[-2].loss

    def stop(progress: object) -> None:
        if getattr(progress, "message", "").endswith("150"):
            raise _Stop

    with pytest.raises(_Stop):
        train(scene, learning, tmp_path / "parts", stop)
    assert same(whole.gaussians, train(scene, learning, tmp_path / "parts").gaussians)
    assert np.array_equal(checkpoint_arrays(tmp_path / "parts")["exposures/values"], exposures)


def checkpoint_arrays(out: Path) -> dict[str, np.ndarray]:
    with np.load(checkpoint.files(out / "checkpoints")[-1]) as archive:
        return dict(archive)


def test_unknown_presets_are_named() -> None:
    with pytest.raises(InputError, match="unknown preset"):
        schedule.preset("fastest", 10, 10)


def test_killed_at_ten_moments_scene_ply_is_the_same(project: Path, tmp_path: Path) -> None:
    """The command itself, SIGKILLed again and again: at eight moments spread over the run, and while a checkpoint is being
    written, twice."""
    command = [
        SPACEPORT,
        "train",
        str(project),
        "--steps",
        "1000",
        "--checkpoint-every",
        "40",
        "--quiet",
        "--threads",
        "1",
    ]
    subprocess.run([*command, "-o", str(tmp_path / "whole")], check=True, timeout=300)
    out = tmp_path / "killed"

    def n_steps_done() -> int:
        lines = (out / "events.jsonl").read_text().splitlines() if (out / "events.jsonl").exists() else []
        steps = [re.search(r'"message": "step (\d+)"', line) for line in lines]
        return max((int(step[1]) for step in steps if step), default=0)

    def partials() -> list[Path]:
        return list(out.glob("checkpoints/.step_*.partial"))

    def killed_when(is_due: Callable[[], object]) -> None:
        process = subprocess.Popen([*command, "-o", str(out), *(["--resume"] if out.exists() else [])])
        while process.poll() is None and not is_due():
            pass
        assert process.returncode is None, "the run ended before it was killed"
        process.kill()
        process.wait()

    n_cut_short = 0
    for k in range(1, 9):
        killed_when(lambda k=k: n_steps_done() >= 95 * k)
        while k % 4 == 0 and n_cut_short < k // 4:
            before = set(partials())
            killed_when(lambda before=before: set(partials()) - before)
            n_cut_short += bool(set(partials()) - before)
    subprocess.run([*command, "-o", str(out), "--resume"], check=True, timeout=300)
    assert (out / "scene.ply").read_bytes() == (tmp_path / "whole" / "scene.ply").read_bytes()
    assert not partials()
