"""Many captures by one command: some of them broken, stopped in the middle, and gone on with."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spaceport_gs.pipeline import cli
from spaceport_gs.pipeline.synthesize import SynthesizeSettings, synthesize

SPACEPORT = str(Path(sys.executable).parent / "spaceport")
QUICK = ("--steps", "6", "--eval-every", "0")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small COLMAP project."""
    out = tmp_path_factory.mktemp("small")
    synthesize(out, SynthesizeSettings(n_photos=12, width=96, height=64))
    return out / "truth"


@pytest.fixture
def captures(project: Path, tmp_path: Path) -> Path:
    """A COLMAP project, a .zip of another, and a folder with a photo that is none."""
    folder = tmp_path / "captures"
    shutil.copytree(project, folder / "harbour")
    shutil.make_archive(str(folder / "quarry"), "zip", project)
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
