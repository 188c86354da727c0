"""Executions that failed and are redriven."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from deployed import JOBS, VALUES
from executions import (
    ACCOUNT,
    CAPACITY,
    HAPPY,
    NO_CAPACITY,
    SCENE,
    asked,
    given_for,
    go,
    go_on,
    is_failed,
    job_failed,
    refused,
)
from interpreter import Handler, Interpreter

from spaceport_gs.pipeline.aws.flow import definition, scene_input


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
