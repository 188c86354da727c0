"""The command: the main job end to end, resumed, killed, and with everything that users get wrong."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spaceport_gs.pipeline import cli
from spaceport_gs.ply import read_ply, write_ply

SPACEPORT = str(Path(sys.executable).parent / "spaceport")
STAGES = ["sfm", "train", "compress", "publish"]
QUICK = ("--steps", "200", "--quiet")


@pytest.fixture(scope="module")
def result(orbit_capture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a quick run."""
    out = tmp_path_factory.mktemp("result") / "out"
    assert cli.run(["reconstruct", str(orbit_capture / "photos"), "-o", str(out), *QUICK, "--title", "Pad <39>"]) == 0
    return out


def test_the_main_job(result: Path) -> None:
    report = json.loads((result / "report.json").read_text())
    assert report["photos"] == report["registered"] == 16
    assert report["gaussians"] == len(read_ply(result / "scene.ply"))
    assert report["psnr"] > 15 and 0 < report["ssim"] < 1 and report["reprojection_error_px"] < 0.5
    assert abs(report["psnr_after_compression"] - report["psnr"]) < 0.3
    assert report["ply_bytes"] == (result / "scene.ply").stat().st_size >= 8 * report["sog_bytes"]
    assert report["stop_reason"] and report["device"] == "cpu" and report["version"]
    assert set(report["stages"]) == {"sfm", "train", "compress", "publish"}
    assert all(stage["seconds"] > 0 and stage["peak_bytes"] > 1e7 for stage in report["stages"].values())
    config = json.loads((result / "config.json").read_text())
    assert config["steps"] == 200 and config["eval_every"] == 8 and config["seed"] == 0
    assert (result / "sfm" / "sparse" / "0" / "images.bin").exists()
    assert "train: starts" in (result / "spaceport.log").read_text()


def test_events_tell_the_progress_of_every_stage(result: Path) -> None:
    events = [json.loads(line) for line in (result / "events.jsonl").read_text().splitlines()]
    assert {event["stage"] for event in events} == {"sfm", "train", "compress", "publish"}
    train = [event for event in events if event["stage"] == "train"]
    fractions = [event["fraction"] for event in train]
    assert fractions == sorted(fractions) and fractions[-1] == 1
    assert {"step", "seconds_left", "loss", "gaussians", "psnr"} <= set(train[-1])


def test_pages_tell_no_place_and_no_path(result: Path, orbit_capture: Path) -> None:
    for name in ("index.html", "report.html", "report.json"):
        text = (result / name).read_text()
        assert str(result) not in text and str(orbit_capture) not in text
        assert (
            not re.search(r"(?<!\d)5\.23", re.sub(r"data:[^\"]*|<script.*?</script>", "", text, flags=re.S))
            and "52.76" not in text[:20_000]
        )
        assert "Pad &lt;39&gt;" in text or "Pad <39>" in json.loads(text)["settings"]["title"]
    for picture in (result / "pictures").iterdir():
        with Image.open(picture) as image:
            assert not image.getexif()


def stamps(result: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (result / "stages").glob("*.json")}


def test_resuming_a_finished_run_redoes_nothing(result: Path, orbit_capture: Path, tmp_path: Path) -> None:
    out = shutil.copytree(result, tmp_path / "out")
    command = ["reconstruct", str(orbit_capture / "photos"), "-o", str(out), *QUICK, "--title", "Pad <39>"]
    before = stamps(out)
    assert cli.run([*command, "--resume"]) == 0
    assert stamps(out) == before
    assert cli.run([*command, "--resume", "--title", "Another"]) == 0
    changed = {name for name, stamp in stamps(out).items() if before[name] != stamp}
    assert changed == {"publish.json"} and "Another" in (out / "index.html").read_text()[:500]


