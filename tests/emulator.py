"""AWS in two processes on this machine: ministack for what the template makes, moto for SageMaker, which ministack lacks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spaceport_gs.pipeline.aws.cloud import Cloud

VARIABLES = {"ministack": "AWS_ENDPOINT_URL", "moto": "AWS_ENDPOINT_URL_SAGEMAKER"}
SERVERS = tuple(VARIABLES)


@contextmanager
def emulated_aws(log: Path, names: Sequence[str] = SERVERS) -> Iterator[dict[str, str]]:
    """The environment in which boto3 finds it. What the servers say goes to `log`."""
    ports = [free_port() for _ in names]
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "eu-central-1",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
        **{VARIABLES[name]: f"http://127.0.0.1:{port}" for name, port in zip(names, ports, strict=True)},
    }
    with ExitStack() as running:
        servers = [
            running.enter_context(started([__file__, name, str(port)], {**environment, "GATEWAY_PORT": str(port)}, log))
            for name, port in zip(names, ports, strict=True)
        ]
        for server, port in zip(servers, ports, strict=True):
            wait_for(server, port, log)
        yield environment


@contextmanager
def connected(log: Path, names: Sequence[str] = SERVERS, **variables: str) -> Iterator[Cloud]:
    """To it, from this process; skips the test where an emulator is missing. `variables`: more of the environment."""
    import pytest  # here, because the servers need none of it

    from spaceport_gs.pipeline.aws import stack
    from spaceport_gs.pipeline.aws.cloud import connect

    for name in names:
        pytest.importorskip(name, reason=f"{name} is not installed")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        with emulated_aws(log, names) as environment:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(stack, "POLL_SECONDS", 0.02)
            yield connect()


@contextmanager
def started(arguments: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A Python program that serves."""
    with open(log, "a") as file:
        server = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **environment, "BIND_HOST": "127.0.0.1"},
            cwd=log.parent,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield server
    finally:
        server.kill()  # it has nothing to lose
        server.wait(timeout=30)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)


def _serve_ministack() -> None:
    """With what it lacks: the import of a repository into a stack."""
    from ministack.app import main
    from ministack.services import ecr
    from ministack.services.cloudformation import provisioners

    def import_repository(identifier: dict[str, str]) -> tuple[str, dict[str, str]]:
        found = ecr._repositories[identifier["RepositoryName"]]
        return found["repositoryName"], {"Arn": found["repositoryArn"], "RepositoryUri": found["repositoryUri"]}

    provisioners._RESOURCE_HANDLERS["AWS::ECR::Repository"]["import"] = import_repository
    main()


def _serve_moto(port: int) -> None:
    from moto.server import main

    main(["-H", "127.0.0.1", "-p", str(port)])


if __name__ == "__main__":
    name, port = sys.argv[1:]
    sys.argv[1:] = []
    _serve_ministack() if name == "ministack" else _serve_moto(int(port))
