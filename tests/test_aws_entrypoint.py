"""The stages as SageMaker jobs: what they find and leave below /opt/ml, stopped, killed and with what is wrong with it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from spaceport_gs.errors import InputError
from spaceport_gs.gaussians import Gaussians
from spaceport_gs.pipeline import compress as compression
from spaceport_gs.pipeline import doctor
from spaceport_gs.pipeline import run as stages
from spaceport_gs.pipeline.aws import entrypoint
from spaceport_gs.pipeline.aws.contract import Places, Reporter, Watchdog, settings_of
from spaceport_gs.pipeline.aws.drills import ALLOWED, VARIABLE, Rehearsal, ordered, parsed
from spaceport_gs.pipeline.aws.template import template
from spaceport_gs.pipeline.compress import CompressSettings
from spaceport_gs.pipeline.manifest import read_manifest
from spaceport_gs.pipeline.workspace import Existing, open_workspace
from spaceport_gs.progress import Listener, Progress, ignore

SETTINGS = {"steps": "120", "device": '"cpu"', "seed": "3", "checkpoint_every": "20"}
ARGUMENTS = tuple(f"{name}={value}" for name, value in SETTINGS.items())


def job(base: Path, stage: str, inputs: dict[str, Path], arguments: tuple[str, ...] = ()) -> list[str]:
    """The command of a job whose inputs lie below `base` as SageMaker would put them."""
    folder = base / ("input/data" if stage == "train" else "processing/input")
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in inputs.items():
        if not (folder / name).exists():
            (folder / name).symlink_to(source, target_is_directory=True)
    if stage == "train":
        (base / "input/config").mkdir(parents=True, exist_ok=True)
        (base / "input/config/hyperparameters.json").write_text(json.dumps(dict(a.split("=", 1) for a in arguments)))
        arguments = ()
    return [stage, *arguments]


def run_job(base: Path, *job_of: str) -> int:
    os.environ["SAGEMAKER_BASE_DIR"] = str(base)
    try:
        return entrypoint.run_stage(job_of)
    finally:
        del os.environ["SAGEMAKER_BASE_DIR"]


def process(base: Path, arguments: list[str], drill: str = "") -> subprocess.Popen[str]:
    rehearsed = parsed(drill).environment if drill else {}
    return subprocess.Popen(
        [sys.executable, "-m", "spaceport_gs.pipeline.aws.entrypoint", *arguments],
        cwd=base,
        env={**os.environ, "SAGEMAKER_BASE_DIR": str(base), **rehearsed},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def sfm(orbit_capture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the job of SfM left."""
    base = tmp_path_factory.mktemp("sfm")
    assert run_job(base, *job(base, "sfm", {"photos": orbit_capture / "photos"}, ARGUMENTS)) == 0
    return base / "processing/output"


