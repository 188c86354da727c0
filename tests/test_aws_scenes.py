"""Scenes submitted, followed, stopped, gone on with and fetched, on the state machines that are deployed."""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from botocore.stub import Stubber
from deployed import BUCKET, IMAGES, USUAL, VALUES, deployed, described
from interpreter import REGION, Interpreter, TaskError, client_of

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws import scenes, uploads, watch
from spaceport_gs.pipeline.aws.cloud import Cloud
from spaceport_gs.pipeline.aws.drills import parsed
from spaceport_gs.pipeline.aws.flow import Scene, scene_input, spot_of
from spaceport_gs.pipeline.aws.jobs import DEFAULT_MACHINES
from spaceport_gs.pipeline.aws.prices import load_prices
from spaceport_gs.pipeline.aws.scenes import (
    Batch,
    Run,
    batch_scenes,
    batch_status,
    begun_scenes,
    fetch,
    queued_runs,
    retry,
    run_for_batch,
    status,
    stop,
    stop_batch,
    submit,
    submit_batch,
)
from spaceport_gs.pipeline.aws.stack import Stack
from spaceport_gs.pipeline.aws.timeline import add_to_report
from spaceport_gs.pipeline.aws.uploads import Upload, plan, send
from spaceport_gs.pipeline.capture import as_folder
from spaceport_gs.pipeline.manifest import read_manifest, write_manifest
from spaceport_gs.pipeline.run import RunSettings
from spaceport_gs.progress import Progress, ignore

STACK = Stack(
    "spaceport",
    REGION,
    {
        "Bucket": BUCKET,
        "SfmRole": VALUES["SfmRole"],
        "SceneMachine": VALUES["SceneMachine"],
        "BatchMachine": VALUES["SceneMachine"].replace("scene", "batch"),
    },
    {},
)
SETTINGS = {"steps": 7000, "title": 'Quarry "é"'}
SCENE = Scene("a1", IMAGES, SETTINGS, spot=spot_of(DEFAULT_MACHINES["train"]))
SECONDS = 30


