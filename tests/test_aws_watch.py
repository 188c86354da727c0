"""Scenes followed: what is told of them, in words, bars and lines of a log."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import boto3
import pytest
from aws_scenes import SCENE, SECONDS, STACK, SageMaker, put_results, wait_for
from deployed import BUCKET
from interpreter import REGION, Interpreter, client_of

from spaceport_gs.pipeline.aws import watch
from spaceport_gs.pipeline.aws.cloud import Cloud
from spaceport_gs.pipeline.aws.page import Page
from spaceport_gs.pipeline.aws.runs import Run
from spaceport_gs.pipeline.aws.scenes import submit
from spaceport_gs.pipeline.aws.status import JobState, Status, status
from spaceport_gs.pipeline.aws.uploads import plan
from spaceport_gs.pipeline.aws.watch import as_progress
from spaceport_gs.progress import Progress, ignore


def test_progress_is_what_the_job_says(
    cloud: Cloud, aws: Interpreter, sagemaker: SageMaker, photos: Path, tmp_path: Path
) -> None:
    upload, looked, s3 = plan(photos), threading.Event(), client_of("s3")
    put_results(upload.scene, "compress", tmp_path)
    asked = threading.Event()

    def train(request: dict[str, Any], attempt: int) -> Any:
        sagemaker.put(request, "InProgress", SecondaryStatus="Training")
        bucket, _, key = request["CheckpointConfig"]["S3Uri"].removeprefix("s3://").partition("/")
        told = json.dumps({"stage": "train", "step": 100, "time": time.time()})
        s3.put_object(Bucket=bucket, Key=f"{key}progress.json", Body=told.encode())
        asked.set()
        assert looked.wait(SECONDS)
        return sagemaker.run(request, attempt)

    aws.handlers = {**aws.handlers, "TrainSpot": train}
    submit(cloud, STACK, SCENE, upload, ignore)
    assert asked.wait(SECONDS)
    found = status(cloud, STACK, upload.scene)
    assert found.run.status == "RUNNING" and found.progress and found.progress["step"] == 100
    assert found.state == "TrainSpot" and found.jobs[-1].stage == "train"
    assert (found.jobs[-1].status, found.jobs[-1].detail) == ("InProgress", "Training")
    looked.set()
    key = f"work/{upload.scene}/progress/compress/progress.json"
    wait_for(cloud, upload.scene)
    for text in (b"{half", b'{"stage": "compress", "step": 1, "time": 5}', b'{"time": "?"}'):  # not this job's
        s3.put_object(Bucket=BUCKET, Key=key, Body=text)
        assert status(cloud, STACK, upload.scene).progress is None


def test_logs_are_followed_until_the_run_is_over(
    cloud: Cloud, aws: Interpreter, sagemaker: SageMaker, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line once, however often it is looked for; also what comes late, and before others in time."""
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    upload, logs, heard = plan(photos), client_of("logs"), threading.Event()
    put_results(upload.scene, "compress", tmp_path)
    group, now = "/aws/sagemaker/ProcessingJobs", int(time.time() * 1000)
    streams: list[str] = []

    def write(line: str, when: int) -> None:
        logs.put_log_events(
            logGroupName=group, logStreamName=streams[0], logEvents=[{"timestamp": when, "message": line}]
        )

    def sfm(request: dict[str, Any], attempt: int) -> Any:
        job = sagemaker.put(request, "InProgress")
        streams.append(f"{job['ProcessingJobName']}/algo-1-1")
        logs.create_log_group(logGroupName=group)
        logs.create_log_stream(logGroupName=group, logStreamName=streams[0])
        write("twice", now)
        write("twice", now)
        assert heard.wait(SECONDS)
        write("late", now - 1000)
        return sagemaker.run(request, attempt)

    told: list[watch.Line] = []

    def tell(line: watch.Line) -> None:
        told.append(line)
        if len(told) == 2:
            heard.set()

    aws.handlers = {**aws.handlers, "Sfm": sfm}
    submit(cloud, STACK, SCENE, upload, ignore)
    found = watch.follow_logs(cloud, STACK, upload.scene, "", tell)
    assert found.run.status == "SUCCEEDED"
    assert [line.line for line in told] == ["twice", "twice", "late"] and told[0].time == now / 1000
    assert {line.job for line in told} == {found.jobs[0].name} and len({line.id for line in told}) == 3
    told.clear()
    watch.follow_logs(cloud, STACK, upload.scene, "train", told.append)
    assert not told


