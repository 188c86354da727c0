"""`spaceport aws` as a user types it: every command a process of its own, AWS emulated on this machine, the jobs real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from emulator import emulated_aws, free_port, started, wait_for

from spaceport_gs.pipeline.synthesize import SynthesizeSettings, synthesize

REGION = "eu-central-1"
PROGRAM = """
import sys
from spaceport_gs.pipeline.aws import scenes, stack, watch
stack.POLL_SECONDS = watch.POLL_SECONDS = 0.1
scenes.STOP_WAITS = (0.0, 0.3, 1.0)
from spaceport_gs.pipeline.cli import main
main()
"""
"""The command, which asks its servers more often than it would ask AWS."""
PODMAN = """#!{python}
import hashlib, json, os, sys
import boto3
verb, rest = sys.argv[1], sys.argv[2:]
with open({log!r}, "a") as file:
    file.write(json.dumps([verb, *rest]) + "\\n")
if verb == "image":
    print(json.dumps([rest[-1].partition(":")[0] + "@sha256:" + 64 * "b"]))
elif verb == "login":
    assert sys.stdin.read() and "--password-stdin" in rest
elif verb == "push":
    repository, _, tag = rest[-1].partition("/")[2].partition(":")
    manifest = dict(schemaVersion=2, mediaType="application/vnd.docker.distribution.manifest.v2+json", name=rest[-1])
    boto3.client("ecr").put_image(repositoryName=repository, imageTag=tag, imageManifest=json.dumps(manifest))
"""
"""Stands for podman: it writes down what it is asked for, and lets ECR have an image without layers."""


@dataclass(frozen=True)
class Shell:
    """In which a user types."""

    environment: Mapping[str, str]
    folder: Path

    def __call__(self, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROGRAM, "aws", *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env={**os.environ, **self.environment}, capture_output=True, text=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == expect, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: str, expect: int = 0) -> Any:
        return json.loads(self(*arguments, "--json", expect=expect).stdout)

    def error(self, *arguments: str) -> str:
        """The one line of a user's mistake."""
        done = self(*arguments, expect=2)
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("spaceport: error: "), done.stderr
        return lines[0].removeprefix("spaceport: error: ")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "aws", *arguments], cwd=self.folder, env={**os.environ, **self.environment},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def client(self, service: str, endpoint: str = "AWS_ENDPOINT_URL") -> Any:
        """`endpoint`: the variable that has it."""
        return boto3.client(
            service, REGION, endpoint_url=self.environment[endpoint], aws_access_key_id="test", aws_secret_access_key="test"
        )  # fmt: skip