class SageMaker:
    """The service as far as jobs are looked at and stopped, which moto's are not; tests say what becomes of them."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.stopped: list[str] = []

    def described(self, name: str) -> dict[str, Any]:
        if name not in self.jobs:
            raise ClientError({"Error": {"Code": "ValidationException", "Message": "not found"}}, "Describe")
        return self.jobs[name]

    def describe_training_job(self, TrainingJobName: str) -> dict[str, Any]:
        return self.described(TrainingJobName)

    def describe_processing_job(self, ProcessingJobName: str) -> dict[str, Any]:
        return self.described(ProcessingJobName)

    def stop_training_job(self, TrainingJobName: str) -> None:
        self.stop(TrainingJobName, "TrainingJobStatus")

    def stop_processing_job(self, ProcessingJobName: str) -> None:
        self.stop(ProcessingJobName, "ProcessingJobStatus")

    def stop(self, name: str, kind: str) -> None:
        if self.described(name)[kind] != "InProgress":
            raise ClientError({"Error": {"Code": "ValidationException", "Message": "has ended"}}, "Stop")
        self.jobs[name][kind] = "Stopped"
        self.stopped.append(name)

    def run(self, request: dict[str, Any], attempt: int) -> Any:
        """A handler: the job is done at once."""
        return self.put(request, "Completed")

    def put(self, request: Mapping[str, Any], state: str, **said: str) -> dict[str, Any]:
        job = described(request, state, said)
        created = {"CreationTime": datetime.now(timezone.utc)}  # to who asks; a state machine gets a number
        self.jobs[request.get("TrainingJobName") or request["ProcessingJobName"]] = {**job, **created}
        return job

    def fail(self, **said: str) -> Callable[[dict[str, Any], int], Any]:
        def handler(request: dict[str, Any], attempt: int) -> Any:
            raise TaskError("SageMaker.JobFailed", json.dumps(self.put(request, "Failed", **said)))

        return handler


@pytest.fixture(scope="module")
def aws() -> Iterator[Interpreter]:
    with deployed() as running:
        yield running


@pytest.fixture
def sagemaker(aws: Interpreter) -> SageMaker:
    service = SageMaker()
    aws.handlers = {**USUAL, **dict.fromkeys(("Sfm", "TrainSpot", "Train", "Compress"), service.run)}
    return service


@pytest.fixture
def cloud(sagemaker: SageMaker, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    monkeypatch.setattr(scenes, "STOP_WAITS", (0.0, 0.0))
    cloud = Cloud(boto3.Session(region_name=REGION))
    cloud._clients["sagemaker"] = sagemaker
    return cloud


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Of another scene for each test."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name in ("a.jpg", "b c é.jpg", "more/d.png"):
        (folder / name).write_bytes(f"{tmp_path} {name}".encode())
    (folder / "notes.md").write_text("not a photo")
    return folder


def put_results(scene: str, stage: str, tmp_path: Path, settings: Mapping[str, Any] = SETTINGS) -> Path:
    """As the job of a stage would leave them in the bucket."""
    folder = tmp_path / scene / stage
    folder.mkdir(parents=True)
    for name in ("scene.sog", "index.html", "report.html") if stage == "compress" else ("sparse.bin",):
        (folder / name).write_text(f"<html><body>{name} of {scene}</body></html>")
    write_manifest(folder, stage, asdict(RunSettings(**settings)), {}, {})
    for path in folder.iterdir():
        client_of("s3").put_object(Bucket=BUCKET, Key=f"work/{scene}/{stage}/{path.name}", Body=path.read_bytes())
    return folder


def wait_for(cloud: Cloud, scene: str, wanted: str = "SUCCEEDED") -> scenes.Status:
    """Of a scene whose run ends."""
    waiting = threading.Event()
    for _ in range(100 * SECONDS):
        found = status(cloud, STACK, scene)
        if found.run.status != "RUNNING":
            assert found.run.status == wanted, found.run
            return found
        waiting.wait(0.01)
    raise AssertionError("the execution does not end")


def make(cloud: Cloud, photos: Path, tmp_path: Path, scene: Scene = SCENE) -> tuple[Upload, Run]:
    """Submits a scene whose jobs leave results."""
    upload = plan(photos)
    if not (tmp_path / upload.scene).exists():
        put_results(upload.scene, "sfm", tmp_path)
        put_results(upload.scene, "compress", tmp_path)
    return upload, submit(cloud, STACK, scene, upload, ignore)


# Uploads


def test_a_scene_is_what_its_photos_hold(photos: Path, tmp_path: Path) -> None:
    upload = plan(photos)
    assert [file.name for file in upload.files] == ["a.jpg", "b c é.jpg", "more/d.png"]
    assert upload.n_bytes == sum(path.stat().st_size for path in photos.rglob("*.*g"))
    moved = photos.rename(tmp_path / "elsewhere")
    assert plan(moved).scene == upload.scene
    (moved / "a.jpg").rename(moved / "z.jpg")
    renamed = plan(moved).scene
    (moved / "z.jpg").write_bytes(b"other")
    assert len({upload.scene, renamed, plan(moved).scene}) == 3


def test_photos_in_a_zip_are_the_same_scene(photos: Path, tmp_path: Path) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "photos"), "zip", tmp_path, "photos"))
    with as_folder(archive) as folder:
        assert plan(folder).scene == plan(photos).scene
    assert not folder.exists()
    with as_folder(photos) as folder:
        assert folder == photos
    assert photos.exists()


def test_what_is_no_capture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a folder of photos"):
        plan(tmp_path / "none")
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match="2 photos; at least 3"):
        plan(tmp_path)
    (tmp_path / "c\n.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match="rename it"):
        plan(tmp_path)


def test_only_what_is_missing_is_sent(cloud: Cloud, photos: Path) -> None:
    upload, told = plan(photos), list[Progress]()
    folder = f"inputs/{upload.scene}/photos"
    assert send(cloud, BUCKET, folder, upload, told.append) == upload.n_bytes
    assert told[-1].step == told[-1].n_steps == upload.n_bytes
    found = client_of("s3").get_object(Bucket=BUCKET, Key=f"{folder}/b c é.jpg")
    assert found["Body"].read() == (photos / "b c é.jpg").read_bytes()
    assert send(cloud, BUCKET, folder, upload, told.append) == 0 and told[-1].step == upload.n_bytes
    client_of("s3").put_object(Bucket=BUCKET, Key=f"{folder}/a.jpg", Body=b"half")
    assert send(cloud, BUCKET, folder, upload, ignore) == (photos / "a.jpg").stat().st_size


def test_a_large_file_goes_on_where_it_was_cut_off(cloud: Cloud, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 5 << 20
    monkeypatch.setattr(uploads, "PART_BYTES", size)
    content = b"".join(bytes([number]) * size for number in range(3)) + b"end"
    (photos / "a.jpg").write_bytes(content)
    upload = plan(photos)
    folder, s3 = f"inputs/{upload.scene}/photos", client_of("s3")
    place = {"Bucket": BUCKET, "Key": f"{folder}/a.jpg"}
    begun = s3.create_multipart_upload(**place, ChecksumAlgorithm="SHA256")["UploadId"]
    s3.upload_part(**place, UploadId=begun, PartNumber=1, Body=content[:size])
    s3.upload_part(**place, UploadId=begun, PartNumber=2, Body=b"\7" * size)  # of another file
    small = upload.n_bytes - len(content)
    assert send(cloud, BUCKET, folder, upload, ignore) == len(content) - size + small
    assert s3.get_object(**place)["Body"].read() == content
    assert not s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads")


def test_a_large_file_that_somebody_else_completes_meanwhile(
    cloud: Cloud, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PART_BYTES", 5 << 20)
    content = bytes(12 << 20)
    (photos / "a.jpg").write_bytes(content)
    upload = plan(photos)
    folder = f"inputs/{upload.scene}/photos"
    others, upload_part = list[int](), cloud.client("s3").upload_part

    def part_as_aws_takes_it(**part: Any) -> Any:
        try:
            return upload_part(**part)
        except KeyError:  # moto's answer to an upload that is over
            raise ClientError({"Error": {"Code": "NoSuchUpload", "Message": "…"}}, "UploadPart") from None

    monkeypatch.setattr(cloud.client("s3"), "upload_part", part_as_aws_takes_it)

    def listen(progress: Progress) -> None:
        if not others and progress.step >= 5 << 20:  # the first part is there
            others.append(0)
            others.append(send(cloud, BUCKET, folder, upload, ignore))

    assert send(cloud, BUCKET, folder, upload, listen) < upload.n_bytes and others[1] >= 7 << 20
    found = client_of("s3").get_object(Bucket=BUCKET, Key=f"{folder}/a.jpg")
    assert found["Body"].read() == content
    assert not client_of("s3").list_multipart_uploads(Bucket=BUCKET).get("Uploads")


@pytest.mark.parametrize("n_bytes", [10, 20 << 20])
def test_a_file_that_changes_under_way(n_bytes: int, cloud: Cloud, photos: Path) -> None:
    (photos / "a.jpg").write_bytes(bytes(n_bytes))
    upload = plan(photos)
    (photos / "a.jpg").write_bytes(b"\1" * n_bytes)
    folder = f"inputs/{upload.scene}/photos"
    with pytest.raises(InputError, match=r"a\.jpg: changed while it was uploaded"):
        send(cloud, BUCKET, folder, upload, ignore)
    keys = [entry["Key"] for entry in client_of("s3").list_objects_v2(Bucket=BUCKET, Prefix=folder).get("Contents", [])]
    assert f"{folder}/a.jpg" not in keys and not client_of("s3").list_multipart_uploads(Bucket=BUCKET).get("Uploads")


@pytest.mark.parametrize(
    ("code", "status", "words"), [("403", 403, "is not ours, or may not be read"), ("404", 404, "destroy it and deploy again")]
)  # fmt: skip
def test_nothing_is_sent_to_a_bucket_that_is_not_ours(
    code: str, status: int, words: str, cloud: Cloud, photos: Path
) -> None:
    """As it can be where a bucket was deleted, and somebody else made one of its name."""
    with Stubber(cloud.client("s3")) as stubber:  # and whatever else is asked of S3 is an error
        asked = {"Bucket": BUCKET, "ExpectedBucketOwner": "123456789012"}
        stubber.add_client_error("head_bucket", code, "", status, expected_params=asked)
        with pytest.raises(InputError, match=words):
            submit(cloud, STACK, SCENE, plan(photos), ignore)
        stubber.assert_no_pending_responses()


def test_a_clock_that_is_wrong_is_told_by_every_service(cloud: Cloud, photos: Path) -> None:
    with Stubber(cloud.client("s3")) as stubber:
        stubber.add_client_error("head_bucket", "RequestTimeTooSkewed", "", 403)
        with pytest.raises(InputError, match="this machine's clock is wrong"):
            submit(cloud, STACK, SCENE, plan(photos), ignore)


UPLOADER = """
import sys
from pathlib import Path
from spaceport_gs.pipeline.aws.cloud import connect
from spaceport_gs.pipeline.aws.uploads import plan, send
upload = plan(Path(sys.argv[1]))
sent = send(connect(), "killed", "inputs", upload, lambda progress: print(progress.step, progress.n_steps, flush=True))
print("sent", sent)
"""


def test_an_upload_of_300_mb_that_is_killed_goes_on(tmp_path: Path) -> None:
    """In another process, against a server; no part that had arrived is sent again."""
    pytest.importorskip("ministack", reason="ministack is not installed")
    from emulator import emulated_aws

    folder = tmp_path / "photos"
    folder.mkdir()
    with open(folder / "large.tif", "wb") as file:
        for number in range(300):
            file.write(hashlib.sha256(bytes([number % 256, number // 256])).digest() * (1_000_000 // 32))
    for name in ("b.jpg", "c.jpg"):
        (folder / name).write_bytes(name.encode())
    n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    with emulated_aws(tmp_path / "log") as environment:
        s3 = boto3.client(
            "s3", REGION, endpoint_url=environment["AWS_ENDPOINT_URL"], aws_access_key_id="test", aws_secret_access_key="test"
        )  # fmt: skip
        s3.create_bucket(Bucket="killed", CreateBucketConfiguration={"LocationConstraint": REGION})
        command = [sys.executable, "-c", UPLOADER, str(folder)]
        first = subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
        )
        assert first.stdout
        for line in first.stdout:
            if int(line.split()[0]) > n_bytes // 2:
                break
        first.send_signal(signal.SIGKILL)
        first.communicate()
        (begun,) = s3.list_multipart_uploads(Bucket="killed")["Uploads"]
        parts = s3.list_parts(Bucket="killed", Key="inputs/large.tif", UploadId=begun["UploadId"])["Parts"]
        there = sum(part["Size"] for part in parts) + len("b.jpg" + "c.jpg")
        second = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, check=True
        )
        assert n_bytes // 2 < there < n_bytes and int(second.stdout.split()[-1]) == n_bytes - there
        with open(folder / "large.tif", "rb") as file:
            wanted = hashlib.sha256(file.read()).digest()
        assert hashlib.sha256(s3.get_object(Bucket="killed", Key="inputs/large.tif")["Body"].read()).digest() == wanted


# Scenes


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
    given = scenes.scene_input(scene, STACK.account("sfm"))
    assert scenes._record(cloud, STACK, scenes._new_run(STACK, upload.scene, 1, given))
    assert status(cloud, STACK, upload.scene).run.status == scenes.UNSTARTED and stop(cloud, STACK, upload.scene) == []
    with pytest.raises(InputError, match="other settings"):
        submit(cloud, STACK, replace(SCENE, settings={"steps": 100}), upload, ignore)
    run = submit(cloud, STACK, SCENE, upload, ignore)
    assert run.name == f"{upload.scene}-1" and wait_for(cloud, upload.scene).run.status == "SUCCEEDED"
    long_ago = replace(run, status=scenes.UNSTARTED, recorded=datetime.now(timezone.utc) - timedelta(hours=1))
    assert not scenes._is_being_started(long_ago)


def test_progress_is_what_the_job_says(
    cloud: Cloud, aws: Interpreter, sagemaker: SageMaker, photos: Path, tmp_path: Path
) -> None:
    upload, looked, s3 = plan(photos), threading.Event(), client_of("s3")
    put_results(upload.scene, "compress", tmp_path)
    asked = threading.Event()

    def train(request: dict[str, Any], attempt: int) -> Any:
        sagemaker.put(request, "InProgress", SecondaryStatus="Training")
        bucket, _, key = request["CheckpointConfig"]["S3Uri"].removeprefix("s3://").partition("/")
        told = json.dumps({"stage": "train", "step": 100, "time": time.time()})
        s3.put_object(Bucket=bucket, Key=f"{key}progress.json", Body=told.encode())
        asked.set()
        assert looked.wait(SECONDS)
        return sagemaker.run(request, attempt)

    aws.handlers = {**aws.handlers, "TrainSpot": train}
    submit(cloud, STACK, SCENE, upload, ignore)
    assert asked.wait(SECONDS)
    found = status(cloud, STACK, upload.scene)
    assert found.run.status == "RUNNING" and found.progress and found.progress["step"] == 100
    assert found.state == "TrainSpot" and found.jobs[-1].stage == "train"
    assert (found.jobs[-1].status, found.jobs[-1].detail) == ("InProgress", "Training")
    looked.set()
    key = f"work/{upload.scene}/progress/compress/progress.json"
    wait_for(cloud, upload.scene)
    for text in (b"{half", b'{"stage": "compress", "step": 1, "time": 5}', b'{"time": "?"}'):  # not this job's
        s3.put_object(Bucket=BUCKET, Key=key, Body=text)
        assert status(cloud, STACK, upload.scene).progress is None


def test_logs_are_followed_until_the_run_is_over(
    cloud: Cloud, aws: Interpreter, sagemaker: SageMaker, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line once, however often it is looked for; also what comes late, and before others in time."""
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    upload, logs, heard = plan(photos), client_of("logs"), threading.Event()
    put_results(upload.scene, "compress", tmp_path)
    group, now = "/aws/sagemaker/ProcessingJobs", int(time.time() * 1000)
    streams: list[str] = []

    def write(line: str, when: int) -> None:
        logs.put_log_events(
            logGroupName=group, logStreamName=streams[0], logEvents=[{"timestamp": when, "message": line}]
        )

    def sfm(request: dict[str, Any], attempt: int) -> Any:
        job = sagemaker.put(request, "InProgress")
        streams.append(f"{job['ProcessingJobName']}/algo-1-1")
        logs.create_log_group(logGroupName=group)
        logs.create_log_stream(logGroupName=group, logStreamName=streams[0])
        write("twice", now)
        write("twice", now)
        assert heard.wait(SECONDS)
        write("late", now - 1000)
        return sagemaker.run(request, attempt)

    told: list[watch.Line] = []

    def tell(line: watch.Line) -> None:
        told.append(line)
        if len(told) == 2:
            heard.set()

    aws.handlers = {**aws.handlers, "Sfm": sfm}
    submit(cloud, STACK, SCENE, upload, ignore)
    found = watch.follow_logs(cloud, STACK, upload.scene, "", tell)
    assert found.run.status == "SUCCEEDED"
    assert [line.line for line in told] == ["twice", "twice", "late"] and told[0].time == now / 1000
    assert {line.job for line in told} == {found.jobs[0].name} and len({line.id for line in told}) == 3
    told.clear()
    watch.follow_logs(cloud, STACK, upload.scene, "train", told.append)
    assert not told


