"""Scenes on AWS: submitted, stopped, and gone on with. A scene's id stands for the content of its photos."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws.cloud import ClientError, Cloud, code_of, explained
from spaceport_gs.pipeline.aws.drills import without
from spaceport_gs.pipeline.aws.flow import STARTS, Scene, scene_input
from spaceport_gs.pipeline.aws.objects import sizes, text_of
from spaceport_gs.pipeline.aws.runs import (
    RUNNING,
    SUCCEEDED,
    UNSTARTED,
    Run,
    existing_run,
    latest_run,
    new_run,
    record_run,
    same_or_next,
    start_run,
    stop_execution,
)
from spaceport_gs.pipeline.aws.stack import Stack, check_bucket
from spaceport_gs.pipeline.aws.status import UNKNOWN_JOB, JobState, events_of, job_of, jobs_of, requests_of
from spaceport_gs.pipeline.aws.uploads import Upload, send
from spaceport_gs.pipeline.manifest import FORMAT
from spaceport_gs.pipeline.manifest import NAME as MANIFEST
from spaceport_gs.pipeline.run import RunSettings
from spaceport_gs.progress import Listener

STOP_WAITS = (0.0, 1.0, 2.0, 4.0)  # seconds


@explained()
def submit(cloud: Cloud, stack: Stack, scene: Scene, upload: Upload, listen: Listener) -> Run:
    """Uploads what is missing and starts the flow, or returns the run that does the same already. InputError if one with
    other settings is under way.
    """
    scene = replace(scene, scene=upload.scene)
    send_photos(cloud, stack, upload, listen)
    given = scene_input(scene, stack.account("sfm"))
    while True:
        last = latest_run(cloud, stack, scene.scene)
        run = same_or_next(stack, last, given)
        if run is last or record_run(cloud, stack, run):
            return start_run(cloud, stack, run)


def send_photos(cloud: Cloud, stack: Stack, upload: Upload, listen: Listener) -> None:
    """To where the jobs of their scene look for them, as far as they are not there, and to nobody else's bucket."""
    check_bucket(cloud, stack)
    send(cloud, stack.bucket, f"inputs/{upload.scene}/photos", upload, listen)


@explained()
def retry(cloud: Cloud, stack: Stack, scene: str, start: str = "") -> Run:
    """Goes on after the last stage that is complete, a training from its checkpoint; what was rehearsed is not done again.
    `start`: one of STARTS to begin at again, no later than that, also if all is done.
    """
    last = existing_run(cloud, stack, scene)
    if last.status == UNSTARTED and start in ("", json.loads(last.given)["from"]):
        return start_run(cloud, stack, last)
    if last.status == RUNNING or (last.status == SUCCEEDED and not start):
        raise InputError(f"scene {scene}: {last.name} {'still runs' if last.status == RUNNING else 'is done'}")
    run = run_after(cloud, stack, last, start)
    return start_run(cloud, stack, run if record_run(cloud, stack, run) else existing_run(cloud, stack, scene))


def run_after(cloud: Cloud, stack: Stack, last: Run, start: str = "") -> Run:
    """The run that goes on with what the last one left; not recorded yet."""
    at, model = _where(cloud, stack, last, start)
    given = {**json.loads(last.given), "from": at, "model": model, "stages": without(last.stages)}
    return new_run(stack, last.scene, last.number + 1, given)


@explained()
def stop(cloud: Cloud, stack: Stack, scene: str) -> list[str]:
    """Stops the latest run and its jobs, by the names in its history; returns those that ran. Twice is as good as once."""
    run = existing_run(cloud, stack, scene)
    if run.status == RUNNING:
        stop_execution(cloud, run.arn)
    ran: dict[str, None] = {}
    for wait in STOP_WAITS:  # the job that was asked for last may not be known to SageMaker yet
        time.sleep(wait)
        jobs = [job_of(cloud, request) for request in requests_of(events_of(cloud, run))]
        for job in jobs:
            if job and job.status == "InProgress":
                _stop(cloud, job)
                ran[job.name] = None
        if not jobs or jobs[-1]:
            break
    return list(ran)


def _stop(cloud: Cloud, job: JobState) -> None:
    sagemaker = cloud.client("sagemaker")
    try:
        if job.is_training:
            sagemaker.stop_training_job(TrainingJobName=job.name)
        else:
            sagemaker.stop_processing_job(ProcessingJobName=job.name)
    except ClientError as error:  # it has just ended
        if code_of(error) not in UNKNOWN_JOB:
            raise


def _where(cloud: Cloud, stack: Stack, last: Run, start: str = "") -> tuple[str, str]:
    """(stage to go on at, address of the trained model): `start`, or after what is complete. InputError if what is to be
    begun at needs what is not there.
    """
    reached, model = _reached(cloud, stack, last)
    if not start:
        return ("compress" if reached == "publish" and last.error != "Spaceport.publish" else reached), model
    if start not in STARTS:
        raise InputError(f"stage {start}: choose {', '.join(STARTS)}")
    if STARTS.index(start) > STARTS.index(reached):
        raise InputError(f"scene {last.scene}: nothing to begin at {start} with; {reached} is not done")
    return start, model if start in ("compress", "publish") else ""


def _reached(cloud: Cloud, stack: Stack, last: Run) -> tuple[str, str]:
    """(the first stage that is not complete, address of the trained model). That its stages made the same of the photos is
    what their manifests say.
    """
    if not _is_complete(cloud, stack, last, "sfm"):
        return "sfm", ""
    model = json.loads(last.given)["model"]
    for job in jobs_of(cloud, last):
        if job.is_training and job.status == "Completed":
            model = job.description["ModelArtifacts"]["S3ModelArtifacts"]
    if not model:
        return "train", ""
    return ("publish" if _is_complete(cloud, stack, last, "compress") else "compress"), model


def _is_complete(cloud: Cloud, stack: Stack, run: Run, stage: str) -> bool:
    """Whether a manifest says so, and what it names is there, made with the settings of this run."""
    folder = f"work/{run.scene}/{stage}"
    try:
        manifest = json.loads(text_of(cloud, stack.bucket, f"{folder}/{MANIFEST}") or "null")
        wanted = {f"{folder}/{name}": file["bytes"] for name, file in manifest["outputs"].items()}
        is_ours = manifest["format"] == FORMAT and manifest["stage"] == stage
        settings = manifest["settings"]
    except (ValueError, TypeError, KeyError, AttributeError):
        return False
    arguments = run.stages[stage]["AppSpecification"]["ContainerArguments"][1:]
    given = {name: json.loads(value) for name, _, value in (argument.partition("=") for argument in arguments)}
    there = sizes(cloud.client("s3"), stack.bucket, f"{folder}/")
    return (
        is_ours
        and settings == asdict(RunSettings(**given))
        and all(there.get(key) == n_bytes for key, n_bytes in wanted.items())
    )