def seen(status: str, state: str, *jobs: JobState, progress: Mapping[str, Any] | None = None) -> list[tuple[str, str]]:
    run = Run("a1", 1, "{}", datetime.now(timezone.utc), "arn", status)
    return [(p.stage, p.message) for p in as_progress(Status(run, jobs, progress, state))]


def job_state(stage: str, status: str, detail: str = "", **said: Any) -> JobState:
    request = {"AppSpecification": {"ContainerArguments": [stage]}}
    return JobState(f"spaceport-{stage}-a1-1", stage == "train", status, detail, said.pop("reason", ""), request, said)


def test_every_state_has_words() -> None:
    done = job_state("sfm", "Completed")
    assert seen("RUNNING", "Sfm") == [("sfm", "asks for an instance")]
    assert seen("RUNNING", "Sfm", job_state("sfm", "InProgress")) == [("sfm", "InProgress")]
    starts = job_state("train", "InProgress", "Starting", SecondaryStatusTransitions=[{"StatusMessage": "Preparing the instances"}])  # fmt: skip
    assert seen("RUNNING", "Train", done, starts) == [("sfm", "done"), ("train", "Starting: Preparing the instances")]
    trains, event = job_state("train", "InProgress", "Training"), {"stage": "train", "step": 3, "n_steps": 9, "message": "step 3", "psnr": 20.5}  # fmt: skip
    assert seen("RUNNING", "Train", done, trains, progress=event)[1] == ("train", "step 3")
    failed = job_state("train", "Failed", "Failed", reason="CapacityError: none")
    assert seen("RUNNING", "WaitForHardware", done, failed)[1] == ("train", "waits for hardware")
    assert seen("FAILED", "Failed", done, failed)[1] == ("train", "Failed: CapacityError: none")
    spot = job_state("train", "Stopped", "MaxWaitTimeExceeded")
    assert seen("RUNNING", "Train", done, spot)[1] == ("train", "asks for an instance")
    assert seen("RUNNING", "Sfm", done) == [("sfm", "done")]
    assert seen("RUNNING", "Copy", done)[1] == ("publish", "copies the scene")
    assert seen("SUCCEEDED", "Done", done)[1] == ("publish", "done")


def test_progress_is_counted_as_on_this_machine() -> None:
    trains = job_state("train", "InProgress", "Training")
    event = {"time": 1.0, "stage": "train", "step": 3, "n_steps": 9, "fraction": 0.3, "seconds_left": 5, "message": "step 3", "psnr": 20.5}  # fmt: skip
    run = Run("a1", 1, "{}", datetime.now(timezone.utc), "arn", "RUNNING")
    (found,) = as_progress(Status(run, (trains,), event, "Train"))
    assert found == Progress("train", 3, 9, "step 3", {"psnr": 20.5})
    (found,) = as_progress(Status(run, (trains,), {"step": "?"}, "Train"))
    assert (found.step, found.n_steps) == (0, 1)


@pytest.mark.parametrize(
    ("region", "host"), [("us-east-1", "b-1.s3.amazonaws.com"), (REGION, f"b-1.s3.{REGION}.amazonaws.com")]
)
def test_links_to_previews_hold_in_every_region(region: str, host: str) -> None:
    """With the signature that opens what KMS has encrypted."""
    page = Page(Cloud(boto3.Session("key", "secret", region_name=region)))
    run = Run("a1", 1, "{}", datetime.now(timezone.utc), "arn", "RUNNING")
    request = {"CheckpointConfig": {"S3Uri": "s3://b-1/checkpoints/a1/x/"}}
    page.show(Status(run, (JobState("t", True, "InProgress", "Training", "", request, {}),), None, "Train"))
    body, _ = page.answer("/state.json") or (b"", "")
    link = json.loads(body)["links"]["preview"]
    assert link.startswith(f"https://{host}/checkpoints/a1/x/preview.jpg?X-Amz-Algorithm=AWS4-HMAC-SHA256")
    assert page.answer("/../secret") is None
