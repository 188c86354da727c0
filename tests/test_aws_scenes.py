"""Scenes submitted, stopped and gone on with, on the state machines that are deployed."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import boto3
import pytest
from aws_scenes import SCENE, SECONDS, SETTINGS, STACK, SageMaker, make, put_results, wait_for
from deployed import BUCKET
from interpreter import REGION, Interpreter, TaskError, client_of, redrive

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws.cloud import Cloud
from spaceport_gs.pipeline.aws.commands.costs import bill_for
from spaceport_gs.pipeline.aws.drills import parsed
from spaceport_gs.pipeline.aws.flow import scene_input
from spaceport_gs.pipeline.aws.results import fetch
from spaceport_gs.pipeline.aws.runs import UNSTARTED, Run, is_being_started, new_run, record_run
from spaceport_gs.pipeline.aws.scenes import retry, stop, submit
from spaceport_gs.pipeline.aws.status import status
from spaceport_gs.pipeline.aws.uploads import plan
from spaceport_gs.pipeline.aws.watch import as_progress
from spaceport_gs.progress import ignore


def test_photos_become_a_scene(cloud: Cloud, photos: Path, tmp_path: Path) -> None:
    upload, run = make(cloud, photos, tmp_path)
    assert run.name == f"{upload.scene}-1" and run.arn.endswith(f":execution:spaceport-scene:{run.name}")
    done = wait_for(cloud, upload.scene)
    assert done.run.output and done.run.output["scene"] == upload.scene
    assert [(job.is_training, job.status) for job in done.jobs] == [
        (False, "Completed"), (True, "Completed"), (False, "Completed"),
    ]  # fmt: skip
    assert done.jobs[1].detail == "Completed" and done.jobs[1].request["EnableManagedSpotTraining"]
    inputs = json.loads(done.run.given)["stages"]["sfm"]["ProcessingInputs"]
    assert inputs[0]["S3Input"]["S3Uri"] == f"s3://{BUCKET}/inputs/{upload.scene}/photos/"


def test_twice_is_once(cloud: Cloud, photos: Path, tmp_path: Path) -> None:
    """While it runs and when it is done; at the same time as well."""
    upload = plan(photos)
    put_results(upload.scene, "compress", tmp_path)
    runs: list[Run] = []
    users = [
        threading.Thread(target=lambda: runs.append(submit(cloud, STACK, SCENE, upload, ignore))) for _ in range(4)
    ]
    for user in users:
        user.start()
    for user in users:
        user.join()
    wait_for(cloud, upload.scene)
    runs.append(submit(cloud, STACK, SCENE, upload, ignore))
    assert {run.name for run in runs} == {f"{upload.scene}-1"} and len(runs) == 5
    assert runs[-1].status == "SUCCEEDED"


def test_threads_share_their_clients() -> None:
    cloud = Cloud(boto3.Session("key", "secret", region_name=REGION))
    together, found = threading.Barrier(8), list[Any]()

    def user() -> None:
        together.wait(SECONDS)
        found.append(cloud.client("stepfunctions"))

    users = [threading.Thread(target=user) for _ in range(8)]
    for one in users:
        one.start()
    for one in users:
        one.join()
    assert len(found) == 8 and len({id(client) for client in found}) == 1


def test_two_users_with_other_settings_at_once_make_one_run(cloud: Cloud, aws: Interpreter, sagemaker: SageMaker, photos: Path, tmp_path: Path) -> None:  # fmt: skip
    """Whoever comes second hears of the first, and nothing of theirs starts."""
    upload, together, goes_on = plan(photos), threading.Barrier(4), threading.Event()
    put_results(upload.scene, "compress", tmp_path)
    runs, refused = list[Run](), list[str]()

    def sfm(request: dict[str, Any], attempt: int) -> Any:
        assert goes_on.wait(SECONDS)
        return sagemaker.run(request, attempt)

    def user(steps: int) -> None:
        together.wait(SECONDS)
        try:
            runs.append(submit(cloud, STACK, replace(SCENE, settings={"steps": steps}), upload, ignore))
        except InputError as error:
            refused.append(str(error))

    aws.handlers = {**aws.handlers, "Sfm": sfm}
    users = [threading.Thread(target=user, args=(steps,)) for steps in (100, 200, 300, 400)]
    for one in users:
        one.start()
    for one in users:
        one.join()
    assert [run.name for run in runs] == [f"{upload.scene}-1"] and len(refused) == 3
    assert all(f"{upload.scene}-1 makes it with other settings; stop that one first" in line for line in refused)
    goes_on.set()
    wait_for(cloud, upload.scene)
    assert len(client_of("s3").list_objects_v2(Bucket=BUCKET, Prefix=f"jobs/{upload.scene}/")["Contents"]) == 1


def test_other_settings_are_another_run(
    cloud: Cloud, aws: Interpreter, sagemaker: SageMaker, photos: Path, tmp_path: Path
) -> None:
    """When the first has ended."""
    upload, goes_on = plan(photos), threading.Event()
    put_results(upload.scene, "compress", tmp_path)

    def sfm(request: dict[str, Any], attempt: int) -> Any:
        assert goes_on.wait(SECONDS)
        return sagemaker.run(request, attempt)

    aws.handlers = {**aws.handlers, "Sfm": sfm}
    submit(cloud, STACK, SCENE, upload, ignore)
    other = replace(SCENE, settings={"steps": 100})
    with pytest.raises(InputError, match=rf"{upload.scene}-1 makes it with other settings"):
        submit(cloud, STACK, other, upload, ignore)
    with pytest.raises(InputError, match="still runs"):
        retry(cloud, STACK, upload.scene)
    goes_on.set()
    wait_for(cloud, upload.scene)
    assert submit(cloud, STACK, other, upload, ignore).name == f"{upload.scene}-2"
    wait_for(cloud, upload.scene)


def test_who_was_cut_off_after_the_record(cloud: Cloud, photos: Path, tmp_path: Path) -> None:
    """Goes on by the same command, and is in nobody's way for long."""
    upload = plan(photos)
    put_results(upload.scene, "compress", tmp_path)
    scene = replace(SCENE, scene=upload.scene)
    given = scene_input(scene, STACK.account("sfm"))
    assert record_run(cloud, STACK, new_run(STACK, upload.scene, 1, given))
    assert status(cloud, STACK, upload.scene).run.status == UNSTARTED and stop(cloud, STACK, upload.scene) == []
    with pytest.raises(InputError, match="other settings"):
        submit(cloud, STACK, replace(SCENE, settings={"steps": 100}), upload, ignore)
    run = submit(cloud, STACK, SCENE, upload, ignore)
    assert run.name == f"{upload.scene}-1" and wait_for(cloud, upload.scene).run.status == "SUCCEEDED"
    long_ago = replace(run, status=UNSTARTED, recorded=datetime.now(timezone.utc) - timedelta(hours=1))
    assert not is_being_started(long_ago)


