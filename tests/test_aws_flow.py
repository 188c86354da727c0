"""The state machines that are deployed, run with every outcome of every stage, and what they ask of SageMaker, S3 and SNS."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from deployed import ARN, BUCKET, IMAGES, JOBS, ROLES, USUAL, VALUES, described, ended
from interpreter import (
    NO_UUID,
    PATCH_POINTS,
    Execution,
    Handler,
    Interpreter,
    TaskError,
    client_of,
    execute,
    found,
    redrive,
    wait_for_end,
)
from moto.stepfunctions.parser.asl.component.intrinsic import jsonata as moto_functions
from service_model import wrong
from statelint.config import Config
from statelint.linter import Linter
from statelint.problem import ProblemType

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws.cost import Capture
from spaceport_gs.pipeline.aws.flow import (
    MACHINES,
    Scene,
    batch_input,
    batch_manifest,
    definition,
    placeholders,
    scene_input,
    spot_of,
    template,
)
from spaceport_gs.pipeline.aws.jobs import DEFAULT_MACHINES, Account, Job, Machine
from spaceport_gs.pipeline.aws.orders import Order
from spaceport_gs.pipeline.aws.prices import load_prices
from spaceport_gs.pipeline.run import RunSettings

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


@pytest.fixture
def flow(aws: Interpreter) -> Interpreter:
    """Where the results of the compression of a scene lie."""
    client = client_of("s3")
    for key in ("scene.sog", "index.html"):
        client.put_object(Bucket=BUCKET, Key=f"work/a1/compress/{key}", Body=key.encode())
    manifest = {"outputs": {"index.html": {"sha256": DIGEST + 48 * "0"}}, "metrics": {}}
    client.put_object(Bucket=BUCKET, Key="work/a1/compress/manifest.json", Body=json.dumps(manifest).encode())
    aws.calls.clear()
    aws.slept.clear()
    return aws


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


def test_a_scene_goes_from_photos_to_a_page(flow: Interpreter) -> None:
    execution = go(flow)
    assert (execution.status, execution.states) == ("SUCCEEDED", HAPPY)
    trained = flow.calls["TrainSpot"][0]["TrainingJobName"]
    for state in ("Sfm", "TrainSpot", "Compress"):
        call, built = asked(flow, state, SCENE, trained if state == "Compress" else "")
        assert call == built
    page = f"https://scenes.example/a1/{DIGEST}/index.html"
    assert execution.output == {"scene": "a1", "page": page}
    (call,) = flow.calls["Notify"]
    assert call["TopicArn"] == VALUES["Topic"] and call["Message"]["page"] == page
    assert call["Message"]["status"] == "SUCCEEDED" and not flow.calls["NotifyFailure"] and not flow.slept


def test_what_is_published(flow: Interpreter) -> None:
    """Copies below their digest, which may be kept for ever, and a pointer to them, which may not."""
    go(flow)
    client = client_of("s3")
    page = client.get_object(Bucket=BUCKET, Key=f"published/a1/{DIGEST}/index.html")
    assert page["Body"].read() == b"index.html" and page["ContentType"] == "text/html; charset=utf-8"
    assert page["CacheControl"] == "max-age=31536000, immutable"
    assert client.get_object(Bucket=BUCKET, Key=f"published/a1/{DIGEST}/scene.sog")["Body"].read() == b"scene.sog"
    pointer = client.get_object(Bucket=BUCKET, Key="published/a1/scene.json")
    latest = json.loads(pointer["Body"].read())
    assert (latest["page"], latest["scene"]) == (f"a1/{DIGEST}/index.html", f"a1/{DIGEST}/scene.sog")
    assert pointer["CacheControl"] == "max-age=60" and pointer["ContentType"] == "application/json"


@pytest.mark.parametrize(
    ("start", "ran"),
    [
        ("sfm", ["Sfm", "TrainSpot", "Compress"]),
        ("train", ["TrainSpot", "Compress"]),
        ("compress", ["Compress"]),
        ("publish", []),
    ],
)
def test_it_starts_at_each_stage(start: str, ran: list[str], flow: Interpreter) -> None:
    trained = "spaceport-train-a1-77" if start == "compress" else ""
    execution = go(flow, scene_input(SCENE, ACCOUNT, start, trained))
    assert execution.status == "SUCCEEDED" and [state for state in execution.states if state in JOBS] == ran
    if start == "compress":
        call, built = asked(flow, "Compress", SCENE, trained)
        assert call == built


@pytest.mark.parametrize(
    ("device", "instance", "image"),
    [
        ("auto", "ml.g4dn.xlarge", "train"),
        ("cuda", "ml.g4dn.xlarge", "train"),
        ("cpu", "ml.g4dn.xlarge", "compress"),
        ("auto", "ml.c6i.4xlarge", "compress"),
        ("auto", "", "compress"),
    ],
)
def test_compression_on_an_instance_with_a_gpu(device: str, instance: str, image: str, flow: Interpreter) -> None:
    """As it is ordered: in the image of the training, which has what a GPU takes."""
    order = Order(RunSettings(device=device), {"compress": instance} if instance else {}, is_spot=True)
    estimated = order.estimated(Capture(20, 12.0), load_prices("us-east-1"))
    scene = replace(order.scene(estimated, IMAGES), scene="a1")
    assert go(flow, scene_input(scene, ACCOUNT)).status == "SUCCEEDED"
    ran = {stage: flow.calls[state][0] for state, stage in JOBS.items() if flow.calls[state]}
    assert ran["compress"]["AppSpecification"]["ImageUri"] == IMAGES[image]
    resources = ran["compress"]["ProcessingResources"]["ClusterConfig"]
    assert resources["InstanceType"] == (instance or DEFAULT_MACHINES["compress"].instance)
    assert ("VolumeKmsKeyId" in resources) == (instance != "ml.g4dn.xlarge")
    assert ran["sfm"]["AppSpecification"]["ImageUri"] == IMAGES["sfm"]
    assert ran["train"]["AlgorithmSpecification"]["TrainingImage"] == IMAGES["train"]


def test_without_spot_it_trains_on_demand(flow: Interpreter) -> None:
    execution = go(flow, scene_input(ON_DEMAND, ACCOUNT))
    call, built = asked(flow, "Train", ON_DEMAND)
    assert execution.status == "SUCCEEDED" and "TrainSpot" not in execution.states and call == built
    assert not call["EnableManagedSpotTraining"] and "MaxWaitTimeInSeconds" not in call["StoppingCondition"]


@pytest.mark.parametrize("state", JOBS)
@pytest.mark.parametrize(
    ("failure", "waits"),
    [
        (refused(CAPACITY, "The account-level service limit is 1 instance"), [60.0, 120.0]),
        (refused(THROTTLED, "Rate exceeded (Error Code: ThrottlingException)"), [5.0, 15.0]),
        (refused("SageMaker.ResourceInUseException", "Job name must be unique"), [5.0, 15.0]),
    ],
    ids=["capacity", "throttled", "name in use"],
)
def test_a_request_that_fails_twice_is_repeated(
    failure: Handler, waits: list[float], state: str, flow: Interpreter
) -> None:
    execution = go(flow, given_for(state), **{state: in_turn(failure, failure, ended())})
    assert execution.status == "SUCCEEDED" and flow.slept == waits and len(flow.calls[state]) == 3
    assert not flow.calls["Train"] or state == "Train"


@pytest.mark.parametrize("state", JOBS)
@pytest.mark.parametrize(
    ("error", "said", "reason"),
    [
        (
            "SageMaker.JobFailed",
            {"FailureReason": "AlgorithmError: internal: KeyError: 'x', exit code: 70"},
            "AlgorithmError: internal: KeyError: 'x', exit code: 70",
        ),
        (
            "States.TaskFailed",
            {"ExitMessage": 'input: "é.jpg" is no photo', "FailureReason": "AlgorithmError: , exit code: 2"},
            'input: "é.jpg" is no photo',
        ),
        ("SageMaker.JobFailed", {"FailureReason": "ClientError: No S3 objects"}, "ClientError: No S3 objects"),
    ],
    ids=["algorithm", "bad input", "no input"],
)
def test_a_job_that_fails_ends_the_scene_in_its_own_words(
    error: str, said: dict[str, str], reason: str, state: str, flow: Interpreter
) -> None:
    """At once: it would fail again."""
    execution = go(flow, given_for(state), **{state: job_failed(error, **said)})
    assert is_failed(flow, execution, JOBS[state], reason)
    assert len(flow.calls[state]) == 1 and not flow.slept and execution.states.count("Train") == (state == "Train")


@pytest.mark.parametrize("state", JOBS)
@pytest.mark.parametrize("stopped", [ended("Stopped"), job_failed(status="Stopped")], ids=["result", "error"])
def test_a_job_that_was_stopped_ends_the_scene(stopped: Handler, state: str, flow: Interpreter) -> None:
    """Whichever of the two Step Functions makes of it."""
    execution = go(flow, given_for(state), **{state: stopped})
    reason = "interrupted: the job ended as Stopped before its result was complete; retry goes on from there"
    assert is_failed(flow, execution, JOBS[state], reason)


@pytest.mark.parametrize("state", ["TrainSpot", "Train"])
@pytest.mark.parametrize("end", [ended, job_failed], ids=["result", "error"])
def test_a_training_that_took_too_long(end: Callable[..., Handler], state: str, flow: Interpreter) -> None:
    handler = end(status="Stopped", SecondaryStatus="MaxRuntimeExceeded")
    execution = go(flow, given_for(state), **{state: handler})
    reason = "interrupted: the job ended as MaxRuntimeExceeded before its result was complete; retry goes on from there"
    assert is_failed(flow, execution, "train", reason) and len(flow.calls["Train"]) == (state == "Train")


@pytest.mark.parametrize("state", JOBS)
@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (
            refused("States.Timeout"),
            "interrupted: SageMaker did not end the job in the time that it was given; see that it is stopped, then retry",
        ),
        (refused("States.Permissions", "may not"), "States.Permissions: may not"),
        (refused("SageMaker.JobFailed", '{"TrainingJobName":"cut'), 'SageMaker.JobFailed: {"TrainingJobName":"cut'),
    ],
    ids=["timeout", "permissions", "cut cause"],
)
def test_other_errors(failure: Handler, reason: str, state: str, flow: Interpreter) -> None:
    assert is_failed(flow, go(flow, given_for(state), **{state: failure}), JOBS[state], reason)
    assert not flow.slept


@pytest.mark.parametrize("state", ["Sfm", "Train", "Compress"])
@pytest.mark.parametrize(
    ("error", "waits"),
    [(CAPACITY, [60.0, 120.0, 240.0, 480.0, 900.0]), (THROTTLED, [5.0, 15.0, 45.0, 135.0])],
)
def test_requests_are_not_repeated_for_ever(error: str, waits: list[float], state: str, flow: Interpreter) -> None:
    execution = go(flow, given_for(state), **{state: refused(error, "limit 0")})
    assert is_failed(flow, execution, JOBS[state], f"{error}: limit 0") and flow.slept == waits


@pytest.mark.parametrize("state", ["Sfm", "Train", "Compress"])
def test_a_job_that_found_no_hardware_starts_again(state: str, flow: Interpreter) -> None:
    failure = job_failed(FailureReason=NO_CAPACITY)
    execution = go(flow, given_for(state), **{state: in_turn(failure, failure, ended())})
    assert execution.status == "SUCCEEDED" and flow.slept == [300, 300] and len(flow.calls[state]) == 3
    assert [len(flow.calls[other]) for other in ("Sfm", "Compress") if other != state] in ([1], [1, 1])


@pytest.mark.parametrize("state", ["Sfm", "Train", "Compress"])
def test_and_gives_up(state: str, flow: Interpreter) -> None:
    execution = go(flow, given_for(state), **{state: job_failed(FailureReason=NO_CAPACITY)})
    assert is_failed(flow, execution, JOBS[state], NO_CAPACITY) and flow.slept == 5 * [300]


@pytest.mark.parametrize("state", JOBS)
def test_a_fault_of_sagemaker_is_met_once(state: str, flow: Interpreter) -> None:
    fault = "InternalServerError: We encountered an internal error. Please try again."
    failure = job_failed(FailureReason=fault)
    execution = go(flow, given_for(state), **{state: in_turn(failure, ended())})
    assert execution.status == "SUCCEEDED" and flow.slept == [300] and len(flow.calls[state]) == 2
    flow.calls.clear()
    execution = go(flow, given_for(state), **{state: failure})
    assert is_failed(flow, execution, JOBS[state], fault) and len(flow.calls[state]) == 2


@pytest.mark.parametrize(
    ("failure", "attempts"),
    [
        (job_failed(status="Stopped", SecondaryStatus="MaxWaitTimeExceeded"), 1),
        (ended("Stopped", SecondaryStatus="MaxWaitTimeExceeded"), 1),
        (job_failed(FailureReason=NO_CAPACITY), 1),
        (refused(CAPACITY, "limit 0"), 3),
    ],
    ids=["waited, error", "waited, result", "no hardware", "no quota"],
)
def test_without_spot_instances_it_goes_on_on_demand(failure: Handler, attempts: int, flow: Interpreter) -> None:
    execution = go(flow, TrainSpot=failure)
    assert execution.status == "SUCCEEDED" and len(flow.calls["TrainSpot"]) == attempts
    call, built = asked(flow, "Train", SCENE)
    assert call == built
    assert call["CheckpointConfig"] == flow.calls["TrainSpot"][0]["CheckpointConfig"]  # where it goes on from
    call, built = asked(flow, "Compress", SCENE, call["TrainingJobName"])
    assert call == built


def test_on_demand_does_not_go_back_to_spot(flow: Interpreter) -> None:
    no = job_failed(FailureReason=NO_CAPACITY)
    execution = go(flow, TrainSpot=no, Train=in_turn(no, ended()))
    assert execution.status == "SUCCEEDED" and flow.slept == [300]
    assert (len(flow.calls["TrainSpot"]), len(flow.calls["Train"])) == (1, 2)


def test_nobody_need_hear_of_a_scene(flow: Interpreter) -> None:
    """Whether it is done, or failed."""
    down = refused("SNS.AmazonSNSException", "The topic is gone")
    execution = go(flow, Notify=down)
    assert (execution.status, execution.states[-1]) == ("SUCCEEDED", "Done") and flow.slept == [5.0, 10.0, 20.0]
    flow.calls.clear()
    flow.slept.clear()
    execution = go(flow, Sfm=job_failed(ExitMessage="input: no photos"), NotifyFailure=down)
    assert (execution.status, execution.error, execution.cause) == ("FAILED", "Spaceport.sfm", "input: no photos")
    assert flow.slept == [5.0, 10.0, 20.0]


def test_only_what_is_complete_is_published(flow: Interpreter) -> None:
    client_of("s3").delete_object(Bucket=BUCKET, Key="work/a1/compress/manifest.json")
    execution = go(flow)
    reason = "internal: there is no finished result of the stage compress; retry from there"
    assert is_failed(flow, execution, "publish", reason) and not flow.slept and not flow.calls["Copy"]


@pytest.mark.parametrize("body", ["{", '{"outputs": {}}'])
def test_a_manifest_that_is_none(body: str, flow: Interpreter) -> None:
    client_of("s3").put_object(Bucket=BUCKET, Key="work/a1/compress/manifest.json", Body=body.encode())
    execution = go(flow)
    assert (execution.status, execution.error) == ("FAILED", "Spaceport.publish") and not flow.calls["Copy"]
    assert len(flow.calls["NotifyFailure"]) == 1


@pytest.mark.parametrize("state", ["ReadManifest", "Copy", "Point"])
def test_s3_is_asked_again(state: str, flow: Interpreter) -> None:
    down = refused("S3.S3Exception", "Please reduce your request rate (Status Code: 503)")
    execution = go(flow, **{state: in_turn(down, down, USUAL[state])})
    assert execution.status == "SUCCEEDED" and flow.slept == [5.0, 10.0]
    flow.calls.clear()
    execution = go(flow, **{state: refused("S3.S3Exception", "Access Denied (Status Code: 403)")})
    assert is_failed(flow, execution, "publish", "S3.S3Exception: Access Denied (Status Code: 403)")


@pytest.mark.parametrize(
    ("wrongly", "word"),
    [
        ({"format": 2}, "format 1"),
        ({"scene": "../a"}, "scene"),
        ({"scene": "a\n"}, "scene"),
        ({"scene": 25 * "a"}, "scene"),
        ({"scene": None}, "scene"),
        ({"scene": 7}, "scene"),
        ({"scene": ""}, "scene"),
        ({"from": "bake"}, "from"),
        ({"from": "compress", "model": None}, "model"),
        ({"from": "compress", "model": ""}, "model"),
        ({"stages": {}}, "stages"),
        ({"stages": {"sfm": {}, "train": {}, "compress": {}}}, "time limit"),
    ],
)
def test_inputs_that_are_refused(wrongly: dict[str, Any], word: str, flow: Interpreter) -> None:
    execution = go(flow, {**scene_input(SCENE, ACCOUNT), **wrongly})
    assert is_failed(flow, execution, "input", execution.cause) and word in execution.cause
    assert execution.cause.startswith("input: ") and not any(flow.calls[state] for state in JOBS)


def test_an_input_of_something_else_is_refused(flow: Interpreter) -> None:
    execution = go(flow, {"hello": "world"})
    assert is_failed(flow, execution, "input", execution.cause) and "format 1" in execution.cause


def test_a_stage_without_a_request_for_spot_is_a_failure_that_is_told(flow: Interpreter) -> None:
    """An input made by hand; what the definition cannot evaluate is caught as well."""
    given = scene_input(SCENE, ACCOUNT)
    del given["model"]
    given["stages"]["spot"] = {"StoppingCondition": {}}
    execution = go(flow, given)
    assert (execution.status, execution.error) == ("FAILED", "Spaceport.train") and not flow.calls["TrainSpot"]
    assert len(flow.calls["NotifyFailure"]) == 1


# Redriven


def failing(state: str, reason: str = "memory: too little") -> dict[str, Handler]:
    """The handler with which this state fails."""
    return {state: job_failed(ExitMessage=reason) if state in JOBS else refused("S3.S3Exception", reason)}


@pytest.mark.parametrize("state", [*JOBS, "ReadManifest", "Copy", "Point"])
def test_a_redrive_goes_on_at_the_stage_that_failed(state: str, flow: Interpreter) -> None:
    """With the same request, for a job of another name: a training finds its checkpoint."""
    failed = go(flow, given_for(state), **failing(state))
    assert is_failed(flow, failed, JOBS.get(state, "publish"), failed.cause)
    done = go_on(flow, failed)
    assert done.status == "SUCCEEDED" and done.output["scene"] == "a1"
    happy = [name.replace("TrainSpot", state if state == "Train" else "TrainSpot") for name in HAPPY]
    rest = happy[happy.index(state if state in JOBS else "ReadManifest") :]
    assert done.states == [*failed.states, "Failed", "From", *rest]
    if state in JOBS:
        first, second = flow.calls[state]
        assert {name for name in first if first[name] != second[name]} <= {"ProcessingJobName", "TrainingJobName"}
    if JOBS.get(state) == "train":
        call, built = asked(flow, "Compress", SCENE, flow.calls[state][1]["TrainingJobName"])
        assert call == built


def test_a_redrive_does_not_go_back_to_spot(flow: Interpreter) -> None:
    failed = go(flow, TrainSpot=refused(CAPACITY), **failing("Train"))
    flow.calls.clear()
    assert go_on(flow, failed).status == "SUCCEEDED"
    assert (len(flow.calls["Sfm"]), len(flow.calls["TrainSpot"]), len(flow.calls["Train"])) == (0, 0, 1)


@pytest.mark.parametrize("state", ["Sfm", "TrainSpot", "Train", "Compress", "ReadManifest"])
def test_what_is_redriven_may_fail_again_and_be_redriven_again(state: str, flow: Interpreter) -> None:
    """Each failure is told, in its own words."""
    execution = go(flow, given_for(state), **failing(state, "disk: full"))
    execution = go_on(flow, execution, **failing(state, "gpu: gone"))
    stage = JOBS.get(state, "publish")
    assert (execution.status, execution.error) == ("FAILED", f"Spaceport.{stage}") and "gpu: gone" in execution.cause
    reasons = [call["Message"]["reason"] for call in flow.calls["NotifyFailure"]]
    assert len(reasons) == 2 and "disk: full" in reasons[0] and reasons[1] == execution.cause
    failed = len(flow.calls[state])
    assert go_on(flow, execution).status == "SUCCEEDED" and len(flow.calls[state]) == failed + 1


def test_after_a_failure_later_on_a_redrive_goes_on_there(flow: Interpreter) -> None:
    execution = go_on(flow, go(flow, **failing("Sfm")), **failing("Compress"))
    assert execution.error == "Spaceport.compress"
    assert go_on(flow, execution).status == "SUCCEEDED"
    assert [len(flow.calls[state]) for state in ("Sfm", "TrainSpot", "Compress")] == [2, 1, 2]


def test_a_redrive_has_the_patience_of_a_first_try(flow: Interpreter) -> None:
    failed = go(flow, Sfm=job_failed(FailureReason=NO_CAPACITY))
    go_on(flow, failed, Sfm=job_failed(FailureReason=NO_CAPACITY))
    assert flow.slept == 10 * [300]


def test_what_nobody_heard_of_is_redriven_all_the_same(flow: Interpreter) -> None:
    failed = go(flow, NotifyFailure=refused("SNS.AmazonSNSException", "The topic is gone"), **failing("Compress"))
    assert go_on(flow, failed).status == "SUCCEEDED"


def test_a_wrong_input_stays_wrong(flow: Interpreter) -> None:
    failed = go(flow, {**scene_input(SCENE, ACCOUNT), "from": "bake"})
    again = go_on(flow, failed)
    assert is_failed(flow, failed, "input", "input: from: choose sfm, train, compress or publish")
    assert again == replace(failed, states=[*failed.states, "Failed"]) and not any(flow.calls[state] for state in JOBS)


def own_failure() -> dict[str, Any]:
    return definition("scene", VALUES)["States"]["Failed"]


@pytest.mark.parametrize("error", own_failure()["Catch"][1]["ErrorEquals"])
def test_a_failure_that_cannot_be_sent_is_the_same_one(error: str, flow: Interpreter) -> None:
    """But for redrives."""
    reason, unsent = "memory: too little", refused(error, "no")
    execution = go(flow, Failed=unsent, **failing("Sfm"))
    for ends in (["Failed", "FailedForGood"], ["FailedForGood", "FailedForGood"]):
        assert (execution.status, execution.error, execution.cause) == ("FAILED", "Spaceport.sfm", reason)
        assert execution.states[-2:] == ends and len(flow.calls["NotifyFailure"]) == 1
        execution = go_on(flow, execution)


def test_a_redrive_that_cannot_be_sent_fails_in_the_same_words(flow: Interpreter) -> None:
    failed = go(flow, **failing("Sfm"))
    again = go_on(flow, failed, Failed=refused("Sfn.SfnException", "Rate exceeded"))
    assert again == replace(failed, states=[*failed.states, "Failed", "FailedForGood"])


def test_no_error_of_ours_is_caught_but_that_of_a_redrive() -> None:
    """Else a run that failed would go on, or lose what it failed with."""
    caught = {error: catch["Next"] for catch in own_failure()["Catch"] for error in catch["ErrorEquals"]}
    assert caught.pop("Spaceport.redriven") == "From" and set(caught.values()) == {"FailedForGood"}
    assert not {"States.ALL", "States.TaskFailed"} & set(caught) and not any(e.startswith("Spaceport") for e in caught)
    assert "Retry" not in own_failure()


# Many scenes


def put_batch(name: str, scenes: list[str]) -> list[dict[str, Any]]:
    inputs = [scene_input(replace(SCENE, scene=scene), ACCOUNT) for scene in scenes]
    text = batch_manifest([(f"{given['scene']}-1", given) for given in inputs])
    client = client_of("s3")
    client.put_object(Bucket=BUCKET, Key=f"batches/{name}/manifest.json", Body=text.encode())
    for scene in scenes:
        for key in ("scene.sog", "index.html", "manifest.json"):
            source = f"{BUCKET}/work/a1/compress/{key}"
            client.copy_object(Bucket=BUCKET, Key=f"work/{scene}/compress/{key}", CopySource=source)
    return inputs


def test_one_failing_scene_stops_no_other(flow: Interpreter) -> None:
    put_batch("july", ["b1", "b2", "b3"])

    def sfm(request: dict[str, Any], attempt: int) -> Any:
        fails = "-b2-" in request["ProcessingJobName"]
        return (job_failed(ExitMessage="input: b2 has no photos") if fails else ended())(request, attempt)

    execution = go(flow, batch_input("july", 2), "batch", Sfm=sfm)
    assert execution.status == "SUCCEEDED", execution
    assert execution.output["counts"] == {"Total": 3, "Succeeded": 2, "Failed": 1}
    assert sorted(call["Name"] for call in flow.calls["Scene"]) == ["b1-1", "b2-1", "b3-1"]
    assert {call["ProcessingJobName"][:21] for call in flow.calls["Compress"]} == {
        "spaceport-compress-b1", "spaceport-compress-b3",
    }  # fmt: skip
    messages = [call["Message"] for call in flow.calls["Notify"]]
    assert [message["kind"] for message in messages].count("scene") == 2
    (message,) = (message for message in messages if message["kind"] == "batch")
    assert message["counts"]["Failed"] == 1
    bucket, key = message["results"].removeprefix("s3://").split("/", 1)
    assert key.startswith("batches/july/results/")
    assert "ResultFiles" in json.loads(client_of("s3").get_object(Bucket=bucket, Key=key)["Body"].read())


def test_a_batch_gives_each_scene_its_input(flow: Interpreter) -> None:
    inputs = put_batch("june", ["c1", "c2"])
    go(flow, batch_input("june", 1), "batch")
    assert [(call["Name"], call["Input"]) for call in flow.calls["Scene"]] == [("c1-1", inputs[0]), ("c2-1", inputs[1])]


def test_a_batch_without_a_manifest_fails_and_says_so(flow: Interpreter) -> None:
    execution = go(flow, batch_input("august", 2), "batch")
    (call,) = flow.calls["NotifyFailure"]
    assert (execution.status, execution.error) == ("FAILED", "Spaceport.batch")
    assert call["Message"]["reason"] == execution.cause and call["Message"]["kind"] == "batch"


def test_a_batch_is_done_without_its_counts_and_without_notice(flow: Interpreter) -> None:
    put_batch("may", ["d1"])
    down = refused("SNS.AmazonSNSException", "The topic is gone")
    execution = go(flow, batch_input("may", 1), "batch", Count=refused("Sfn.SfnException", "no"), Notify=down)
    assert execution.status == "SUCCEEDED" and execution.output["counts"] == {}
    execution = go(flow, batch_input("none", 1), "batch", NotifyFailure=down)
    assert (execution.status, execution.error) == ("FAILED", "Spaceport.batch")


@pytest.mark.parametrize(
    ("wrongly", "word"),
    [
        ({"format": "1"}, "format 1"),
        ({"batch": "../x"}, "batch"),
        ({"batch": 7}, "batch"),
        ({"batch": None}, "batch"),
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": "3"}, "concurrency"),
        ({"concurrency": 1001}, "concurrency"),
        ({"tolerated_percentage": 101}, "tolerated_percentage"),
        ({"tolerated_percentage": -1}, "tolerated_percentage"),
    ],
)
def test_batches_that_are_refused(wrongly: dict[str, Any], word: str, flow: Interpreter) -> None:
    execution = go(flow, {**batch_input("july", 2), **wrongly}, "batch")
    assert execution.states == ["Validate", "NotifyFailure", "Failed"] and word in execution.cause
    assert execution.cause.startswith("input: ")


# Inputs


def test_inputs_bring_whole_requests_without_names_and_roles() -> None:
    stages = scene_input(SCENE, ACCOUNT)["stages"]
    assert set(stages) == {"sfm", "train", "spot", "compress"}
    for stage, request in stages.items():
        job = SCENE.job("train" if stage == "spot" else stage)
        whole = job.request(ACCOUNT, SCENE.spot if stage == "spot" else SCENE.machine(stage))
        assert set(whole) - set(request) == {"RoleArn", job.operation().removeprefix("Create") + "Name"}
        assert request == {name: whole[name] for name in request}


def test_wrong_inputs_are_not_made() -> None:
    with pytest.raises(InputError, match="stage bake"):
        scene_input(SCENE, ACCOUNT, "bake")
    with pytest.raises(InputError, match="name the training job"):
        scene_input(SCENE, ACCOUNT, "compress")
    with pytest.raises(InputError, match="twice: a1"):
        batch_manifest(2 * [("a1-1", scene_input(SCENE, ACCOUNT))])
    with pytest.raises(InputError, match="one or more scenes"):
        batch_manifest([])
    for name, concurrency, tolerated in (("../x", 1, 0), ("", 1, 0), ("a", 0, 0), ("a", 1001, 0), ("a", 1, 101)):
        with pytest.raises(InputError):
            batch_input(name, concurrency, tolerated)


# The definitions


def states_of(machine: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All of a machine, those in a Map as well."""
    found: dict[str, dict[str, Any]] = {}
    for name, state in machine["States"].items():
        assert name not in found
        found[name] = state
        if "ItemProcessor" in state:
            found.update(states_of(state["ItemProcessor"]))
    return found


