"""The state machines that are deployed, run with every outcome of every stage, and what they ask of SageMaker, S3 and SNS."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from deployed import BUCKET, IMAGES, JOBS, USUAL, VALUES, ended
from executions import (
    ACCOUNT,
    CAPACITY,
    DIGEST,
    HAPPY,
    NO_CAPACITY,
    ON_DEMAND,
    SCENE,
    THROTTLED,
    asked,
    given_for,
    go,
    in_turn,
    is_failed,
    job_failed,
    refused,
)
from interpreter import Handler, Interpreter, client_of

from spaceport_gs.pipeline.aws.cost import Capture
from spaceport_gs.pipeline.aws.flow import batch_input, batch_manifest, scene_input
from spaceport_gs.pipeline.aws.jobs import DEFAULT_MACHINES
from spaceport_gs.pipeline.aws.orders import Order
from spaceport_gs.pipeline.aws.prices import load_prices
from spaceport_gs.pipeline.run import RunSettings


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