@pytest.mark.parametrize("state", ["Sfm", "TrainSpot"])
def test_stop_ends_the_flow_and_the_job(
    state: str, cloud: Cloud, aws: Interpreter, sagemaker: SageMaker, photos: Path, tmp_path: Path
) -> None:
    """By the names in the history; a second time there is nothing left to stop."""
    upload, asked, over = plan(photos), threading.Event(), threading.Event()

    aws.handlers = {**aws.handlers, state: sagemaker.keep(asked, over)}
    sagemaker.put({"ProcessingJobName": f"spaceport-sfm-{upload.scene}-another"}, "InProgress")
    submit(cloud, STACK, SCENE, upload, ignore)
    assert asked.wait(SECONDS)
    (name,) = stop(cloud, STACK, upload.scene)
    assert name.startswith(f"spaceport-{'sfm' if state == 'Sfm' else 'train'}-{upload.scene}-")
    assert sagemaker.stopped == [name] and stop(cloud, STACK, upload.scene) == []
    over.set()  # moto lets a task end before it stops
    assert wait_for(cloud, upload.scene, "ABORTED").jobs[-1].status == "Stopped"

    put_results(upload.scene, "sfm", tmp_path)
    put_results(upload.scene, "compress", tmp_path)
    aws.handlers = {**aws.handlers, state: sagemaker.run}
    again = retry(cloud, STACK, upload.scene)
    assert again.number == 2 and json.loads(again.given)["from"] == "train"
    wait_for(cloud, upload.scene)