@contextmanager
def account(folder: Path) -> Iterator[Shell]:
    """An account with nothing in it, and tools to build images with."""
    log = folder / "log"
    with emulated_aws(log) as environment:
        flow, jobs = free_port(), free_port()
        environment |= {
            "AWS_ENDPOINT_URL_SFN": f"http://127.0.0.1:{flow}",
            "AWS_ENDPOINT_URL_SAGEMAKER": f"http://127.0.0.1:{jobs}",
            "MOTO_ACCOUNT_ID": "000000000000",  # that of ministack
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        server = [str(Path(__file__).with_name("jobs_here.py")), str(flow), str(jobs), environment["AWS_ENDPOINT_URL"], str(folder / "jobs")]  # fmt: skip
        with started(server, environment, log) as process:
            wait_for(process, flow, log)
            wait_for(process, jobs, log)
            tools = folder / "bin"
            tools.mkdir()
            podman = tools / "podman"
            podman.write_text(PODMAN.format(python=sys.executable, log=str(folder / "podman.jsonl")))
            podman.chmod(0o755)
            (folder / "home").mkdir()
            yield Shell({**environment, "PATH": f"{tools}:/usr/bin:/bin"}, folder / "home")


def put_flow(shell: Shell, prefix: str = "spaceport") -> None:
    """The state machines that the stack has, on the interpreter."""
    there, flow = shell.client("stepfunctions"), shell.client("stepfunctions", "AWS_ENDPOINT_URL_SFN")
    for machine in there.list_state_machines()["stateMachines"]:
        if machine["name"].startswith(f"{prefix}-"):
            found = there.describe_state_machine(stateMachineArn=machine["stateMachineArn"])
            made = flow.create_state_machine(name=found["name"], definition=found["definition"], roleArn=found["roleArn"])
            assert made["stateMachineArn"] == machine["stateMachineArn"]


def until(look: Callable[[], Any], seconds: float = 120) -> Any:
    """What it finds at last."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    for module in ("ministack", "moto", "jsonata"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    with account(tmp_path_factory.mktemp("aws")) as found:
        yield found


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small photos whose cameras are known, so that jobs take seconds."""
    out = tmp_path_factory.mktemp("small")
    synthesize(out, SynthesizeSettings(n_photos=12, width=96, height=64))
    return out / "truth"


@pytest.fixture(scope="module")
def stack(shell: Shell) -> str:
    """Name of a stack that has images."""
    shell("deploy", "--yes", "--prefix", "shared")
    put_flow(shell, "shared")
    shell("push", "--prefix", "shared")
    return "shared"


def test_from_photos_to_a_scene_and_back_to_nothing(shell: Shell, capture: Path) -> None:
    photos, hold = str(capture), shell.folder.parent / "jobs/hold-Training"
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
    watching = shell.start("watch", job, "-o", "seen")
    until(lambda: [one["stage"] for one in shell.json("status", job)["jobs"]] == ["sfm", "train"])
    assert f"1 under way: {job}-1; stop them" in shell.error("destroy", "--yes")
    stopped = shell.json("stop", job)
    (name,) = stopped["stopped"]
    assert name.startswith(f"spaceport-train-{job}-") and len(stopped["jobs"]) == 2 and stopped["usd"] > 0
    assert shell.json("stop", job)["stopped"] == []
    printed, said = watching.communicate(timeout=60)
    assert watching.returncode == 1 and "aborted" in printed and not said
    events = [json.loads(line) for line in (shell.folder / "seen/events.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(event["stage"] for event in events)) == ["sfm", "train"]
    assert "no finished result" in shell.error("fetch", job)

    hold.unlink()
    again = shell("retry", job, "--watch")
    assert f"{job}-2: succeeded" in again.stdout
    state = shell.json("status", job)
    assert [one["stage"] for one in state["jobs"]] == ["train", "compress"] and state["page"].endswith("/index.html")
    assert "is done" in shell.error("retry", job)
    assert "== spaceport-train-" in (log := shell("logs", job, "--stage", "train").stdout) and "metric step=6" in log

    shell("fetch", job)
    assert "Quarry é" in (shell.folder / job / "index.html").read_text()
    cost = shell.json("cost", job)
    assert len(cost["jobs"]) == 4 and cost["usd"] == pytest.approx(sum(one["usd"] for one in cost["jobs"]))
    gone = shell("destroy", "--yes")
    assert "keep Bucket" in gone.stdout and "the stack spaceport is gone" in gone.stdout
    assert "no stack spaceport in eu-central-1" in shell.error("status", job)
    assert "remove Bucket" in shell("destroy", "--yes", "--delete-data").stdout
    assert not [b for b in shell.client("s3").list_buckets()["Buckets"] if b["Name"].startswith("spaceport-")]


@pytest.mark.slow
def test_a_training_that_is_stopped_goes_on_where_it_was(shell: Shell, stack: str, orbit_capture: Path) -> None:
    """From photos; while it is watched, which brings events and the preview here."""
    there, photos = ("--prefix", stack), str(orbit_capture / "photos")
    job = shell.json("submit", photos, "--steps", "600", "--device", "cpu", "--downscale", "2", *there)["job"]

    def trained() -> bool:
        progress = shell.json("status", job, *there)["progress"] or {}
        return progress.get("stage") == "train" and progress["step"] > 0

    until(trained)
    shell("stop", job, *there)
    assert f"{job}-2: succeeded" in shell("retry", job, "--watch", *there).stdout
    events = [json.loads(line) for line in (shell.folder / job / "events.jsonl").read_text().splitlines()]
    assert min(event["step"] for event in events if event["stage"] == "train" and event["n_steps"] == 600) > 0
    assert (shell.folder / job / "preview.jpg").read_bytes()[:2] == b"\xff\xd8"
    shell("fetch", job, *there)
    assert (shell.folder / job / "scene.sog").stat().st_size > 100_000
