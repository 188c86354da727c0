"""The definitions of the state machines, their inputs, and what the interpreter of the tests rests on."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from deployed import JOBS, VALUES
from executions import ACCOUNT, SCENE
from interpreter import NO_UUID, PATCH_POINTS, found
from moto.stepfunctions.parser.asl.component.intrinsic import jsonata as moto_functions
from statelint.config import Config
from statelint.linter import Linter
from statelint.problem import ProblemType

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws.flow import (
    MACHINES,
    batch_input,
    batch_manifest,
    definition,
    placeholders,
    scene_input,
    template,
)

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