@pytest.fixture(scope="module")
def trained(sfm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base folder of a training job that was left alone."""
    base = tmp_path_factory.mktemp("train")
    assert run_job(base, *job(base, "train", {"sfm": sfm}, ARGUMENTS)) == 0
    return base


def test_three_jobs_make_what_a_local_run_makes(sfm: Path, trained: Path, tmp_path: Path) -> None:
    """From the same model and seed; the training's results go through the archive that SageMaker makes of them."""
    (tmp_path / "model").mkdir()
    with tarfile.open(tmp_path / "model/model.tar.gz", "w:gz") as tar:
        for entry in (trained / "model").iterdir():
            tar.add(entry, entry.name)
    base = tmp_path / "compress"
    inputs = {"train": tmp_path / "model", "sfm": sfm}
    assert run_job(base, *job(base, "compress", inputs, ARGUMENTS)) == 0
    manifest = read_manifest(base / "processing/output", "compress")
    assert set(manifest.inputs) == {"train", "sfm"} and manifest.metrics["sog_bytes"] > 0
    told = json.loads((base / "processing/progress/progress.json").read_text())
    assert told["fraction"] == 1
    assert {"report.html", "report.json"} < set(manifest.outputs)
    report = json.loads((base / "processing/output/report.json").read_text())
    assert (
        report["registered"] == 16 and report["gaussians"] > 0 and report["sog_bytes"] == manifest.metrics["sog_bytes"]
    )
    assert "render of view 1" in (base / "processing/output/report.html").read_text()

    settings = stages.RunSettings(device="cpu", seed=3, steps=120, checkpoint_every=20)
    config = {"version": "0", "command": "reconstruct"}
    with open_workspace(tmp_path / "local", tmp_path / "photos", Existing.REFUSE, config) as workspace:
        (workspace.folder / "stages").mkdir()
        shutil.copy(sfm / "stages/sfm.json", workspace.folder / "stages")
        shutil.copytree(sfm / "sfm", workspace.folder / "sfm")
        stages.train_stage(workspace, settings, ignore)
        stages.compress_stage(workspace, settings, ignore)
    for name, job_of in (("scene.ply", trained / "model"), ("scene.sog", base / "processing/output")):
        assert (workspace.folder / name).read_bytes() == (job_of / name).read_bytes()
    assert (base / "processing/output/index.html").stat().st_size > (
        base / "processing/output/scene.sog"
    ).stat().st_size


def test_a_manifest_names_every_file(sfm: Path, trained: Path) -> None:
    for folder, stage in ((sfm, "sfm"), (trained / "model", "train")):
        manifest = read_manifest(folder, stage)
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert there == {*manifest.outputs, "manifest.json"}
    assert read_manifest(trained / "model", "train").metrics["gaussians"] > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_training_goes_on(number: signal.Signals, sfm: Path, trained: Path, tmp_path: Path) -> None:
    """In another container, as after a spot interruption: of the first one only the checkpoints are left."""
    first, second = tmp_path / "first", tmp_path / "second"
    stopped = process(first, job(first, "train", {"sfm": sfm}, ARGUMENTS))
    wait_for(lambda: [path for path in (first / "checkpoints").glob("step_*.npz") if int(path.stem[5:]) >= 40])
    stopped.send_signal(number)
    out, _ = stopped.communicate(timeout=120)
    assert re.search(
        r"^metric step=\d+ loss=[\d.]+ gaussians=\d+ psnr=[\d.]+ steps_per_second=[\d.]+$", out, re.MULTILINE
    )
    assert stopped.returncode == (0 if number is signal.SIGTERM else -number)
    assert not (first / "model/manifest.json").exists() and not (first / "output/failure").exists()
    shutil.copytree(first / "checkpoints", second / "checkpoints")
    assert run_job(second, *job(second, "train", {"sfm": sfm}, ARGUMENTS)) == 0
    assert (second / "model/scene.ply").read_bytes() == (trained / "model/scene.ply").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_ended_at_random_moments_it_comes_to_the_same_end(seed: int, sfm: Path, trained: Path, tmp_path: Path) -> None:
    """By SIGTERM and SIGKILL, before and while it trains and while it writes; whatever a moment leaves can be gone on with."""
    moments, before = random.Random(seed), tmp_path / "none"
    for attempt in range(5):
        base = tmp_path / str(attempt)
        command = job(base, "train", {"sfm": sfm}, ARGUMENTS)
        if before.exists():
            shutil.copytree(before, base / "checkpoints")
        running = process(base, command)
        number = moments.choice((signal.SIGTERM, signal.SIGKILL))
        try:
            running.communicate(timeout=None if attempt == 4 else moments.uniform(1, 10))
        except subprocess.TimeoutExpired:
            running.send_signal(number)
            running.communicate(timeout=120)
        before = base / "checkpoints"
        if (base / "model/manifest.json").exists():
            break
        assert running.returncode in (0, -number) and not (base / "output/failure").exists()
    read_manifest(base / "model", "train")  # perhaps it was ended when all was written
    assert (base / "model/scene.ply").read_bytes() == (trained / "model/scene.ply").read_bytes()


def test_a_processing_job_that_is_stopped_says_so(orbit_capture: Path, tmp_path: Path) -> None:
    stopped = process(tmp_path, job(tmp_path, "sfm", {"photos": orbit_capture / "photos"}))
    wait_for(lambda: (tmp_path / "processing/progress/progress.json").exists())
    stopped.terminate()
    stopped.communicate(timeout=60)
    assert stopped.returncode == entrypoint.EXIT_TERMINATED
    assert (tmp_path / "output/message").read_text().startswith("interrupted: ")
    assert not (tmp_path / "processing/output/manifest.json").exists()


# Drills


def test_a_training_that_crashes_in_a_drill_goes_on(sfm: Path, trained: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    crashed = process(first, job(first, "train", {"sfm": sfm}, ARGUMENTS), "train:crash@50")
    out, _ = crashed.communicate(timeout=120)
    assert crashed.returncode == 137 and out.splitlines()[-1] == "drill train:crash@50"
    assert not (first / "model/manifest.json").exists() and not (first / "output/failure").exists()
    assert 40 in {int(path.stem[5:]) for path in (first / "checkpoints").glob("step_*.npz")}
    shutil.copytree(first / "checkpoints", second / "checkpoints")
    assert run_job(second, *job(second, "train", {"sfm": sfm}, ARGUMENTS)) == 0
    assert (second / "model/scene.ply").read_bytes() == (trained / "model/scene.ply").read_bytes()


def test_a_training_whose_instance_is_taken_back_in_a_drill_ends_well(sfm: Path, trained: Path, tmp_path: Path) -> None:
    """In the same job, which starts again with its checkpoint and nothing else."""
    job_of = process(tmp_path, job(tmp_path, "train", {"sfm": sfm}, ARGUMENTS), "train:interrupt@50")
    out, _ = job_of.communicate(timeout=120)
    assert job_of.returncode == 0 and out.count("drill train:interrupt@50") == 1
    before, stopped, after = out.partition("stopped by SIGTERM at step 50")
    assert stopped and '"step": 120' not in before and '"step": 120' in after
    assert min(json.loads(line)["step"] for line in after.splitlines() if line.startswith('{"time"')) > 50
    assert (tmp_path / "model/scene.ply").read_bytes() == (trained / "model/scene.ply").read_bytes()
    read_manifest(tmp_path / "model", "train")


def test_a_training_that_stands_still_in_a_drill_can_be_stopped(sfm: Path, tmp_path: Path) -> None:
    stalled = process(tmp_path, job(tmp_path, "train", {"sfm": sfm}, ARGUMENTS), "train:stall@50")
    assert stalled.stdout
    for line in stalled.stdout:
        if line.startswith("drill"):
            break
    stalled.terminate()
    out, _ = stalled.communicate(timeout=60)
    assert stalled.returncode == 0 and "stopped by SIGTERM at step 50" in out
    assert not (tmp_path / "model/manifest.json").exists()


@pytest.mark.parametrize(
    ("fault", "reason", "code"),
    [
        ("error", "internal: RuntimeError: a drill", 70),
        ("bad-input", "input: a drill: this input", 2),
        ("out-of-memory", "memory: take a larger instance", 70),
        ("disk-full", "disk: the volume, by a drill, is full", 70),
    ],
)
def test_faults_are_told_as_true_ones(
    fault: str, reason: str, code: int, orbit_capture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in parsed(f"sfm:{fault}").environment.items():
        monkeypatch.setenv(name, value)
    assert run_job(tmp_path, *job(tmp_path, "sfm", {"photos": orbit_capture / "photos"})) == code
    assert (tmp_path / "output/message").read_text().startswith(reason)


def test_drills_need_to_be_allowed(sfm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are asked for, and in the job; one of another stage does not concern it."""
    monkeypatch.delenv(ALLOWED, raising=False)
    with pytest.raises(InputError, match="set SPACEPORT_DRILLS=1 to allow that"):
        ordered(["train:crash"])
    assert ordered([]) == {}
    monkeypatch.setenv(VARIABLE, "train:error")
    assert run_job(tmp_path, *job(tmp_path, "train", {"sfm": sfm}, ARGUMENTS)) == entrypoint.EXIT_MISTAKE
    text = (tmp_path / "output/failure").read_text()
    assert (
        text == "input: SPACEPORT_DRILL=train:error: breaks this job on purpose; that needs SPACEPORT_DRILLS=1 as well"
    )
    assert not (tmp_path / "work").exists()
    monkeypatch.setenv(ALLOWED, "1")
    told = list[Progress]()
    Rehearsal("sfm").around(told.append)(Progress("sfm", 1, 1))
    assert len(told) == 1
    with pytest.raises(RuntimeError, match="a drill"):
        Rehearsal("train").around(told.append)(Progress("train", 1, 1))


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["train"], "expected STAGE:FAULT or train:FAULT@STEP; faults are interrupt, crash"),
        (["bake:crash"], "expected STAGE:FAULT"),
        (["train:fire"], "expected STAGE:FAULT"),
        (["train:crash@-1"], "expected STAGE:FAULT"),
        (["train:crash\n"], "expected STAGE:FAULT"),
        (["sfm:crash@5"], "only the training counts steps"),
        (["compress:interrupt"], "only the training counts steps, and runs where it can be interrupted"),
        (["train:crash", "train:error"], "one for each stage"),
    ],
)
def test_what_is_no_drill(texts: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOWED, "1")
    with pytest.raises(InputError, match=words):
        ordered(texts)
    assert {name: str(drill) for name, drill in ordered(["sfm:error", "train:crash@5"]).items()} == {
        "sfm": "sfm:error", "train": "train:crash@5",
    }  # fmt: skip


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("steps=many",), "steps: expected a number, not 'many'"),
        (("steps=true",), "steps: expected a number"),
        (("steps=1.5",), "steps: expected a number"),
        (("stesp=100",), "stesp: no such setting"),
        (("preset=best",), "unknown preset 'best'"),
        (("eval_every=1",), "--eval-every 1"),
        (("moments=half",), "--moments half"),
        ((), "the job of the stage train needs the input sfm"),
    ],
)
def test_wrong_settings_and_inputs(arguments: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    assert run_job(tmp_path, *job(tmp_path, "train", {}, ("device=cpu", *arguments))) == entrypoint.EXIT_MISTAKE
    failure = (tmp_path / "output/failure").read_text()
    assert failure.startswith("input: ") and reason in failure and "\n" not in failure


def test_a_gpu_that_is_not_there_is_refused(sfm: Path, tmp_path: Path) -> None:
    if not stages.cuda_missing():
        pytest.skip("there is a GPU")
    assert run_job(tmp_path, *job(tmp_path, "train", {"sfm": sfm}, ("device=cuda",))) == entrypoint.EXIT_MISTAKE
    assert (tmp_path / "output/failure").read_text().startswith("gpu: --device cuda")


def test_the_other_stages_do_without_the_gpu_of_the_training(trained: Path, tmp_path: Path) -> None:
    arguments = ("device=cuda",)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"no photo")
    base = tmp_path / "sfm"
    assert run_job(base, *job(base, "sfm", {"photos": tmp_path / "photos"}, arguments)) == entrypoint.EXIT_MISTAKE
    assert (base / "output/message").read_text().startswith("input: ")
    base = tmp_path / "compress"
    assert run_job(base, *job(base, "compress", {"train": trained / "model"}, arguments)) == 0
    assert read_manifest(base / "processing/output", "compress").settings["device"] == "cuda"


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_compression_without_a_gpu_is_on_the_cpu_with_torch_as_well(
    device: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the image of the training on a machine without one."""
    doctor.check_stage("train")  # all that this image has is here
    monkeypatch.setattr(stages, "cuda_missing", lambda: "no GPU")
    scenes = []
    for given in (device, "cpu"):
        base = tmp_path / given
        assert run_job(base, *job(base, "compress", {"train": trained / "model"}, (f"device={given}",))) == 0
        assert read_manifest(base / "processing/output", "compress").metrics["device"] == "cpu"
        scenes.append((base / "processing/output/scene.sog").read_bytes())
    assert scenes[0] == scenes[1]


@pytest.mark.parametrize(("device", "clustered"), [("auto", "cuda"), ("cuda", "cuda"), ("cpu", "cpu")])
def test_compression_clusters_on_the_gpu_that_is_there(
    device: str, clustered: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether there is one or not, it is asked for one; the work itself is done on the CPU here."""
    asked = []

    def compress(gaussians: Gaussians, path: Path, settings: CompressSettings, listen: Listener) -> dict[str, float]:
        asked.append(settings.device)
        return compression.compress(gaussians, path, replace(settings, device="cpu"), listen)

    monkeypatch.setattr(stages, "cuda_missing", lambda: "")
    monkeypatch.setattr(stages, "compress", compress)
    assert run_job(tmp_path, *job(tmp_path, "compress", {"train": trained / "model"}, (f"device={device}",))) == 0
    assert asked == [clustered]
    assert read_manifest(tmp_path / "processing/output", "compress").metrics["device"] == clustered


def test_damaged_results_of_the_stage_before(sfm: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "sfm"
    shutil.copytree(sfm, damaged)
    file = damaged / "sfm/sparse/0/points3D.bin"
    file.write_bytes(file.read_bytes()[:-1])
    assert run_job(tmp_path, *job(tmp_path, "train", {"sfm": damaged}, ARGUMENTS)) == entrypoint.EXIT_MISTAKE
    assert "run the stage sfm again" in (tmp_path / "output/failure").read_text()


@pytest.mark.parametrize("name", ["../outside.ply", "/tmp/outside.ply"])
def test_archives_and_manifests_stay_in_their_folder(name: str, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with tarfile.open(tmp_path / "model/model.tar.gz", "w:gz") as tar:
        tar.add(trained / "model/scene.ply", "scene.ply")
        entry = tar.gettarinfo(trained / "model/scene.ply")
        entry.name = name
        with open(trained / "model/scene.ply", "rb") as file:
            tar.addfile(entry, file)
    assert run_job(tmp_path, *job(tmp_path, "compress", {"train": tmp_path / "model"}, ARGUMENTS)) == 2
    assert "no plain file" in (tmp_path / "output/message").read_text()
    assert not (tmp_path.parent / "outside.ply").exists() and not Path("/tmp/outside.ply").exists()

    shutil.copytree(trained / "model", tmp_path / "plain")
    path = tmp_path / "plain/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["outputs"][name] = manifest["outputs"]["scene.ply"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="outside of its folder"):
        read_manifest(tmp_path / "plain", "train")


def test_failures_have_a_class(tmp_path: Path) -> None:
    for error, kind, code in (
        (MemoryError("no"), "memory", 70),
        (OSError(28, "No space left on device", "/opt/ml/model"), "disk", 70),
        (KeyError("x"), "internal", 70),
    ):
        assert (entrypoint._failure_of(error)[0], entrypoint._failure_of(error)[2]) == (kind, code)
    places = Places(tmp_path, "train")
    places.write_failure("internal: " + "é" * 2000)
    places.write_failure("input: later")
    text = (tmp_path / "output/failure").read_bytes()
    assert text.startswith(b"internal: ") and 1020 <= len(text) <= 1024 and text.decode()


def test_settings_are_json_or_text(tmp_path: Path) -> None:
    places = Places(tmp_path, "train")
    (tmp_path / "input/config").mkdir(parents=True)
    given = {"steps": "100", "downscale": "2", "title": "3 hills", "preset": '"baseline"', "sagemaker_region": "x"}
    (tmp_path / "input/config/hyperparameters.json").write_text(json.dumps(given))
    settings = settings_of(places, ["seed=7"])
    assert settings == stages.RunSettings(steps=100, downscale=2.0, title="3 hills", preset="baseline", seed=7)
    assert isinstance(settings.downscale, float)
    for text in ("[", "[1]", '"text"'):
        (tmp_path / "input/config/hyperparameters.json").write_text(text)
        with pytest.raises(InputError, match="not a JSON object"):
            settings_of(places, [])


def test_a_stage_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert entrypoint.run_stage([]) == entrypoint.run_stage(["bake"]) == entrypoint.EXIT_MISTAKE
    assert "sfm, train, compress" in capsys.readouterr().err


def test_a_job_says_when_it_stands_still_or_is_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, in the words that the stack's alarms wait for."""
    monkeypatch.setenv("SPACEPORT_PREFIX", "hills")
    monkeypatch.setenv("SPACEPORT_EXPECTED_SECONDS", "1000")
    reporter = Reporter(tmp_path)
    start = time.monotonic()
    watchdog = Watchdog(Places(tmp_path, "train"), reporter)
    assert not watchdog.look(start + 1400)
    reporter.heard = start + 1500
    assert watchdog.look(start + 1600) == [{"alarm": "late", "prefix": "hills", "stage": "train", "seconds": 1600}]
    stalled = watchdog.look(start + 3400)
    assert stalled == [{"alarm": "stalled", "prefix": "hills", "stage": "train", "seconds": 1900}]
    assert not watchdog.look(start + 9000)
    reporter.heard = start + 9000
    assert not watchdog.look(start + 9010) and len(watchdog.look(start + 20000)) == 1
    patterns = {pattern["Fn::Sub"].replace("${Prefix}", "hills") for pattern in filter_patterns()}
    assert '{ $.alarm = "stalled" && $.prefix = "hills" }' in patterns and len(patterns) == 2


def filter_patterns() -> list[dict[str, str]]:
    resources = template()["Resources"].values()
    return [r["Properties"]["FilterPattern"] for r in resources if r["Type"] == "AWS::Logs::MetricFilter"]


def test_a_job_without_an_estimate_is_never_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for expected in ("", "0", "soon"):
        monkeypatch.setenv("SPACEPORT_EXPECTED_SECONDS", expected)
        reporter = Reporter(tmp_path)
        watchdog = Watchdog(Places(tmp_path, "sfm"), reporter)
        assert not watchdog.look(reporter.heard + 1000)
