"""The command for many scenes: batch. And `spaceport batch --backend aws`."""

from __future__ import annotations

import json as json_format
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws import PREFIX
from spaceport_gs.pipeline.aws.commands.common import (
    BATCH,
    Deadline,
    Instance,
    MaxCost,
    Prefix,
    Profile,
    Region,
    Spot,
    Watch,
    bars,
    command_line,
    connected,
    order_of,
    require_packages,
    teller,
)
from spaceport_gs.pipeline.aws.commands.scenes import fetch_into
from spaceport_gs.pipeline.aws.commands.watching import watch_batch
from spaceport_gs.pipeline.options import (
    EXIT_SOME_FAILED,
    DeviceOption,
    Downscale,
    EvalEvery,
    Json,
    MaxSeconds,
    Preset,
    Seed,
    Steps,
    finish,
)

if TYPE_CHECKING:
    from spaceport_gs.pipeline.aws.cloud import Cloud
    from spaceport_gs.pipeline.aws.cost import Estimate
    from spaceport_gs.pipeline.aws.orders import Order
    from spaceport_gs.pipeline.aws.runs import Run
    from spaceport_gs.pipeline.aws.stack import Stack
    from spaceport_gs.pipeline.aws.status import Status
    from spaceport_gs.pipeline.aws.uploads import Upload
    from spaceport_gs.pipeline.batch import Outcome
    from spaceport_gs.pipeline.run import RunSettings


def batch_command(
    manifest: Annotated[
        Path,
        typer.Argument(metavar="MANIFEST", help='JSON, a list of {"name": …, "photos": …, "settings": {…}}; or a folder of captures.'),
    ],
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Scenes at a time.")] = 1,
    name: Annotated[str, typer.Option("--name", help="Of the batch; default: one made from what is in it.")] = "",
    preset: Preset = "standard", steps: Steps = 0, max_seconds: MaxSeconds = 0, downscale: Downscale = 1,
    eval_every: EvalEvery = 8, seed: Seed = 0, device: DeviceOption = "auto", instance: Instance = None, spot: Spot = False,
    max_cost: MaxCost = 0, deadline: Deadline = 0, watch: Watch = False, region: Region = "", profile: Profile = "",
    prefix: Prefix = PREFIX, json: Json = False,
) -> None:  # fmt: skip
    """Submits many scenes, some at a time. What fails in one stops no other; settings of a capture go over the options.

    What is done already, by the same photos and settings, is not made again; what failed goes on as by retry.
    """
    from spaceport_gs.pipeline.aws.orders import captures_of
    from spaceport_gs.pipeline.run import RunSettings

    settings = RunSettings(device, seed, preset, steps, max_seconds, downscale, eval_every)
    order = order_of(settings, instance, spot, max_cost, deadline)
    captures = captures_of(manifest)
    cloud, stack = connected(region, profile, prefix)
    result = _submit_batch(cloud, stack, captures, order, jobs, name, json)
    if watch:
        watch_batch(cloud, stack, BATCH + result["batch"], json)
    else:
        job, is_done = BATCH + str(result["batch"]), set(result["scenes"]) == set(result["done"])
        what_now, verb = ("fetch it", "fetch") if is_done else ("follow it", "watch")
        finish(result, json, False, lambda: f"job       {job}\n{what_now:9} {command_line(verb, job, stack)}")
    if result["refused"]:
        raise typer.Exit(EXIT_SOME_FAILED)


def _submit_batch(
    cloud: Cloud, stack: Stack, captures: Mapping[str, tuple[Path, Mapping[str, Any]]], order: Order, n_at_once: int,
    name: str, as_json: bool,
) -> dict[str, Any]:  # fmt: skip
    """The batch's name, the scenes' ids, which were done or under way, and what could not be submitted, by the captures' names.
    What is wrong with a capture is said before anything is uploaded.
    """
    import hashlib

    from spaceport_gs.pipeline.aws.batches import submit_batch
    from spaceport_gs.pipeline.aws.cloud import explained
    from spaceport_gs.pipeline.aws.flow import batch_input
    from spaceport_gs.pipeline.aws.runs import QUEUED, RUNNING, SUCCEEDED, UNSTARTED
    from spaceport_gs.pipeline.aws.stack import check_bucket

    batch_input(name or "none", n_at_once)
    with explained():
        check_bucket(cloud, stack)
    tell, refused = teller(as_json), dict[str, str]()
    planned = _planned(cloud, stack, captures, order, n_at_once, refused, tell)
    for capture, (upload, run) in planned.items():
        if run.status == UNSTARTED:
            with _left_out(capture, refused, tell):
                _send_capture(cloud, stack, captures[capture][0], upload, as_json)
    runs = {capture: run for capture, (_, run) in planned.items() if capture not in refused}
    if not runs:
        raise InputError(f"no capture can be submitted; the first: {next(iter(refused.values()))}")
    usual = hashlib.sha256(" ".join(run.scene for run in runs.values()).encode()).hexdigest()[:12]
    batch = submit_batch(cloud, stack, name or usual, list(runs.values()), n_at_once)
    for capture, run in runs.items():
        with _left_out(capture, refused, tell):
            if run.scene in batch.lost:
                raise InputError(f"somebody else has just submitted {run.scene}")
    runs = {capture: run for capture, run in runs.items() if capture not in refused}
    return {
        "batch": batch.name,
        "execution": batch.arn,
        "scenes": {capture: run.scene for capture, run in runs.items()},
        "done": [capture for capture, run in runs.items() if run.status == SUCCEEDED],
        "under_way": [capture for capture, run in runs.items() if run.status in (RUNNING, QUEUED)],
        "refused": refused,
    }


