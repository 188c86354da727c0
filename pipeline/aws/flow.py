"""The state machines: their definitions, and what their executions are given.

scene.asl.json takes photos to a published scene, batch.asl.json many of them. An execution brings the request for each of its
jobs; the machine gives every attempt a name of its own, and the role of its stage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws.contract import STAGES
from spaceport_gs.pipeline.aws.drills import Drill
from spaceport_gs.pipeline.aws.jobs import DEFAULT_MACHINES, Account, Job, Machine, image_stage, is_on_gpu
from spaceport_gs.pipeline.aws.prices import instances

MACHINES = ("scene", "batch")
FORMAT = 1
STARTS = (*STAGES, "publish")
BATCH_NAME = re.compile(r"[a-z0-9-]{1,40}")
MOST_SCENES_AT_ONCE = 1000
_PLACEHOLDER = re.compile(r"\$\{(\w+)\}")
_FROM_THE_MACHINE = ("ProcessingJobName", "TrainingJobName", "RoleArn")


def template(machine: str) -> str:
    """The definition in Amazon States Language, with ${Name} where CloudFormation puts what the stack knows."""
    return (resources.files(__package__) / f"{machine}.asl.json").read_text(encoding="utf-8")


def placeholders(machine: str) -> set[str]:
    """Their names."""
    return set(_PLACEHOLDER.findall(template(machine)))


def definition(machine: str, values: Mapping[str, str]) -> dict[str, Any]:
    """The definition as the stack deploys it: with `values` for its placeholders."""
    return json.loads(_PLACEHOLDER.sub(lambda found: values[found[1]], template(machine)))


@dataclass(frozen=True)
class Scene:
    """What is to be made of the photos of one scene, and on what."""

    scene: str
    """Its id: lower-case letters and digits."""
    images: Mapping[str, str]
    """Of the containers, with their digests, by stage."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of RunSettings."""
    machines: Mapping[str, Machine] = field(default_factory=dict)
    """By stage, where they are not the default ones."""
    spot: Machine | None = None
    """To train on at first; `machines` have what to take if there are none of these."""
    drills: Mapping[str, Drill] = field(default_factory=dict)
    """By stage."""

    def job(self, stage: str, **fields: str) -> Job:
        instance = instances().get(self.machine(stage).instance)
        image = self.images[image_stage(stage, is_on_gpu(stage, instance, self.settings.get("device", "auto")))]
        return Job(stage, self.scene, image, self.settings, drill=self.drills.get(stage), **fields)

    def machine(self, stage: str) -> Machine:
        return self.machines.get(stage, DEFAULT_MACHINES[stage])


def spot_of(machine: Machine) -> Machine:
    """The same, when there are some to spare."""
    return replace(machine, is_spot=True)


def scene_input(scene: Scene, account: Account, start: str = "sfm", trained: str = "") -> dict[str, Any]:
    """What an execution of the scene machine is given. `start`: one of STARTS; the stages before it are done. `trained`: to
    start at compress, the training job whose model it is, by its name.
    """
    if start not in STARTS:
        raise InputError(f"stage {start}: choose {', '.join(STARTS)}")
    if start == "compress" and not trained:
        raise InputError("to start at compress, name the training job whose model it is")
    stages = {stage: _request(scene.job(stage), account, scene.machine(stage)) for stage in STAGES}
    if scene.spot:
        stages["spot"] = _request(scene.job("train"), account, scene.spot)
    model = f"s3://{account.bucket}/{scene.job('compress', trained=trained).input_key('train')}" if trained else ""
    return {"format": FORMAT, "scene": scene.scene, "from": start, "model": model, "stages": stages}


def _request(job: Job, account: Account, machine: Machine) -> dict[str, Any]:
    request = job.request(account, machine)
    return {name: value for name, value in request.items() if name not in _FROM_THE_MACHINE}


def batch_input(batch: str, concurrency: int, tolerated_percentage: int = 100) -> dict[str, Any]:
    """What an execution of the batch machine is given. `concurrency`: scenes at once, at most as many as there is quota for
    instances. `tolerated_percentage`: of scenes that fail, before the batch does.
    """
    if not BATCH_NAME.fullmatch(batch):
        raise InputError(f"batch {batch!r}: a name has 1 to 40 lower-case letters, digits and hyphens")
    if not 1 <= concurrency <= MOST_SCENES_AT_ONCE:
        raise InputError(f"{concurrency} scenes at once: give 1 to {MOST_SCENES_AT_ONCE}")
    if not 0 <= tolerated_percentage <= 100:
        raise InputError(f"{tolerated_percentage} % of failures: give 0 to 100")
    return {
        "format": FORMAT,
        "batch": batch,
        "concurrency": concurrency,
        "tolerated_percentage": tolerated_percentage,
    }


def batch_manifest(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Text of manifest.json in the batch's folder: for each scene the name of its execution, and what `scene_input` gives."""
    scenes = [str(given["scene"]) for _, given in runs]
    twice = {scene for scene in scenes if scenes.count(scene) > 1}
    if twice or not scenes:
        raise InputError(f"a batch has one or more scenes, each once; twice: {', '.join(sorted(twice)) or 'none'}")
    return json.dumps([{"name": name, "input": given} for name, given in runs], ensure_ascii=False)
