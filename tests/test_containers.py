"""The images, built and run without a Docker engine: buildah builds them on a base of Debian packages, podman runs them.

They run as a job of SageMaker would: without a network, without root, on a file system that is read-only, in 2 GB.
"""

from __future__ import annotations

import base64
import ctypes
import ctypes.util
import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from emulator import free_port, wait_for

from spaceport_gs import __version__
from spaceport_gs.pipeline import images
from spaceport_gs.pipeline import run as stages
from spaceport_gs.pipeline.aws import push as push_module
from spaceport_gs.pipeline.aws.cloud import Cloud
from spaceport_gs.pipeline.aws.jobs import Job
from spaceport_gs.pipeline.aws.push import Image, push
from spaceport_gs.pipeline.aws.stack import Stack
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
    torch = f"torch-{metadata.version('torch')}.lock"
    for path in images.CONTAINERS.rglob("*.lock"):
        if path.name == torch or not path.name.startswith("torch-"):
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

    # As on an instance with a GPU, though there is none: in the image of the training, with any device.
    beside, settings = tmp_path / "beside", {**SETTINGS, "device": "auto"}
    shutil.copytree(compress / "processing/input", beside / "processing/input")
    finish(start(engine, Job("compress", "a1", built["train"], settings, attempt="1"), beside))
    assert read_manifest(beside / "processing/output", "compress").metrics["device"] == "cpu"
    assert (beside / "processing/output/scene.sog").read_bytes() == (published / "scene.sog").read_bytes()

    local = local_run(placed, tmp_path / "local", SETTINGS)
    assert (local / "scene.ply").read_bytes() == (again / "model/scene.ply").read_bytes()
    assert (local / "scene.sog").read_bytes() == (published / "scene.sog").read_bytes()


def local_run(placed: Path, folder: Path, given: Mapping[str, Any]) -> Path:
    """The stages after SfM in this process."""
    settings = stages.RunSettings(**given)
    with open_workspace(folder, placed, Existing.REFUSE, {"version": "0", "command": "reconstruct"}) as workspace:
        (folder / "stages").mkdir()
        shutil.copy(placed / "stages/sfm.json", folder / "stages")
        shutil.copytree(placed / "sfm", folder / "sfm")
        stages.train_stage(workspace, settings, ignore)
        stages.compress_stage(workspace, settings, ignore)
    return folder


