"""Commands for scenes: submit, stop, fetch, link, retry."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws import PREFIX
from spaceport_gs.pipeline.aws.commands.common import (
    BATCH,
    Deadline,
    DrillOption,
    Folder,
    Instance,
    Into,
    Job,
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
    scenes_of,
    teller,
)
from spaceport_gs.pipeline.aws.commands.costs import bill_for
from spaceport_gs.pipeline.aws.commands.watching import watch_scene
from spaceport_gs.pipeline.options import (
    DeviceOption,
    Downscale,
    EvalEvery,
    Json,
    MaxSeconds,
    Preset,
    Seed,
    Steps,
    Title,
    finish,
)

if TYPE_CHECKING:
    from spaceport_gs.pipeline.aws.cloud import Cloud
    from spaceport_gs.pipeline.aws.stack import Stack
    from spaceport_gs.progress import Listener


def submit_command(
    photos: Folder, preset: Preset = "standard", steps: Steps = 0, max_seconds: MaxSeconds = 0, downscale: Downscale = 1,
    eval_every: EvalEvery = 8, seed: Seed = 0, device: DeviceOption = "auto", title: Title = "", instance: Instance = None,
    spot: Spot = False, max_cost: MaxCost = 0, deadline: Deadline = 0, drill: DrillOption = None, watch: Watch = False,
    output: Into = None, region: Region = "", profile: Profile = "", prefix: Prefix = PREFIX, json: Json = False,
) -> None:  # fmt: skip
    """Uploads photos, as far as they are not there yet, and starts what makes a scene of them."""
    from dataclasses import replace

    from spaceport_gs.pipeline.aws.doctor import require_quotas
    from spaceport_gs.pipeline.aws.drills import ordered
    from spaceport_gs.pipeline.aws.orders import capture_in
    from spaceport_gs.pipeline.aws.prices import load_prices
    from spaceport_gs.pipeline.aws.push import images_of
    from spaceport_gs.pipeline.aws.scenes import submit
    from spaceport_gs.pipeline.aws.uploads import plan
    from spaceport_gs.pipeline.capture import as_folder
    from spaceport_gs.pipeline.run import RunSettings

    settings = RunSettings(device, seed, preset, steps, max_seconds, downscale, eval_every, title=title)
    order = replace(order_of(settings, instance, spot, max_cost, deadline), drills=ordered(drill or ()))
    with as_folder(photos) as folder:
        capture = capture_in(folder)
        cloud, stack = connected(region, profile, prefix)
        images = images_of(cloud, stack)
        estimated = order.estimated(capture, load_prices(cloud.region))
        require_quotas(cloud, estimated.machines)
        teller(json)(str(estimated))
        upload = plan(folder)
        with bars(json) as listen:
            run = submit(cloud, stack, order.scene(estimated, images), upload, listen)
    result = {
        "job": run.scene,
        "run": run.name,
        "execution": run.arn,
        "status": run.status,
        "estimate": asdict(estimated),
    }
    if watch:
        if not json:
            print(f"job       {run.scene}")
        watch_scene(cloud, stack, run.scene, output, json)
        return
    what_now, verb = {"RUNNING": ("follow it", "watch"), "SUCCEEDED": ("fetch it", "fetch")}.get(run.status, ("retry it", "retry"))  # fmt: skip
    finish(result, json, False, lambda: (
        f"job       {run.scene} ({run.name}: {run.status.lower()})\n{what_now:9} {command_line(verb, run.scene, stack)}"
    ))  # fmt: skip


def stop_command(
    job: Job, region: Region = "", profile: Profile = "", prefix: Prefix = PREFIX, json: Json = False
) -> None:
    """Stops a scene and its jobs; what is made so far stays, and retry goes on from there."""
    from spaceport_gs.pipeline.aws.batches import begun_scenes, stop_batch
    from spaceport_gs.pipeline.aws.scenes import stop
    from spaceport_gs.pipeline.aws.watch import wait_for_end

    cloud, stack = connected(region, profile, prefix)
    if job.startswith(BATCH):
        batch = job.removeprefix(BATCH)
        stopped, scenes = stop_batch(cloud, stack, batch), begun_scenes(cloud, stack, batch)
    else:
        stopped, scenes = stop(cloud, stack, job), [job]
    teller(json)(f"{job}: " + (f"stops {', '.join(stopped)}" if stopped else "no job ran"))
    wait_for_end(cloud, stack, scenes)
    result, lines = bill_for(cloud, stack, scenes)
    finish({"job": job, "stopped": stopped, **result}, json, False, lambda: "\n".join(lines))


def fetch_command(
    job: Job,
    output: Into = None,
    region: Region = "",
    profile: Profile = "",
    prefix: Prefix = PREFIX,
    json: Json = False,
) -> None:
    """Brings a finished scene here: scene.sog, index.html, the report and their manifest, checked."""
    cloud, stack = connected(region, profile, prefix)
    scenes, folder = scenes_of(cloud, stack, job), output or Path(job)
    folders = {scene: folder / scene if job.startswith(BATCH) else folder for scene in scenes}
    with bars(json) as listen:
        for scene, target in folders.items():
            fetch_into(cloud, stack, scene, target, listen)
    result = {"job": job, "folders": [str(target) for target in folders.values()]}
    finish(result, json, False, lambda: "\n".join(line for target in folders.values() for line in _page_lines(target)))


def _page_lines(folder: Path) -> Iterator[str]:
    for word, name in (("page", "index.html"), ("report", "report.html")):
        if (folder / name).exists():
            yield f"{word:6}  {folder / name}"


def fetch_into(cloud: Cloud, stack: Stack, scene: str, folder: Path, listen: Listener) -> None:
    """Into a folder that is new, empty, or of this scene."""
    from spaceport_gs.pipeline.aws.results import fetch
    from spaceport_gs.pipeline.aws.timeline import add_to_report

    known = ("manifest.json", "events.jsonl")
    if folder.exists() and (
        not folder.is_dir() or (any(folder.iterdir()) and not any((folder / name).exists() for name in known))
    ):
        raise InputError(f"{folder}: holds other files; give an empty or a new folder with --output")
    fetch(cloud, stack, scene, folder, listen)
    add_to_report(cloud, stack, scene, folder)


def link_command(
    job: Job,
    hours: Annotated[float, typer.Option("--hours", help="That the links hold, up to 168.")] = 24,
    key: Annotated[Path | None, typer.Option("--key", help="Private key of a stack with Publishing=signed: links through CloudFront.", show_default=False)] = None,
    region: Region = "", profile: Profile = "", prefix: Prefix = PREFIX, json: Json = False,
) -> None:  # fmt: skip
    """Links to the page and the .sog of a published scene, for people without an account."""
    from spaceport_gs.pipeline.aws.links import links_to

    cloud, stack = connected(region, profile, prefix)
    found = {scene: links_to(cloud, stack, scene, hours, key) for scene in scenes_of(cloud, stack, job)}
    result = {"job": job, "links": [{"job": scene, **asdict(links), "expires": links.expires and links.expires.isoformat()} for scene, links in found.items()]}  # fmt: skip
    finish(result, json, False, lambda: "\n".join(
        f"page    {links.page}\nscene   {links.scene}\nuntil   {links.expires or 'ever'}, signed by {links.signed_by}"
        for links in found.values()
    ))  # fmt: skip


def retry_command(
    job: Job,
    start: Annotated[
        str, typer.Option("--from", metavar="STAGE", help="Begin at sfm, train, compress or publish again; default: after what is complete.", show_default=False),
    ] = "",
    watch: Watch = False, output: Into = None, region: Region = "", profile: Profile = "", prefix: Prefix = PREFIX,
    json: Json = False,
) -> None:  # fmt: skip
    """Goes on with a scene that failed or was stopped, after the last stage that is complete."""
    from spaceport_gs.pipeline.aws.runs import RUNNING, SUCCEEDED
    from spaceport_gs.pipeline.aws.scenes import retry
    from spaceport_gs.pipeline.aws.status import status

    cloud, stack = connected(region, profile, prefix)
    scenes = scenes_of(cloud, stack, job)
    if job.startswith(BATCH):
        if watch:
            raise InputError("--watch follows one scene; watch those of a batch one by one")
        over = (RUNNING,) if start else (SUCCEEDED, RUNNING)
        scenes = [s for s in scenes if status(cloud, stack, s).run.status not in over]
    runs = [retry(cloud, stack, scene, start) for scene in scenes]
    if watch:
        watch_scene(cloud, stack, job, output, json)
        return
    result = {"job": job, "runs": [{"run": run.name, "from": json_format.loads(run.given)["from"], "status": run.status} for run in runs]}  # fmt: skip
    finish(result, json, False, lambda: "\n".join(
        f"{run.name}: {run.status.lower()}, goes on at {json_format.loads(run.given)['from']}" for run in runs
    ))  # fmt: skip
