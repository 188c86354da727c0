"""Commands, each a process of its own, that begin where the imports are done: this program forks for each that it is asked for.

A line of JSON asks: the command's arguments, its folder, its environment, and files for what it prints. A line with the exit
code answers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SERVICES = ("cloudformation", "ecr", "logs", "s3", "sagemaker", "service-quotas", "stepfunctions", "sts")
MODULES = ("cost", "doctor", "links", "orders", "page", "push", "scenes", "stack", "uploads", "watch")


@dataclass(frozen=True)
class Typist:
    """Asks for commands."""

    server: subprocess.Popen[str]
    folder: Path

    def run(
        self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        assert self.server.stdin and self.server.stdout
        out, err = self.folder / "out", self.folder / "err"
        asked = {"arguments": arguments, "folder": str(folder), "environment": dict(environment), "files": [str(out), str(err)]}  # fmt: skip
        print(json.dumps(asked), file=self.server.stdin, flush=True)
        code = int(self.server.stdout.readline())
        return subprocess.CompletedProcess(list(arguments), code, out.read_text(), err.read_text())


@contextmanager
def typist(folder: Path) -> Iterator[Typist]:
    """`folder`: for what commands print."""
    folder.mkdir()
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with server:
        yield Typist(server, folder)


def _serve() -> None:
    from functools import cache
    from importlib import import_module

    import boto3
    import botocore.session

    from spaceport_gs.pipeline.aws import scenes, stack, watch
    from spaceport_gs.pipeline.cli import main

    for module in MODULES:
        import_module(f"spaceport_gs.pipeline.aws.{module}")
    botocore.session.create_loader = cache(botocore.session.create_loader)  # reads what it knows of each service once
    for service in SERVICES:
        boto3.client(service, "eu-central-1")
    # It asks its servers more often than it would ask AWS.
    stack.POLL_SECONDS = watch.POLL_SECONDS = 0.1
    scenes.STOP_WAITS = (0.0, 0.3, 1.0)
    for line in sys.stdin:
        asked = json.loads(line)
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        for file, flags, number in ((os.devnull, os.O_RDONLY, 0), *((f, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, i) for i, f in enumerate(asked["files"], 1))):  # fmt: skip
            os.dup2(os.open(file, flags, 0o600), number)
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        sys.argv = ["spaceport", *asked["arguments"]]
        main()


if __name__ == "__main__":
    _serve()
