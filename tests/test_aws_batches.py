"""Many scenes by one command, on the state machines that are deployed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aws_scenes import SCENE, SECONDS, STACK, SageMaker, put_results, wait_for
from deployed import BUCKET
from interpreter import Interpreter, client_of

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws import batches, watch
from spaceport_gs.pipeline.aws.batches import (
    Batch,
    batch_scenes,
    batch_status,
    begun_scenes,
    queued_runs,
    run_for_batch,
    stop_batch,
    submit_batch,
)
from spaceport_gs.pipeline.aws.cloud import Cloud
from spaceport_gs.pipeline.aws.flow import Scene
from spaceport_gs.pipeline.aws.scenes import submit
from spaceport_gs.pipeline.aws.status import status
from spaceport_gs.pipeline.aws.uploads import plan
from spaceport_gs.progress import ignore


def submit_all(cloud: Cloud, batch: str, several: Sequence[Scene], n_at_once: int = 2) -> Batch:
    """As the command does when the photos are there."""
    queued = queued_runs(cloud, STACK)
    runs = [run_for_batch(cloud, STACK, scene, queued) for scene in several]
    return submit_batch(cloud, STACK, batch, runs, n_at_once)


def named(*ids: str, **changes: Any) -> list[Scene]:
    return [replace(SCENE, scene=scene, **changes) for scene in ids]


def wait_for_batch(cloud: Cloud, batch: str, wanted: str = "SUCCEEDED") -> None:
    waiting = threading.Event()
    while (found := batch_status(cloud, STACK, batch)) == "RUNNING":
        waiting.wait(0.01)
    assert found == wanted


@pytest.fixture
def hold(aws: Interpreter, sagemaker: SageMaker) -> Iterator[threading.Event]:
    """Set, it lets jobs of SfM go on."""
    goes_on = threading.Event()

    def sfm(request: dict[str, Any], attempt: int) -> Any:
        sagemaker.put(request, "InProgress")
        assert goes_on.wait(SECONDS)
        return sagemaker.run(request, attempt)

    aws.handlers = {**aws.handlers, "Sfm": sfm}
    yield goes_on
    goes_on.set()


def test_a_batch_again_makes_what_is_not_done(
    cloud: Cloud, aws: Interpreter, sagemaker: SageMaker, tmp_path: Path
) -> None:
    """What failed goes on after its last complete stage, what was added begins, what is done stays as it is."""
    usual = aws.handlers
    for scene in ("m1", "m2", "m3"):
        put_results(scene, "sfm", tmp_path)
        put_results(scene, "compress", tmp_path)

    def train(request: dict[str, Any], attempt: int) -> Any:
        fails = "-m2-" in request["TrainingJobName"]
        return (sagemaker.fail(FailureReason="AlgorithmError: disk: full") if fails else sagemaker.run)(
            request, attempt
        )

    aws.handlers = {**usual, "TrainSpot": train}
    first = submit_all(cloud, "july", named("m1", "m2"))
    assert first.name == "july" and first.arn.endswith(":execution:spaceport-batch:july") and not first.lost
    wait_for_batch(cloud, "july")
    assert status(cloud, STACK, "m1").run.name == "m1-1"
    assert status(cloud, STACK, "m2").run.reason == "AlgorithmError: disk: full"

    aws.handlers = usual
    assert submit_all(cloud, "july", named("m1", "m2", "m3")).name == "july-2"
    wait_for_batch(cloud, "july-2")
    found = [status(cloud, STACK, scene).run for scene in batch_scenes(cloud, STACK, "july-2")]
    starts = [(run.name, run.status, json.loads(run.given)["from"]) for run in found]
    assert starts == [("m1-1", "SUCCEEDED", "sfm"), ("m2-2", "SUCCEEDED", "train"), ("m3-1", "SUCCEEDED", "sfm")]
    assert begun_scenes(cloud, STACK, "july-2") == ["m2", "m3"] and batch_scenes(cloud, STACK, "july") == ["m1", "m2"]

    n_jobs = len(sagemaker.jobs)
    assert submit_all(cloud, "july", named("m1", "m2", "m3")) == Batch("july-2", "", ())
    done = submit_all(cloud, "august", named("m1"))  # of which nothing is to be made
    assert (done.name, done.arn) == ("august", "") and begun_scenes(cloud, STACK, "august") == []
    assert [one.run.name for one in watch.follow_batch(cloud, STACK, "august", print)] == ["m1-1"]
    assert stop_batch(cloud, STACK, "august") == [] and len(sagemaker.jobs) == n_jobs

    client_of("s3").delete_object(Bucket=BUCKET, Key="batches/july/scenes.json")  # old, but AWS keeps names for 90 days
    assert submit_all(cloud, "july", named("m1", settings={"steps": 100})).name == "july-3"
    wait_for_batch(cloud, "july-3")
    assert status(cloud, STACK, "m1").run.name == "m1-2"


def test_what_is_under_way_is_followed_and_not_made_twice(
    cloud: Cloud, hold: threading.Event, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scene submitted alone, and one that waits in another batch for its turn."""
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    alone = plan(photos).scene
    for scene in (alone, "p1", "p2", "p3"):
        put_results(scene, "compress", tmp_path)
    submit(cloud, STACK, SCENE, plan(photos), ignore)
    first = submit_all(cloud, "june", named("p1", "p2"), 1)
    assert submit_all(cloud, "june", named("p1", "p2"), 2) == Batch("june", "", ())
    second = submit_all(cloud, "more", named(alone, "p1", "p2", "p3"))
    assert first.arn and second.arn and begun_scenes(cloud, STACK, "more") == ["p3"]
    for scene in (alone, "p1", "p2"):
        (other,) = named(scene, settings={"steps": 100})
        with pytest.raises(InputError, match=f"{scene}-1 makes it with other settings; stop that one first"):
            run_for_batch(cloud, STACK, other, queued_runs(cloud, STACK))
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        if line.startswith("p3"):
            hold.set()

    found = watch.follow_batch(cloud, STACK, "more", tell)
    assert [(one.run.name, one.run.status) for one in found] == [
        (f"{scene}-1", "SUCCEEDED") for scene in (alone, "p1", "p2", "p3")
    ]
    wait_for_batch(cloud, "june")


