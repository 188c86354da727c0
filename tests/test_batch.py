"""Many captures by one command: some of them broken, stopped in the middle, and gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spaceport_gs.pipeline import cli, contained
from spaceport_gs.pipeline.aws.contract import STAGES
from spaceport_gs.pipeline.contained import Containers

SPACEPORT = str(Path(sys.executable).parent / "spaceport")
QUICK = ("--steps", "6", "--eval-every", "0")
PODMAN = """#!{python}
import os, pathlib, sys
verb, *rest = sys.argv[1:]
if verb == "image":
    sys.exit(not rest[-1].endswith(":there"))
if verb == "run":
    print(" ".join(rest), file=open({log!r}, "a"))
    volumes = [part.removeprefix("--volume=").split(":") for part in rest if part.startswith("--volume=")]
    base = pathlib.Path(volumes[0][0])
    for source, target, mode in volumes[1:]:
        place = base / pathlib.PurePath(target).relative_to(volumes[0][1])
        if not place.is_symlink():
            place.rmdir()
            place.symlink_to(source)
    arguments = rest[[part.endswith(":there") for part in rest].index(True) + 1:]
    os.environ["SAGEMAKER_BASE_DIR"] = str(base)
    os.chdir(base)
    os.execv(sys.executable, [sys.executable, "-m", "spaceport_gs.pipeline.aws.entrypoint", *arguments])
"""
"""Stands for podman: it runs what is in the images as a process, on the folders that it is given."""


@pytest.fixture
def captures(small_capture: Path, tmp_path: Path) -> Path:
    """A COLMAP project, a .zip of another, and a folder with a photo that is none."""
    folder = tmp_path / "captures"
    shutil.copytree(small_capture, folder / "harbour")
    shutil.make_archive(str(folder / "quarry"), "zip", small_capture)
    (folder / "broken").mkdir()
    (folder / "broken" / "a.jpg").write_bytes(b"no photo")
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("not a capture")
    return folder


def test_one_broken_capture_stops_no_other(captures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.run(["batch", str(captures), "-o", str(out), *QUICK, "--jobs", "2", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    outcomes = {outcome["name"]: outcome for outcome in result["captures"]}
    assert list(outcomes) == ["broken", "harbour", "quarry"] and result["failed"] == 1
    assert "a.jpg" in outcomes["broken"]["error"] or "photo" in outcomes["broken"]["error"]
    for name in ("harbour", "quarry"):
        assert outcomes[name]["error"] == "" and (out / name / "index.html").is_file()
        assert outcomes[name]["report"] == json.loads((out / name / "report.json").read_text())
    assert json.loads((out / "batch.json").read_text()) == result["captures"]

    stamp = (out / "harbour" / "scene.ply").stat().st_mtime_ns
    assert cli.run(["batch", str(captures), "-o", str(out), *QUICK]) == 2
    assert "--resume" in capsys.readouterr().err
    shutil.rmtree(captures / "broken")
    assert cli.run(["batch", str(captures), "-o", str(out), *QUICK, "--resume"]) == 0
    assert (out / "harbour" / "scene.ply").stat().st_mtime_ns == stamp
    assert "2 of 2 captures" in capsys.readouterr().out


def test_a_signal_ends_all_and_a_resumed_batch_completes(captures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.rmtree(captures / "broken")
    command = [SPACEPORT, "batch", str(captures), "-o", str(out), *QUICK]
    batch = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    end = time.monotonic() + 60
    while not (out / "harbour" / "events.jsonl").exists():
        assert batch.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    batch.send_signal(signal.SIGTERM)
    _, errors = batch.communicate(timeout=60)
    assert batch.returncode == 143 and "go on with --resume" in errors
    assert not (out / "quarry").exists() and not (out / "harbour" / "index.html").exists()
    subprocess.run([*command, "--resume"], check=True, timeout=300, stdout=subprocess.DEVNULL)
    assert all((out / name / "index.html").is_file() for name in ("harbour", "quarry"))


@pytest.fixture
def podman(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log of what it was asked to run."""
    log, tool = tmp_path / "podman.log", tmp_path / "bin/podman"
    tool.parent.mkdir()
    tool.write_text(PODMAN.format(python=sys.executable, log=str(log)))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    return log


