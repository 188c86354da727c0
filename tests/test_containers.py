"""The images, built and run without a Docker engine: buildah builds them on a base of Debian packages, podman runs them.

They run as a job of SageMaker would: without a network, without root, on a file system that is read-only, in 2 GB.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from spaceport_gs import __version__
from spaceport_gs.pipeline import images
from spaceport_gs.pipeline import run as stages
from spaceport_gs.pipeline.aws.jobs import Job
from spaceport_gs.pipeline.manifest import read_manifest
from spaceport_gs.pipeline.workspace import Existing, open_workspace
from spaceport_gs.progress import ignore

pytestmark = pytest.mark.slow

USER = 10001  # of the images
PYTHON = "3.11"  # of Debian bookworm
SETTINGS = {"steps": 240, "device": "cpu", "seed": 3, "checkpoint_every": 20}
NEEDED_KB = 12 << 20
MOST_BYTES = {"sfm": 700_000_000, "compressor": 600_000_000}
SLIM = 'cd "$1/usr/share" && rm -r doc locale man'
STORAGE = """
[storage]
driver = "overlay"
graphroot = "{folder}/images"
runroot = "{folder}/run"
"""
CONTAINERS = """
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
"""


@dataclass(frozen=True)
class Engine:
    """podman and buildah, with images of their own."""

    environment: dict[str, str]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True)

    def output(self, *command: str) -> str:
        done = self.run(*command)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def inspect(self, image: str) -> dict[str, Any]:
        return dict(json.loads(self.output("podman", "image", "inspect", image))[0])

    def inside(self, image: str, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs a program of an image."""
        command = ["podman", "run", "--rm", "--network=none", "--read-only", f"--entrypoint={program}", image]
        return self.run(*command, *arguments)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    for tool in ("buildah", "podman", "runc", "mmdebstrap"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if os.getuid() != 0:
        pytest.skip("needs root")
    available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    if available is None or int(available[1]) < NEEDED_KB:
        pytest.skip(f"needs {NEEDED_KB >> 20} GB of memory")
    folder = tmp_path_factory.mktemp("engine")
    # Many small files, written once and deleted: in memory that takes seconds, and on some disks minutes.
    subprocess.run(["mount", "-t", "tmpfs", "spaceport-test", folder], check=True)
    (folder / "storage.conf").write_text(STORAGE.format(folder=folder))
    (folder / "containers.conf").write_text(CONTAINERS)
    files = {
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        "CONTAINERS_CONF": str(folder / "containers.conf"),
    }
    engine = Engine({**os.environ, **files})
    yield engine
    engine.run("podman", "rm", "--all", "--force", "--time=0")
    subprocess.run(["umount", "--recursive", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def base(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Debian, as small as the image that the Dockerfiles name."""
    archive = tmp_path_factory.mktemp("base") / "base.tar"
    engine.output(
        "mmdebstrap",
        "--variant=minbase",
        '--aptopt=Acquire::Retries "5"',
        f"--customize-hook={SLIM}",
        "bookworm",
        str(archive),
    )
    engine.output("podman", "import", "-q", str(archive), "localhost/debian:bookworm")
    archive.unlink()
    return "localhost/debian:bookworm"


@pytest.fixture(scope="module")
def wheels(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the images install, from where pip gets packages here: so that no build needs a network for them."""
    folder = tmp_path_factory.mktemp("wheels")
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    download += [f"--python-version={PYTHON}", f"--dest={folder}"]
    for path in images.CONTAINERS.rglob("*.lock"):
        engine.output(*download, "--require-hashes", "-r", str(path))
    engine.output(*download, f"torch=={metadata.version('torch')}")
    return folder


@pytest.fixture(scope="module")
def built(engine: Engine, base: str, wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The image of each stage."""
    context = tmp_path_factory.mktemp("build") / "context"
    images.write_context(context)
    arguments = {
        "BASE": base,
        "BUILD_BASE": base,
        "CMAKE_ARGS": "-DSPACEPORT_CUDA=OFF",
        "PIP_FIND_LINKS": "/wheels-of-test",
        "PIP_NO_INDEX": "1",
    }
    for image in images.IMAGES.values():
        torch = {"TORCH": metadata.version("torch")} if image == "3dgs" else {}
        command = images.build_command(image, context, _tag(image), {**arguments, **torch}, "buildah")
        # --isolation chroot: it needs nothing that a container lacks in which the tests may run.
        command[2:2] = ["--layers", "--isolation=chroot", "--network=host", f"--volume={wheels}:/wheels-of-test:ro"]
        engine.output(*command)
    return {stage: _tag(image) for stage, image in images.IMAGES.items()}


def _tag(image: str) -> str:
    return f"localhost/spaceport/{image}:test"


@pytest.mark.parametrize("stage", images.IMAGES)
def test_what_an_image_says_of_itself(engine: Engine, built: dict[str, str], stage: str) -> None:
    image = engine.inspect(built[stage])
    config = image["Config"]
    assert config["User"] == f"{USER}:{USER}"
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert (labels["title"], labels["version"]) == (f"spaceport/{images.IMAGES[stage]}", __version__)
    assert labels["revision"] == images.commit()
    check = (image.get("Healthcheck") or image["HealthCheck"])["Test"]
    assert check == ["CMD", "spaceport", "doctor", "--stage", stage]
    assert engine.inside(built[stage], *check[1:]).returncode == 0
    assert image["Size"] <= MOST_BYTES.get(images.IMAGES[stage], image["Size"])


@pytest.mark.parametrize("stage", images.IMAGES)
def test_what_an_image_holds(engine: Engine, built: dict[str, str], stage: str) -> None:
    """No compiler, no pip; torch only where it trains."""
    tools = "for tool in cc c++ gcc g++ cpp ld make cmake nvcc pip; do command -v $tool; done; true"
    found = engine.inside(built[stage], "sh", "-c", tools)
    assert (found.returncode, found.stdout) == (0, "")
    done = engine.inside(built[stage], "python", "-c", "import torch")
    assert (done.returncode == 0) == (stage == "train")
    if stage != "train":
        done = engine.inside(built[stage], "spaceport", "doctor", "--stage", "train")
        assert done.returncode == 2 and "No module named 'torch'" in done.stderr


def start(engine: Engine, job: Job, folder: Path) -> subprocess.Popen[str]:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, USER, USER)
    command = job.container_command(folder, memory_gb=2)
    command.insert(2, f"--name={job.name}")
    return subprocess.Popen(
        command, env=engine.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(started: subprocess.Popen[str]) -> str:
    printed, _ = started.communicate(timeout=300)
    assert started.returncode == 0, printed[-4000:]
    return printed


def test_a_capture_goes_through_three_containers(
    engine: Engine, built: dict[str, str], orbit_capture: Path, tmp_path: Path
) -> None:
    """And makes of the same sparse model what a run without containers makes; the training is stopped on its way."""
    sfm, train, again, compress = (tmp_path / name for name in ("sfm", "train", "again", "compress"))
    jobs = {stage: Job(stage, "a1", image, SETTINGS) for stage, image in built.items()}

    shutil.copytree(orbit_capture / "photos", sfm / "processing/input/photos")
    finish(start(engine, jobs["sfm"], sfm))
    placed = sfm / "processing/output"
    read_manifest(placed, "sfm")

    shutil.copytree(placed, train / "input/data/sfm")
    stopped = start(engine, jobs["train"], train)
    end = time.monotonic() + 120
    while not [path for path in train.glob("checkpoints/step_*.npz") if int(path.stem[5:]) >= 20]:
        assert stopped.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    engine.output("podman", "stop", "--time=100", jobs["train"].name)
    assert "SIGTERM" in finish(stopped)
    assert not (train / "model/manifest.json").exists()

    for name in ("input", "checkpoints"):  # all that SageMaker gives to the next attempt
        shutil.copytree(train / name, again / name)
    finish(start(engine, jobs["train"], again))

    shutil.copytree(again / "model", compress / "processing/input/train")
    shutil.copytree(placed, compress / "processing/input/sfm")
    finish(start(engine, jobs["compress"], compress))
    published = compress / "processing/output"
    read_manifest(published, "compress")
    assert (published / "index.html").is_file()

    local = local_run(placed, tmp_path / "local")
    assert (local / "scene.ply").read_bytes() == (again / "model/scene.ply").read_bytes()
    assert (local / "scene.sog").read_bytes() == (published / "scene.sog").read_bytes()


def local_run(placed: Path, folder: Path) -> Path:
    """The stages after SfM in this process."""
    settings = stages.RunSettings(**SETTINGS)  # type: ignore[arg-type]
    with open_workspace(folder, placed, Existing.REFUSE, {"version": "0", "command": "reconstruct"}) as workspace:
        (folder / "stages").mkdir()
        shutil.copy(placed / "stages/sfm.json", folder / "stages")
        shutil.copytree(placed / "sfm", folder / "sfm")
        stages.train_stage(workspace, settings, ignore)
        stages.compress_stage(workspace, settings, ignore)
    return folder


def test_a_mistake_is_told(engine: Engine, built: dict[str, str], tmp_path: Path) -> None:
    """The exit code and the reason get out of the container."""
    (tmp_path / "job/processing/input/photos").mkdir(parents=True)
    started = start(engine, Job("sfm", "b1", built["sfm"]), tmp_path / "job")
    started.communicate(timeout=120)
    assert started.returncode == 2
    assert (tmp_path / "job/output/message").read_text().startswith("input: ")
