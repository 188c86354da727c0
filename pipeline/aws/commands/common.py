"""What the commands have in common: options and what they mean, the stack that they work on, and how they tell of it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws import PREFIX

if TYPE_CHECKING:
    from spaceport_gs.pipeline.aws.cloud import Cloud
    from spaceport_gs.pipeline.aws.orders import Order
    from spaceport_gs.pipeline.aws.stack import Stack
    from spaceport_gs.pipeline.run import RunSettings
    from spaceport_gs.progress import Listener

EXIT_FAILED = 70  # as the jobs' own: neither done nor the user's mistake
BATCH = "batch/"  # begins what stands for a whole batch where a scene's id can stand

Region = Annotated[str, typer.Option("--region", help="Default: AWS_REGION, or the profile's.")]
Profile = Annotated[str, typer.Option("--profile", help="Of ~/.aws/config; default: AWS_PROFILE, or what boto3 finds.")]
Prefix = Annotated[
    str, typer.Option("--prefix", envvar="SPACEPORT_STACK", help="Name of the stack; begins every other name.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Drain = Annotated[bool, typer.Option("--drain", help="Wait for scenes under way, instead of refusing.")]
Job = Annotated[str, typer.Argument(metavar="JOB", help="As submit printed it; batch/NAME: all scenes of a batch.")]
Folder = Annotated[
    Path, typer.Argument(metavar="PHOTOS", help="A folder of photos, a .zip of one, or a COLMAP project.")
]
Instance = Annotated[
    list[str] | None,
    typer.Option(
        "--instance", help="STAGE=TYPE, as train=ml.g5.2xlarge; or auto: the cheapest that fit. May be repeated."
    ),
]
Spot = Annotated[bool, typer.Option("--spot", help="Train on spot instances; if there are none, on demand.")]
MaxCost = Annotated[float, typer.Option("--max-cost", min=0, help="US dollars that a scene may cost; 0: no limit.")]
Deadline = Annotated[
    float, typer.Option("--deadline", min=0, help="With --instance auto: minutes that it may take; 0: any.")
]
DrillOption = Annotated[
    list[str] | None,
    typer.Option(
        "--drill",
        help="STAGE:FAULT or train:FAULT@STEP: a job fails on purpose; needs SPACEPORT_DRILLS=1. May be repeated.",
        show_default=False,
    ),
]
Watch = Annotated[bool, typer.Option("--watch", help="Then follow it until it is over.")]
Into = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", help="Folder for what comes back; default: one of the job's name.", show_default=False
    ),
]


def require_packages() -> None:
    for module in ("boto3", "yaml"):
        if find_spec(module) is None:
            raise InputError("the pipeline on AWS needs boto3 and PyYAML: pip install 'spaceport-gs[aws]'")


def order_of(
    settings: RunSettings, instance: Sequence[str] | None, spot: bool, max_cost: float, deadline: float
) -> Order:
    from spaceport_gs.pipeline.aws.orders import Order, instances_of

    named, is_cheapest = instances_of(instance or ())
    if deadline and not is_cheapest:
        raise InputError("--deadline chooses among instances: give --instance auto with it")
    return Order(settings, named, is_cheapest, spot, max_cost or math.inf, 60 * deadline or math.inf)


def connected(region: str, profile: str, prefix: str) -> tuple[Cloud, Stack]:
    from spaceport_gs.pipeline.aws.cloud import connect
    from spaceport_gs.pipeline.aws.stack import read

    cloud = connect(region, profile)
    return cloud, read(cloud, prefix)


def scenes_of(cloud: Cloud, stack: Stack, job: str) -> list[str]:
    """The one that a job's name stands for, or those of a batch."""
    from spaceport_gs.pipeline.aws.batches import batch_scenes

    return batch_scenes(cloud, stack, job.removeprefix(BATCH)) if job.startswith(BATCH) else [job]


def command_line(verb: str, job: str, stack: Stack) -> str:
    """As a user types it."""
    other = f" --prefix {stack.prefix}" if stack.prefix != PREFIX else ""
    return f"spaceport aws {verb} {job}{other}"


def teller(as_json: bool) -> Callable[[str], None]:
    """For lines on the way, which must not get into JSON."""
    return lambda line: print(line, file=sys.stderr if as_json else sys.stdout, flush=True)


@contextmanager
def bars(as_json: bool, events: Path = Path(os.devnull)) -> Iterator[Listener]:
    from spaceport_gs.pipeline.events import progress_of

    with progress_of(events, "never" if as_json else "auto") as listen:
        yield listen
