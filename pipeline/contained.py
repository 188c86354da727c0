"""A capture through the three containers on this machine, run as SageMaker would run them.

Each stage has a folder of its own in OUT/jobs, laid out as /opt/ml, with a manifest once it is complete. What a run leaves
there, and no more, is what the next one goes on from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from spaceport_gs import __version__
from spaceport_gs.errors import InputError, Interrupted
from spaceport_gs.files import remove, replacing, write_json
from spaceport_gs.pipeline import run
from spaceport_gs.pipeline.aws.contract import STAGES, Places
from spaceport_gs.pipeline.aws.jobs import GPU_STAGES, INPUTS, MOUNT, Job, image_stage
from spaceport_gs.pipeline.capture import linked, list_files, stamp_of, unzipped
from spaceport_gs.pipeline.events import progress_in
from spaceport_gs.pipeline.images import LOCAL_PREFIX, find_tool, name_of
from spaceport_gs.pipeline.manifest import NAME as MANIFEST
from spaceport_gs.pipeline.manifest import read_manifest, sha256_of
from spaceport_gs.pipeline.run import RunSettings
from spaceport_gs.pipeline.workspace import LOG, Workspace
from spaceport_gs.progress import Listener, Progress

TOOLS = ("podman", "docker")
BUILDERS = (*TOOLS, "buildah")  # the one that will run them first: podman and docker have images of their own
USER = 10001  # of the images
KILLED = 137
GPU = Path("/dev/nvidiactl")
RESULTS: Mapping[str, tuple[str, ...]] = {
    "sfm": ("sfm",),
    "train": ("scene.ply", "pictures"),
    "compress": ("scene.sog", "index.html"),
}
"""Of each stage, what a run without containers leaves in OUT too."""


@dataclass(frozen=True)
class Containers:
    """What stages run in."""

    tool: str
    images: Mapping[str, str]
    """By stage."""

    def is_on_gpu(self, stage: str, device: str) -> bool:
        """Whether this machine's GPU works for a stage."""
        return stage in GPU_STAGES and (device == "cuda" or (device == "auto" and GPU.exists()))

    def image(self, stage: str, device: str) -> str:
        return self.images[image_stage(stage, self.is_on_gpu(stage, device))]

    def options(self, stage: str, device: str) -> list[str]:
        """Of the tool: a user of the container who may write where who calls may, and the GPU."""
        options = ["--security-opt=label=disable"]  # where SELinux is on, it would hide the folder
        if os.getuid() and self.tool == "podman":
            options.append(f"--userns=keep-id:uid={USER},gid={USER}")
        elif os.getuid():
            options.append(f"--user={os.getuid()}:{os.getgid()}")
        if self.is_on_gpu(stage, device):
            options.append("--device=nvidia.com/gpu=all" if self.tool == "podman" else "--gpus=all")
        return options


def find_containers(prefix: str = LOCAL_PREFIX, tag: str = __version__) -> Containers:
    """InputError if nothing here runs containers, or an image is missing."""
    tool = find_tool(TOOLS, what="containers are run by one")
    images = {stage: name_of(stage, prefix, tag) for stage in STAGES}
    for image in images.values():
        if subprocess.run([tool, "image", "inspect", image], capture_output=True).returncode:
            raise InputError(f"{tool} has no image {image}: build it with `spaceport images`, or name another --image-prefix or --image-tag")  # fmt: skip
    return Containers(tool, images)


def check(settings: RunSettings) -> None:
    """As run.check does; what device there is, the container finds out."""
    if settings.device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {settings.device}: choose auto, cpu or cuda")
    run.check(replace(settings, device="cpu"))


def reconstruct(
    source: Path, workspace: Workspace, settings: RunSettings, containers: Containers, listen: Listener
) -> dict[str, Any]:
    """The main job; returns the report. InputError with the container's own sentence if a stage fails."""
    jobs = workspace.folder / "jobs"
    _begin(jobs, source, settings)
    results: dict[str, Path] = {}
    for stage in STAGES:
        places = Places(jobs / stage, stage)
        before = {name: results[name] for name in INPUTS[stage] if name in results}
        if _is_done(places, settings, before):
            LOG.info("%s: finished earlier", stage)
        else:
            if stage == "sfm":
                _lay_in(source, places.input("photos"))
            _run(places, settings, before, containers, listen)
            if stage == "sfm":
                remove(places.input("photos"))
        results[stage] = places.output
    _gather(workspace.folder, results)
    return run.write_report(workspace, settings)


