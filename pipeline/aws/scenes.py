"""Scenes on AWS: submitted, followed, stopped, gone on with and fetched.

A scene's id stands for the content of its photos. Every run of its flow has a record in the bucket, jobs/SCENE/0001.json and
so on, written before the execution starts and never again: so who submits twice, or at the same time as somebody else, gets
the run that is there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta, timezone
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

from spaceport_gs.errors import InputError
from spaceport_gs.files import replacing
from spaceport_gs.pipeline.aws.cloud import ClientError, Cloud, code_of, explained
from spaceport_gs.pipeline.aws.drills import without
from spaceport_gs.pipeline.aws.flow import BATCH_NAME, STARTS, Scene, batch_input, batch_manifest, scene_input
from spaceport_gs.pipeline.aws.jobs import SCENE_ID
from spaceport_gs.pipeline.aws.stack import Stack, check_bucket
from spaceport_gs.pipeline.aws.uploads import Upload, send, sizes
from spaceport_gs.pipeline.manifest import FORMAT, read_manifest, sha256_of
from spaceport_gs.pipeline.manifest import NAME as MANIFEST
from spaceport_gs.pipeline.run import RunSettings
from spaceport_gs.progress import Listener, Progress

RUNNING, SUCCEEDED = "RUNNING", "SUCCEEDED"
UNSTARTED = "UNSTARTED"  # recorded, and then somebody was cut off
QUEUED = "QUEUED"  # recorded, and a batch that is under way will start it
STOPPED = "Spaceport.stopped"
STOP_WAITS = (0.0, 1.0, 2.0, 4.0)  # seconds
UNKNOWN_JOB = {"ValidationException", "ResourceNotFound"}


@dataclass(frozen=True)
class Run:
    """One execution of a scene's flow."""

    scene: str
    number: int
    given: str
    """Its input, JSON."""
    recorded: datetime
    arn: str
    status: str
    """What Step Functions calls it, UNSTARTED, or QUEUED."""
    error: str = ""
    reason: str = ""
    """Why it failed, in one sentence."""
    output: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        return f"{self.scene}-{self.number}"

    @property
    def stages(self) -> Mapping[str, Any]:
        """Requests of its jobs."""
        return json.loads(self.given)["stages"]


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
def submit(cloud: Cloud, stack: Stack, scene: Scene, upload: Upload, listen: Listener) -> Run:
    """Uploads what is missing and starts the flow, or returns the run that does the same already. InputError if one with
    other settings is under way.
    """
    scene = replace(scene, scene=upload.scene)
    send_photos(cloud, stack, upload, listen)
    given = scene_input(scene, stack.account("sfm"))
    while True:
        last = _latest(cloud, stack, scene.scene)
        run = _same_or_next(stack, last, given)
        if run is last or _record(cloud, stack, run):
            return _start(cloud, stack, run)


def _same_or_next(stack: Stack, last: Run | None, given: Mapping[str, Any]) -> Run:
    """The last run of a scene if it is asked for the same, else the one after it. InputError while the last is under way."""
    scene = str(given["scene"])
    if last is None:
        return _new_run(stack, scene, 1, given)
    if last.stages == given["stages"]:
        return last
    if last.status in (RUNNING, QUEUED) or _is_being_started(last):
        raise InputError(f"scene {scene}: {last.name} makes it with other settings; stop that one first")
    return _new_run(stack, scene, last.number + 1, given)


def send_photos(cloud: Cloud, stack: Stack, upload: Upload, listen: Listener) -> None:
    """To where the jobs of their scene look for them, as far as they are not there, and to nobody else's bucket."""
    check_bucket(cloud, stack)
    send(cloud, stack.bucket, f"inputs/{upload.scene}/photos", upload, listen)


@explained()
def retry(cloud: Cloud, stack: Stack, scene: str, start: str = "") -> Run:
    """Goes on after the last stage that is complete, a training from its checkpoint; what was rehearsed is not done again.
    `start`: one of STARTS to begin at again, no later than that, also if all is done.
    """
    last = _existing(cloud, stack, scene)
    if last.status == UNSTARTED and start in ("", json.loads(last.given)["from"]):
        return _start(cloud, stack, last)
    if last.status == RUNNING or (last.status == SUCCEEDED and not start):
        raise InputError(f"scene {scene}: {last.name} {'still runs' if last.status == RUNNING else 'is done'}")
    run = _run_after(cloud, stack, last, start)
    return _start(cloud, stack, run if _record(cloud, stack, run) else _existing(cloud, stack, scene))


