"""Batches: many scenes under one name, made some at a time.

batches/NAME/scenes.json in the bucket has the runs of all its scenes; those that the batch starts itself, and did not find done
or under way, are in manifest.json beside it, which the batch machine reads.
"""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from itertools import count

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws.cloud import ClientError, Cloud, code_of, explained
from spaceport_gs.pipeline.aws.flow import BATCH_NAME, Scene, batch_input, batch_manifest, scene_input
from spaceport_gs.pipeline.aws.objects import put_once, text_of
from spaceport_gs.pipeline.aws.runs import (
    QUEUED,
    RUNNING,
    SUCCEEDED,
    UNSTARTED,
    Run,
    arn_of,
    existing_run,
    latest_run,
    record_run,
    same_or_next,
    start_execution,
    stop_execution,
)
from spaceport_gs.pipeline.aws.scenes import run_after, stop
from spaceport_gs.pipeline.aws.stack import Stack


@dataclass(frozen=True)
class Batch:
    """Many scenes, under one name."""

    name: str
    arn: str
    """Of the execution that makes those which were neither done nor under way; empty if there was none to make."""
    lost: tuple[str, ...]
    """Ids of scenes that somebody else submitted at the same time."""


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
    last = latest_run(cloud, stack, scene.scene)
    if last and last.status == UNSTARTED and last.name in queued:
        last = replace(last, status=QUEUED)
    run = same_or_next(stack, last, scene_input(scene, stack.account("sfm")))
    return run if run.status in (SUCCEEDED, RUNNING, UNSTARTED, QUEUED) else run_after(cloud, stack, run)


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
        put_once(cloud, stack.bucket, _begun_key(batch), manifest)
        arn = start_execution(cloud, stack.machines[1], batch, json.dumps(batch_input(batch, concurrency)))
    return Batch(batch, arn, tuple(run.scene for run in unstarted if run not in ours))


@explained()
def batch_scenes(cloud: Cloud, stack: Stack, batch: str) -> list[str]:
    """Ids of the scenes of a batch."""
    text = text_of(cloud, stack.bucket, _scenes_key(batch)) if BATCH_NAME.fullmatch(batch) else None
    if text is None:
        raise InputError(f"batch {batch!r}: the stack {stack.prefix} knows of none")
    return [_scene_of(name) for name in json.loads(text)]


@explained()
def begun_scenes(cloud: Cloud, stack: Stack, batch: str) -> list[str]:
    """Ids of those of its scenes that the batch itself makes."""
    known = batch_scenes(cloud, stack, batch)
    begun = {_scene_of(name) for name in _begun_by(cloud, stack, batch)}
    return [scene for scene in known if scene in begun]


@explained()
def batch_status(cloud: Cloud, stack: Stack, batch: str) -> str:
    """What Step Functions says of a batch's execution, or UNSTARTED."""
    arn = arn_of(stack.machines[1], batch)
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
    if batch_status(cloud, stack, batch) == RUNNING:
        stop_execution(cloud, arn_of(stack.machines[1], batch))
    return [job for scene in scenes for job in stop(cloud, stack, scene)]


def _is_ours(cloud: Cloud, stack: Stack, run: Run) -> bool:
    """Whether it is recorded as it is, by us or before us."""
    if record_run(cloud, stack, run):
        return True
    there = existing_run(cloud, stack, run.scene)
    return (there.name, there.given) == (run.name, run.given)


def _name_of_batch(cloud: Cloud, stack: Stack, name: str, runs: Sequence[Run], begins: bool) -> str:
    """`name`, with a number behind it where that is another batch, or one that is over while something is to begin."""
    scenes = json.dumps([run.name for run in runs])
    for number in count(1):
        batch = name if number == 1 else f"{name}-{number}"
        batch_input(batch, 1)  # it may have become too long
        key = _scenes_key(batch)
        is_this = put_once(cloud, stack.bucket, key, scenes) or text_of(cloud, stack.bucket, key) == scenes
        if is_this and (not begins or batch_status(cloud, stack, batch) in (UNSTARTED, RUNNING)):
            return batch
    raise AssertionError("there is always another number")


def _begun_by(cloud: Cloud, stack: Stack, batch: str) -> list[str]:
    """Names of the runs that a batch starts."""
    text = text_of(cloud, stack.bucket, _begun_key(batch))
    return [run["name"] for run in json.loads(text)] if text else []


def _scenes_key(batch: str) -> str:
    """Of the names of all runs of a batch."""
    return f"batches/{batch}/scenes.json"


def _begun_key(batch: str) -> str:
    """Of what the batch machine reads: those that it starts, and their inputs."""
    return f"batches/{batch}/manifest.json"


def _scene_of(name: str) -> str:
    """That a run of this name makes."""
    return name.rpartition("-")[0]
