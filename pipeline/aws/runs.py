"""Runs of a scene's flow: what was asked for, and what became of it.

Every run has a record in the bucket, jobs/SCENE/0001.json and so on, written before its execution starts and never again: so
who submits twice, or at the same time as somebody else, gets the run that is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import PurePosixPath
from typing import Any

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws.cloud import ClientError, Cloud, code_of, explained
from spaceport_gs.pipeline.aws.jobs import SCENE_ID
from spaceport_gs.pipeline.aws.objects import put_once, text_of
from spaceport_gs.pipeline.aws.stack import Stack

RUNNING, SUCCEEDED = "RUNNING", "SUCCEEDED"
UNSTARTED = "UNSTARTED"  # recorded, and then somebody was cut off
QUEUED = "QUEUED"  # recorded, and a batch that is under way will start it
STOPPED = "Spaceport.stopped"


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


@explained()
def runs_of(cloud: Cloud, stack: Stack, scene: str) -> list[Run]:
    """All runs of a scene, in their order."""
    found = [_recorded(cloud, stack, scene, key, when) for key, when in sorted(_records(cloud, stack, scene).items())]
    if not found:
        raise _unknown(stack, scene)
    return found


def latest_run(cloud: Cloud, stack: Stack, scene: str) -> Run | None:
    """None if a scene has none."""
    records = _records(cloud, stack, scene)
    return _recorded(cloud, stack, scene, max(records), records[max(records)]) if records else None


def existing_run(cloud: Cloud, stack: Stack, scene: str) -> Run:
    """The latest of a scene. InputError if it has none."""
    run = latest_run(cloud, stack, scene)
    if run is None:
        raise _unknown(stack, scene)
    return run


def same_or_next(stack: Stack, last: Run | None, given: Mapping[str, Any]) -> Run:
    """The last run of a scene if it is asked for the same, else the one after it. InputError while the last is under way."""
    scene = str(given["scene"])
    if last is None:
        return new_run(stack, scene, 1, given)
    if last.stages == given["stages"]:
        return last
    if last.status in (RUNNING, QUEUED) or is_being_started(last):
        raise InputError(f"scene {scene}: {last.name} makes it with other settings; stop that one first")
    return new_run(stack, scene, last.number + 1, given)


def new_run(stack: Stack, scene: str, number: int, given: Mapping[str, Any]) -> Run:
    """That is not recorded yet."""
    text, now = json.dumps(given, sort_keys=True), datetime.now(timezone.utc)
    return Run(scene, number, text, now, arn_of(stack.machines[0], f"{scene}-{number}"), UNSTARTED)


def record_run(cloud: Cloud, stack: Stack, run: Run) -> bool:
    """Takes its number; False if somebody else has it."""
    return put_once(cloud, stack.bucket, f"jobs/{run.scene}/{run.number:04}.json", run.given)


def is_being_started(run: Run) -> bool:
    """By somebody, just now; who was cut off half an hour ago does not come back."""
    return run.status == UNSTARTED and datetime.now(timezone.utc) - run.recorded < timedelta(minutes=30)


def start_run(cloud: Cloud, stack: Stack, run: Run) -> Run:
    """As it is then; unless it is recorded only, it stays as it is."""
    if run.status != UNSTARTED:
        return run
    return _described(cloud, replace(run, arn=start_execution(cloud, stack.machines[0], run.name, run.given)))


def start_execution(cloud: Cloud, machine: str, name: str, given: str) -> str:
    """ARN of the execution of this name, which is started unless it was."""
    try:
        answer = cloud.client("stepfunctions").start_execution(stateMachineArn=machine, name=name, input=given)
        return str(answer["executionArn"])
    except ClientError as error:
        if code_of(error) != "ExecutionAlreadyExists":
            raise
        return arn_of(machine, name)


def stop_execution(cloud: Cloud, arn: str) -> None:
    """Unless it is over."""
    states, cause = cloud.client("stepfunctions"), "stopped by its user; retry goes on from there"
    if states.describe_execution(executionArn=arn)["status"] == RUNNING:
        states.stop_execution(executionArn=arn, error=STOPPED, cause=cause)


def arn_of(machine: str, name: str) -> str:
    """Of an execution of a state machine, by the machine's ARN."""
    return f"{machine.replace(':stateMachine:', ':execution:')}:{name}"


def checked_id(scene: str) -> str:
    """The same. InputError if that is no id of a scene."""
    if not SCENE_ID.fullmatch(scene):
        raise InputError(f"scene {scene!r}: an id has 1 to 24 lower-case letters and digits")
    return scene


def _unknown(stack: Stack, scene: str) -> InputError:
    return InputError(f"scene {scene}: the stack {stack.prefix} knows of none; submit its photos")


def _records(cloud: Cloud, stack: Stack, scene: str) -> dict[str, datetime]:
    """Of a scene's runs: when they were made, by their keys."""
    prefix = f"jobs/{checked_id(scene)}/"
    pages = cloud.client("s3").get_paginator("list_objects_v2").paginate(Bucket=stack.bucket, Prefix=prefix)
    return {entry["Key"]: entry["LastModified"] for page in pages for entry in page.get("Contents", [])}


def _recorded(cloud: Cloud, stack: Stack, scene: str, key: str, when: datetime) -> Run:
    number, given = int(PurePosixPath(key).stem), text_of(cloud, stack.bucket, key) or ""
    arn = arn_of(stack.machines[0], f"{scene}-{number}")
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