def _run_after(cloud: Cloud, stack: Stack, last: Run, start: str = "") -> Run:
    """The run that goes on with what the last one left; not recorded yet."""
    at, model = _where(cloud, stack, last, start)
    given = {**json.loads(last.given), "from": at, "model": model, "stages": without(last.stages)}
    return _new_run(stack, last.scene, last.number + 1, given)


@explained()
def status(cloud: Cloud, stack: Stack, scene: str) -> Status:
    """Where the latest run of a scene stands."""
    run = _existing(cloud, stack, scene)
    events = _events(cloud, run)
    jobs = tuple(_jobs(cloud, events))
    entered = [event["stateEnteredEventDetails"]["name"] for event in events if "stateEnteredEventDetails" in event]
    return Status(run, jobs, _progress(cloud, jobs[-1]) if jobs else None, entered[-1] if entered else "")


@explained()
def runs(cloud: Cloud, stack: Stack, scene: str) -> list[Run]:
    """All runs of a scene, in their order."""
    found = [_recorded(cloud, stack, scene, key, when) for key, when in sorted(_records(cloud, stack, scene).items())]
    if not found:
        raise _unknown(stack, scene)
    return found


@explained()
def jobs_of(cloud: Cloud, run: Run) -> list[JobState]:
    """Every attempt at every stage of a run, in the order in which they were asked for."""
    return history_of(cloud, run)[1]


@explained()
def history_of(cloud: Cloud, run: Run) -> tuple[list[Mapping[str, Any]], list[JobState]]:
    """(what Step Functions wrote down of a run, its jobs); nothing once that is ninety days old."""
    events = _events(cloud, run)
    return events, list(_jobs(cloud, events))


@explained()
def stop(cloud: Cloud, stack: Stack, scene: str) -> list[str]:
    """Stops the latest run and its jobs, by the names in its history; returns those that ran. Twice is as good as once."""
    run = _existing(cloud, stack, scene)
    if run.status == RUNNING:
        _stop_execution(cloud, run.arn)
    ran: dict[str, None] = {}
    for wait in STOP_WAITS:  # the job that was asked for last may not be known to SageMaker yet
        time.sleep(wait)
        jobs = [_job(cloud, request) for request in _requests(_events(cloud, run))]
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


@explained()
def fetch(cloud: Cloud, stack: Stack, scene: str, out: Path, listen: Listener) -> None:
    """The scene's file, its page and the manifest, checked, in `out`; what is there already is not fetched again."""
    s3, folder = cloud.client("s3"), f"work/{_checked(scene)}/compress"
    text = _text(cloud, stack.bucket, f"{folder}/{MANIFEST}")
    if text is None:
        raise InputError(f"scene {scene}: there is no finished result; see its status")
    try:
        files = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in json.loads(text)["outputs"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"scene {scene}: {folder}/{MANIFEST} is not a manifest; retry it") from error
    total, done = sum(n_bytes for n_bytes, _ in files.values()), 0
    for name, (n_bytes, sha256) in files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"scene {scene}: its manifest names a file outside of its folder, {name}")
        listen(Progress("fetch", done, total, name))
        if not (out / name).is_file() or sha256_of(out / name) != sha256:
            with replacing(out / name) as path:
                s3.download_file(stack.bucket, f"{folder}/{name}", str(path))
        done += n_bytes
    with replacing(out / MANIFEST) as path:
        path.write_text(text, encoding="utf-8")
    read_manifest(out, "compress")
    listen(Progress("fetch", total, total))


