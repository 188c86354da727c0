"""A scene followed from here: what the flow, SageMaker and the jobs say, told as the progress of a run on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spaceport_gs.errors import InputError
from spaceport_gs.files import replacing
from spaceport_gs.pipeline.aws.batches import batch_scenes, batch_status, queued_runs
from spaceport_gs.pipeline.aws.cloud import ClientError, Cloud, code_of, explained
from spaceport_gs.pipeline.aws.runs import RUNNING, SUCCEEDED, UNSTARTED, Run
from spaceport_gs.pipeline.aws.stack import Stack
from spaceport_gs.pipeline.aws.status import JobState, Status, status, told_in
from spaceport_gs.pipeline.events import progress_in
from spaceport_gs.progress import Listener, Progress

POLL_SECONDS = 10.0
STOP_SECONDS = 180.0
LATE_SECONDS = 60.0  # that a line of a log may come after later ones
PREVIEW = "preview.jpg"
UNDER_WAY = ("InProgress", "Stopping")
PUBLISHING = ("ReadManifest", "Publish", "Copy", "Point", "Notify")
"""States of the flow after the last job."""
ASKING = {"Sfm": "sfm", "TrainSpot": "train", "Train": "train", "Compress": "compress"}
"""Stage of each state that starts a job."""
LOGS: Mapping[bool, str] = {True: "/aws/sagemaker/TrainingJobs", False: "/aws/sagemaker/ProcessingJobs"}


def follow(
    cloud: Cloud,
    stack: Stack,
    scene: str,
    listen: Listener,
    folder: Path,
    show: Callable[[Status], None],
) -> Status:
    """Where a scene stands once its latest run is over. Until then tells how it goes, `show`s each state that it finds, and keeps
    the latest preview in `folder`.
    """
    told: dict[str, Progress] = {}
    tag = ""
    while True:
        found = status(cloud, stack, scene)
        if found.run.status == UNSTARTED:
            raise InputError(f"scene {scene}: {found.run.name} was recorded, but never started; retry starts it")
        for progress in as_progress(found):
            if told.get(progress.stage) != progress:
                told[progress.stage] = progress
                listen(progress)
        show(found)
        tag = save_preview(cloud, found, folder / PREVIEW, tag)
        if found.run.status != RUNNING:
            return found
        time.sleep(POLL_SECONDS)


def as_progress(found: Status) -> Iterator[Progress]:
    """Of each stage that has begun, in words where there are no steps to count."""
    stages = {job.stage: _progress_of(job, found.progress if job is found.jobs[-1] else None) for job in found.jobs}
    if found.run.status == RUNNING:
        if found.state == "WaitForHardware":
            stage = found.jobs[-1].stage if found.jobs else "sfm"
            stages[stage] = Progress(stage, 0, 1, "waits for hardware")
        elif (stage := ASKING.get(found.state, "")) and not _has_job(found, stage):
            stages[stage] = Progress(stage, 0, 1, "asks for an instance")
        elif found.state in PUBLISHING:
            stages["publish"] = Progress("publish", 0, 1, "copies the scene")
    if found.run.status == SUCCEEDED:
        stages["publish"] = Progress("publish", 1, 1, "done")
    yield from stages.values()


def _has_job(found: Status, stage: str) -> bool:
    """Whether one of this stage runs, or has just been completed."""
    return bool(found.jobs) and (
        found.jobs[-1].status in UNDER_WAY or (found.jobs[-1].stage, found.jobs[-1].status) == (stage, "Completed")
    )


def _progress_of(job: JobState, event: Mapping[str, Any] | None) -> Progress:
    if job.status == "Completed":
        return Progress(job.stage, 1, 1, "done")
    if job.status in UNDER_WAY and event and job.detail in ("", "Training"):
        return progress_in(event, job.stage)
    return Progress(job.stage, 0, 1, _words(job))


def _words(job: JobState) -> str:
    """What SageMaker calls it, and why."""
    state = job.detail if job.detail not in ("", job.status) else ""
    transitions = job.description.get("SecondaryStatusTransitions") or [{}]
    reason = job.reason or (transitions[-1].get("StatusMessage", "") if job.status in UNDER_WAY else "")
    return ": ".join(part for part in (state or job.status, reason) if part)


@explained()
def save_preview(cloud: Cloud, found: Status, path: Path, tag: str) -> str:
    """The tag of the preview that is at `path` now; `tag`: of the one that was."""
    training = [job for job in found.jobs if job.is_training]
    if not training:
        return tag
    bucket, folder = told_in(training[-1])
    unless = {"IfNoneMatch": tag} if tag else {}
    try:
        answer = cloud.client("s3").get_object(Bucket=bucket, Key=f"{folder}{PREVIEW}", **unless)
    except ClientError as error:
        if code_of(error) not in ("NoSuchKey", "304", "NotModified"):
            raise
        return tag
    with replacing(path) as temporary:
        temporary.write_bytes(answer["Body"].read())
    return str(answer["ETag"])


@dataclass(frozen=True)
class Line:
    """Of what a job printed."""

    job: str
    time: float
    """In seconds since 1970."""
    line: str
    id: str = ""
    """CloudWatch's, for no other line."""