def test_a_batch_that_was_cut_off_goes_on(cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After what it makes was written down, and before it started."""
    for scene in ("r1", "r2"):
        put_results(scene, "compress", tmp_path)

    def cut_off(*arguments: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(batches, "start_execution", cut_off)
        with pytest.raises(KeyboardInterrupt):
            submit_all(cloud, "cut", named("r1", "r2"))
    assert batch_status(cloud, STACK, "cut") == "UNSTARTED" and stop_batch(cloud, STACK, "cut") == []
    assert submit_all(cloud, "cut", named("r1", "r2")).name == "cut"
    wait_for_batch(cloud, "cut")
    assert [status(cloud, STACK, scene).run.name for scene in ("r1", "r2")] == ["r1-1", "r2-1"]


def test_a_scene_that_somebody_else_submits_meanwhile(cloud: Cloud, photos: Path, tmp_path: Path) -> None:
    alone = plan(photos).scene
    for scene in (alone, "s1"):
        put_results(scene, "compress", tmp_path)
    runs = [run_for_batch(cloud, STACK, scene, ()) for scene in named(alone, "s1")]
    submit(cloud, STACK, replace(SCENE, settings={"steps": 100}), plan(photos), ignore)
    assert submit_batch(cloud, STACK, "race", runs, 2).lost == (alone,)
    wait_for_batch(cloud, "race")
    assert begun_scenes(cloud, STACK, "race") == ["s1"]
    wait_for(cloud, alone)


def test_a_batch_is_stopped_with_its_scenes(
    cloud: Cloud, aws: Interpreter, sagemaker: SageMaker, tmp_path: Path
) -> None:
    """And goes on with those that were stopped, or had not begun."""
    for scene in ("n1", "n2"):
        put_results(scene, "compress", tmp_path)
    asked, over = threading.Event(), threading.Event()

    usual = aws.handlers
    aws.handlers = {**usual, "Sfm": sagemaker.keep(asked, over)}
    submit_all(cloud, "winter", named("n1", "n2"), 1)
    assert asked.wait(SECONDS)
    (job,) = stop_batch(cloud, STACK, "winter")
    assert sagemaker.stopped == [job] and job.startswith("spaceport-sfm-n")
    over.set()
    wait_for_batch(cloud, "winter", "ABORTED")
    assert stop_batch(cloud, STACK, "winter") == []
    aws.handlers = usual
    assert submit_all(cloud, "winter", named("n1", "n2")).name == "winter-2"
    wait_for_batch(cloud, "winter-2")
    with pytest.raises(InputError, match="knows of none"):
        stop_batch(cloud, STACK, "../winter")