@pytest.mark.parametrize("state", ["Sfm", "TrainSpot"])
def test_stop_ends_the_flow_and_the_job(
    state: str, cloud: Cloud, aws: Interpreter, sagemaker: SageMaker, photos: Path, tmp_path: Path
) -> None:
    """By the names in the history; a second time there is nothing left to stop."""
    upload, asked, over = plan(photos), threading.Event(), threading.Event()

    def never(request: dict[str, Any], attempt: int) -> Any:
        sagemaker.put(request, "InProgress")
        asked.set()
        assert over.wait(SECONDS)
        return described(request, "Stopped", {})

    aws.handlers = {**aws.handlers, state: never}
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


def test_results_are_fetched_once_and_checked(cloud: Cloud, photos: Path, tmp_path: Path) -> None:
    upload, _ = make(cloud, photos, tmp_path)
    wait_for(cloud, upload.scene)
    out, told = tmp_path / "out", list[Progress]()
    fetch(cloud, STACK, upload.scene, out, told.append)
    assert f"scene.sog of {upload.scene}" in (out / "scene.sog").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "manifest.json", "report.html", "scene.sog"]
    assert told[-1].step == told[-1].n_steps > 0
    stamp = (out / "index.html").stat().st_mtime_ns
    (out / "scene.sog").write_bytes(bytes((out / "scene.sog").stat().st_size))
    fetch(cloud, STACK, upload.scene, out, ignore)
    assert f"scene.sog of {upload.scene}" in (out / "scene.sog").read_text()
    assert (out / "index.html").stat().st_mtime_ns == stamp


