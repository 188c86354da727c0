"""A stage of a scene as SageMaker is asked for it, and the same as a container or a process on this machine.

Keys in the bucket begin with their class, because lifecycle rules know no wildcards: inputs, work, checkpoints, published.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spaceport_gs import __version__
from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws import PREFIX
from spaceport_gs.pipeline.aws.contract import MODEL, STAGES
from spaceport_gs.pipeline.aws.drills import Drill
from spaceport_gs.pipeline.aws.prices import Instance, instances

INPUTS: Mapping[str, tuple[str, ...]] = {"sfm": ("photos",), "train": ("sfm",), "compress": ("train", "sfm")}
"""Of each stage, by name; `train` is what a training job left."""
SCENE_ID = re.compile(r"[a-z0-9]{1,24}")
MOST_ARGUMENT = 256  # characters
MOUNT = "/opt/ml"
GPU_STAGES = ("train", "compress")
"""Those that a GPU has work in."""
METRICS = ("psnr", "loss", "gaussians", "step", "steps_per_second")


@dataclass(frozen=True)
class Account:
    """Where jobs run: what the stack in an account and a region says of itself."""

    bucket: str
    role: str
    """ARN of the role that the job takes on."""
    kms_key: str = ""
    """ARN of the key for what is stored; empty: the bucket's own."""
    prefix: str = PREFIX
    """Of the stack, whose alarms hear of a job that stands still."""


@dataclass(frozen=True)
class Machine:
    """What a job runs on, and for how long."""

    instance: str
    volume_gb: int = 100
    """Instances with disks of their own do not look at it."""
    max_seconds: int = 2 * 3600
    is_spot: bool = False
    """Training only: cheaper, and may be interrupted."""
    max_wait_seconds: int = 4 * 3600
    """That a spot job may wait for hardware, at first and after interruptions, beside its work."""
    expected_seconds: int = 0
    """By the estimate, if there is one; a job that takes half as long again says so."""


DEFAULT_MACHINES: Mapping[str, Machine] = {
    "sfm": Machine("ml.c6i.2xlarge"),
    "train": Machine("ml.g5.xlarge"),
    "compress": Machine("ml.c6i.2xlarge", max_seconds=3600),
}


def is_on_gpu(stage: str, instance: Instance | None, device: str) -> bool:
    """Whether a GPU of the instance works for the stage. `device`: of RunSettings."""
    return stage in GPU_STAGES and device != "cpu" and bool(instance and instance.gpu)


def image_stage(stage: str, on_gpu: bool) -> str:
    """Whose image a job takes: on a GPU, compression needs the engine for it and torch, which that of the training has."""
    return "train" if stage == "compress" and on_gpu else stage