@pytest.mark.parametrize(
    ("state", "results", "start"),
    [
        ("Sfm", [], "sfm"),
        ("TrainSpot", ["sfm"], "train"),
        ("TrainSpot", [], "sfm"),
        ("Compress", ["sfm"], "compress"),
    ],
)
def test_retry_goes_on_after_what_is_complete(
    state: str,
    results: list[str],
    start: str,
    cloud: Cloud,
    aws: Interpreter,
    sagemaker: SageMaker,
    photos: Path,
    tmp_path: Path,
) -> None:
    upload, usual = plan(photos), aws.handlers
    for stage in results:
        put_results(upload.scene, stage, tmp_path)
    aws.handlers = {**usual, state: sagemaker.fail(FailureReason="AlgorithmError: disk: full")}
    submit(cloud, STACK, SCENE, upload, ignore)
    failed = wait_for(cloud, upload.scene, "FAILED")
    assert failed.run.reason == failed.jobs[-1].reason == "AlgorithmError: disk: full"
    trained = [job.description["ModelArtifacts"]["S3ModelArtifacts"] for job in failed.jobs if job.is_training]

    aws.handlers = usual
    put_results(upload.scene, "compress", tmp_path)
    given = json.loads(retry(cloud, STACK, upload.scene).given)
    assert given["from"] == start and given["model"] == (trained[0] if start == "compress" else "")
    wait_for(cloud, upload.scene)
    with pytest.raises(InputError, match="is done"):
        retry(cloud, STACK, upload.scene)


def test_a_scene_that_is_done_begins_again_where_one_says(cloud: Cloud, photos: Path, tmp_path: Path) -> None:
    upload, _ = make(cloud, photos, tmp_path)
    wait_for(cloud, upload.scene)
    starts = ("publish", "compress", "train", "sfm")
    for number, start in enumerate(starts, 2):
        again = retry(cloud, STACK, upload.scene, start)
        given = json.loads(again.given)
        assert again.number == number and given["from"] == start and bool(given["model"]) == (number < 4)
        wait_for(cloud, upload.scene)
    with pytest.raises(InputError, match="stage cook: choose sfm, train, compress, publish"):
        retry(cloud, STACK, upload.scene, "cook")
    client_of("s3").delete_object(Bucket=BUCKET, Key=f"work/{upload.scene}/compress/manifest.json")
    with pytest.raises(InputError, match="nothing to begin at publish with; compress is not done"):
        retry(cloud, STACK, upload.scene, "publish")


def test_retry_does_not_rehearse_again(
    cloud: Cloud, aws: Interpreter, sagemaker: SageMaker, photos: Path, tmp_path: Path
) -> None:
    """Whatever was to go wrong, on spot instances and on demand; everything else is asked for as before."""
    asked = list[dict[str, Any]]()

    def drilled(request: dict[str, Any], attempt: int) -> Any:
        asked.append(request)
        return (sagemaker.fail(FailureReason="AlgorithmError: ") if len(asked) == 1 else sagemaker.run)(
            request, attempt
        )

    aws.handlers = {**aws.handlers, "TrainSpot": drilled}
    upload, _ = make(cloud, photos, tmp_path, replace(SCENE, drills={"train": parsed("train:crash@5")}))
    failed = wait_for(cloud, upload.scene, "FAILED")
    with_it = {stage for stage, request in failed.run.stages.items() if "SPACEPORT_DRILL" in request["Environment"]}
    assert with_it == {"train", "spot"}
    again = retry(cloud, STACK, upload.scene)
    wait_for(cloud, upload.scene)
    first, second = (request["Environment"] for request in asked)
    assert first == {**second, "SPACEPORT_DRILL": "train:crash@5", "SPACEPORT_DRILLS": "1"}
    assert again.stages == scene_input(replace(SCENE, scene=upload.scene), STACK.account("sfm"))["stages"]


def test_retry_publishes_what_could_not_be(
    cloud: Cloud, aws: Interpreter, sagemaker: SageMaker, photos: Path, tmp_path: Path
) -> None:
    usual = aws.handlers

    def denied(request: dict[str, Any], attempt: int) -> Any:
        raise TaskError("S3.S3Exception", "Access Denied")

    aws.handlers = {**usual, "Copy": denied}
    upload, _ = make(cloud, photos, tmp_path)
    wait_for(cloud, upload.scene, "FAILED")
    aws.handlers = usual
    n_jobs = len(sagemaker.jobs)
    assert json.loads(retry(cloud, STACK, upload.scene).given)["from"] == "publish"
    wait_for(cloud, upload.scene)
    assert len(sagemaker.jobs) == n_jobs