@contextmanager
def _left_out(capture: str, refused: dict[str, str], tell: Callable[[str], None]) -> Iterator[None]:
    """What is wrong with one capture stops no other."""
    try:
        yield
    except (InputError, OSError) as error:
        refused[capture] = str(error)
        tell(f"{capture}: left out: {error}")


def _planned(
    cloud: Cloud, stack: Stack, captures: Mapping[str, tuple[Path, Mapping[str, Any]]], order: Order, n_at_once: int,
    refused: dict[str, str], tell: Callable[[str], None],
) -> dict[str, tuple[Upload, Run]]:  # fmt: skip
    """What is to be uploaded of each capture, and the run that makes its scene: see `run_for_batch`."""
    from dataclasses import replace

    from spaceport_gs.pipeline.aws.batches import queued_runs, run_for_batch
    from spaceport_gs.pipeline.aws.doctor import require_quotas
    from spaceport_gs.pipeline.aws.orders import capture_in, changed
    from spaceport_gs.pipeline.aws.prices import load_prices
    from spaceport_gs.pipeline.aws.push import images_of
    from spaceport_gs.pipeline.aws.runs import UNSTARTED
    from spaceport_gs.pipeline.aws.uploads import plan
    from spaceport_gs.pipeline.capture import as_folder

    images, prices, queued = images_of(cloud, stack), load_prices(cloud.region), queued_runs(cloud, stack)
    planned: dict[str, tuple[Upload, Run]] = {}
    allowed: set[frozenset[str]] = set()
    for capture, (path, given) in captures.items():
        with _left_out(capture, refused, tell):
            one = replace(order, settings=changed(order.settings, given))
            with as_folder(path) as folder:
                estimated = one.estimated(capture_in(folder), prices)
                upload = plan(folder)
            if twin := next((name for name, (known, _) in planned.items() if known.scene == upload.scene), ""):
                raise InputError(f"{path}: has the same photos as {twin}")
            scene = replace(one.scene(estimated, images), scene=upload.scene)
            run = run_for_batch(cloud, stack, scene, queued)
            instances = frozenset(machine.instance for machine in estimated.machines.values())
            if run.status == UNSTARTED and instances not in allowed:
                require_quotas(cloud, estimated.machines, n_at_once)
                allowed.add(instances)
            for line in _plan_lines(run, estimated):
                tell(f"{capture}: {line}")
            planned[capture] = upload, run
    return planned


def _plan_lines(run: Run, estimated: Estimate) -> Iterator[str]:
    """What is to become of a capture in a batch."""
    from spaceport_gs.pipeline.aws.runs import SUCCEEDED, UNSTARTED

    if run.status == SUCCEEDED:
        yield f"is done, {run.name}"
    elif run.status != UNSTARTED:
        yield f"is under way, {run.name}; it is followed with this batch"
    else:
        start = json_format.loads(run.given)["from"]
        again = "" if start == "sfm" else f", goes on at {start}"
        yield f"{estimated.usd.likely:.2f} $ ({estimated.usd.low:.2f} to {estimated.usd.high:.2f}){again}"
        yield from (f"warning: {line}" for line in estimated.shortages)


def _send_capture(cloud: Cloud, stack: Stack, path: Path, upload: Upload, as_json: bool) -> None:
    from spaceport_gs.pipeline.aws.scenes import send_photos
    from spaceport_gs.pipeline.capture import as_folder

    with as_folder(path) as folder, bars(as_json) as listen:
        send_photos(cloud, stack, upload.moved(folder), listen)


def make_batch(
    captures: Mapping[str, Path], out: Path, settings: RunSettings, n_at_once: int, as_json: bool
) -> list[Outcome]:
    """`spaceport batch` on the default stack: submits, follows and fetches."""
    from spaceport_gs.files import write_json
    from spaceport_gs.pipeline.aws.runs import SUCCEEDED
    from spaceport_gs.pipeline.aws.watch import follow_batch
    from spaceport_gs.pipeline.batch import SUMMARY, Outcome

    require_packages()
    cloud, stack = connected("", "", os.environ.get("SPACEPORT_STACK", PREFIX))
    given = {name: (path, dict[str, Any]()) for name, path in captures.items()}
    submitted = _submit_batch(cloud, stack, given, order_of(settings, None, False, 0, 0), n_at_once, "", as_json)
    found = {one.run.scene: one for one in follow_batch(cloud, stack, submitted["batch"], teller(as_json))}
    outcomes = []
    for name in captures:
        one, error = found.get(submitted["scenes"].get(name, "")), submitted["refused"].get(name, "")
        if one is not None and one.run.status != SUCCEEDED:
            error = one.run.reason or one.run.status.lower()
        elif one is not None:
            try:
                with bars(as_json) as listen:
                    fetch_into(cloud, stack, one.run.scene, out / name, listen)
            except InputError as problem:
                error = str(problem)
        outcomes.append(Outcome(name, _seconds(one), error, was_done=name in submitted["done"]))
    write_json(out / SUMMARY, [asdict(outcome) for outcome in outcomes])
    return outcomes


def _seconds(found: Status | None) -> float:
    """That the jobs of a scene's latest run took together."""
    times = [(job.description.get(f"{job.kind}StartTime"), job.description.get(f"{job.kind}EndTime")) for job in found.jobs] if found else []  # fmt: skip
    return round(sum((end - start).total_seconds() for start, end in times if start and end), 1)
