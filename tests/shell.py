"""`spaceport aws` as a user types it: every command a process of its own, AWS emulated on this machine, the jobs real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from emulator import emulated_aws, free_port, started, wait_for
from typed import Typist, typist

REGION = "eu-central-1"
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where it is ignored
from spaceport_gs.pipeline.aws import scenes, stack, watch
stack.POLL_SECONDS = watch.POLL_SECONDS = 0.1
scenes.STOP_WAITS = (0.0, 0.3, 1.0)
from spaceport_gs.pipeline.cli import main
main()
"""
"""The command from its start, which asks its servers more often than it would ask AWS."""
PODMAN = """#!{python}
import json, os, sys
verb, rest = sys.argv[1], sys.argv[2:]
with open({log!r}, "a") as file:
    file.write(json.dumps([verb, *rest]) + "\\n")
if verb == "image":
    print(json.dumps([rest[-1].partition(":")[0] + "@sha256:" + 64 * "b"]))
elif verb == "login":
    assert sys.stdin.read() and "--password-stdin" in rest
elif verb == "push":
    from urllib.request import Request, urlopen
    repository, _, tag = rest[-1].partition("/")[2].partition(":")
    manifest = dict(schemaVersion=2, mediaType="application/vnd.docker.distribution.manifest.v2+json", name=rest[-1])
    image = dict(repositoryName=repository, imageTag=tag, imageManifest=json.dumps(manifest))
    headers = {{
        "Content-Type": "application/x-amz-json-1.1",
        "X-Amz-Target": "AmazonEC2ContainerRegistry_V20150921.PutImage",
        "Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/eu-central-1/ecr/aws4_request, Signature=none",
    }}
    urlopen(Request(os.environ["AWS_ENDPOINT_URL"], json.dumps(image).encode(), headers)).close()
    sys.exit(int(os.environ.get("PUSH_ENDS_WITH", 0)))
"""
"""Stands for podman: it writes down what it is asked for, and lets ECR have an image without layers."""


@dataclass(frozen=True)
class Shell:
    """In which a user types."""

    environment: Mapping[str, str]
    folder: Path
    typist: Typist

    def __call__(self, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        done = self.typist.run(["aws", *arguments], self.folder, {**os.environ, **self.environment})
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
    with emulated_aws(log, ["ministack"]) as environment:
        flow, jobs = free_port(), free_port()
        environment |= {
            "AWS_ENDPOINT_URL_SFN": f"http://127.0.0.1:{flow}",
            "AWS_ENDPOINT_URL_SAGEMAKER": f"http://127.0.0.1:{jobs}",
            "AWS_ENDPOINT_URL_SERVICE_QUOTAS": f"http://127.0.0.1:{jobs}",
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
            with typist(folder / "printed") as commands:
                yield Shell({**environment, "PATH": f"{tools}:/usr/bin:/bin"}, folder / "home", commands)


def put_flow(shell: Shell, prefix: str = "spaceport") -> None:
    """The state machines that the stack has, on the interpreter."""
    there, flow = shell.client("stepfunctions"), shell.client("stepfunctions", "AWS_ENDPOINT_URL_SFN")
    for machine in there.list_state_machines()["stateMachines"]:
        if machine["name"].startswith(f"{prefix}-"):
            found = there.describe_state_machine(stateMachineArn=machine["stateMachineArn"])
            made = flow.create_state_machine(
                name=found["name"], definition=found["definition"], roleArn=found["roleArn"]
            )
            assert made["stateMachineArn"] == machine["stateMachineArn"]


def read(address: str, **headers: str) -> bytes:
    """What an address answers; nothing if it refuses."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError:
        return b""


def until(look: Callable[[], Any], seconds: float = 120) -> Any:
    """What it finds at last."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)
    return found