def successors(state: Mapping[str, Any]) -> set[str]:
    ways = [state, *state.get("Choices", []), *state.get("Catch", [])]
    inner = {state["ItemProcessor"]["StartAt"]} if "ItemProcessor" in state else set()
    return (
        {way["Next"] for way in ways if "Next" in way} | ({state["Default"]} if "Default" in state else set()) | inner
    )


def reached(states: Mapping[str, dict[str, Any]], start: str, without: frozenset[str] = frozenset()) -> set[str]:
    """From a state, by every way that does not lead through those in `without`."""
    seen: set[str] = set()
    left = [start]
    while left:
        name = left.pop()
        if name not in seen and name not in without:
            seen.add(name)
            left += successors(states[name])
    return seen


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest) -> dict[str, Any]:
    return definition(request.param, VALUES)


def test_every_state_is_there_and_reached(machine: dict[str, Any]) -> None:
    states = states_of(machine)
    for state in states.values():
        assert successors(state) <= set(states)
        assert state["Type"] in ("Choice", "Succeed", "Fail") or ("Next" in state) != ("End" in state)
    assert reached(states, machine["StartAt"]) == set(states)


def test_everything_has_a_time_limit(machine: dict[str, Any]) -> None:
    """That of a job's task is an hour longer than the job's own, so that it is SageMaker that ends the job."""
    assert machine["TimeoutSeconds"] > 0
    for name, state in states_of(machine).items():
        if state["Type"] == "Task":
            limit = state["TimeoutSeconds"]
            job = r"\{% \$stages\.\w+\.StoppingCondition\.Max(Runtime|WaitTime)InSeconds \+ 3600 %\}"
            assert re.fullmatch(job, limit) if name in JOBS else limit > 0, name
    assert ("MaxWaitTime" in definition("scene", VALUES)["States"]["TrainSpot"]["TimeoutSeconds"]) is True