def test_a_run_that_was_redriven_runs_again(
    cloud: Cloud, aws: Interpreter, sagemaker: SageMaker, photos: Path, tmp_path: Path
) -> None:
    """To whoever looks at it, stops it, or goes on with it."""
    asked, over = threading.Event(), threading.Event()

    usual = aws.handlers
    aws.handlers = {**usual, "TrainSpot": sagemaker.fail(FailureReason="AlgorithmError: gpu: gone")}
    upload, run = make(cloud, photos, tmp_path)
    wait_for(cloud, upload.scene, "FAILED")
    aws.handlers = {**usual, "TrainSpot": sagemaker.keep(asked, over)}
    redrive(run.arn)
    assert asked.wait(SECONDS)
    found = status(cloud, STACK, upload.scene)
    assert (found.run.name, found.run.status, found.run.reason, found.state) == (run.name, "RUNNING", "", "TrainSpot")
    assert [job.status for job in found.jobs] == ["Completed", "Failed", "InProgress"]
    assert [(one.stage, one.message) for one in as_progress(found)] == [("sfm", "done"), ("train", "InProgress")]
    assert submit(cloud, STACK, SCENE, upload, ignore).status == "RUNNING"
    with pytest.raises(InputError, match="still runs"):
        retry(cloud, STACK, upload.scene)
    assert stop(cloud, STACK, upload.scene) == [found.jobs[-1].name] == sagemaker.stopped
    over.set()  # moto lets a task end before it stops
    stopped = wait_for(cloud, upload.scene, "ABORTED")
    assert [job.status for job in stopped.jobs] == ["Completed", "Failed", "Stopped"]

    aws.handlers = usual
    assert json.loads(retry(cloud, STACK, upload.scene).given)["from"] == "train"
    assert wait_for(cloud, upload.scene).run.number == 2
    assert len(bill_for(cloud, STACK, [upload.scene])[0]["jobs"]) == 5


@pytest.mark.parametrize("damage", ["settings", "missing", "short", "no manifest", "another stage"])
def test_results_that_are_not_whole_or_not_ours_are_made_again(
    damage: str, cloud: Cloud, aws: Interpreter, sagemaker: SageMaker, photos: Path, tmp_path: Path
) -> None:
    upload, s3 = plan(photos), client_of("s3")
    put_results(upload.scene, "sfm", tmp_path, {"steps": 100} if damage == "settings" else SETTINGS)
    folder = f"work/{upload.scene}/sfm"
    if damage == "missing":
        s3.delete_object(Bucket=BUCKET, Key=f"{folder}/sparse.bin")
    elif damage == "short":
        s3.put_object(Bucket=BUCKET, Key=f"{folder}/sparse.bin", Body=b"s")
    elif damage == "no manifest":
        s3.put_object(Bucket=BUCKET, Key=f"{folder}/manifest.json", Body=b"[]")
    elif damage == "another stage":
        text = (tmp_path / upload.scene / "sfm/manifest.json").read_text().replace('"sfm"', '"train"')
        s3.put_object(Bucket=BUCKET, Key=f"{folder}/manifest.json", Body=text.encode())
    usual = aws.handlers
    aws.handlers = {**usual, "TrainSpot": sagemaker.fail(FailureReason="AlgorithmError: gpu: gone")}
    submit(cloud, STACK, SCENE, upload, ignore)
    wait_for(cloud, upload.scene, "FAILED")
    aws.handlers = usual
    put_results(upload.scene, "compress", tmp_path)
    assert json.loads(retry(cloud, STACK, upload.scene).given)["from"] == "sfm"
    wait_for(cloud, upload.scene)


@pytest.mark.parametrize("scene", ["", "../a", "A1", "a1\n", 25 * "a"])
def test_odd_ids(scene: str, cloud: Cloud, tmp_path: Path) -> None:
    for action in (status, stop, retry):
        with pytest.raises(InputError, match="an id has"):
            action(cloud, STACK, scene)
    with pytest.raises(InputError, match="an id has"):
        fetch(cloud, STACK, scene, tmp_path, ignore)


def test_an_unknown_scene(cloud: Cloud) -> None:
    with pytest.raises(InputError, match="knows of none"):
        status(cloud, STACK, "nothere")