@explained()
def pointer_of(cloud: Cloud, stack: Stack, scene: str) -> dict[str, str]:
    """What is published of a scene: `page` and `scene`, keys below published/. InputError if nothing is."""
    text = _text(cloud, stack.bucket, f"published/{_checked(scene)}/scene.json")
    if text is None:
        raise InputError(f"scene {scene}: is not published; see its status")
    try:
        pointer = json.loads(text)
        return {name: str(pointer[name]) for name in ("page", "scene")}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"scene {scene}: published/{scene}/scene.json is damaged; retry the scene") from error


@explained()
def queued_runs(cloud: Cloud, stack: Stack) -> set[str]:
    """Names of the runs that batches under way make, or will make."""
    pages = cloud.client("stepfunctions").get_paginator("list_executions")
    found = pages.paginate(stateMachineArn=stack.machines[1], statusFilter=RUNNING)
    batches = [execution["name"] for page in found for execution in page["executions"]]
    return {name for batch in batches for name in _begun_by(cloud, stack, batch)}


@explained()
def run_for_batch(cloud: Cloud, stack: Stack, scene: Scene, queued: Container[str]) -> Run:
    """The run that a batch has of a scene: the one that is done or under way, if it is asked for the same; else UNSTARTED, one
    that begins, or goes on as `retry` does where the last one failed. Nothing is recorded yet. `queued`: of `queued_runs`.
    InputError if one with other settings is under way.
    """
    last = _latest(cloud, stack, scene.scene)
    if last and last.status == UNSTARTED and last.name in queued:
        last = replace(last, status=QUEUED)
    run = _same_or_next(stack, last, scene_input(scene, stack.account("sfm")))
    return run if run.status in (SUCCEEDED, RUNNING, UNSTARTED, QUEUED) else _run_after(cloud, stack, run)


@dataclass(frozen=True)
class Batch:
    """Many scenes, under one name."""

    name: str
    arn: str
    """Of the execution that makes those which were neither done nor under way; empty if there was none to make."""
    lost: tuple[str, ...]
    """Ids of scenes that somebody else submitted at the same time."""


@explained()
def submit_batch(cloud: Cloud, stack: Stack, name: str, runs: Sequence[Run], concurrency: int) -> Batch:
    """Starts what has not begun of the runs that `run_for_batch` found, some at a time, when all photos are uploaded. Each is
    followed and stopped as one that was submitted alone. The same batch twice is one; another one of its name gets a number.
    """
    unstarted = [run for run in runs if run.status == UNSTARTED]
    ours = [run for run in unstarted if _is_ours(cloud, stack, run)]
    batch = _name_of_batch(cloud, stack, name, runs, bool(ours))
    arn = ""
    if ours:
        manifest = batch_manifest([(run.name, json.loads(run.given)) for run in ours])
        _put_once(cloud, stack.bucket, _begun_key(batch), manifest)
        arn = _execute(cloud, stack.machines[1], batch, json.dumps(batch_input(batch, concurrency)))
    return Batch(batch, arn, tuple(run.scene for run in unstarted if run not in ours))


def _is_ours(cloud: Cloud, stack: Stack, run: Run) -> bool:
    """Whether it is recorded as it is, by us or before us."""
    if _record(cloud, stack, run):
        return True
    there = _existing(cloud, stack, run.scene)
    return (there.name, there.given) == (run.name, run.given)


def _name_of_batch(cloud: Cloud, stack: Stack, name: str, runs: Sequence[Run], begins: bool) -> str:
    """`name`, with a number behind it where that is another batch, or one that is over while something is to begin."""
    scenes = json.dumps([run.name for run in runs])
    for number in count(1):
        batch = name if number == 1 else f"{name}-{number}"
        batch_input(batch, 1)  # it may have become too long
        if _put_once(cloud, stack.bucket, _scenes_key(batch), scenes):
            return batch
        if _text(cloud, stack.bucket, _scenes_key(batch)) == scenes:
            if not begins or batch_status(cloud, stack, batch) in (UNSTARTED, RUNNING):
                return batch
    raise AssertionError("there is always another number")


def _scenes_key(batch: str) -> str:
    """Of the names of all runs of a batch."""
    return f"batches/{batch}/scenes.json"


def _begun_key(batch: str) -> str:
    """Of what the batch machine reads: those that it starts, and their inputs."""
    return f"batches/{batch}/manifest.json"