def test_results_that_are_not_what_the_manifest_says(cloud: Cloud, photos: Path, tmp_path: Path) -> None:
    upload, s3 = plan(photos), client_of("s3")
    with pytest.raises(InputError, match="no finished result"):
        fetch(cloud, STACK, upload.scene, tmp_path / "out", ignore)
    put_results(upload.scene, "compress", tmp_path)
    key = f"work/{upload.scene}/compress/"
    s3.put_object(Bucket=BUCKET, Key=f"{key}scene.sog", Body=b"damaged")
    with pytest.raises(InputError, match="run the stage compress again"):
        fetch(cloud, STACK, upload.scene, tmp_path / "out", ignore)
    for text, word in (("{", "not a manifest"), ('{"outputs": {"../x": {"bytes": 1, "sha256": ""}}}', "outside")):
        s3.put_object(Bucket=BUCKET, Key=f"{key}manifest.json", Body=text.encode())
        with pytest.raises(InputError, match=word):
            fetch(cloud, STACK, upload.scene, tmp_path / "out", ignore)
    assert not (tmp_path / "x").exists()


# Reports

HOSTILE = '</section></body><script>alert("é")</script>'


def times(kind: str, minutes: int, **more: Any) -> dict[str, Any]:
    """Of a job that begins two minutes from now."""
    begin = datetime.now(timezone.utc) + timedelta(minutes=2)
    return {f"{kind}StartTime": begin, f"{kind}EndTime": begin + timedelta(minutes=minutes), **more}


