"""Commands for the stack: deploy, destroy, push, doctor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws import PREFIX
from spaceport_gs.pipeline.aws.commands.common import (
    Drain,
    Instance,
    Prefix,
    Profile,
    Region,
    Spot,
    Yes,
    connected,
    teller,
)
from spaceport_gs.pipeline.options import EXIT_SOME_FAILED, BuildArgument, Json, OnlyImage, Tool, chosen_images, finish

if TYPE_CHECKING:
    from spaceport_gs.pipeline.aws.push import Image
    from spaceport_gs.pipeline.aws.stack import Change


def deploy_command(
    parameters: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE, a parameter of the template; NAME=@FILE: what is in a file. May be repeated."),
    ] = None,
    email: Annotated[str, typer.Option("--email", help="Who hears of finished and failed scenes.")] = "",
    yes: Yes = False, drain: Drain = False, region: Region = "", profile: Profile = "", prefix: Prefix = PREFIX,
    json: Json = False,
) -> None:  # fmt: skip
    """Makes the stack, or brings it up to date: shows what would change, asks, and does it."""
    from spaceport_gs.pipeline.aws.cloud import connect
    from spaceport_gs.pipeline.aws.cost import idle_line, idle_usd_per_month
    from spaceport_gs.pipeline.aws.stack import Running, deploy

    given = dict(_parameter(text) for text in parameters or ()) | ({"Email": email} if email else {})
    running = Running.DRAIN if drain else Running.REFUSE
    stack = deploy(connect(region, profile), prefix, given, _confirm(yes, json), teller(json), running)
    if stack is None:
        finish({"deployed": False}, json, False, lambda: "nothing was changed")
        return
    idle = idle_usd_per_month(stack.parameters)
    result = {"deployed": True, "prefix": prefix, "region": stack.region, "outputs": dict(stack.outputs), "idle_usd_per_month": idle}  # fmt: skip
    finish(result, json, False, lambda: (
        f"the stack {prefix} in {stack.region} is ready, bucket {stack.bucket}\n{idle_line(stack.parameters)}"
    ))  # fmt: skip


def _parameter(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set {text}: expected NAME=VALUE, such as LogDays=60")
    return name, Path(value[1:]).read_text(encoding="utf-8") if value.startswith("@") else value


def destroy_command(
    delete_data: Annotated[bool, typer.Option("--delete-data", help="Photos, scenes and images too.")] = False,
    yes: Yes = False, drain: Drain = False, region: Region = "", profile: Profile = "", prefix: Prefix = PREFIX,
    json: Json = False,
) -> None:  # fmt: skip
    """Removes the stack. Photos, scenes and images stay, unless --delete-data is given; deploy takes them up again."""
    from spaceport_gs.pipeline.aws.cloud import connect
    from spaceport_gs.pipeline.aws.stack import Data, Running, destroy, find_kept

    cloud = connect(region, profile)
    data, running = Data.DELETE if delete_data else Data.KEEP, Running.DRAIN if drain else Running.REFUSE
    is_gone = destroy(cloud, prefix, _confirm(yes, json), teller(json), data, running)
    kept = find_kept(cloud, prefix) if is_gone and not delete_data else {}
    result = {"destroyed": is_gone, "kept": kept}
    finish(result, json, False, lambda: f"the stack {prefix} is gone" if is_gone else "nothing was changed")


def _confirm(yes: bool, as_json: bool) -> Callable[[Sequence[Change]], bool]:
    """Shows changes and asks whether they are wanted."""

    def confirm(changes: Sequence[Change]) -> bool:
        for change in changes:
            teller(as_json)(f"  {change}")
        if not yes and not sys.stdin.isatty():
            raise InputError("there is nobody to ask; give --yes to go on without")
        return yes or typer.confirm("Do that?", err=as_json)

    return confirm


def push_command(
    image: OnlyImage = None, build_arg: BuildArgument = None, tool: Tool = "",
    region: Region = "", profile: Profile = "", prefix: Prefix = PREFIX, json: Json = False,
) -> None:  # fmt: skip
    """Builds the images of the containers, pushes them to the stack's repositories and records their digests."""
    from spaceport_gs.pipeline.aws.push import push
    from spaceport_gs.pipeline.images import find_tool

    stages, arguments = chosen_images(image, build_arg)
    cloud, stack = connected(region, profile, prefix)
    pushed = push(cloud, stack, stages, arguments, find_tool(wanted=tool), teller(True))
    result = {stage: asdict(one) for stage, one in pushed.items()}
    finish(result, json, False, lambda: "\n".join(_image_lines(pushed)))


def _image_lines(pushed: Mapping[str, Image]) -> Iterator[str]:
    for stage, image in pushed.items():
        yield f"{stage:9} {image.address} ({image.tag})"


def doctor_command(
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Scenes to be made at a time.")] = 1,
    instance: Instance = None, spot: Spot = False, region: Region = "", profile: Profile = "", prefix: Prefix = PREFIX,
    json: Json = False,
) -> None:  # fmt: skip
    """Whether scenes can be made in this account, and what to do about what is missing."""
    from dataclasses import replace

    from spaceport_gs.pipeline.aws.cloud import connect
    from spaceport_gs.pipeline.aws.doctor import examine
    from spaceport_gs.pipeline.aws.jobs import DEFAULT_MACHINES
    from spaceport_gs.pipeline.aws.orders import instances_of

    named, _ = instances_of(instance or ())
    machines = {
        stage: replace(machine, instance=named.get(stage, machine.instance), is_spot=spot and stage == "train")
        for stage, machine in DEFAULT_MACHINES.items()
    }
    found = examine(connect(region, profile), prefix, machines, jobs)
    is_good = all(finding.is_good for finding in found)
    result = {"good": is_good, "checks": [asdict(finding) for finding in found]}
    finish(result, json, False, lambda: "\n".join(
        f"{'good' if finding.is_good else 'LOOK'}  {finding.check:11}  {finding.line}" for finding in found
    ))  # fmt: skip
    if not is_good:
        raise typer.Exit(EXIT_SOME_FAILED)