def test_resuming_with_other_settings_or_photos_is_refused(
    result: Path, orbit_capture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(result, tmp_path / "out")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.suffix in (".ply", ".json", ".npz")}
    photos = orbit_capture / "photos"
    for change, name in (("--downscale 2", "downscale"), ("--steps 300", "steps"), ("--eval-every 4", "eval_every")):
        command = ["reconstruct", str(photos), "-o", str(out), *QUICK, "--resume", *change.split()]
        assert cli.run(command) == cli.EXIT_MISTAKE
        printed = capsys.readouterr().err
        assert name in printed and "--overwrite" in printed
    other = photos_of(orbit_capture, tmp_path / "other", 15)
    assert cli.run(["reconstruct", str(other), "-o", str(out), *QUICK, "--resume"]) == cli.EXIT_MISTAKE
    assert "photos" in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in before.items())


def test_what_is_gone_is_made_again(result: Path, orbit_capture: Path, tmp_path: Path) -> None:
    out = shutil.copytree(result, tmp_path / "out")
    (out / "scene.sog").unlink()
    command = ["reconstruct", str(orbit_capture / "photos"), "-o", str(out), *QUICK, "--title", "Pad <39>", "--resume"]
    assert cli.run(command) == 0
    assert (out / "scene.sog").read_bytes() == (result / "scene.sog").read_bytes()


def test_inputs_are_never_removed(orbit_capture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = tmp_path / "project"
    shutil.copytree(orbit_capture / "truth", project)
    (project / "config.json").write_text('{"command": "train", "version": "0"}')
    assert cli.run(["train", str(project), "-o", str(project), "--overwrite"]) == cli.EXIT_MISTAKE
    inside = tmp_path / "out" / "sfm"
    inside.parent.mkdir()
    shutil.move(project, inside)
    shutil.move(inside / "config.json", inside.parent)
    assert cli.run(["train", str(inside), "-o", str(inside.parent), "--overwrite"]) == cli.EXIT_MISTAKE
    assert "input" in capsys.readouterr().err
    assert len(list((inside / "images").iterdir())) == 16 and (inside / "sparse" / "0" / "images.bin").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"mine": 1}')
    assert cli.run(["train", str(inside), "-o", str(foreign), "--overwrite"]) == cli.EXIT_MISTAKE
    assert (foreign / "config.json").read_text() == '{"mine": 1}'
    (foreign / "photos").mkdir()
    assert cli.run(["synthesize", "-o", str(foreign), "--overwrite", "--photos", "3"]) == cli.EXIT_MISTAKE


def test_a_kill_at_the_very_start_leaves_a_folder_that_can_be_used(orbit_capture: Path, tmp_path: Path) -> None:
    (tmp_path / ".config.json.4711.partial").write_text("{")
    assert cli.run(["sfm", str(orbit_capture / "truth"), "-o", str(tmp_path), "--quiet"]) == 0
    assert not list(tmp_path.glob(".*.partial"))


def test_a_failed_first_run_does_not_block_the_right_one(orbit_capture: Path, tmp_path: Path) -> None:
    assert cli.run(["sfm", str(orbit_capture / "truth" / "depth"), "-o", str(tmp_path / "out")]) == cli.EXIT_MISTAKE
    assert cli.run(["sfm", str(orbit_capture / "truth"), "-o", str(tmp_path / "out"), "--quiet"]) == 0