@explained()
def batch_scenes(cloud: Cloud, stack: Stack, batch: str) -> list[str]:
    """Ids of the scenes of a batch."""
    text = _text(cloud, stack.bucket, _scenes_key(batch)) if BATCH_NAME.fullmatch(batch) else None
    if text is None:
        raise InputError(f"batch {batch!r}: the stack {stack.prefix} knows of none")
    return [_scene_of(name) for name in json.loads(text)]


@explained()
def begun_scenes(cloud: Cloud, stack: Stack, batch: str) -> list[str]:
    """Ids of those of its scenes that the batch itself makes."""
    known = batch_scenes(cloud, stack, batch)
    begun = {_scene_of(name) for name in _begun_by(cloud, stack, batch)}
    return [scene for scene in known if scene in begun]


def _begun_by(cloud: Cloud, stack: Stack, batch: str) -> list[str]:
    """Names of the runs that a batch starts."""
    text = _text(cloud, stack.bucket, _begun_key(batch))
    return [run["name"] for run in json.loads(text)] if text else []


def _scene_of(name: str) -> str:
    """That a run of this name makes."""
    return name.rpartition("-")[0]


@explained()
def batch_status(cloud: Cloud, stack: Stack, batch: str) -> str:
    """What Step Functions says of a batch's execution, or UNSTARTED."""
    arn = _arn_of(stack.machines[1], batch)
    try:
        return str(cloud.client("stepfunctions").describe_execution(executionArn=arn)["status"])
    except ClientError as error:
        if code_of(error) != "ExecutionDoesNotExist":
            raise
        return UNSTARTED


@explained()
def stop_batch(cloud: Cloud, stack: Stack, batch: str) -> list[str]:
    """Begins no more scenes, and stops those of its own that are under way; returns the jobs that ran."""
    scenes = begun_scenes(cloud, stack, batch)
    if scenes:
        _stop_execution(cloud, _arn_of(stack.machines[1], batch))
    return [job for scene in scenes for job in stop(cloud, stack, scene)]


def _stop_execution(cloud: Cloud, arn: str) -> None:
    states, cause = cloud.client("stepfunctions"), "stopped by its user; retry goes on from there"
    if states.describe_execution(executionArn=arn)["status"] == RUNNING:
        states.stop_execution(executionArn=arn, error=STOPPED, cause=cause)


def _new_run(stack: Stack, scene: str, number: int, given: Mapping[str, Any]) -> Run:
    """That is not recorded yet."""
    text, now = json.dumps(given, sort_keys=True), datetime.now(timezone.utc)
    return Run(scene, number, text, now, _arn_of(stack.machines[0], f"{scene}-{number}"), UNSTARTED)


def _record(cloud: Cloud, stack: Stack, run: Run) -> bool:
    """Takes its number; False if somebody else has it."""
    return _put_once(cloud, stack.bucket, f"jobs/{run.scene}/{run.number:04}.json", run.given)


def _is_being_started(run: Run) -> bool:
    """By somebody, just now; who was cut off half an hour ago does not come back."""
    return run.status == UNSTARTED and datetime.now(timezone.utc) - run.recorded < timedelta(minutes=30)


def _start(cloud: Cloud, stack: Stack, run: Run) -> Run:
    if run.status != UNSTARTED:
        return run
    return _described(cloud, replace(run, arn=_execute(cloud, stack.machines[0], run.name, run.given)))


def _execute(cloud: Cloud, machine: str, name: str, given: str) -> str:
    """ARN of the execution of this name, which is started unless it was."""
    try:
        answer = cloud.client("stepfunctions").start_execution(stateMachineArn=machine, name=name, input=given)
        return str(answer["executionArn"])
    except ClientError as error:
        if code_of(error) != "ExecutionAlreadyExists":
            raise
        return _arn_of(machine, name)


def _arn_of(machine: str, name: str) -> str:
    return f"{machine.replace(':stateMachine:', ':execution:')}:{name}"


def _existing(cloud: Cloud, stack: Stack, scene: str) -> Run:
    run = _latest(cloud, stack, scene)
    if run is None:
        raise _unknown(stack, scene)
    return run