def spaceport(engine: Engine, *arguments: str) -> subprocess.Popen[str]:
    """The command as a user types it."""
    command = [str(Path(sys.executable).parent / "spaceport"), *arguments]
    return subprocess.Popen(command, env=engine.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_batch_of_captures_in_containers(
    engine: Engine, built: dict[str, str], orbit_capture: Path, tmp_path: Path
) -> None:
    """One is broken; while the other trains the batch is ended, and then gone on with. It makes what a run without containers makes."""
    captures, out = tmp_path / "captures", tmp_path / "out"
    shutil.copytree(orbit_capture / "photos", captures / "harbour")
    (captures / "broken").mkdir()
    (captures / "broken/a.jpg").write_bytes(b"no photo")
    prefix, _, tag = built["sfm"].partition("/sfm:")
    order = [
        "batch",
        str(captures),
        "-o",
        str(out),
        "--backend",
        "container",
        "--image-prefix",
        prefix,
        "--image-tag",
        tag,
    ]
    order += ["--jobs", "2", "--steps", "600", "--device", "cpu", "--seed", "3"]

    def trained() -> bool:
        told = out / "harbour/jobs/train/checkpoints/progress.json"
        return told.is_file() and json.loads(told.read_text())["step"] > 0

    batch = spaceport(engine, *order)
    end = time.monotonic() + 300
    while not trained():
        assert batch.poll() is None and time.monotonic() < end, batch.communicate()
        time.sleep(0.05)
    batch.terminate()
    _, errors = batch.communicate(timeout=120)
    assert batch.returncode == 143 and "go on with --resume" in errors
    assert engine.output("podman", "ps", "--quiet") == ""
    assert not (out / "harbour/jobs/train/model/manifest.json").exists()
    assert list(out.glob("harbour/jobs/train/checkpoints/step_*.npz"))
    placed = out / "harbour/jobs/sfm/processing/output"
    stamp = (placed / "manifest.json").stat().st_mtime_ns

    again = spaceport(engine, *order, "--resume", "--json")
    printed, errors = again.communicate(timeout=600)
    assert again.returncode == 1, errors
    outcomes = {one["name"]: one for one in json.loads(printed)["captures"]}
    assert outcomes["broken"]["error"].startswith("sfm: ") and outcomes["harbour"]["error"] == ""
    assert outcomes["harbour"]["report"] == json.loads((out / "harbour/report.json").read_text())
    assert (placed / "manifest.json").stat().st_mtime_ns == stamp
    local = local_run(placed, tmp_path / "local", {"steps": 600, "device": "cpu", "seed": 3})
    for name in ("scene.ply", "scene.sog"):
        assert (local / name).read_bytes() == (out / "harbour" / name).read_bytes()
    for name in ("index.html", "report.html"):
        assert (out / "harbour" / name).is_file()


def test_a_mistake_is_told(engine: Engine, built: dict[str, str], tmp_path: Path) -> None:
    """The exit code and the reason get out of the container."""
    (tmp_path / "job/processing/input/photos").mkdir(parents=True)
    started = start(engine, Job("sfm", "b1", built["sfm"]), tmp_path / "job")
    started.communicate(timeout=120)
    assert started.returncode == 2
    assert (tmp_path / "job/output/message").read_text().startswith("input: ")


# A registry


REGISTRY = """
version: 0.1
log: {{accesslog: {{disabled: false}}}}
storage: {{filesystem: {{rootdirectory: {folder}/registry}}, delete: {{enabled: false}}}}
http: {{addr: "{host}", tls: {{certificate: {folder}/certificate.pem, key: {folder}/key.pem}}}}
auth: {{htpasswd: {{realm: ecr, path: {folder}/htpasswd}}}}
"""
USER_NAME, PASSWORD = "AWS", "a token of twelve hours"
MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"


@dataclass(frozen=True)
class Registry:
    """One that asks for a password, as ECR does; and what ECR's own API says of it."""

    host: str
    certificate: Path
    log: Path

    def get_authorization_token(self) -> dict[str, Any]:
        token = base64.b64encode(f"{USER_NAME}:{PASSWORD}".encode()).decode()
        return {"authorizationData": [{"authorizationToken": token}]}

    def describe_images(self, repositoryName: str, imageIds: list[dict[str, str]]) -> dict[str, Any]:
        try:
            answer, _ = self.manifest(repositoryName, imageIds[0]["imageTag"])
        except urllib.error.HTTPError as error:
            raise ClientError({"Error": {"Code": "ImageNotFoundException"}}, "DescribeImages") from error
        return {"imageDetails": [{"imageDigest": answer["Docker-Content-Digest"]}]}

    def manifest(self, repository: str, reference: str) -> tuple[Mapping[str, str], bytes]:
        """(headers, body) that it serves."""
        password = base64.b64encode(f"{USER_NAME}:{PASSWORD}".encode()).decode()
        headers = {"Authorization": f"Basic {password}", "Accept": MANIFEST_TYPE}
        address = f"https://{self.host}/v2/{repository}/manifests/{reference}"
        trusted = ssl.create_default_context(cafile=self.certificate)
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), context=trusted) as answer:
            return dict(answer.headers), answer.read()

    def n_sent(self) -> int:
        """Requests so far that brought something."""
        return len(re.findall(r'"(?:PUT|PATCH) /v2/', self.log.read_text()))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    for tool in ("docker-registry", "openssl"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    folder = tmp_path_factory.mktemp("registry")
    log, host = folder / "log", f"localhost:{free_port()}"
    (folder / "htpasswd").write_text(f"{USER_NAME}:{bcrypted(PASSWORD)}\n")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "key.pem", "-out", folder / "certificate.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    (folder / "config.yml").write_text(REGISTRY.format(folder=folder, host=host))
    with open(log, "wb") as file:
        server = subprocess.Popen(
            ["docker-registry", "serve", str(folder / "config.yml")], stdout=file, stderr=subprocess.STDOUT
        )
    try:
        wait_for(server, int(host.partition(":")[2]), log)
        yield Registry(host, folder / "certificate.pem", log)
    finally:
        server.terminate()
        server.wait(timeout=30)


def bcrypted(password: str) -> str:
    """By the system's crypt, which the registry's way of keeping passwords comes from."""
    library = ctypes.CDLL(ctypes.util.find_library("crypt"))
    library.crypt.restype = ctypes.c_char_p
    found = library.crypt(password.encode(), b"$2y$05$abcdefghijklmnopqrstuu")
    assert found and found.startswith(b"$2y$05$")
    return str(found.decode())


@pytest.fixture
def pushing(
    engine: Engine, registry: Registry, built: dict[str, str], wheels: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Image]]:  # fmt: skip
    """`push`, of the image of compression, by a tool and with arguments for its Dockerfile; S3 on moto, ECR as above."""
    mock_aws = pytest.importorskip("moto", reason="moto is not installed").mock_aws
    (tmp_path / "containers.conf").write_text(
        CONTAINERS.replace("[containers]", f'[containers]\nvolumes = ["{wheels}:/wheels-of-test:ro"]')
    )
    for name, value in {
        **engine.environment,
        "CONTAINERS_CONF": str(tmp_path / "containers.conf"),
        "SSL_CERT_FILE": str(registry.certificate),
        "REGISTRY_AUTH_FILE": str(tmp_path / "auth.json"),
        "BUILDAH_ISOLATION": "chroot",
        "BUILDAH_LAYERS": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }.items():
        monkeypatch.setenv(name, value)
    outputs = {
        f"{stage.capitalize()}Repository": f"{registry.host}/spaceport/{name}" for stage, name in images.IMAGES.items()
    }
    stack = Stack("spaceport", "us-east-1", {"Bucket": "ours", **outputs}, {})
    base = f"{registry.host}/debian:bookworm"
    engine.output("podman", "tag", "localhost/debian:bookworm", base)
    given = {
        "BASE": base,
        "CMAKE_ARGS": "-DSPACEPORT_CUDA=OFF",
        "PIP_FIND_LINKS": "/wheels-of-test",
        "PIP_NO_INDEX": "1",
    }

    with mock_aws():
        cloud = Cloud(boto3.Session(region_name="us-east-1"))
        cloud.client("s3").create_bucket(Bucket="ours")
        cloud._clients["ecr"] = registry
        push_module._log_in(cloud, stack, "buildah")
        subprocess.run(["buildah", "push", base], check=True)

        def pushed(tool: str, **more: str) -> Image:
            push(cloud, stack, ["compress"], {**given, **more}, tool, lambda line: None)
            return push_module.read_record(cloud, stack)["compress"]

        yield pushed


