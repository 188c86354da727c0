"""The images of the containers: built here, pushed to the repositories of a stack, and recorded in its bucket by their digests.

A tag is never used twice. It stands for everything that an image is built from, so an image that is there is not built again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from spaceport_gs import __version__
from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws.cloud import ClientError, Cloud, code_of, explained
from spaceport_gs.pipeline.aws.contract import STAGES
from spaceport_gs.pipeline.aws.objects import text_of
from spaceport_gs.pipeline.aws.stack import Stack
from spaceport_gs.pipeline.images import IMAGES, build_command, commit, last_line, run_tool, write_context

RECORD = "deploy/images.json"
_BASE = re.compile(r"^ARG (\w*BASE)=([^\s$]+)$", re.MULTILINE)  # not one that takes another's value


@dataclass(frozen=True)
class Image:
    """Of one stage, as it was pushed."""

    address: str
    """With its digest: what jobs are given."""
    tag: str
    version: str
    commit: str
    bases: Mapping[str, str] = field(default_factory=dict)
    """What it was built on, with digests, by the Dockerfile's argument."""


@explained()
def push(
    cloud: Cloud,
    stack: Stack,
    stages: Sequence[str],
    arguments: Mapping[str, str],
    tool: str,
    tell: Callable[[str], None],
) -> dict[str, Image]:
    """Builds and pushes the images of these stages; returns all that the stack has. `arguments`: of the Dockerfiles."""
    pushed = read_record(cloud, stack)
    bases: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        context = Path(temporary) / "context"
        write_context(context)
        _log_in(cloud, stack, tool)
        for stage in stages:
            dockerfile = context / "pipeline/containers" / IMAGES[stage] / "Dockerfile"
            on = {name: arguments.get(name, usual) for name, usual in _BASE.findall(dockerfile.read_text())}
            for base in on.values():
                if base not in bases:
                    tell(f"{IMAGES[stage]}: looks up {base}")
                    bases[base] = resolved(tool, base)
            given = {**arguments, **{name: bases[base] for name, base in on.items()}}
            tag = f"{__version__}-{_digest(context, given)}"
            name = f"{stack.repository(stage)}:{tag}"
            if not (digest := _digest_of(cloud, stack, stage, tag)):
                tell(f"{IMAGES[stage]}: builds {name}")
                command = build_command(IMAGES[stage], context, name, given, tool)
                run_tool([*command[:2], *_platform(), *command[2:]], f"building {IMAGES[stage]}")
                tell(f"{IMAGES[stage]}: pushes it")
                digest = _pushed(cloud, stack, stage, name, tool)
            address = f"{stack.repository(stage)}@{digest}"
            pushed[stage] = Image(address, tag, __version__, commit(), {name: given[name] for name in on})
            _write_record(cloud, stack, pushed)
            tell(f"{IMAGES[stage]}: {address}")
    return pushed


def _pushed(cloud: Cloud, stack: Stack, stage: str, name: str, tool: str) -> str:
    """The digest of an image, once it is in its repository: by us, or by somebody who pushed the same meanwhile, because a
    tag that is there cannot be given away again.
    """
    tag, refused = name.rpartition(":")[2], None
    try:
        run_tool([tool, "push", name], f"pushing {IMAGES[stage]}")
    except InputError as error:
        refused = error
    if not (digest := _digest_of(cloud, stack, stage, tag)):
        raise refused or InputError(f"pushing {IMAGES[stage]}: the repository has no {name} after it; push again")
    return digest


@explained()
def images_of(cloud: Cloud, stack: Stack) -> dict[str, str]:
    """What the jobs of each stage run in. InputError if an image is missing, or is not of this version."""
    pushed = read_record(cloud, stack)
    for stage in STAGES:
        image = pushed.get(stage)
        if image is None:
            raise InputError(f"the stack {stack.prefix} has no image {IMAGES[stage]} yet: run `spaceport aws push`")
        if image.version != __version__:
            raise InputError(
                f"the image {IMAGES[stage]} is of version {image.version}, this installation of {__version__}:"
                " run `spaceport aws push`, or install the same version"
            )
        if not _digest_of(cloud, stack, stage, image.tag):
            raise InputError(f"the image {image.address} is gone from its repository: run `spaceport aws push`")
    return {stage: pushed[stage].address for stage in STAGES}


def read_record(cloud: Cloud, stack: Stack) -> dict[str, Image]:
    """What was pushed last, by stage."""
    try:
        record = json.loads(text_of(cloud, stack.bucket, RECORD) or "{}")
        return {str(stage): Image(**image) for stage, image in record.items()}
    except (ValueError, TypeError, AttributeError):
        return {}  # of another version, or broken: as if nothing had been pushed


def _write_record(cloud: Cloud, stack: Stack, pushed: Mapping[str, Image]) -> None:
    text = json.dumps({stage: asdict(image) for stage, image in pushed.items()}, indent=2)
    cloud.client("s3").put_object(
        Bucket=stack.bucket, Key=RECORD, Body=text.encode(), ContentType="application/json"
    )  # fmt: skip


def resolved(tool: str, base: str) -> str:
    """A base image by its digest, which `tool` finds out by pulling it."""
    if "@" in base:
        return base
    what = f"looking up {base}"
    run_tool([tool, "pull", "--quiet", *_platform(), base], what)
    if tool == "buildah":
        digest = json.loads(_output([tool, "inspect", "--type=image", base], what)).get("FromImageDigest", "")
        digests = [f"{base.rpartition(':')[0] or base}@{digest}"] if digest else []
    else:
        digests = json.loads(_output([tool, "image", "inspect", "--format={{json .RepoDigests}}", base], what)) or []
    if not digests:
        raise InputError(f"{base}: {tool} knows no digest of it; give one as NAME@sha256:… with --build-arg")
    return str(digests[0])


def _platform() -> list[str]:
    """What SageMaker's machines are, where that is not what this one is."""
    return [] if platform.machine() in ("x86_64", "AMD64") else ["--platform=linux/amd64"]


def _digest(context: Path, arguments: Mapping[str, str]) -> str:
    """Of everything that an image is built from, in a few characters."""
    whole = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode())
    for path in sorted(path for path in context.rglob("*") if path.is_file()):
        whole.update(
            f"\0{path.relative_to(context).as_posix()}\0".encode() + hashlib.sha256(path.read_bytes()).digest()
        )
    return whole.hexdigest()[:12]


def _digest_of(cloud: Cloud, stack: Stack, stage: str, tag: str) -> str:
    """Of the image with this tag in the repository of a stage; empty if there is none."""
    repository = stack.repository(stage).partition("/")[2]
    try:
        found = cloud.client("ecr").describe_images(repositoryName=repository, imageIds=[{"imageTag": tag}])
        return next((str(image["imageDigest"]) for image in found["imageDetails"]), "")
    except ClientError as error:
        if code_of(error) != "ImageNotFoundException":
            raise
        return ""


def _log_in(cloud: Cloud, stack: Stack, tool: str) -> None:
    token = cloud.client("ecr").get_authorization_token()["authorizationData"][0]["authorizationToken"]
    user, _, password = base64.b64decode(token).decode().partition(":")
    registry = stack.repository("sfm").partition("/")[0]
    command = [tool, "login", f"--username={user}", "--password-stdin", registry]
    _output(command, f"logging in to {registry}", password)


def _output(command: Sequence[str], what: str, given: str = "") -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{what}: {command[0]} failed: {last_line(done.stderr)}")
    return done.stdout