def test_captures_go_through_containers(
    captures: Path, podman: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They leave what a run without leaves, and are gone on with stage by stage."""
    out = tmp_path / "out"
    shutil.rmtree(captures / "harbour")
    command = ["batch", str(captures), "-o", str(out), *QUICK, "--backend", "container", "--image-tag", "there"]
    assert cli.run([*command, "--json"]) == 1
    outcomes = {one["name"]: one for one in json.loads(capsys.readouterr().out)["captures"]}
    assert outcomes["broken"]["error"].startswith("sfm: ") and "a.jpg" in outcomes["broken"]["error"]
    assert outcomes["quarry"]["error"] == "" and outcomes["quarry"]["report"]["gaussians"] > 0
    left = {path.name for path in (out / "quarry").iterdir()}
    assert {"scene.ply", "scene.sog", "index.html", "report.html", "report.json", "sfm", "pictures"} < left
    assert not list((out / "quarry").glob("jobs/sfm/processing/input/photos/*"))
    events = [json.loads(line) for line in (out / "quarry/events.jsonl").read_text().splitlines()]
    assert {"sfm", "train", "compress"} <= {event["stage"] for event in events}
    runs = [line.split() for line in podman.read_text().splitlines()]
    assert len(runs) == 4 and all({"--network=none", "--read-only", "--cap-drop=all"} < set(run) for run in runs)
    assert "localhost/spaceport/3dgs:there" in podman.read_text()

    podman.unlink()
    shutil.rmtree(captures / "broken")
    (out / "quarry/jobs/train/model/scene.ply").write_bytes(b"damaged")
    assert cli.run([*command, "--resume"]) == 0
    assert "/3dgs:there train" in podman.read_text() and "/sfm:there" not in podman.read_text()
    podman.unlink()
    assert cli.run([*command, "--resume", "--seed", "7"]) == 1
    assert "begun with another value of seed" in json.loads((out / "batch.json").read_text())[0]["error"]
    assert not podman.exists()


def test_without_containers(
    captures: Path, podman: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is begun where nothing can be run."""
    command = ["batch", str(captures), "-o", str(tmp_path / "out"), *QUICK, "--backend", "container"]
    assert cli.run([*command, "--image-prefix", "example.org/ours", "--image-tag", "none"]) == 2
    assert "podman has no image example.org/ours/sfm:none: build it with `spaceport images`" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.run(command) == 2
    assert "no podman or docker that works here: containers are run by one" in capsys.readouterr().err
    assert cli.run([*command[:-1], "cloud"]) == 2
    assert "choose local, container or aws" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tool", "user", "device", "options"),
    [
        ("podman", 0, "cpu", []),
        ("podman", 1000, "cpu", ["--userns=keep-id:uid=10001,gid=10001"]),
        ("docker", 1000, "cuda", ["--user=1000:1000", "--gpus=all"]),
        ("podman", 0, "cuda", ["--device=nvidia.com/gpu=all"]),
    ],
)
def test_users_and_gpus_of_containers(
    tool: str, user: int, device: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: user)
    monkeypatch.setattr(os, "getgid", lambda: user)
    containers = Containers(tool, {})
    assert containers.options("train", device)[1:] == containers.options("compress", device)[1:] == options
    assert not any("gpu" in option for option in containers.options("sfm", device))


@pytest.mark.parametrize(("device", "has_gpu", "image"), [
    ("auto", False, "compressor"), ("auto", True, "3dgs"), ("cuda", False, "3dgs"), ("cpu", True, "compressor"),
])  # fmt: skip
def test_containers_compress_with_the_image_for_gpus_where_there_is_one(
    device: str, has_gpu: bool, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contained, "GPU", tmp_path if has_gpu else tmp_path / "none")
    containers = Containers("podman", {"sfm": "sfm", "train": "3dgs", "compress": "compressor"})
    assert [containers.image(stage, device) for stage in STAGES] == ["sfm", "3dgs", image]


def test_wrong_folders(captures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(captures / "harbour", captures / "quarry")
    for folder, reason in (
        (captures, "the same name quarry"),
        (captures / "empty", "holds no captures"),
        (tmp_path / "x", "expected a folder"),
    ):
        assert cli.run(["batch", str(folder), "-o", str(tmp_path / "out")]) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