def test_images_are_pushed_to_a_registry_by_digest(
    engine: Engine, registry: Registry, pushing: Callable[..., Image]
) -> None:
    """The digest that is recorded is that of what the registry serves; what is there is not sent again."""
    image = pushing("buildah")
    repository, _, digest = image.address.partition("/")[2].partition("@")
    for reference in (image.tag, digest):
        headers, body = registry.manifest(repository, reference)
        assert headers["Docker-Content-Digest"] == digest == f"sha256:{hashlib.sha256(body).hexdigest()}"
        assert headers["Content-Type"] == MANIFEST_TYPE == json.loads(body)["mediaType"]
    assert re.fullmatch(rf"{registry.host}/debian@sha256:[0-9a-f]{{64}}", image.bases["BASE"])

    before = registry.n_sent()
    assert before > 0 and pushing("buildah") == image and registry.n_sent() == before
    subprocess.run(["podman", "pull", "--quiet", image.address], check=True, stdout=subprocess.DEVNULL)
    done = engine.inside(image.address, "spaceport", "doctor", "--stage", "compress")
    assert done.returncode == 0, done.stderr


def test_other_contents_get_another_tag(registry: Registry, pushing: Callable[..., Image]) -> None:
    """Also by podman; what was pushed before stays what it was."""
    first = pushing("buildah")
    other = pushing("podman", LABEL="other")
    assert other.tag != first.tag and other.tag.partition("-")[0] == first.tag.partition("-")[0] == __version__
    repository = first.address.partition("/")[2].partition("@")[0]
    headers, _ = registry.manifest(repository, first.tag)
    assert first.address.endswith(headers["Docker-Content-Digest"])