def log_lines(cloud: Cloud, job: JobState, since: float = 0.0) -> Iterator[Line]:
    """What a job printed; `since`: seconds since 1970."""
    named = {"logGroupName": LOGS[job.is_training], "logStreamNamePrefix": f"{job.name}/"}
    try:
        with explained():
            pages = cloud.client("logs").get_paginator("filter_log_events")
            for page in pages.paginate(**named, startTime=round(1000 * since)):
                for event in page["events"]:
                    text = event["message"].rstrip("\n")
                    yield Line(job.name, event["timestamp"] / 1000, text, event["eventId"])
    except InputError as error:
        if not isinstance(error.__cause__, ClientError) or code_of(error.__cause__) != "ResourceNotFoundException":
            raise  # else no job of this kind has run yet


def follow_logs(cloud: Cloud, stack: Stack, scene: str, stage: str, tell: Callable[[Line], None]) -> Status:
    """Where a scene stands once its latest run is over. Until then tells each line that its jobs print, once, those of all
    stages or of one. Lines come some seconds late, and not always in their order.
    """
    seen, newest = set[str](), dict[str, float]()

    def look() -> Status:
        found = status(cloud, stack, scene)
        for job in found.jobs:
            if stage not in ("", job.stage):
                continue
            for line in log_lines(cloud, job, max(0.0, newest.get(job.name, 0.0) - LATE_SECONDS)):
                newest[job.name] = max(line.time, newest.get(job.name, 0.0))
                if line.id not in seen:
                    seen.add(line.id)
                    tell(line)
        return found

    while (found := look()).run.status == RUNNING:
        time.sleep(POLL_SECONDS)
    if found.run.status == UNSTARTED:
        raise InputError(f"scene {scene}: {found.run.name} was recorded, but never started; retry starts it")
    time.sleep(POLL_SECONDS)
    return look()


def follow_batch(cloud: Cloud, stack: Stack, batch: str, tell: Callable[[str], None]) -> list[Status]:
    """Where its scenes stand once a batch is over, and what was retried; a line whenever one goes on to something else."""
    scenes, told = batch_scenes(cloud, stack, batch), dict[str, str]()
    while True:
        is_over = batch_status(cloud, stack, batch) != RUNNING
        queued = queued_runs(cloud, stack) if is_over else set()  # by other batches
        found = [status(cloud, stack, scene) for scene in scenes]
        for one in found:
            if told.get(one.run.scene) != (line := one_line(one)):
                told[one.run.scene] = line
                tell(line)
        if is_over and not any(one.run.status == RUNNING or _waits(one.run, queued) for one in found):
            return found
        time.sleep(max(POLL_SECONDS, 0.5 * len(scenes)))  # AWS answers only so many questions a second


def _waits(run: Run, queued: Container[str]) -> bool:
    return run.status == UNSTARTED and run.name in queued


def wait_for_end(cloud: Cloud, stack: Stack, scenes: Sequence[str]) -> None:
    """Until the jobs of these scenes have ended, as those that were stopped do after two minutes at most."""
    end = time.monotonic() + STOP_SECONDS
    while time.monotonic() < end:
        if not any(job.status in UNDER_WAY for scene in scenes for job in status(cloud, stack, scene).jobs):
            return
        time.sleep(POLL_SECONDS / 2)


def one_line(found: Status) -> str:
    """Where a scene stands."""
    run = found.run
    if run.status == UNSTARTED:
        return f"{run.scene}: has not begun"
    if run.status == RUNNING:
        return f"{run.scene}: {found.jobs[-1].stage if found.jobs else 'starts'}"
    return f"{run.scene}: {run.status.lower()}" + (f": {run.reason}" if run.reason else "")
