"""Scenes for tests of AWS, on the state machines that are deployed; fixtures for them are in conftest.py."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError
from deployed import BUCKET, IMAGES, VALUES, described
from interpreter import REGION, TaskError, client_of

from spaceport_gs.pipeline.aws.cloud import Cloud
from spaceport_gs.pipeline.aws.flow import Scene, spot_of
from spaceport_gs.pipeline.aws.jobs import DEFAULT_MACHINES
from spaceport_gs.pipeline.aws.runs import Run
from spaceport_gs.pipeline.aws.scenes import submit
from spaceport_gs.pipeline.aws.stack import Stack
from spaceport_gs.pipeline.aws.status import Status, status
from spaceport_gs.pipeline.aws.uploads import Upload, plan
from spaceport_gs.pipeline.manifest import write_manifest
from spaceport_gs.pipeline.run import RunSettings
from spaceport_gs.progress import ignore

STACK = Stack(
    "spaceport",
    REGION,
    {
        "Bucket": BUCKET,
        "SfmRole": VALUES["SfmRole"],
        "SceneMachine": VALUES["SceneMachine"],
        "BatchMachine": VALUES["SceneMachine"].replace("scene", "batch"),
    },
    {},
)
SETTINGS = {"steps": 7000, "title": 'Quarry "é"'}
SCENE = Scene("a1", IMAGES, SETTINGS, spot=spot_of(DEFAULT_MACHINES["train"]))
SECONDS = 30


class SageMaker:
    """The service as far as jobs are looked at and stopped, which moto's are not; tests say what becomes of them."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.stopped: list[str] = []

    def described(self, name: str) -> dict[str, Any]:
        if name not in self.jobs:
            raise ClientError({"Error": {"Code": "ValidationException", "Message": "not found"}}, "Describe")
        return self.jobs[name]

    def describe_training_job(self, TrainingJobName: str) -> dict[str, Any]:
        return self.described(TrainingJobName)

    def describe_processing_job(self, ProcessingJobName: str) -> dict[str, Any]:
        return self.described(ProcessingJobName)

    def stop_training_job(self, TrainingJobName: str) -> None:
        self.stop(TrainingJobName, "TrainingJobStatus")

    def stop_processing_job(self, ProcessingJobName: str) -> None:
        self.stop(ProcessingJobName, "ProcessingJobStatus")

    def stop(self, name: str, kind: str) -> None:
        if self.described(name)[kind] != "InProgress":
            raise ClientError({"Error": {"Code": "ValidationException", "Message": "has ended"}}, "Stop")
        self.jobs[name][kind] = "Stopped"
        self.stopped.append(name)

    def run(self, request: dict[str, Any], attempt: int) -> Any:
        """A handler: the job is done at once."""
        return self.put(request, "Completed")

    def put(self, request: Mapping[str, Any], state: str, **said: str) -> dict[str, Any]:
        job = described(request, state, said)
        created = {"CreationTime": datetime.now(timezone.utc)}  # to who asks; a state machine gets a number
        self.jobs[request.get("TrainingJobName") or request["ProcessingJobName"]] = {**job, **created}
        return job

    def fail(self, **said: str) -> Callable[[dict[str, Any], int], Any]:
        def handler(request: dict[str, Any], attempt: int) -> Any:
            raise TaskError("SageMaker.JobFailed", json.dumps(self.put(request, "Failed", **said)))

        return handler

    def keep(self, asked: threading.Event, over: threading.Event) -> Callable[[dict[str, Any], int], Any]:
        """A job that is under way from when it is asked for until it is over; then it was stopped."""

        def handler(request: dict[str, Any], attempt: int) -> Any:
            self.put(request, "InProgress")
            asked.set()
            assert over.wait(SECONDS)
            return described(request, "Stopped", {})

        return handler


def put_results(scene: str, stage: str, tmp_path: Path, settings: Mapping[str, Any] = SETTINGS) -> Path:
    """As the job of a stage would leave them in the bucket."""
    folder = tmp_path / scene / stage
    folder.mkdir(parents=True)
    for name in ("scene.sog", "index.html", "report.html") if stage == "compress" else ("sparse.bin",):
        (folder / name).write_text(f"<html><body>{name} of {scene}</body></html>")
    write_manifest(folder, stage, asdict(RunSettings(**settings)), {}, {})
    for path in folder.iterdir():
        client_of("s3").put_object(Bucket=BUCKET, Key=f"work/{scene}/{stage}/{path.name}", Body=path.read_bytes())
    return folder


def wait_for(cloud: Cloud, scene: str, wanted: str = "SUCCEEDED") -> Status:
    """Of a scene whose run ends."""
    waiting = threading.Event()
    for _ in range(100 * SECONDS):
        found = status(cloud, STACK, scene)
        if found.run.status != "RUNNING":
            assert found.run.status == wanted, found.run
            return found
        waiting.wait(0.01)
    raise AssertionError("the execution does not end")


def make(cloud: Cloud, photos: Path, tmp_path: Path, scene: Scene = SCENE) -> tuple[Upload, Run]:
    """Submits a scene whose jobs leave results."""
    upload = plan(photos)
    if not (tmp_path / upload.scene).exists():
        put_results(upload.scene, "sfm", tmp_path)
        put_results(upload.scene, "compress", tmp_path)
    return upload, submit(cloud, STACK, scene, upload, ignore)