def test_a_report_shows_every_try_and_what_it_cost(
    cloud: Cloud, aws: Interpreter, sagemaker: SageMaker, photos: Path, tmp_path: Path
) -> None:
    """No spot instances, twice refused and once waited for; then no hardware on demand, a failure, and a second run."""
    usual, tried = aws.handlers, list[str]()

    def described_as(request: Mapping[str, Any], state: str, **said: Any) -> dict[str, Any]:
        answer = sagemaker.put(request, state, **{k: v for k, v in said.items() if isinstance(v, str)})
        sagemaker.jobs[request.get("TrainingJobName") or request["ProcessingJobName"]] |= said
        return answer

    def sfm(request: dict[str, Any], attempt: int) -> Any:
        return described_as(request, "Completed", **times("Processing", 30))

    def spot(request: dict[str, Any], attempt: int) -> Any:
        if attempt < 2:
            raise TaskError("SageMaker.ResourceLimitExceededException", HOSTILE)
        interrupted = {"BillableTimeInSeconds": 600, "TrainingTimeInSeconds": 1800}
        return described_as(request, "Stopped", SecondaryStatus="MaxWaitTimeExceeded", **times("Training", 30, **interrupted))  # fmt: skip

    def on_demand(request: dict[str, Any], attempt: int) -> Any:
        tried.append(request["TrainingJobName"])
        if len(tried) == 1:
            return sagemaker.fail(FailureReason="CapacityError: none")(request, attempt)
        if len(tried) == 2:
            reason = f"AlgorithmError: {HOSTILE}"
            answer = described_as(request, "Failed", FailureReason=reason, **times("Training", 60))
            raise TaskError("SageMaker.JobFailed", json.dumps(answer))
        cut = [{"Status": status} for status in ("Starting", "Training", "Interrupted", "Training", "Interrupted")]
        return described_as(request, "Completed", SecondaryStatusTransitions=cut, **times("Training", 60))

    aws.handlers = {**usual, "Sfm": sfm, "TrainSpot": spot, "Train": on_demand}
    upload, _ = make(cloud, photos, tmp_path)
    wait_for(cloud, upload.scene, "FAILED")
    aws.handlers = {**usual, "TrainSpot": on_demand}
    retry(cloud, STACK, upload.scene)
    wait_for(cloud, upload.scene)
    out = tmp_path / "out"
    fetch(cloud, STACK, upload.scene, out, ignore)
    before = (out / "report.html").read_text()
    add_to_report(cloud, STACK, upload.scene, out)

    text = (out / "report.html").read_text()
    rows = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    tries = [(row[0], row[1], row[4]) for row in rows if len(row) >= 5 and row[0] in ("sfm", "train", "wait", "compress", "publish") and "<svg" in row[-1]]  # fmt: skip
    refused = "SageMaker.ResourceLimitExceededException: " + html.escape(HOSTILE)
    assert tries == [
        ("sfm", "ml.c6i.2xlarge", "Completed"),
        ("train", "ml.g5.xlarge, spot", refused),
        ("train", "ml.g5.xlarge, spot", refused),
        ("train", "ml.g5.xlarge, spot", "MaxWaitTimeExceeded"),
        ("train", "ml.g5.xlarge", "Failed: CapacityError: none"),
        ("wait", "", "no hardware"),
        ("train", "ml.g5.xlarge", "Failed: AlgorithmError: " + html.escape(HOSTILE)),
        ("train", "ml.g5.xlarge, spot", "Completed, interrupted 2 times"),
        ("compress", "ml.c6i.2xlarge", "Completed"),
        ("publish", "", ""),
    ]
    (chart, bill) = (row[2:4] for row in rows if row[0] == "sfm")
    assert chart[0].startswith("2.") and chart[1] == "30.0\xa0min" and bill == ["1,800 s", "1,800 s"]
    assert [row[3] for row in rows if row[:2] == ["train", "ml.g5.xlarge, spot"]][:2] == ["–", "–"]
    assert "<script>" not in text and text.count("</body>") == 1 and text.startswith(before.partition("</body>")[0])

    prices = load_prices(REGION)
    cpu, gpu = prices.of("ml.c6i.2xlarge", "processing"), prices.of("ml.g5.xlarge", "training")
    (total,) = (row for row in rows if row[0] == "together")
    assert total[-2:] == [f"{cpu / 2 + gpu * (600 / 3600 + 2):.3f} $", f"{gpu * 1200 / 3600:.3f} $"]
    assert f"Prices of {prices.region}, {prices.as_of}" in text

    fetch(cloud, STACK, upload.scene, out, ignore)
    add_to_report(cloud, STACK, upload.scene, out)
    add_to_report(cloud, STACK, upload.scene, out)
    assert (out / "report.html").read_text() == text
    assert read_manifest(out, "compress").outputs["report.html"]["bytes"] == len(text.encode())