def test_photos_that_are_not_used_are_named_everywhere(
    orbit_capture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = photos_of(orbit_capture, tmp_path / "photos", 6)
    (photos / "text.jpg").write_text("hello")
    (photos / "cut.jpg").write_bytes((photos / "DJI_0001.JPG").read_bytes()[:3000])
    assert cli.run(["reconstruct", str(photos), "-o", str(tmp_path / "out"), "--steps", "40"]) == 0
    printed = capsys.readouterr().out
    assert "not used: text.jpg: not an image" in printed and "not used: cut.jpg: damaged" in printed
    for name in ("report.json", "report.html", "spaceport.log"):
        text = (tmp_path / "out" / name).read_text()
        assert "text.jpg" in text and "cut.jpg" in text and str(tmp_path) not in text


def test_reconstruct_killed_at_ten_random_moments_completes(orbit_capture: Path, tmp_path: Path) -> None:
    """Each kill waits for a stage, and a share of it, that were drawn before; finished stages stay as they are."""
    out = tmp_path / "out"
    command = [
        SPACEPORT,
        "reconstruct",
        str(orbit_capture / "photos"),
        "-o",
        str(out),
        *QUICK,
        "--checkpoint-every",
        "20",
    ]
    draw = random.Random(4)
    moments = sorted((STAGES.index(s), draw.random()) for s in ["sfm", *draw.choices(STAGES, [2, 4, 2, 1], k=9)])
    n_lines, n_kept = 0, 0
    for k, (stage, share) in enumerate(moments):
        process = subprocess.Popen([*command, *(["--resume"] if k else [])], stderr=subprocess.DEVNULL)
        finished = stamps(out)
        while process.poll() is None:
            lines = (out / "events.jsonl").read_text().splitlines()[n_lines:] if (out / "events.jsonl").exists() else []
            events = [json.loads(line) for line in lines if line.endswith("}")]
            told = [(STAGES.index(event["stage"]), event["fraction"]) for event in events]
            if any(moment >= (stage, share) for moment in told):
                break
        process.kill()
        process.wait()
        n_lines = len((out / "events.jsonl").read_text().splitlines())
        assert all(stamps(out)[name] == stamp for name, stamp in finished.items())
        n_kept = max(n_kept, len(finished))
    assert n_kept >= 2
    subprocess.run([*command, "--resume"], check=True, timeout=300)
    assert json.loads((out / "report.json").read_text())["registered"] == 16


def test_stages_alone(result: Path, orbit_capture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """sfm → train → compress → publish, render and evaluate, each from the files of the one before."""

    def spaceport(*arguments: object) -> dict[str, object]:
        assert cli.run([*map(str, arguments), "--json"]) == 0
        printed: dict[str, object] = json.loads(capsys.readouterr().out)
        return printed

    assert spaceport("sfm", orbit_capture / "truth", "-o", tmp_path / "sfm")["registered"] == 16
    trained = spaceport("train", tmp_path / "sfm", "-o", tmp_path / "out", "--steps", 60, "--eval-every", 0)
    assert trained["psnr"] is None and trained["sog_bytes"] is None
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == trained
    packed = spaceport("compress", tmp_path / "out" / "scene.ply", "-o", tmp_path / "scene.sog")
    assert packed["sog_bytes"] == (tmp_path / "scene.sog").stat().st_size
    assert (
        spaceport("compress", tmp_path / "out", "-o", tmp_path / "scene.sog", "--resume")["sog_bytes"]
        == packed["sog_bytes"]
    )
    for scene in (tmp_path / "scene.sog", tmp_path / "out" / "scene.ply", result):
        spaceport("publish", scene, "-o", tmp_path / "page.html", "--overwrite")
    pictures = spaceport("render", result, "-o", tmp_path / "pictures", "--downscale", 2)["pictures"]
    assert isinstance(pictures, list) and len(pictures) == 16
    with Image.open(pictures[0]) as image:
        assert abs(image.width - 180) <= 2
    scores = spaceport("evaluate", result, "-o", tmp_path / "scores.json")
    assert scores["psnr"] == pytest.approx(json.loads((result / "report.json").read_text())["psnr"], abs=1e-6)
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    built = spaceport("doctor")["built"]
    assert isinstance(built, dict) and "cpu" in built["backends"]


def test_stages_without_training_import_no_torch(result: Path, orbit_capture: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from spaceport_gs.pipeline.cli import run; "
        "codes = [run(a.split('|')) for a in sys.argv[1:]]; assert 'torch' not in sys.modules; sys.exit(max(codes))"
    )
    commands = [
        f"sfm|{orbit_capture / 'truth'}|-o|{tmp_path / 'sfm'}|--quiet",
        f"compress|{result / 'scene.ply'}|-o|{tmp_path / 'scene.sog'}|--quiet",
        f"publish|{tmp_path / 'scene.sog'}|-o|{tmp_path / 'page.html'}|--quiet",
    ]
    subprocess.run([sys.executable, "-c", code, *commands], cwd=tmp_path, check=True, timeout=120)


def test_two_runs_in_one_folder_are_refused(result: Path, orbit_capture: Path, tmp_path: Path) -> None:
    command = [SPACEPORT, "train", str(orbit_capture / "truth"), "-o", str(tmp_path / "out"), "--quiet"]
    first = subprocess.Popen(command)
    while not (tmp_path / "out" / "events.jsonl").exists():
        assert first.poll() is None
    second = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == cli.EXIT_TERMINATED
    assert second.returncode == 2 and f"process {first.pid}" in second.stderr


def photos_of(orbit_capture: Path, folder: Path, n: int = 3) -> Path:
    folder.mkdir(parents=True)
    for photo in sorted((orbit_capture / "photos").iterdir())[:n]:
        shutil.copy(photo, folder)
    return folder


def bomb_in(folder: Path) -> Path:
    Image.new("1", (40_000, 30_000)).save(folder / "0.png")
    return folder


def zip_with(path: Path, name: str) -> Path:
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr(name, b"x")
    return path


def with_nan(path: Path, result: Path) -> Path:
    scene = read_ply(result / "scene.ply")
    scene.means[3, 1] = np.nan
    write_ply(scene, path)
    return path


def cut(path: Path, source: Path) -> Path:
    path.write_bytes(source.read_bytes()[:5000])
    return path


def promising(path: Path, source: Path) -> Path:
    path.write_bytes(re.sub(rb"element vertex \d+", b"element vertex 99999999999", source.read_bytes(), count=1))
    return path


# What is asked for, given (folder, capture, result); and what the answer must hold.
MISTAKES: dict[str, tuple[Callable[[Path, Path, Path], list[object]], tuple[str, ...]]] = {
    "missing input": (lambda t, c, r: ["reconstruct", t / "none", "-o", t / "o"], ("none", "no such file")),
    "no images": (lambda t, c, r: ["reconstruct", c / "truth" / "depth", "-o", t / "o"], ("depth", "no photos")),
    "two photos": (lambda t, c, r: ["reconstruct", photos_of(c, t / "two", 2), "-o", t / "o"], ("2 usable photos", "at least 3")),
    "not a folder": (lambda t, c, r: ["sfm", r / "scene.ply", "-o", t / "o"], ("scene.ply", "expected a folder")),
    "zip slip": (lambda t, c, r: ["reconstruct", zip_with(t / "a.zip", "../x.jpg"), "-o", t / "o"], ("a.zip", "outside")),
    "bomb": (lambda t, c, r: ["reconstruct", bomb_in(photos_of(c, t / "bomb")), "-o", t / "o"], ("0.png", "pixels")),
    "not a zip": (lambda t, c, r: ["reconstruct", cut(t / "b.zip", r / "scene.ply"), "-o", t / "o"], ("b.zip", "zip")),
    "finished": (lambda t, c, r: ["reconstruct", c / "photos", "-o", r], ("--resume", "--overwrite")),
    "foreign folder": (lambda t, c, r: ["reconstruct", c / "photos", "-o", c], ("not a result",)),
    "output is a file": (lambda t, c, r: ["train", c / "truth", "-o", r / "scene.ply"], ("is a file",)),
    "read-only": (lambda t, c, r: ["train", c / "truth", "-o", "/sys/o"], ("/sys/o", "written to")),
    "train from photos": (lambda t, c, r: ["train", c / "photos", "-o", t / "o"], ("not a COLMAP project", "spaceport sfm")),
    "no such device": (lambda t, c, r: ["train", c / "truth", "-o", t / "o", "--device", "tpu"], ("auto, cpu or cuda",)),
    "unknown preset": (lambda t, c, r: ["train", c / "truth", "-o", t / "o", "--preset", "fastest"], ("fastest", "standard")),
    "unknown option": (lambda t, c, r: ["train", c / "truth", "-o", t / "o", "--fast"], ("--fast", "--help")),
    "unknown command": (lambda t, c, r: ["reconstrukt"], ("reconstrukt",)),
    "steps": (lambda t, c, r: ["train", c / "truth", "-o", t / "o", "--steps", "many"], ("--steps", "integer")),
    "eval every 1": (lambda t, c, r: ["train", c / "truth", "-o", t / "o", "--eval-every", 1], ("--eval-every",)),
    "all too small": (lambda t, c, r: ["train", c / "truth", "-o", t / "o", "--downscale", 40], ("smaller --downscale",)),
    "resume and overwrite": (lambda t, c, r: ["train", c / "truth", "-o", t / "o", "--resume", "--overwrite"], ("exclude",)),
    "truncated ply": (lambda t, c, r: ["compress", cut(t / "a.ply", r / "scene.ply"), "-o", t / "o.sog"], ("a.ply", "truncated")),
    "terabytes": (lambda t, c, r: ["compress", promising(t / "b.ply", r / "scene.ply"), "-o", t / "o.sog"], ("b.ply", "promises")),
    "NaN": (lambda t, c, r: ["compress", with_nan(t / "c.ply", r), "-o", t / "o.sog"], ("c.ply", "NaN")),
    "truncated sog": (lambda t, c, r: ["publish", cut(t / "a.sog", r / "scene.sog"), "-o", t / "o.html"], ("a.sog",)),
    "view nothing": (lambda t, c, r: ["view", c / "truth"], ("index.html", "publish")),
    "render without cameras": (lambda t, c, r: ["render", shutil.copy(r / "scene.ply", t), "-o", t / "p"], ("--cameras",)),
    "exists": (lambda t, c, r: ["compress", r / "scene.ply", "-o", r / "scene.sog"], ("scene.sog", "--overwrite")),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(
    mistake: str, result: Path, orbit_capture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = MISTAKES[mistake]
    before = stamps(result)
    assert cli.run(list(map(str, arguments(tmp_path, orbit_capture, result)))) == cli.EXIT_MISTAKE
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("spaceport: error: ") and "\n" not in printed, printed
    assert all(word in printed for word in words), printed
    assert stamps(result) == before


def test_cuda_that_is_not_there(
    orbit_capture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from spaceport_gs.pipeline import run

    if not run.cuda_missing():
        monkeypatch.setattr(run, "cuda_missing", lambda: "no NVIDIA driver")
    arguments = ["train", str(orbit_capture / "truth"), "-o", str(tmp_path / "out"), "--device", "cuda"]
    assert cli.run(arguments) == cli.EXIT_MISTAKE
    assert "use --device cpu" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("most", [200_000, 2_000_000])
def test_a_full_disk_loses_nothing(orbit_capture: Path, tmp_path: Path, most: int) -> None:
    """Files may not grow over a size that ends SfM, or training at its first checkpoint."""
    out = tmp_path / "out"
    limited = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most})); "
    run = "from spaceport_gs.pipeline.cli import run; sys.exit(run(sys.argv[1:]))"
    arguments = ["train", str(orbit_capture / "truth"), "-o", str(out), "--quiet", "--steps", "60"]
    full = subprocess.run(
        [sys.executable, "-c", limited + run, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert full.returncode == cli.EXIT_MISTAKE and full.stderr.count("\n") == 1, full.stderr
    assert "free some space" in full.stderr
    assert not list(out.rglob("*.partial")) and not (out / "scene.ply").exists()
    assert cli.run([*arguments, "--resume"]) == 0
    assert (out / "scene.ply").exists()


def test_the_demo_reaches_its_quality(tmp_path: Path) -> None:
    """What `make demo` does, with default settings."""
    assert cli.run(["synthesize", "-o", str(tmp_path / "capture"), "--quiet"]) == 0
    arguments = ["reconstruct", str(tmp_path / "capture" / "photos"), "-o", str(tmp_path / "out"), "--quiet"]
    assert cli.run([*arguments, "--device", "cpu"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["registered"] == 30 and report["psnr"] >= 28
    assert report["psnr_after_compression"] >= report["psnr"] - 0.3 and report["ply_bytes"] >= 8 * report["sog_bytes"]
    curve = [check["psnr_held_out"] for check in report["history"]]
    assert curve[-1] >= max(curve) - 0.1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert re.match(r"spaceport-gs \d+\.\d+", capsys.readouterr().out)