def _begin(jobs: Path, source: Path, settings: RunSettings) -> None:
    """InputError if something else was begun here."""
    wanted, path = {"photos": stamp_of(source), **asdict(settings)}, jobs / "begun.json"
    try:
        begun = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        begun = wanted
    if changed := [name for name in wanted if begun.get(name) != wanted[name]]:
        raise InputError(
            f"{jobs.parent}: was begun with another value of {', '.join(changed)};"
            " give that of then, or start again with --overwrite"
        )
    write_json(path, wanted)


def _is_done(places: Places, settings: RunSettings, before: Mapping[str, Path]) -> bool:
    """Whether the stage's results are whole, and were made with these settings of what lies before it now."""
    try:
        manifest = read_manifest(places.output, places.stage)
    except InputError:
        return False
    inputs = {name: sha256_of(folder / MANIFEST) for name, folder in before.items()}
    return manifest.settings == asdict(settings) and manifest.inputs == inputs


def _lay_in(source: Path, folder: Path) -> None:
    """Copies, because the container's user may not be allowed to read what the caller can, and links lead nowhere there."""
    if source.is_file():
        unzipped(source, folder)
        return
    for file in list_files(source):
        target = folder / file.relative_to(source)
        about = file.stat()
        if not target.exists() or (target.stat().st_size, target.stat().st_mtime_ns) != (about.st_size, about.st_mtime_ns):  # fmt: skip
            with replacing(target) as temporary:
                shutil.copy2(file, temporary)


def _run(
    places: Places, settings: RunSettings, before: Mapping[str, Path], containers: Containers, listen: Listener
) -> None:
    """One container, to its end. When this process is to end, so is the container, which first saves what it can."""
    for name in before:
        places.input(name).mkdir(parents=True, exist_ok=True)
    reason = places.reason
    for left in (reason, places.output):  # by an attempt before
        remove(left)
    if os.getuid() == 0:
        for path in (places.base, *places.base.rglob("*")):
            os.chown(path, USER, USER, follow_symlinks=False)
    mounts = [f"--volume={folder.resolve()}:{_inside(places, name)}:ro" for name, folder in before.items()]
    options = [*containers.options(places.stage, settings.device), *mounts]
    command = _job(places, settings, containers).container_command(places.base.resolve(), containers.tool, 0, options)
    LOG.info("%s: %s", places.stage, " ".join(command))
    code, last = _followed(command, places, listen)
    if reason.is_file():
        raise InputError(f"{places.stage}: {reason.read_text(encoding='utf-8').removeprefix('input: ')}")
    if code == KILLED:
        raise InputError(f"{places.stage}: its container was killed; if that was the system's, there was too little memory")  # fmt: skip
    if code:
        raise InputError(f"{places.stage}: {containers.tool} ended with exit code {code}: {last}")
    if not (places.output / MANIFEST).is_file():
        raise Interrupted(f"{places.stage}: its container was stopped; go on with --resume")
    remove(places.work)


def _job(places: Places, settings: RunSettings, containers: Containers) -> Job:
    usual = asdict(RunSettings())
    given = {name: value for name, value in asdict(settings).items() if value != usual[name]}
    scene = hashlib.sha256(str(places.base.resolve()).encode()).hexdigest()[:12]
    return Job(places.stage, scene, containers.image(places.stage, settings.device), given)


def _inside(places: Places, name: str) -> str:
    """Where the container finds an input."""
    return f"{MOUNT}/{places.input(name).relative_to(places.base).as_posix()}"


def _followed(command: Sequence[str], places: Places, listen: Listener) -> tuple[int, str]:
    """(exit code, last line) of a container, whose progress is told; all that it says goes to a log beside its folder."""
    last = ""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # it is stopped once, and by SIGTERM
    )
    try:
        assert process.stdout is not None
        with open(places.base.with_suffix(".log"), "a", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                last = line.strip() or last
                if progress := _progress_of(line, places.stage):
                    listen(progress)
        return process.wait(), last
    except BaseException:
        process.terminate()
        process.communicate()
        raise


def _progress_of(line: str, stage: str) -> Progress | None:
    """What a container says in a line, if that is progress."""
    try:
        event = json.loads(line) if line.startswith("{") else None
    except ValueError:
        return None
    return progress_in(event, stage) if isinstance(event, dict) and "step" in event else None


def _gather(out: Path, results: Mapping[str, Path]) -> None:
    """Lets OUT hold what a run without containers leaves there, without holding it twice."""
    for stage, names in RESULTS.items():
        for name in (*names, f"stages/{stage}.json"):
            source, target = results[stage] / name, out / name
            remove(target)
            for path in [source] if source.is_file() else source.rglob("*"):
                if path.is_file():
                    linked(path, target / path.relative_to(source))