def _unknown(stack: Stack, scene: str) -> InputError:
    return InputError(f"scene {scene}: the stack {stack.prefix} knows of none; submit its photos")


def _checked(scene: str) -> str:
    if not SCENE_ID.fullmatch(scene):
        raise InputError(f"scene {scene!r}: an id has 1 to 24 lower-case letters and digits")
    return scene


def _latest(cloud: Cloud, stack: Stack, scene: str) -> Run | None:
    records = _records(cloud, stack, scene)
    return _recorded(cloud, stack, scene, max(records), records[max(records)]) if records else None


def _records(cloud: Cloud, stack: Stack, scene: str) -> dict[str, datetime]:
    """Of a scene's runs: when they were made, by their keys."""
    prefix = f"jobs/{_checked(scene)}/"
    pages = cloud.client("s3").get_paginator("list_objects_v2").paginate(Bucket=stack.bucket, Prefix=prefix)
    return {entry["Key"]: entry["LastModified"] for page in pages for entry in page.get("Contents", [])}


def _recorded(cloud: Cloud, stack: Stack, scene: str, key: str, when: datetime) -> Run:
    number, given = int(PurePosixPath(key).stem), _text(cloud, stack.bucket, key) or ""
    arn = _arn_of(stack.machines[0], f"{scene}-{number}")
    return _described(cloud, Run(scene, number, given, when, arn, UNSTARTED))


def _described(cloud: Cloud, run: Run) -> Run:
    try:
        found = cloud.client("stepfunctions").describe_execution(executionArn=run.arn)
    except ClientError as error:
        if code_of(error) != "ExecutionDoesNotExist":
            raise
        return run
    output = json.loads(found["output"]) if found.get("output") else None
    return replace(
        run, status=found["status"], error=found.get("error", ""), reason=found.get("cause", ""), output=output
    )


def _events(cloud: Cloud, run: Run) -> list[Mapping[str, Any]]:
    """The history of a run."""
    if run.status == UNSTARTED:
        return []
    pages = cloud.client("stepfunctions").get_paginator("get_execution_history").paginate(executionArn=run.arn)
    return [event for page in pages for event in page["events"]]


def _jobs(cloud: Cloud, events: Sequence[Mapping[str, Any]]) -> Iterator[JobState]:
    """Those that were asked for and SageMaker knows."""
    return filter(None, (_job(cloud, request) for request in _requests(events)))


def _requests(events: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """For jobs, from a history: with the names that no one can guess."""
    for event in events:
        task = event.get("taskScheduledEventDetails", {})
        if task.get("resourceType") == "sagemaker":
            yield json.loads(task["parameters"])


def _job(cloud: Cloud, request: Mapping[str, Any]) -> JobState | None:
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
    text = _text(cloud, bucket, f"{folder}progress.json")
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
    for job in _jobs(cloud, _events(cloud, last)):
        if job.is_training and job.status == "Completed":
            model = job.description["ModelArtifacts"]["S3ModelArtifacts"]
    if not model:
        return "train", ""
    return ("publish" if _is_complete(cloud, stack, last, "compress") else "compress"), model


def _is_complete(cloud: Cloud, stack: Stack, run: Run, stage: str) -> bool:
    """Whether a manifest says so, and what it names is there, made with the settings of this run."""
    folder = f"work/{run.scene}/{stage}"
    try:
        manifest = json.loads(_text(cloud, stack.bucket, f"{folder}/{MANIFEST}") or "null")
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


def _text(cloud: Cloud, bucket: str, key: str) -> str | None:
    """Of an object; None if it is not there."""
    try:
        return str(cloud.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read().decode())
    except ClientError as error:
        if code_of(error) != "NoSuchKey":
            raise
        return None


def _put_once(cloud: Cloud, bucket: str, key: str, text: str) -> bool:
    """False if something is there already."""
    try:
        cloud.client("s3").put_object(Bucket=bucket, Key=key, Body=text.encode(), IfNoneMatch="*")
        return True
    except ClientError as error:
        if code_of(error) not in ("PreconditionFailed", "ConditionalRequestConflict"):
            raise
        return False