def test_a_run_whose_history_is_gone_leaves_a_report(cloud: Cloud, photos: Path, tmp_path: Path) -> None:
    """As after ninety days; and results of a version that made no report stay as they are."""
    upload, _ = make(cloud, photos, tmp_path)
    wait_for(cloud, upload.scene)
    fetch(cloud, STACK, upload.scene, tmp_path / "out", ignore)
    elsewhere = replace(STACK, outputs={**STACK.outputs, "SceneMachine": f"{VALUES['SceneMachine']}-other"})
    add_to_report(cloud, elsewhere, upload.scene, tmp_path / "out")
    text = (tmp_path / "out/report.html").read_text()
    assert "<svg" not in text and "<th>0.000 $</th>" in text
    (tmp_path / "out/report.html").unlink()
    add_to_report(cloud, STACK, upload.scene, tmp_path / "out")
    assert not (tmp_path / "out/report.html").exists()


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


# Many


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
        patch.setattr(scenes, "_execute", cut_off)
        with pytest.raises(KeyboardInterrupt):
            submit_all(cloud, "cut", named("r1", "r2"))
    assert batch_status(cloud, STACK, "cut") == "UNSTARTED"
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

    def never(request: dict[str, Any], attempt: int) -> Any:
        sagemaker.put(request, "InProgress")
        asked.set()
        assert over.wait(SECONDS)
        return described(request, "Stopped", {})

    usual = aws.handlers
    aws.handlers = {**usual, "Sfm": never}
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