def test_every_failure_is_told_and_ends_as_one(machine: dict[str, Any]) -> None:
    """From every Catch, but for those of what a scene does not depend on; to try again is no end."""
    states = states_of(machine)
    again = frozenset({"Train", "WaitForHardware", "From"})
    unimportant = {"Notify", "NotifyFailure", "Count", "Failed"}
    for name, state in states.items():
        if state["Type"] in ("Task", "Map") and name not in unimportant | {"Copy", "Scene"}:  # these fail their Map
            (catch,) = state["Catch"]
            assert catch["ErrorEquals"] == ["States.ALL"]
            ends = {end for end in reached(states, catch["Next"], again) if states[end]["Type"] in ("Succeed", "Fail")}
            assert ends == {"FailedForGood" if "FailedForGood" in states else "Failed"}
            assert "Failed" not in reached(states, catch["Next"], again | {"NotifyFailure"})
    assert states["Notify"]["Catch"][0]["Next"] == "Done" and states["NotifyFailure"]["Catch"][0]["Next"] == "Failed"


def test_all_jobs_are_retried_alike() -> None:
    states = definition("scene", VALUES)["States"]
    for name in JOBS:
        capacity, throttled = states[name]["Retry"]
        assert capacity == {**states["Sfm"]["Retry"][0], "MaxAttempts": 2 if name == "TrainSpot" else 5}
        assert throttled == states["Sfm"]["Retry"][1]
        assert capacity["JitterStrategy"] == throttled["JitterStrategy"] == "FULL"
        assert "$uuid()" in states[name]["Arguments"]  # evaluated anew for each attempt


