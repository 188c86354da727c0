"""Where a scene stands: its latest run, the jobs that its flow asked for, and what they said last."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spaceport_gs.pipeline.aws.cloud import ClientError, Cloud, code_of, explained
from spaceport_gs.pipeline.aws.objects import text_of
from spaceport_gs.pipeline.aws.runs import UNSTARTED, Run, existing_run
from spaceport_gs.pipeline.aws.stack import Stack

UNKNOWN_JOB = {"ValidationException", "ResourceNotFound"}


@dataclass(frozen=True)
class JobState:
    """Of one attempt at a stage."""

    name: str
    is_training: bool
    status: str
    """InProgress, Completed, Failed, Stopping or Stopped."""
    detail: str
    """What it is about, such as Downloading; of a training job only."""
    reason: str
    request: Mapping[str, Any]
    description: Mapping[str, Any]
    """All that SageMaker says of it."""

    @property
    def kind(self) -> str:
        """As it stands in SageMaker's names."""
        return "Training" if self.is_training else "Processing"

    @property
    def stage(self) -> str:
        return "train" if self.is_training else str(self.request["AppSpecification"]["ContainerArguments"][0])


@dataclass(frozen=True)
class Status:
    """Of a scene, by its latest run."""

    run: Run
    jobs: tuple[JobState, ...]
    """In the order in which they were asked for."""
    progress: Mapping[str, Any] | None
    """What the latest job said last: an event as in progress.json."""
    state: str
    """Of the flow, such as WaitForHardware; empty before it has any."""


@explained()
def status(cloud: Cloud, stack: Stack, scene: str) -> Status:
    """Where the latest run of a scene stands."""
    run = existing_run(cloud, stack, scene)
    events = events_of(cloud, run)
    jobs = tuple(_jobs(cloud, events))
    entered = [event["stateEnteredEventDetails"]["name"] for event in events if "stateEnteredEventDetails" in event]
    return Status(run, jobs, _progress(cloud, jobs[-1]) if jobs else None, entered[-1] if entered else "")


@explained()
def jobs_of(cloud: Cloud, run: Run) -> list[JobState]:
    """Every attempt at every stage of a run, in the order in which they were asked for."""
    return history_of(cloud, run)[1]


@explained()
def history_of(cloud: Cloud, run: Run) -> tuple[list[Mapping[str, Any]], list[JobState]]:
    """(what Step Functions wrote down of a run, its jobs); nothing once that is ninety days old."""
    events = events_of(cloud, run)
    return events, list(_jobs(cloud, events))


def events_of(cloud: Cloud, run: Run) -> list[Mapping[str, Any]]:
    """The history of a run."""
    if run.status == UNSTARTED:
        return []
    pages = cloud.client("stepfunctions").get_paginator("get_execution_history").paginate(executionArn=run.arn)
    return [event for page in pages for event in page["events"]]


def _jobs(cloud: Cloud, events: Sequence[Mapping[str, Any]]) -> Iterator[JobState]:
    """Those that were asked for and SageMaker knows."""
    return filter(None, (job_of(cloud, request) for request in requests_of(events)))


def requests_of(events: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """For jobs, from a history: with the names that no one can guess."""
    for event in events:
        task = event.get("taskScheduledEventDetails", {})
        if task.get("resourceType") == "sagemaker":
            yield json.loads(task["parameters"])


def job_of(cloud: Cloud, request: Mapping[str, Any]) -> JobState | None:
    """None if there is no such job: it was refused."""
    sagemaker, is_training = cloud.client("sagemaker"), "TrainingJobName" in request
    kind = "Training" if is_training else "Processing"
    name = str(request[f"{kind}JobName"])
    try:
        if is_training:
            found = sagemaker.describe_training_job(TrainingJobName=name)
        else:
            found = sagemaker.describe_processing_job(ProcessingJobName=name)
    except ClientError as error:
        if code_of(error) not in UNKNOWN_JOB:
            raise
        return None
    reason = found.get("ExitMessage") or found.get("FailureReason") or ""
    detail = found.get("SecondaryStatus", "") if is_training else ""
    return JobState(name, is_training, found[f"{kind}JobStatus"], detail, reason, request, found)


def _progress(cloud: Cloud, job: JobState) -> Mapping[str, Any] | None:
    """What a job writes every few seconds; nothing of what one before it wrote to the same place."""
    bucket, folder = told_in(job)
    text = text_of(cloud, bucket, f"{folder}progress.json")
    try:
        event = json.loads(text or "null")
        began = job.description["CreationTime"].timestamp()
        return event if isinstance(event, dict) and float(event["time"]) >= began else None
    except (ValueError, TypeError, KeyError):
        return None


def told_in(job: JobState) -> tuple[str, str]:
    """(bucket, key of the folder) that a job's progress comes to while it runs: its checkpoints, or an output of its own."""
    if "CheckpointConfig" in job.request:
        folder = job.request["CheckpointConfig"]["S3Uri"]
    else:
        outputs = job.request["ProcessingOutputConfig"]["Outputs"]
        folder = next(output["S3Output"]["S3Uri"] for output in outputs if output["OutputName"] == "progress")
    bucket, _, key = folder.removeprefix("s3://").partition("/")
    return bucket, key
