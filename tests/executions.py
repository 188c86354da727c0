"""Executions of the state machines that are deployed, for tests: what tasks come to, and checks of what was asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from deployed import ARN, BUCKET, IMAGES, JOBS, ROLES, USUAL, described
from interpreter import Execution, Handler, Interpreter, TaskError, execute, redrive, wait_for_end
from service_model import wrong

from spaceport_gs.pipeline.aws.flow import Scene, scene_input, spot_of
from spaceport_gs.pipeline.aws.jobs import DEFAULT_MACHINES, Account, Job, Machine

KEY = ARN.format("kms", "key/0a1b-2c")
# What users write must not be taken for what SageMaker says.
SETTINGS = {"steps": 7000, "title": 'é "3" \\ {"FailureReason":"CapacityError: "}'}
ON_DEMAND = Scene("a1", IMAGES, SETTINGS, {"train": Machine("ml.g6.xlarge", max_seconds=5000)})
SCENE = replace(ON_DEMAND, spot=spot_of(DEFAULT_MACHINES["train"]))
ACCOUNT = Account(BUCKET, "", KEY)
DIGEST = "0123456789abcdef"

CAPACITY, THROTTLED = "SageMaker.ResourceLimitExceededException", "SageMaker.AmazonSageMakerException"
NO_CAPACITY = "CapacityError: Unable to provision requested ML compute capacity."
HAPPY = [
    "Validate", "From", "Sfm", "SfmDone", "SpotOrNot", "TrainSpot", "TrainDone", "Compress", "CompressDone",
    "ReadManifest", "Publish", "Copy", "Copy", "Point", "Notify", "Done",
]  # fmt: skip


def job_failed(error: str = "SageMaker.JobFailed", status: str = "Failed", **said: str) -> Handler:
    """The error that says how a job ended."""

    def handler(request: dict[str, Any], attempt: int) -> Any:
        raise TaskError(error, json.dumps(described(request, status, said), separators=(",", ":")))

    return handler


def refused(error: str, cause: str = "") -> Handler:
    """A task that does not come to anything."""

    def handler(request: dict[str, Any], attempt: int) -> Any:
        raise TaskError(error, cause)

    return handler


def in_turn(*handlers: Handler) -> Handler:
    """Of a first call, a second one, …; the last one stays."""
    left = list(handlers)
    return lambda request, attempt: (left.pop(0) if len(left) > 1 else left[0])(request, attempt)


OPERATIONS = {
    "ReadManifest": ("s3", "GetObject"), "Copy": ("s3", "CopyObject"), "Point": ("s3", "PutObject"),
    "Scene": ("stepfunctions", "StartExecution"), "Failed": ("stepfunctions", "SendTaskFailure"),
    "Notify": ("sns", "Publish"), "NotifyFailure": ("sns", "Publish"), "Count": ("stepfunctions", "DescribeMapRun"),
}  # fmt: skip


def go(flow: Interpreter, given: Any = None, machine: str = "scene", **handlers: Handler) -> Execution:
    """An execution, checked."""
    flow.handlers = {**USUAL, **handlers}
    execution = execute(ARN.format("states", f"stateMachine:spaceport-{machine}"), given or scene_input(SCENE, ACCOUNT))
    check_calls(flow)
    return execution


def go_on(flow: Interpreter, execution: Execution, **handlers: Handler) -> Execution:
    """The same, redriven and checked."""
    flow.handlers = {**USUAL, **handlers}
    redrive(execution.arn)
    again = wait_for_end(execution.arn)
    check_calls(flow)
    return again


def check_calls(flow: Interpreter) -> None:
    """Whatever was asked for is what the services take, and no job has another one's name."""
    names = [call[name] for state in JOBS for call in flow.calls[state] for name in call if name.endswith("JobName")]
    assert len(set(names)) == len(names)
    for state, calls in flow.calls.items():
        service, operation = OPERATIONS.get(
            state, ("sagemaker", "CreateTrainingJob" if state.startswith("Train") else "CreateProcessingJob")
        )
        for call in calls:
            bodies = {name: json.dumps(call[name]) for name in ("Message", "Body", "Input") if name in call}
            whole = {**call, **bodies}
            if service == "stepfunctions":  # whose own API has names in lower case
                whole = {name[0].lower() + name[1:]: value for name, value in whole.items()}
            assert not wrong(operation, whole, service)
            assert len(call.get("Subject", "")) <= 100 and call.get("Subject", "").isascii()


def given_for(state: str) -> dict[str, Any]:
    """An input with which this state is reached."""
    return scene_input(ON_DEMAND if state == "Train" else SCENE, ACCOUNT)


def is_failed(flow: Interpreter, execution: Execution, stage: str, reason: str) -> bool:
    """At this stage and in these words, which were also sent; nothing came after it."""
    (message,) = (call["Message"] for call in flow.calls["NotifyFailure"])
    return (
        (execution.status, execution.error, execution.cause) == ("FAILED", f"Spaceport.{stage}", reason)
        and (message["status"], message["stage"], message["reason"]) == ("FAILED", stage, reason)
        and execution.states[-2:] == ["NotifyFailure", "Failed"]
        and not flow.calls["Notify"]
    )


def requested(job: Job, machine: Machine) -> dict[str, Any]:
    """What the builder of requests makes of a job."""
    return job.request(replace(ACCOUNT, role=ROLES[job.stage]), machine)


def asked(flow: Interpreter, state: str, scene: Scene, trained: str = "") -> tuple[Any, Any]:
    """(request of the only job of this state, what the builder makes for its name)."""
    (call,) = flow.calls[state]
    stage = JOBS[state]
    name = call.get("TrainingJobName") or call["ProcessingJobName"]
    job = scene.job(stage, attempt=name.rsplit("-", 1)[1], trained=trained)
    machine = scene.spot if state == "TrainSpot" and scene.spot else scene.machine(stage)
    return call, requested(job, machine)