def test_names_of_jobs_are_short_enough() -> None:
    """With the longest id, and a prefix of twenty characters."""
    for job in re.findall(r"JobName': '(.*?)' & \$scene & '-' & \$substring\(\$uuid\(\), 0, (\d)\)", template("scene")):
        assert len(job[0].replace("${Prefix}", 20 * "p")) + 24 + 1 + int(job[1]) <= 63


def test_placeholders() -> None:
    assert placeholders("scene") == set(VALUES) - {"SceneMachine"}
    assert placeholders("batch") == {"Bucket", "SceneMachine", "Topic"}
    for machine in MACHINES:
        assert "${" not in json.dumps(definition(machine, VALUES))
    with pytest.raises(KeyError):
        definition("scene", {})


def test_the_language_is_spoken_well(machine: dict[str, Any]) -> None:
    """By statelint, which does not know that numbers may be JSONata, nor two of the fields."""
    for state in states_of(machine).values():
        for name in ("TimeoutSeconds", "MaxConcurrency", "ToleratedFailurePercentage"):
            if isinstance(state.get(name), str):
                state[name] = 1
    unknown = re.compile(r'Field "(Label|InputType)" not allowed')
    problems = Linter.validate(machine, Config(ignored_problem_types={ProblemType.FLOAT}))
    assert not [problem for problem in problems if not unknown.match(problem)]
    machine["States"]["Validate"]["Default"] = "Nowhere"
    assert any("Nowhere" in problem for problem in Linter.validate(machine))


# What the interpreter rests on


@pytest.mark.parametrize("point", PATCH_POINTS)
def test_moto_has_what_is_replaced_in_it(point: str) -> None:
    owner, name = found(point)
    assert hasattr(owner, name)


def test_moto_is_the_pinned_one() -> None:
    assert NO_UUID in moto_functions._DECLARATION_UUID
    constraints = (Path(__file__).parent.parent / "constraints.txt").read_text()
    assert f"moto=={importlib.metadata.version('moto')}\n" in constraints