@dataclass(frozen=True)
class Job:
    """One stage of one scene."""

    stage: str
    scene: str
    """Its id: lower-case letters and digits."""
    image: str
    """Of the container, with its digest."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of RunSettings."""
    attempt: str = "0"
    """Tells the attempts at a stage apart: letters and digits. In a state machine each has random ones."""
    trained: str = ""
    """To compress: the training job whose model it is, by its name; empty: the first attempt."""
    drill: Drill | None = None
    """That is to happen to it."""

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise InputError(f"stage {self.stage}: choose {', '.join(STAGES)}")
        if not SCENE_ID.fullmatch(self.scene):
            raise InputError(f"scene {self.scene!r}: an id has 1 to 24 lower-case letters and digits")
        for argument in self._arguments:
            if len(argument) > MOST_ARGUMENT:
                raise InputError(
                    f"{argument.partition('=')[0]}: too long; at most {MOST_ARGUMENT} characters with its name"
                )

    @property
    def name(self) -> str:
        """Never used twice in an account and a region."""
        return f"{PREFIX}-{self.stage}-{self.scene}-{self.attempt}"

    @property
    def result(self) -> str:
        """Key of the folder that the stage's results go to."""
        return f"work/{self.scene}/{self.stage}"

    @property
    def checkpoints(self) -> str:
        """Key of the folder of checkpoints: another one for other settings."""
        text = json.dumps({**self._hyperparameters, "version": __version__}, sort_keys=True)
        return f"checkpoints/{self.scene}/{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def input_key(self, name: str) -> str:
        """Key of an input: the folder, or the model's archive, that the stage before left."""
        if name == "photos":
            return f"inputs/{self.scene}/photos/"
        before = Job(name, self.scene, self.image)
        # SageMaker puts a training job's model below the job's name.
        return (
            f"{before.result}/{self.trained or before.name}/output/{MODEL}" if name == "train" else f"{before.result}/"
        )

    @property
    def _hyperparameters(self) -> dict[str, str]:
        return {name: json.dumps(value) for name, value in sorted(self.settings.items())}

    @property
    def _rehearsed(self) -> dict[str, str]:
        return self.drill.environment if self.drill else {}

    @property
    def _arguments(self) -> list[str]:
        return [f"{name}={value}" for name, value in self._hyperparameters.items()]

    def operation(self) -> str:
        """What SageMaker calls the request."""
        return "CreateTrainingJob" if self.stage == "train" else "CreateProcessingJob"

    def request(self, account: Account, machine: Machine | None = None) -> dict[str, Any]:
        """The parameters of `operation`."""
        chosen = machine or DEFAULT_MACHINES[self.stage]
        if chosen.is_spot and self.stage != "train":
            raise InputError(f"stage {self.stage}: only the training can run on spot instances")
        tags = {
            "Project": "spaceport",
            "Stack": account.prefix,
            "Stage": self.stage,
            "JobId": self.scene,
            "Version": __version__,
        }
        environment = {
            "SPACEPORT_PREFIX": account.prefix,
            "SPACEPORT_EXPECTED_SECONDS": str(chosen.expected_seconds),
            **self._rehearsed,
        }
        common = {
            "RoleArn": account.role,
            "Environment": environment,
            "Tags": [{"Key": key, "Value": value} for key, value in tags.items()],
        }
        specific = self._training if self.stage == "train" else self._processing
        return {**common, **specific(account, chosen)}

    def _training(self, account: Account, machine: Machine) -> dict[str, Any]:
        stopping = {"MaxRuntimeInSeconds": machine.max_seconds}
        if machine.is_spot:
            stopping["MaxWaitTimeInSeconds"] = machine.max_seconds + machine.max_wait_seconds
        return {
            "TrainingJobName": self.name,
            "HyperParameters": self._hyperparameters,
            "AlgorithmSpecification": {
                "TrainingImage": self.image,
                "TrainingInputMode": "File",
                "MetricDefinitions": [{"Name": name, "Regex": rf"^metric .*\b{name}=([-+0-9.e]+)"} for name in METRICS],
            },
            "InputDataConfig": [
                {
                    "ChannelName": name,
                    "DataSource": {
                        "S3DataSource": {
                            "S3DataType": "S3Prefix",
                            "S3Uri": f"s3://{account.bucket}/{self.input_key(name)}",
                            "S3DataDistributionType": "FullyReplicated",
                        }
                    },
                }
                for name in INPUTS[self.stage]
            ],
            "OutputDataConfig": {"S3OutputPath": f"s3://{account.bucket}/{self.result}", **_key_of(account)},
            "CheckpointConfig": {
                "S3Uri": f"s3://{account.bucket}/{self.checkpoints}/",
                "LocalPath": f"{MOUNT}/checkpoints",
            },
            "ResourceConfig": {
                "InstanceCount": 1,
                "InstanceType": machine.instance,
                "VolumeSizeInGB": machine.volume_gb,
                **_volume_key_of(account, machine),
            },
            "StoppingCondition": stopping,
            "EnableManagedSpotTraining": machine.is_spot,
            "EnableNetworkIsolation": True,
        }

    def _processing(self, account: Account, machine: Machine) -> dict[str, Any]:
        def output(name: str, key: str, folder: str, mode: str) -> dict[str, Any]:
            uri = f"s3://{account.bucket}/{key}/"
            return {
                "OutputName": name,
                "S3Output": {"S3Uri": uri, "LocalPath": f"{MOUNT}/processing/{folder}", "S3UploadMode": mode},
            }

        return {
            "ProcessingJobName": self.name,
            "ProcessingInputs": [
                {
                    "InputName": name,
                    "S3Input": {
                        "S3Uri": f"s3://{account.bucket}/{self.input_key(name)}",
                        "LocalPath": f"{MOUNT}/processing/input/{name}",
                        "S3DataType": "S3Prefix",
                        "S3InputMode": "File",
                    },
                }
                for name in INPUTS[self.stage]
            ],
            "ProcessingOutputConfig": {
                "Outputs": [
                    output("result", self.result, "output", "EndOfJob"),
                    output("progress", f"work/{self.scene}/progress/{self.stage}", "progress", "Continuous"),
                ],
                **_key_of(account),
            },
            "ProcessingResources": {
                "ClusterConfig": {
                    "InstanceCount": 1,
                    "InstanceType": machine.instance,
                    "VolumeSizeInGB": machine.volume_gb,
                    **_volume_key_of(account, machine),
                }
            },
            "StoppingCondition": {"MaxRuntimeInSeconds": machine.max_seconds},
            "AppSpecification": {"ImageUri": self.image, "ContainerArguments": [self.stage, *self._arguments]},
            "NetworkConfig": {"EnableNetworkIsolation": True},
        }

    def container_command(
        self, folder: Path, tool: str = "podman", memory_gb: int = 0, options: Sequence[str] = ()
    ) -> list[str]:
        """The job in its container here, over a folder laid out as /opt/ml: no network, nothing else of the host writable.

        The folder must let the image's user write. `memory_gb`: that the container may take; 0: all there is. `options`: more
        of the tool's, such as inputs that lie elsewhere.
        """
        limits = [f"--memory={memory_gb}g"] if memory_gb else []
        variables = [f"--env={name}={value}" for name, value in self._rehearsed.items()]
        return [
            tool, "run", "--rm", "--network=none", "--read-only", "--cap-drop=all", "--tmpfs=/tmp", "--no-healthcheck",
            *limits, *variables, f"--volume={folder}:{MOUNT}", *options, self.image, self.stage, *self._arguments,
        ]  # fmt: skip

    def process(self, folder: Path) -> tuple[list[str], dict[str, str]]:
        """The job as a process here: its command, and what it needs in its environment."""
        command = [sys.executable, "-m", "spaceport_gs.pipeline.aws.entrypoint", self.stage, *self._arguments]
        return command, {"SAGEMAKER_BASE_DIR": str(folder), **self._rehearsed}


def _key_of(account: Account) -> dict[str, str]:
    return {"KmsKeyId": account.kms_key} if account.kms_key else {}


def _volume_key_of(account: Account, machine: Machine) -> dict[str, str]:
    """Disks of an instance's own are encrypted by their hardware, and SageMaker refuses a key for them."""
    known = instances().get(machine.instance)
    has_volume = known is None or known.disk_gb == 0
    return {"VolumeKmsKeyId": account.kms_key} if account.kms_key and has_volume else {}
