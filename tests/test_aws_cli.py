"""`spaceport aws` as a user types it: every command a process of its own, AWS emulated on this machine, the jobs real."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import boto3
import botocore.session
import pytest
from botocore.stub import Stubber
from shell import REGION, Shell, account, put_flow, read, until

from spaceport_gs.pipeline import cli
from spaceport_gs.pipeline.aws import cloud as clouds
from spaceport_gs.pipeline.aws import watch
from spaceport_gs.pipeline.aws.cli import app as commands
from spaceport_gs.pipeline.aws.cloud import Cloud


@pytest.fixture(scope="module", autouse=True)
def services_are_read_once() -> Iterator[None]:
    """What botocore knows of them, which takes longer than most commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", cache(botocore.session.create_loader))
        yield


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    for module in ("ministack", "moto", "jsonata"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    with account(tmp_path_factory.mktemp("aws")) as found:
        yield found


@pytest.fixture(scope="module")
def stack(shell: Shell) -> str:
    """Name of a stack that has images."""
    shell("deploy", "--yes", "--prefix", "shared")
    put_flow(shell, "shared")
    shell("push", "--prefix", "shared")
    return "shared"


def test_from_photos_to_a_scene_and_back_to_nothing(shell: Shell, small_capture: Path) -> None:
    photos, hold = str(small_capture), shell.folder.parent / "jobs/hold-Training"
    ready = shell("deploy", "--yes", "--email", "a@example.org")
    assert "add SceneMachine" in ready.stdout and "bucket spaceport-000000000000-eu-central-1" in ready.stdout
    assert "idle, it costs about 3.70 $ a month" in ready.stdout
    put_flow(shell)
    assert "has no image sfm yet: run `spaceport aws push`" in shell.error("submit", photos)
    assert set(shell.json("push")) == {"sfm", "train", "compress"}

    order = (photos, "--steps", "6", "--device", "cpu", "--title", "Quarry é", "--spot", "--max-cost", "9")
    hold.parent.mkdir()
    hold.touch()
    submitted = shell.json("submit", *order)
    job = submitted["job"]
    assert submitted["run"] == f"{job}-1" and submitted["estimate"]["stages"]["train"]["usd"]["high"] < 9
    assert shell.json("submit", *order)["run"] == f"{job}-1"
    watching = shell.start("watch", job, "-o", "seen", "--web")
    assert watching.stdout
    address = watching.stdout.readline().removesuffix(" shows it\n")
    assert b"<title>Spaceport</title>" in read(address) and read(address, Host="evil.example:80") == b""
    sagemaker = shell.client("sagemaker", "AWS_ENDPOINT_URL_SAGEMAKER")
    until(lambda: sagemaker.list_training_jobs(StatusEquals="InProgress")["TrainingJobSummaries"])
    state = until(lambda: (found := json.loads(read(f"{address}state.json"))).get("links") and found)
    assert [one["stage"] for one in state["stages"]] == ["sfm", "train"] and state["status"] == "RUNNING"
    assert "/preview.jpg?" in state["links"]["preview"]
    following = shell.start("logs", job, "--follow")
    assert following.stdout and following.stdout.readline().startswith(f"== spaceport-sfm-{job}-")
    following.send_signal(signal.SIGINT)
    assert f"{job} goes on without you; `spaceport aws stop {job}` ends it" in following.communicate(timeout=60)[1]
    assert following.returncode == 130
    assert f"1 under way: {job}-1; stop them" in shell.error("destroy", "--yes")
    stopped = shell.json("stop", job)
    (name,) = stopped["stopped"]
    assert name.startswith(f"spaceport-train-{job}-") and len(stopped["jobs"]) == 2 and stopped["usd"] > 0
    printed, said = watching.communicate(timeout=60)
    assert watching.returncode == 1 and "aborted" in printed and not said
    events = [json.loads(line) for line in (shell.folder / "seen/events.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(event["stage"] for event in events)) == ["sfm", "train"]

    hold.unlink()
    again = shell("retry", job, "--watch")
    assert f"{job}-2: succeeded" in again.stdout
    state = shell.json("status", job)
    assert [one["stage"] for one in state["jobs"]] == ["train", "compress"] and state["page"].endswith("/index.html")
    assert "== spaceport-train-" in (log := shell("logs", job, "--stage", "train").stdout) and "metric step=6" in log

    (links,) = shell.json("link", job)["links"]
    assert "Quarry é" in read(links["page"]).decode() and read(links["scene"])[:2] == b"PK"
    shell("fetch", job)
    assert "Quarry é" in (shell.folder / job / "index.html").read_text()
    report = (shell.folder / job / "report.html").read_text()
    assert f"{job}-1: aborted, " in report and f"{job}-2: succeeded, " in report and "ml.g5.xlarge" not in report
    cost = shell.json("cost", job)
    assert f"<th>{cost['usd']:.3f} $</th>" in report
    assert len(cost["jobs"]) == 4 and cost["usd"] == pytest.approx(sum(one["usd"] for one in cost["jobs"]))
    gone = shell("destroy", "--yes")
    assert "keep Bucket" in gone.stdout and "the stack spaceport is gone" in gone.stdout
    assert "remove Bucket" in shell("destroy", "--yes", "--delete-data").stdout
    assert not [b for b in shell.client("s3").list_buckets()["Buckets"] if b["Name"].startswith("spaceport-")]


@pytest.mark.slow
def test_a_training_that_is_stopped_goes_on_where_it_was(shell: Shell, stack: str, orbit_capture: Path) -> None:
    """From photos; while it is watched, which brings events and the preview here."""
    there, photos = ("--prefix", stack), str(orbit_capture / "photos")
    job = shell.json("submit", photos, "--steps", "600", "--device", "cpu", "--downscale", "2", *there)["job"]

    s3, bucket = shell.client("s3"), f"{stack}-000000000000-{REGION}"

    def trained() -> bool:
        keys = s3.list_objects_v2(Bucket=bucket, Prefix=f"checkpoints/{job}/").get("Contents", [])
        told = [entry["Key"] for entry in keys if entry["Key"].endswith("/progress.json")]
        return any(json.loads(s3.get_object(Bucket=bucket, Key=key)["Body"].read())["step"] > 0 for key in told)

    until(trained)
    following = shell.start("logs", job, "--follow", *there)
    assert following.stdout and following.stdout.readline().startswith(f"== {stack}-sfm-{job}-")
    shell("stop", job, *there)
    printed, said = following.communicate(timeout=60)
    assert following.returncode == 0 and "metric step=" in printed and said == f"{job}-1: aborted\n"
    assert f"{job}-2: succeeded" in shell("retry", job, "--watch", *there).stdout
    events = [json.loads(line) for line in (shell.folder / job / "events.jsonl").read_text().splitlines()]
    assert min(event["step"] for event in events if event["stage"] == "train" and event["n_steps"] == 600) > 0
    assert (shell.folder / job / "preview.jpg").read_bytes()[:2] == b"\xff\xd8"
    shell("fetch", job, *there)
    assert (shell.folder / job / "scene.sog").stat().st_size > 100_000


def test_a_capture_that_fails_says_why(shell: Shell, stack: str, tmp_path: Path) -> None:
    """Where a user sees it: the job's own sentence, and the exit code of a user's mistake."""
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    done = shell("submit", str(tmp_path), "--watch", "-o", "failed", "--prefix", stack, expect=2)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("spaceport: error: scene ") and ": failed: input: " in last
    job = last.split()[3].rstrip(":")
    state = shell.json("status", job, "--prefix", stack)
    assert state["status"] == "FAILED" and state["error"] == "Spaceport.sfm" and state["reason"].startswith("input: ")
    again = shell("submit", str(tmp_path), "--prefix", stack).stdout
    assert f"({job}-1: failed)\nretry it  spaceport aws retry {job} --prefix {stack}\n" in again


@pytest.mark.slow
def test_a_drill_fails_as_it_should_and_retry_goes_on(shell: Shell, stack: str, small_capture: Path) -> None:
    order = ("submit", str(small_capture), "--steps", "30", "--device", "cpu", "--drill", "train:crash@20", "--prefix", stack)  # fmt: skip
    assert "set SPACEPORT_DRILLS=1" in shell.error(*order)
    allowed = replace(shell, environment={**shell.environment, "SPACEPORT_DRILLS": "1"})
    job = allowed.json(*order)["job"]
    failed = shell.json("watch", job, "-o", "drill", "--prefix", stack, expect=70)
    assert failed["error"] == "Spaceport.train" and failed["reason"].startswith("interrupted: ")
    assert "drill train:crash@20" in shell("logs", job, "--stage", "train", "--prefix", stack).stdout
    assert f"{job}-2: succeeded" in shell("retry", job, "--watch", "-o", "drill", "--prefix", stack).stdout


def test_a_batch_leaves_out_what_is_made_already(shell: Shell, stack: str, tmp_path: Path) -> None:
    """And does not stop what others make."""
    there, hold = ("--prefix", stack), shell.folder.parent / "jobs/hold-Processing"
    manifest, order = tmp_path / "manifest.json", ("--device", "cpu", "--name", "first", *there, "--steps")
    for folder in ("alone", "also", "new"):
        (tmp_path / folder).mkdir()
        for name in ("a.jpg", "b.jpg", "c.jpg"):
            (tmp_path / folder / name).write_bytes(f"{folder} {name}".encode())
    hold.parent.mkdir(exist_ok=True)
    hold.touch()
    try:
        alone = shell.json("submit", str(tmp_path / "alone"), "--device", "cpu", *there, "--steps", "5")["job"]
        manifest.write_text(json.dumps([{"name": name, "photos": name} for name in ("alone", "also")]))
        printed = shell("batch", str(manifest), *order, "5").stdout
        assert f"alone: is under way, {alone}-1; it is followed with this batch\n" in printed
        assert f"job       batch/first\nfollow it spaceport aws watch batch/first --prefix {stack}\n" in printed
        manifest.write_text(json.dumps([{"name": name, "photos": name} for name in ("alone", "also", "new")]))
        second = shell.json("batch", str(manifest), *order, "5")
        assert second["batch"] == "first-2" and second["under_way"] == ["alone", "also"] and not second["refused"]
        assert f"the first: scene {alone}: {alone}-1 makes it with other settings" in shell.error(
            "batch", str(manifest), *order, "6"
        )
        for batch in ("batch/first-2", "batch/first"):
            shell("stop", batch, *there)
        states = {one["job"]: one["status"] for one in shell.json("status", "batch/first-2", *there)["scenes"]}
        assert states == {**dict.fromkeys(second["scenes"].values(), "ABORTED"), alone: "RUNNING"}
        shell("stop", alone, *there)
    finally:
        hold.unlink()


@pytest.mark.slow
def test_a_batch_is_submitted_followed_and_fetched(
    shell: Shell, stack: str, small_capture: Path, tmp_path: Path
) -> None:
    """What cannot be submitted, and what fails, stops no other."""
    there = ("--prefix", stack)
    for name in ("broken", "few"):
        (tmp_path / name).mkdir()
        for number in range(3 if name == "broken" else 2):
            (tmp_path / name / f"{number}.jpg").write_bytes(b"no photo")
    (tmp_path / "harbour").symlink_to(small_capture, target_is_directory=True)
    manifest = tmp_path / "manifest.json"
    entries = [{"name": name, "photos": name, "settings": {"steps": 6}} for name in ("broken", "few", "harbour")]
    manifest.write_text(json.dumps(entries))
    order = ("batch", str(manifest), "--device", "cpu", "--jobs", "2", *there)
    batch = shell.json(*order, expect=1)
    assert set(batch["scenes"]) == {"broken", "harbour"} and "2 photos" in batch["refused"]["few"]
    name, made = f"batch/{batch['batch']}", batch["scenes"]["harbour"]
    assert shell.json(*order, expect=1)["batch"] == batch["batch"]
    followed = shell.json("watch", name, *there, expect=1)
    assert {one["job"]: one["status"] for one in followed["scenes"]} == {
        made: "SUCCEEDED", batch["scenes"]["broken"]: "FAILED",
    }  # fmt: skip
    shell("fetch", made, *there)
    assert (shell.folder / made / "index.html").is_file()
    assert shell.json("stop", name, *there)["stopped"] == []

    before = {one["job"]: one["run"] for one in followed["scenes"]}
    for number in range(3):
        (tmp_path / "few" / f"{number}.jpg").write_bytes(b"now there are some")
    again = shell.json(*order)
    assert set(again["scenes"]) == {"broken", "few", "harbour"} and again["done"] == ["harbour"]
    followed = shell.json("watch", f"batch/{again['batch']}", *there, expect=1)
    runs = {one["job"]: one["run"] for one in followed["scenes"]}
    assert len(runs) == 3 and before[made] == runs[made] and before.keys() < runs.keys()
    assert before[batch["scenes"]["broken"]] != runs[batch["scenes"]["broken"]]


@pytest.mark.slow
def test_captures_are_made_there_as_they_are_made_here(
    shell: Shell, stack: str, small_capture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """`spaceport batch --backend aws`: folders by the captures' names, and batch.json."""
    for name, value in {**shell.environment, "SPACEPORT_STACK": stack}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.1)
    captures, out = tmp_path / "captures", tmp_path / "out"
    (captures / "few").mkdir(parents=True)
    (captures / "few/a.jpg").write_bytes(b"no photo")
    (captures / "harbour").symlink_to(small_capture, target_is_directory=True)
    order = ["batch", str(captures), "-o", str(out), "--backend", "aws", "--steps", "7", "--device", "cpu", "--json"]
    assert cli.run(order) == 1
    outcomes = {one["name"]: one for one in json.loads(capsys.readouterr().out)["captures"]}
    assert "1 photos; at least 3" in outcomes["few"]["error"] and not outcomes["harbour"]["error"]
    assert outcomes["harbour"]["seconds"] > 0 and list(outcomes.values()) == json.loads(
        (out / "batch.json").read_text()
    )
    page = (out / "harbour/index.html").read_bytes()
    assert cli.run(order) == 2 and "go on with --resume" in capsys.readouterr().err
    assert not outcomes["harbour"]["was_done"]
    assert cli.run([*order, "--resume"]) == 1 and (out / "harbour/index.html").read_bytes() == page
    printed = capsys.readouterr()
    assert [one["was_done"] for one in json.loads(printed.out)["captures"]] == [False, True]
    (scene,) = re.findall(r"harbour: is done, (\w+)-\d+\n", printed.err)
    place = {"Bucket": f"{stack}-000000000000-{REGION}", "Key": f"work/{scene}/compress/manifest.json"}
    shell.client("s3").delete_object(**place)  # as after some weeks
    assert cli.run([*order, "--resume"]) == 1
    assert "there is no finished result" in json.loads((out / "batch.json").read_text())[1]["error"]


# Bad input, in this process


@pytest.fixture
def here(shell: Shell, stack: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs a command in the account."""
    for name, value in shell.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: cli.run(["aws", *arguments, "--prefix", stack])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status", "nothere"], "the stack shared knows of none; submit its photos"),
        (["status", "A b\n"], "an id has 1 to 24 lower-case letters and digits"),
        (["watch", "../../x"], "an id has"),
        (["logs", "x;y"], "an id has"),
        (["logs", "a1", "--stage", "bake"], "choose sfm, train, compress"),
        (["fetch", "nothere"], "no finished result"),
        (["stop", "batch/../x"], "knows of none"),
        (["retry", "nothere"], "knows of none"),
        (["link", "nothere"], "is not published"),
        (["link", "a1", "--hours", "200"], "a link holds for up to 168"),
        (["logs", "batch/x", "--follow"], "--follow follows one scene"),
        (["cost", "nothere"], "knows of none"),
        (["cost", "./nothere"], "expected a folder of photos"),
        (["submit", "nothere"], "expected a folder of photos"),
        (["submit", "few"], "2 photos; at least 3"),
        (["submit", "few.zip"], "few.zip: 2 photos; at least 3"),
        (["submit", "wrong.zip"], "wrong.zip: not a readable zip file"),
        (["cost", "./few.zip"], "few.zip: 2 photos; at least 3"),
        (["submit", "photos", "--drill", "train:crash"], "set SPACEPORT_DRILLS=1 to allow that"),
        (["submit", "photos", "--drill", "train:fire"], "faults are interrupt, crash"),
        (["submit", "photos", "--preset", "best"], "best"),
        (["submit", "photos", "--device", "tpu"], "choose auto, cpu or cuda"),
        (["submit", "photos", "--eval-every", "1"], "--eval-every 1"),
        (["submit", "photos", "--title", 300 * "x"], "title: too long"),
        (["submit", "photos", "--instance", "ml.g5.xlarge"], "give auto, or STAGE=TYPE"),
        (["submit", "photos", "--instance", "train=ml.abacus"], "ml.abacus: nothing is known of it"),
        (["submit", "photos", "--instance", "auto", "--instance", "train=ml.g5.xlarge"], "leave the other ones out"),
        (["submit", "photos", "--deadline", "5"], "give --instance auto"),
        (["submit", "photos", "--instance", "auto", "--deadline", "1"], "no instances are sure to be done in 1 min"),
        (["submit", "photos", "--max-cost", "0.01"], "more than --max-cost 0.01"),
        (["batch", "twice.json"], "the name a stands in it twice"),
        (["batch", "photos/a.jpg"], "expected JSON"),
        (["batch", "one.json", "--name", "A b"], "batch 'A b': a name has 1 to 40 lower-case letters"),
        (["batch", "one.json", "--jobs", "2000"], "2000 scenes at once: give 1 to 1000"),
        (["batch", "no.json"], "no.json"),
        (["batch", "wrong.json"], "no capture can be submitted; the first: setting steps: 'many' is none"),
        (["push", "--image", "train"], "choose sfm, 3dgs, compressor"),
        (["push", "--build-arg", "BASE"], "expected NAME=VALUE"),
        (["push", "--tool", "kaniko"], "choose docker, podman, buildah"),
        (["deploy", "--set", "Size=3"], "no such parameter"),
        (["deploy", "--set", "PublicKey=@none.pem"], "none.pem"),
        (["deploy", "--region", "moon-1"], "SageMaker is not there"),
        (["deploy", "--region", "eu-west-1"], "there is nobody to ask; give --yes"),
        (["status", "a1", "--region", "eu-west-1"], "no stack shared in eu-west-1"),
        (["status", "a1", "--profile", "none"], "profile none: not in"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    arguments: list[str], words: str, here: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, n in (("photos", 3), ("few", 2)):
        (tmp_path / folder).mkdir()
        for name in ("a.jpg", "b.jpg", "c.jpg")[:n]:
            (tmp_path / folder / name).write_bytes(name.encode())
    shutil.make_archive(str(tmp_path / "few"), "zip", tmp_path, "few")
    (tmp_path / "wrong.zip").write_bytes((tmp_path / "few.zip").read_bytes()[:-10])
    (tmp_path / "one.json").write_text(json.dumps([{"name": "a", "photos": "photos"}]))
    (tmp_path / "twice.json").write_text(json.dumps(2 * [{"name": "a", "photos": "photos"}]))
    (tmp_path / "wrong.json").write_text('[{"name": "a", "photos": "photos", "settings": {"steps": "many"}}]')
    assert here(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("spaceport: error: ") and words in lines[-1]
    assert len(lines) == 1


@pytest.mark.parametrize("command", ["submit", "batch"])
def test_nothing_is_started_where_there_is_no_quota(
    command: str, here: Callable[..., int], shell: Shell, stack: str, small_capture: Path, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    names = ("ml.c6i.2xlarge for processing job usage", "ml.g5.xlarge for training job usage")
    quotas = [{"QuotaName": name, "QuotaCode": f"L-{i}", "Value": 1.0 - i} for i, name in enumerate(names)]

    def answering(region: str = "", profile: str = "") -> Cloud:
        cloud = connect(region, profile)
        stubber = Stubber(cloud.client("service-quotas"))
        for operation in ("list_aws_default_service_quotas", "list_service_quotas"):
            stubber.add_response(operation, {"Quotas": quotas}, {"ServiceCode": "sagemaker"})
        stubber.activate()
        return cloud

    connect = clouds.connect
    monkeypatch.setattr(clouds, "connect", answering)
    before = shell.client("s3").list_objects_v2(Bucket=f"{stack}-000000000000-{REGION}")["KeyCount"]
    manifest = tmp_path / "one.json"
    manifest.write_text(json.dumps([{"name": "harbour", "photos": str(small_capture)}]))
    assert here(command, str(small_capture if command == "submit" else manifest)) == 2
    line = capsys.readouterr().err
    assert (
        "quota ml.g5.xlarge for training job usage: 0, needed 1; ask for more at https://eu-central-1.console" in line
    )
    assert line.strip().endswith("/L-1")
    assert shell.client("s3").list_objects_v2(Bucket=f"{stack}-000000000000-{REGION}")["KeyCount"] == before


@pytest.mark.parametrize(
    ("code", "message", "words"),
    [
        ("ExpiredToken", "", "the AWS credentials have expired: log in again"),
        ("InvalidClientTokenId", "", "AWS does not know these credentials"),
        ("AccessDenied", "not authorized to perform: cloudformation:DescribeStacks", "no permission for cloudformation:DescribeStacks"),
        ("RequestTimeTooSkewed", "", "this machine's clock is wrong"),
    ],
)  # fmt: skip
def test_what_aws_refuses_is_one_line(
    code: str, message: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud = Cloud(boto3.Session("key", "secret", region_name=REGION))
    monkeypatch.setattr(clouds, "connect", lambda region, profile: cloud)
    with Stubber(cloud.client("cloudformation")) as stubber:
        stubber.add_client_error("describe_stacks", code, message)
        assert cli.run(["aws", "status", "a1"]) == 2
    assert words in capsys.readouterr().err


def test_without_credentials(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in (
        ("CONFIG_FILE", "/dev/null"),
        ("SHARED_CREDENTIALS_FILE", "/dev/null"),
        ("EC2_METADATA_DISABLED", "true"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    assert cli.run(["aws", "status", "a1", "--region", REGION]) == 2
    assert "no AWS credentials: run `aws configure`" in capsys.readouterr().err
    assert cli.run(["aws", "doctor", "--region", REGION]) == 1
    assert "LOOK  credentials  no AWS credentials" in capsys.readouterr().out
    assert cli.run(["aws", "status", "a1"]) == 2
    assert "no region: give --region" in capsys.readouterr().err


def test_without_boto3_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("spaceport_gs.pipeline.aws.commands.common.find_spec", lambda name: None)
    for arguments in ([], ["doctor"], ["submit", "photos"]):
        assert cli.run(["aws", *arguments]) == 2
        assert "pip install 'spaceport-gs[aws]'" in capsys.readouterr().err
    assert cli.run(["aws", "--help"]) == 0


# Images


def built(shell: Shell) -> list[list[str]]:
    """What podman was asked for since it was last looked at."""
    log = shell.folder.parent / "podman.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def test_images_are_built_once_and_recorded_by_digest(
    here: Callable[..., int], shell: Shell, stack: str, capfd: pytest.CaptureFixture[str]
) -> None:
    built(shell)
    assert here("push", "--image", "sfm", "--build-arg", "PIP_INDEX_URL=https://pypi.example", "--json") == 0
    printed = capfd.readouterr()
    image, commands = json.loads(printed.out)["sfm"], built(shell)
    assert [command[0] for command in commands] == ["version", "login", "pull", "image", "build", "push"]
    build = commands[-2]
    assert "--build-arg=PIP_INDEX_URL=https://pypi.example" in build
    assert f"--build-arg=BASE=debian@sha256:{64 * 'b'}" in build and image["bases"] == {
        "BASE": f"debian@sha256:{64 * 'b'}"
    }
    assert f"--tag=000000000000.dkr.ecr.{REGION}.amazonaws.com/{stack}/sfm:{image['tag']}" in build
    ecr = boto3.client("ecr", REGION)
    (there,) = ecr.describe_images(repositoryName=f"{stack}/sfm", imageIds=[{"imageTag": image["tag"]}])["imageDetails"]
    assert image["address"] == f"000000000000.dkr.ecr.{REGION}.amazonaws.com/{stack}/sfm@{there['imageDigest']}"

    assert here("push", "--image", "sfm", "--build-arg", "PIP_INDEX_URL=https://pypi.example", "--json") == 0
    assert json.loads(capfd.readouterr().out)["sfm"] == image
    assert "build" not in [command[0] for command in built(shell)]


def test_who_pushes_the_same_at_the_same_time_gets_what_is_there(
    here: Callable[..., int], stack: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The repository refuses a tag that it has; the image under it is made of the same."""
    monkeypatch.setenv("PUSH_ENDS_WITH", "1")
    assert here("push", "--image", "sfm", "--build-arg", "PIP_INDEX_URL=https://other.example", "--json") == 0
    image = json.loads(capfd.readouterr().out)["sfm"]
    (there,) = boto3.client("ecr", REGION).describe_images(
        repositoryName=f"{stack}/sfm", imageIds=[{"imageTag": image["tag"]}]
    )["imageDetails"]
    assert image["address"].endswith(f"@{there['imageDigest']}")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exit 0", ""),
        ('[ "$1" = version ] && { echo "Cannot connect to the Docker daemon" >&2; exit 1; }', "docker: Cannot connect to the"),
        ('[ "$1" = login ] && { echo denied >&2; exit 1; }; exit 0', "logging in to 000000000000.dkr.ecr"),
        ('[ "$1" = pull ] && exit 1; exit 0', "looking up debian:bookworm-slim: docker failed with exit code 1"),
        ('[ "$1" = image ] && echo null; exit 0', "docker knows no digest of it"),
        ('[ "$1" = build ] && exit 3; [ "$1" = image ] && echo "[\\"debian@sha256:1\\"]"; exit 0', "building sfm: docker failed with exit code 3"),
        ('[ "$1" = push ] && exit 1; [ "$1" = image ] && echo "[\\"debian@sha256:1\\"]"; exit 0', "pushing sfm: docker failed with exit code 1"),
        ('[ "$1" = image ] && echo "[\\"debian@sha256:1\\"]"; exit 0', "pushing sfm: the repository has no 000000000000.dkr.ecr"),
    ],
)  # fmt: skip
def test_tools_that_do_not_work(
    script: str, words: str, here: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    if words:
        tool = tmp_path / "bin/docker"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    assert here("push", "--image", "sfm", "--build-arg", f"NUMBER={words}") == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert (words or "no docker, podman or buildah that works here: the images are built with one") in line


def test_images_of_another_version_or_gone_are_not_used(
    here: Callable[..., int], shell: Shell, stack: str, small_capture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    s3, place = shell.client("s3"), {"Bucket": f"{stack}-000000000000-{REGION}", "Key": "deploy/images.json"}
    text = s3.get_object(**place)["Body"].read().decode()
    record = json.loads(text)
    try:
        for change, words in (
            ({"version": "0.0.1"}, "the image sfm is of version 0.0.1, this installation of"),
            ({"tag": "none"}, "is gone from its repository: run `spaceport aws push`"),
        ):
            s3.put_object(**place, Body=json.dumps({**record, "sfm": {**record["sfm"], **change}}).encode())
            assert here("submit", str(small_capture)) == 2
            assert words in capsys.readouterr().err
    finally:
        s3.put_object(**place, Body=text.encode())


def test_policies_in_the_docs_are_policies() -> None:
    """And every command in the docs is one."""
    text = (Path(__file__).parent.parent / "docs/aws.md").read_text()
    policies = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    assert len(policies) == 2
    for statement in (one for policy in policies for one in policy["Statement"]):
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert statement["Effect"] == "Allow" and all(re.fullmatch(r"[a-z0-9-]+:[*A-Za-z]+", name) for name in actions)
    known = {command.name for command in commands.registered_commands}
    assert set(re.findall(r"spaceport aws (\w+)", text)) <= known <= set(re.findall(r"`(\w+)[ A-Z]*`", text))
