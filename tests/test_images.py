"""What the containers' images are built from, and that the stages without training need no torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scenes import random_gaussians

from spaceport_gs import __version__
from spaceport_gs.errors import BackendError, InputError
from spaceport_gs.pipeline import cli, doctor, images
from spaceport_gs.pipeline.manifest import read_manifest, write_manifest
from spaceport_gs.ply import write_ply

REPOSITORY = Path(__file__).parent.parent
CONSTRAINTS = (REPOSITORY / "constraints.txt").read_text()
WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, NoTorch())
from spaceport_gs.pipeline.aws.entrypoint import main
main()
"""


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build") / "context"
    images.write_context(folder)
    return folder


def test_the_context_is_the_source_distribution(context: Path) -> None:
    """Of an installed package too: every file that it is built from, and no other."""
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a checkout")
    wanted = {name for name in tracked.stdout.splitlines() if name.startswith(("csrc/", "pipeline/", "spaceport_gs/"))}
    there = {path.relative_to(context).as_posix() for path in context.rglob("*") if path.is_file()}
    assert there == wanted | set(images.ROOT_FILES)
    changed = [name for name in sorted(there) if (context / name).read_bytes() != (REPOSITORY / name).read_bytes()]
    assert not changed, "install the package again"
    with pytest.raises(InputError, match="exists"):
        images.write_context(context)


def test_every_stage_has_an_image(context: Path) -> None:
    for image in images.IMAGES.values():
        command = images.build_command(image, context, f"spaceport/{image}:1", {"BASE": "debian:x"}, "docker")
        file = Path(next(part for part in command if part.startswith("--file=")).removeprefix("--file="))
        assert file.is_file() and command[-1] == str(context)
        assert {"--build-arg=BASE=debian:x", f"--build-arg=VERSION={__version__}"} < set(command)
    assert re.fullmatch(r"unknown|[0-9a-f]{40}(-dirty)?", images.commit())
    assert "--format=docker" in images.build_command("sfm", context, "x", {}, "buildah")


def test_images_for_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Built under the names that `--backend container` looks for, by the tool that will run them."""
    log = tmp_path / "log"
    for tool in ("docker", "podman"):
        (tmp_path / tool).write_text(f'#!/bin/sh\necho {tool} "$@" >> {log}\n')
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert cli.run(["images", "--image", "3dgs", "--device", "cpu", "--build-arg", "TORCH=x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"train": f"localhost/spaceport/3dgs:{__version__}"}
    version, build = log.read_text().splitlines()
    assert version == "podman version" and build.startswith("podman build --file=")
    for argument in (f"--tag=localhost/spaceport/3dgs:{__version__}", "--build-arg=CMAKE_ARGS=-DSPACEPORT_CUDA=OFF", "--build-arg=TORCH=x"):  # fmt: skip
        assert f" {argument} " in build
    assert cli.run(["images", "--tool", "docker", "--image", "sfm", "--image-prefix", "a/b", "--image-tag", "c"]) == 0
    assert " --tag=a/b/sfm:c " in log.read_text() and capsys.readouterr().out == "a/b/sfm:c\n"
    assert cli.run(["images", "--device", "tpu"]) == 2 and "choose cuda or cpu" in capsys.readouterr().err


def test_arguments_of_the_image_that_trains_on_the_cpu() -> None:
    """The Dockerfile knows all of them, and says the same."""
    dockerfile = (images.CONTAINERS / "3dgs/Dockerfile").read_text()
    for name, value in images.CPU.items():
        assert f"--build-arg {name}={value}" in dockerfile and f"ARG {name}" in dockerfile
    known = re.search(r"^torch==(\S+)$", CONSTRAINTS, re.MULTILINE)
    assert known and images.CPU["TORCH"] == f"{known[1]}+cpu"


def locked(path: Path) -> dict[str, str]:
    """Versions by name; every one has hashes."""
    text = path.read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    assert all(part.startswith("--hash=sha256:") for line in lines for part in line[1:]) and min(map(len, lines)) > 1
    return dict(line[0].split("==") for line in lines)


def test_locked_lists_hold_what_the_package_asks_for() -> None:
    """In the versions of constraints.txt. torch has a list for each of its builds; that for CUDA 12 has none yet."""
    known = dict(re.findall(r'^([\w-]+)==([^\s;]+)(?:; python_version >= "3.11")?$', CONSTRAINTS, re.MULTILINE))
    project = (REPOSITORY / "pyproject.toml").read_text()
    dependencies = re.search(r"^dependencies = \[(.*?)\]", project, re.DOTALL | re.MULTILINE)
    requires = re.search(r"^requires = \[(.*?)\]", project, re.MULTILINE)
    assert dependencies is not None and requires is not None
    asked = {name.lower() for name in re.findall(r'"([\w-]+)', dependencies[1])} - {"torch"}
    lists = {path.relative_to(images.CONTAINERS).as_posix(): locked(path) for path in images.CONTAINERS.rglob("*.lock")}
    assert asked <= set(lists["requirements.lock"]) and set(lists["sfm/heic.lock"]) == {"pillow-heif"}
    assert set(re.findall(r'"([\w-]+)', requires[1])) <= set(lists["build.lock"])
    assert lists.pop(f"3dgs/torch-{images.CPU['TORCH']}.lock") == {"torch": images.CPU["TORCH"]}
    for versions in lists.values():
        assert "torch" not in versions
        assert {name: known[name] for name in versions if name in known}.items() <= versions.items()
    dockerfile = (images.CONTAINERS / "3dgs/Dockerfile").read_text()
    assert f"ARG TORCH={known['torch']}+cu12" in dockerfile and "ARG BASE=nvidia/cuda:12." in dockerfile


def run_without_torch(base: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SAGEMAKER_BASE_DIR": str(base)}
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    return subprocess.run(command, cwd=base, env=environment, capture_output=True, text=True)


def test_structure_from_motion_needs_no_torch(orbit_capture: Path, tmp_path: Path) -> None:
    shutil.copytree(orbit_capture / "photos", tmp_path / "processing/input/photos")
    done = run_without_torch(tmp_path, "sfm")
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "processing/output", "sfm").metrics["registered"] > 10


def test_compression_needs_no_torch(tmp_path: Path) -> None:
    trained = tmp_path / "processing/input/train"
    (trained / "stages").mkdir(parents=True)
    (trained / "stages/train.json").write_text('{"settings": {}, "seconds": 1, "peak_bytes": 1, "result": {}}')
    write_ply(random_gaussians(2000), trained / "scene.ply")
    write_manifest(trained, "train", {}, {}, {})
    done = run_without_torch(tmp_path, "compress")
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "processing/output", "compress").metrics["sog_bytes"] > 0
    done = run_without_torch(tmp_path, "train")
    assert done.returncode == 2


def test_doctor_tells_whether_a_stage_can_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in images.IMAGES:
        assert cli.run(["doctor", "--stage", stage]) == 0
    assert cli.run(["doctor", "--stage", "bake"]) == 2
    assert "choose sfm, train, compress" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torch", None)
    doctor.check_stage("sfm")
    with pytest.raises(BackendError, match="the stage train cannot run here: .*torch"):
        doctor.check_stage("train")
