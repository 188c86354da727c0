"""`spaceport aws`: the stack, its images, and scenes that are made there."""

from __future__ import annotations

import json as json_format
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spaceport_gs.errors import InputError, Interrupted
from spaceport_gs.pipeline.aws import PREFIX
from spaceport_gs.pipeline.options import (
    EXIT_MISTAKE,
    EXIT_SOME_FAILED,
    BuildArgument,
    DeviceOption,
    Downscale,
    EvalEvery,
    Json,
    MaxSeconds,
    OnlyImage,
    Preset,
    Seed,
    Steps,
    Title,
    Tool,
    chosen_images,
    fail,
    finish,
)  # fmt: skip

if TYPE_CHECKING:
    from spaceport_gs.pipeline.aws.cloud import Cloud
    from spaceport_gs.pipeline.aws.cost import Estimate
    from spaceport_gs.pipeline.aws.orders import Order
    from spaceport_gs.pipeline.aws.push import Image
    from spaceport_gs.pipeline.aws.scenes import JobState, Run, Status
    from spaceport_gs.pipeline.aws.stack import Change, Stack
    from spaceport_gs.pipeline.aws.uploads import Upload
    from spaceport_gs.pipeline.aws.watch import Line
    from spaceport_gs.pipeline.batch import Outcome
    from spaceport_gs.pipeline.run import RunSettings
    from spaceport_gs.progress import Listener

EXIT_FAILED = 70  # as the jobs' own: neither done nor the user's mistake
BATCH = "batch/"  # begins what stands for a whole batch where a scene's id can stand

app = typer.Typer(
    name="aws",
    help="Scenes made in an account of Amazon's cloud: a stack, its images, jobs. Needs the package's extra: aws.",
    invoke_without_command=True,
    add_completion=False,
)

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


@app.callback()
def _common(context: typer.Context) -> None:
    _require_packages()
    if context.invoked_subcommand is None:
        print(context.get_help())


def _require_packages() -> None:
    for module in ("boto3", "yaml"):
        if find_spec(module) is None:
            raise InputError("the pipeline on AWS needs boto3 and PyYAML: pip install 'spaceport-gs[aws]'")


# ---- The stack ---------------------------------------------------------------------------------------------------------------


@app.command(name="deploy")
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
    stack = deploy(connect(region, profile), prefix, given, _confirm(yes, json), _teller(json), running)
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


@app.command(name="destroy")
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
    is_gone = destroy(cloud, prefix, _confirm(yes, json), _teller(json), data, running)
    kept = find_kept(cloud, prefix) if is_gone and not delete_data else {}
    result = {"destroyed": is_gone, "kept": kept}
    finish(result, json, False, lambda: f"the stack {prefix} is gone" if is_gone else "nothing was changed")


def _confirm(yes: bool, as_json: bool) -> Callable[[Sequence[Change]], bool]:
    """Shows changes and asks whether they are wanted."""

    def confirm(changes: Sequence[Change]) -> bool:
        for change in changes:
            _teller(as_json)(f"  {change}")
        if not yes and not sys.stdin.isatty():
            raise InputError("there is nobody to ask; give --yes to go on without")
        return yes or typer.confirm("Do that?", err=as_json)

    return confirm


def _teller(as_json: bool) -> Callable[[str], None]:
    """For lines on the way, which must not get into JSON."""
    return lambda line: print(line, file=sys.stderr if as_json else sys.stdout, flush=True)


@app.command(name="push")
def push_command(
    image: OnlyImage = None, build_arg: BuildArgument = None, tool: Tool = "",
    region: Region = "", profile: Profile = "", prefix: Prefix = PREFIX, json: Json = False,
) -> None:  # fmt: skip
    """Builds the images of the containers, pushes them to the stack's repositories and records their digests."""
    from spaceport_gs.pipeline.aws.push import push
    from spaceport_gs.pipeline.images import find_tool

    stages, arguments = chosen_images(image, build_arg)
    cloud, stack = _stack(region, profile, prefix)
    pushed = push(cloud, stack, stages, arguments, find_tool(wanted=tool), _teller(True))
    result = {stage: asdict(one) for stage, one in pushed.items()}
    finish(result, json, False, lambda: "\n".join(_image_lines(pushed)))


def _image_lines(pushed: Mapping[str, Image]) -> Iterator[str]:
    for stage, image in pushed.items():
        yield f"{stage:9} {image.address} ({image.tag})"


@app.command(name="doctor")
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


# ---- Scenes ------------------------------------------------------------------------------------------------------------------


@app.command(name="submit")
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
    order = replace(_order(settings, instance, spot, max_cost, deadline), drills=ordered(drill or ()))
    with as_folder(photos) as folder:
        capture = capture_in(folder)
        cloud, stack = _stack(region, profile, prefix)
        images = images_of(cloud, stack)
        estimated = order.estimated(capture, load_prices(cloud.region))
        require_quotas(cloud, estimated.machines)
        _teller(json)(str(estimated))
        upload = plan(folder)
        with _bars(json) as listen:
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
        _follow(cloud, stack, run.scene, output, json)
        return
    what_now, verb = {"RUNNING": ("follow it", "watch"), "SUCCEEDED": ("fetch it", "fetch")}.get(run.status, ("retry it", "retry"))  # fmt: skip
    finish(result, json, False, lambda: (
        f"job       {run.scene} ({run.name}: {run.status.lower()})\n{what_now:9} {_command(verb, run.scene, stack)}"
    ))  # fmt: skip


def _order(
    settings: RunSettings, instance: Sequence[str] | None, spot: bool, max_cost: float, deadline: float
) -> Order:
    from spaceport_gs.pipeline.aws.orders import Order, instances_of

    named, is_cheapest = instances_of(instance or ())
    if deadline and not is_cheapest:
        raise InputError("--deadline chooses among instances: give --instance auto with it")
    return Order(settings, named, is_cheapest, spot, max_cost or math.inf, 60 * deadline or math.inf)


def _command(verb: str, job: str, stack: Stack) -> str:
    """As a user types it."""
    other = f" --prefix {stack.prefix}" if stack.prefix != PREFIX else ""
    return f"spaceport aws {verb} {job}{other}"


@app.command(name="watch")
def watch_command(
    job: Job, output: Into = None,
    web: Annotated[bool, typer.Option("--web", help="Also show it in the browser, from 127.0.0.1.")] = False,
    region: Region = "", profile: Profile = "", prefix: Prefix = PREFIX, json: Json = False,
) -> None:  # fmt: skip
    """Follows a scene until it is over: bars as of a run on this machine, its preview and events in OUTPUT.

    The exit code is 0 if it is done, 2 if it failed by the user's mistake, 70 if by anything else, 1 if it was stopped.
    """
    cloud, stack = _stack(region, profile, prefix)
    if not job.startswith(BATCH):
        _follow(cloud, stack, job, output, json, web)
    elif web:
        raise InputError("--web shows one scene; watch those of a batch one by one")
    else:
        _follow_batch(cloud, stack, job, json)


def _follow(cloud: Cloud, stack: Stack, scene: str, output: Path | None, as_json: bool, web: bool = False) -> None:
    """Ends with the exit code that a scene's end has."""
    from spaceport_gs.pipeline.aws.page import Page
    from spaceport_gs.pipeline.aws.scenes import status
    from spaceport_gs.pipeline.aws.watch import follow

    status(cloud, stack, scene)  # before a folder is made for what may not exist
    folder = output or Path(scene)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as open_for_it:
            page = Page(cloud)
            if web:
                _teller(as_json)(f"{open_for_it.enter_context(page.served())} shows it")
            listen = open_for_it.enter_context(_bars(as_json, folder / "events.jsonl"))
            found = follow(cloud, stack, scene, listen, folder, page.show)
    except KeyboardInterrupt:
        raise Interrupted(f"scene {scene} goes on without you; `{_command('stop', scene, stack)}` ends it") from None
    finish(_state(found), as_json, False, lambda: "\n".join(_state_lines(found)))
    if code := _exit_code(found):
        if found.run.status != "ABORTED":
            fail(
                f"scene {scene}: {found.run.status.lower()}: {found.run.reason or found.run.error or 'no reason given'}"
            )
        raise typer.Exit(code)


def _exit_code(found: Status) -> int:
    """Of a scene that is over."""
    if found.run.status == "SUCCEEDED":
        return 0
    if found.run.status == "ABORTED":
        return EXIT_SOME_FAILED
    return EXIT_MISTAKE if _class_of(found.run.reason) == "input" else EXIT_FAILED


def _class_of(reason: str) -> str:
    """Of a failure, whose text begins with it; SageMaker puts its own before that."""
    return reason.removeprefix("AlgorithmError: ").partition(":")[0]


def _follow_batch(cloud: Cloud, stack: Stack, job: str, as_json: bool) -> list[Status]:
    from spaceport_gs.pipeline.aws.watch import follow_batch

    try:
        found = follow_batch(cloud, stack, job.removeprefix(BATCH), _teller(as_json))
    except KeyboardInterrupt:
        raise Interrupted(f"{job} goes on without you; `{_command('stop', job, stack)}` ends it") from None
    n_failed = sum(map(bool, map(_exit_code, found)))
    result = {"batch": job.removeprefix(BATCH), "failed": n_failed, "scenes": [_state(one) for one in found]}
    finish(result, as_json, False, lambda: f"{len(found) - n_failed} of {len(found)} scenes")
    if n_failed:
        raise typer.Exit(EXIT_SOME_FAILED)
    return found


@app.command(name="status")
def status_command(
    job: Job, region: Region = "", profile: Profile = "", prefix: Prefix = PREFIX, json: Json = False
) -> None:
    """Where a scene stands: its run, its jobs, and what the latest of them said last."""
    from spaceport_gs.pipeline.aws.scenes import status

    cloud, stack = _stack(region, profile, prefix)
    found = [status(cloud, stack, scene) for scene in _scenes(cloud, stack, job)]
    result = {"batch": job.removeprefix(BATCH), "scenes": [_state(one) for one in found]} if job.startswith(BATCH) else _state(found[0])  # fmt: skip
    finish(result, json, False, lambda: "\n".join(line for one in found for line in _state_lines(one)))


def _scenes(cloud: Cloud, stack: Stack, job: str) -> list[str]:
    """The one that a job's name stands for, or those of a batch."""
    from spaceport_gs.pipeline.aws.scenes import batch_scenes

    return batch_scenes(cloud, stack, job.removeprefix(BATCH)) if job.startswith(BATCH) else [job]


def _state(found: Status) -> dict[str, Any]:
    """As JSON."""
    run = found.run
    return {
        "job": run.scene,
        "run": run.name,
        "status": run.status,
        "state": found.state,
        "error": run.error,
        "reason": run.reason,
        "page": (run.output or {}).get("page", ""),
        "jobs": [_job_state(job) for job in found.jobs],
        "progress": found.progress,
    }


def _job_state(job: JobState) -> dict[str, Any]:
    times = {when: job.description.get(f"{job.kind}{when}Time") for when in ("Start", "End")}
    return {
        "name": job.name,
        "stage": job.stage,
        "status": job.status,
        "detail": job.detail,
        "reason": job.reason,
        "started": times["Start"].isoformat() if times["Start"] else None,
        "ended": times["End"].isoformat() if times["End"] else None,
    }


def _state_lines(found: Status) -> Iterator[str]:
    run, event = found.run, found.progress
    yield f"{run.name}: {run.status.lower()}" + (f", {run.reason}" if run.reason else "")
    for job in found.jobs:
        detail = f", {job.detail}" if job.detail not in ("", job.status) else ""
        yield f"  {job.stage:9} {job.status}{detail}  {job.name}" + (f"  {job.reason}" if job.reason else "")
    if event and run.status == "RUNNING":
        yield f"  {event.get('stage', '')}: {event.get('message') or 'step'} {event.get('step', 0)} of {event.get('n_steps', 0)}"
    if page := (run.output or {}).get("page"):
        yield f"page    {page}"


@app.command(name="logs")
def logs_command(
    job: Job,
    stage: Annotated[str, typer.Option("--stage", help="Only of this one: sfm, train or compress.")] = "",
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the run is over; --json: one object a line.")] = False,
    region: Region = "", profile: Profile = "", prefix: Prefix = PREFIX, json: Json = False,
) -> None:  # fmt: skip
    """What the jobs of a scene's latest run printed."""
    from spaceport_gs.pipeline.aws.contract import STAGES
    from spaceport_gs.pipeline.aws.scenes import status
    from spaceport_gs.pipeline.aws.watch import log_lines

    if stage and stage not in STAGES:
        raise InputError(f"--stage {stage}: choose {', '.join(STAGES)}")
    cloud, stack = _stack(region, profile, prefix)
    if follow:
        _follow_logs(cloud, stack, job, stage, json)
        return
    jobs = [
        one
        for scene in _scenes(cloud, stack, job)
        for one in status(cloud, stack, scene).jobs
        if stage in ("", one.stage)
    ]
    lines = [line for one in jobs for line in log_lines(cloud, one)]
    result = {"lines": [_log_line(line) for line in lines]}
    before = ["", *(line.job for line in lines)]
    finish(result, json, False, lambda: "\n".join(map(_log_text, lines, before)) or "nothing was printed yet")


def _log_line(line: Line) -> dict[str, Any]:
    """As JSON."""
    return {"job": line.job, "time": line.time, "line": line.line}


def _log_text(line: Line, before: str) -> str:
    """With the job's name where the one before was of another job."""
    return line.line if line.job == before else f"== {line.job}\n{line.line}"


def _follow_logs(cloud: Cloud, stack: Stack, job: str, stage: str, as_json: bool) -> None:
    from spaceport_gs.pipeline.aws.watch import follow_logs

    if job.startswith(BATCH):
        raise InputError("--follow follows one scene; follow those of a batch one by one")
    before = ""

    def tell(line: Line) -> None:
        nonlocal before
        text = json_format.dumps(_log_line(line), ensure_ascii=False) if as_json else _log_text(line, before)
        before = line.job
        print(text, flush=True)

    try:
        found = follow_logs(cloud, stack, job, stage, tell)
    except KeyboardInterrupt:
        raise Interrupted(f"scene {job} goes on without you; `{_command('stop', job, stack)}` ends it") from None
    _teller(True)(f"{found.run.name}: {found.run.status.lower()}")


@app.command(name="stop")
def stop_command(
    job: Job, region: Region = "", profile: Profile = "", prefix: Prefix = PREFIX, json: Json = False
) -> None:
    """Stops a scene and its jobs; what is made so far stays, and retry goes on from there."""
    from spaceport_gs.pipeline.aws.scenes import begun_scenes, stop, stop_batch
    from spaceport_gs.pipeline.aws.watch import wait_for_end

    cloud, stack = _stack(region, profile, prefix)
    if job.startswith(BATCH):
        batch = job.removeprefix(BATCH)
        stopped, scenes = stop_batch(cloud, stack, batch), begun_scenes(cloud, stack, batch)
    else:
        stopped, scenes = stop(cloud, stack, job), [job]
    _teller(json)(f"{job}: " + (f"stops {', '.join(stopped)}" if stopped else "no job ran"))
    wait_for_end(cloud, stack, scenes)
    result, lines = _bill(cloud, stack, scenes)
    finish({"job": job, "stopped": stopped, **result}, json, False, lambda: "\n".join(lines))


@app.command(name="fetch")
def fetch_command(
    job: Job,
    output: Into = None,
    region: Region = "",
    profile: Profile = "",
    prefix: Prefix = PREFIX,
    json: Json = False,
) -> None:
    """Brings a finished scene here: scene.sog, index.html, the report and their manifest, checked."""
    cloud, stack = _stack(region, profile, prefix)
    scenes, folder = _scenes(cloud, stack, job), output or Path(job)
    folders = {scene: folder / scene if job.startswith(BATCH) else folder for scene in scenes}
    with _bars(json) as listen:
        for scene, target in folders.items():
            _fetch(cloud, stack, scene, target, listen)
    result = {"job": job, "folders": [str(target) for target in folders.values()]}
    finish(result, json, False, lambda: "\n".join(line for target in folders.values() for line in _page_lines(target)))


def _page_lines(folder: Path) -> Iterator[str]:
    for word, name in (("page", "index.html"), ("report", "report.html")):
        if (folder / name).exists():
            yield f"{word:6}  {folder / name}"


@app.command(name="link")
def link_command(
    job: Job,
    hours: Annotated[float, typer.Option("--hours", help="That the links hold, up to 168.")] = 24,
    key: Annotated[Path | None, typer.Option("--key", help="Private key of a stack with Publishing=signed: links through CloudFront.", show_default=False)] = None,
    region: Region = "", profile: Profile = "", prefix: Prefix = PREFIX, json: Json = False,
) -> None:  # fmt: skip
    """Links to the page and the .sog of a published scene, for people without an account."""
    from spaceport_gs.pipeline.aws.links import links_to

    cloud, stack = _stack(region, profile, prefix)
    found = {scene: links_to(cloud, stack, scene, hours, key) for scene in _scenes(cloud, stack, job)}
    result = {"job": job, "links": [{"job": scene, **asdict(links), "expires": links.expires and links.expires.isoformat()} for scene, links in found.items()]}  # fmt: skip
    finish(result, json, False, lambda: "\n".join(
        f"page    {links.page}\nscene   {links.scene}\nuntil   {links.expires or 'ever'}, signed by {links.signed_by}"
        for links in found.values()
    ))  # fmt: skip


def _fetch(cloud: Cloud, stack: Stack, scene: str, folder: Path, listen: Listener) -> None:
    """Into a folder that is new, empty, or of this scene."""
    from spaceport_gs.pipeline.aws.scenes import fetch
    from spaceport_gs.pipeline.aws.timeline import add_to_report

    known = ("manifest.json", "events.jsonl")
    if folder.exists() and (
        not folder.is_dir() or (any(folder.iterdir()) and not any((folder / name).exists() for name in known))
    ):
        raise InputError(f"{folder}: holds other files; give an empty or a new folder with --output")
    fetch(cloud, stack, scene, folder, listen)
    add_to_report(cloud, stack, scene, folder)


@app.command(name="retry")
def retry_command(
    job: Job,
    start: Annotated[
        str, typer.Option("--from", metavar="STAGE", help="Begin at sfm, train, compress or publish again; default: after what is complete.", show_default=False),
    ] = "",
    watch: Watch = False, output: Into = None, region: Region = "", profile: Profile = "", prefix: Prefix = PREFIX,
    json: Json = False,
) -> None:  # fmt: skip
    """Goes on with a scene that failed or was stopped, after the last stage that is complete."""
    from spaceport_gs.pipeline.aws.scenes import RUNNING, SUCCEEDED, retry, status

    cloud, stack = _stack(region, profile, prefix)
    scenes = _scenes(cloud, stack, job)
    if job.startswith(BATCH):
        if watch:
            raise InputError("--watch follows one scene; watch those of a batch one by one")
        over = (RUNNING,) if start else (SUCCEEDED, RUNNING)
        scenes = [s for s in scenes if status(cloud, stack, s).run.status not in over]
    runs = [retry(cloud, stack, scene, start) for scene in scenes]
    if watch:
        _follow(cloud, stack, job, output, json)
        return
    result = {"job": job, "runs": [{"run": run.name, "from": json_format.loads(run.given)["from"], "status": run.status} for run in runs]}  # fmt: skip
    finish(result, json, False, lambda: "\n".join(
        f"{run.name}: {run.status.lower()}, goes on at {json_format.loads(run.given)['from']}" for run in runs
    ))  # fmt: skip


@app.command(name="batch")
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
    order = _order(settings, instance, spot, max_cost, deadline)
    captures = captures_of(manifest)
    cloud, stack = _stack(region, profile, prefix)
    result = _submit_batch(cloud, stack, captures, order, jobs, name, json)
    if watch:
        _follow_batch(cloud, stack, BATCH + result["batch"], json)
    else:
        job, is_done = BATCH + str(result["batch"]), set(result["scenes"]) == set(result["done"])
        what_now, verb = ("fetch it", "fetch") if is_done else ("follow it", "watch")
        finish(result, json, False, lambda: f"job       {job}\n{what_now:9} {_command(verb, job, stack)}")
    if result["refused"]:
        raise typer.Exit(EXIT_SOME_FAILED)


def _submit_batch(
    cloud: Cloud, stack: Stack, captures: Mapping[str, tuple[Path, Mapping[str, Any]]], order: Order, n_at_once: int,
    name: str, as_json: bool,
) -> dict[str, Any]:  # fmt: skip
    """The batch's name, the scenes' ids, which were done or under way, and what could not be submitted, by the captures' names.
    Whatever is wrong is said before anything is uploaded.
    """
    import hashlib

    from spaceport_gs.pipeline.aws.cloud import explained
    from spaceport_gs.pipeline.aws.flow import batch_input
    from spaceport_gs.pipeline.aws.scenes import QUEUED, RUNNING, SUCCEEDED, UNSTARTED, submit_batch
    from spaceport_gs.pipeline.aws.stack import check_bucket

    batch_input(name or "none", n_at_once)
    with explained():
        check_bucket(cloud, stack)
    tell, refused = _teller(as_json), dict[str, str]()
    wanted = _wanted(cloud, stack, captures, order, n_at_once, refused, tell)
    for capture, (upload, run) in wanted.items():
        if run.status == UNSTARTED:
            with _left_out(capture, refused, tell):
                _send_capture(cloud, stack, captures[capture][0], upload, as_json)
    runs = {capture: run for capture, (_, run) in wanted.items() if capture not in refused}
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
    except InputError as error:
        refused[capture] = str(error)
        tell(f"{capture}: left out: {error}")


def _wanted(
    cloud: Cloud, stack: Stack, captures: Mapping[str, tuple[Path, Mapping[str, Any]]], order: Order, n_at_once: int,
    refused: dict[str, str], tell: Callable[[str], None],
) -> dict[str, tuple[Upload, Run]]:  # fmt: skip
    """What is to be uploaded of each capture, and the run that makes its scene: see `run_for_batch`."""
    from dataclasses import replace

    from spaceport_gs.pipeline.aws.doctor import require_quotas
    from spaceport_gs.pipeline.aws.orders import capture_in, changed
    from spaceport_gs.pipeline.aws.prices import load_prices
    from spaceport_gs.pipeline.aws.push import images_of
    from spaceport_gs.pipeline.aws.scenes import UNSTARTED, queued_runs, run_for_batch
    from spaceport_gs.pipeline.aws.uploads import plan
    from spaceport_gs.pipeline.capture import as_folder

    images, prices, queued = images_of(cloud, stack), load_prices(cloud.region), queued_runs(cloud, stack)
    wanted: dict[str, tuple[Upload, Run]] = {}
    allowed: set[frozenset[str]] = set()
    for capture, (path, given) in captures.items():
        with _left_out(capture, refused, tell):
            one = replace(order, settings=changed(order.settings, given))
            with as_folder(path) as folder:
                estimated = one.estimated(capture_in(folder), prices)
                upload = plan(folder)
            if twin := next((name for name, (known, _) in wanted.items() if known.scene == upload.scene), ""):
                raise InputError(f"{path}: has the same photos as {twin}")
            scene = replace(one.scene(estimated, images), scene=upload.scene)
            run = run_for_batch(cloud, stack, scene, queued)
            instances = frozenset(machine.instance for machine in estimated.machines.values())
            if run.status == UNSTARTED and instances not in allowed:
                require_quotas(cloud, estimated.machines, n_at_once)
                allowed.add(instances)
            for line in _wanted_lines(run, estimated):
                tell(f"{capture}: {line}")
            wanted[capture] = upload, run
    return wanted


def _wanted_lines(run: Run, estimated: Estimate) -> Iterator[str]:
    """What is to become of a capture in a batch."""
    from spaceport_gs.pipeline.aws.scenes import SUCCEEDED, UNSTARTED

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

    with as_folder(path) as folder, _bars(as_json) as listen:
        send_photos(cloud, stack, upload.moved(folder), listen)


def make_batch(
    captures: Mapping[str, Path], out: Path, settings: RunSettings, n_at_once: int, as_json: bool
) -> list[Outcome]:
    """`spaceport batch` on the default stack: submits, follows and fetches."""
    from spaceport_gs.files import write_json
    from spaceport_gs.pipeline.aws.scenes import SUCCEEDED
    from spaceport_gs.pipeline.aws.watch import follow_batch
    from spaceport_gs.pipeline.batch import SUMMARY, Outcome

    _require_packages()
    cloud, stack = _stack("", "", os.environ.get("SPACEPORT_STACK", PREFIX))
    given = {name: (path, dict[str, Any]()) for name, path in captures.items()}
    submitted = _submit_batch(cloud, stack, given, _order(settings, None, False, 0, 0), n_at_once, "", as_json)
    found = {one.run.scene: one for one in follow_batch(cloud, stack, submitted["batch"], _teller(as_json))}
    outcomes = []
    for name in captures:
        one, error = found.get(submitted["scenes"].get(name, "")), submitted["refused"].get(name, "")
        if one is not None and one.run.status != SUCCEEDED:
            error = one.run.reason or one.run.status.lower()
        elif one is not None:
            with _bars(as_json) as listen:
                _fetch(cloud, stack, one.run.scene, out / name, listen)
        outcomes.append(Outcome(name, _seconds(one), error, was_done=name in submitted["done"]))
    write_json(out / SUMMARY, [asdict(outcome) for outcome in outcomes])
    return outcomes


def _seconds(found: Status | None) -> float:
    """That the jobs of a scene's latest run took together."""
    times = [(job.description.get(f"{job.kind}StartTime"), job.description.get(f"{job.kind}EndTime")) for job in found.jobs] if found else []  # fmt: skip
    return round(sum((end - start).total_seconds() for start, end in times if start and end), 1)


@app.command(name="cost")
def cost_command(
    what: Annotated[
        str, typer.Argument(metavar="JOB|PHOTOS", help="What a job has cost, or a scene of photos would; neither: the stack.")
    ] = "",
    preset: Preset = "standard", steps: Steps = 0, max_seconds: MaxSeconds = 0, downscale: Downscale = 1,
    eval_every: EvalEvery = 8, device: DeviceOption = "auto", instance: Instance = None, spot: Spot = False,
    max_cost: MaxCost = 0, deadline: Deadline = 0,
    refresh: Annotated[bool, typer.Option("--refresh", help="First ask AWS for today's prices.")] = False,
    region: Region = "", profile: Profile = "", prefix: Prefix = PREFIX, json: Json = False,
) -> None:  # fmt: skip
    """What the stack costs while nothing runs, what a scene of PHOTOS is estimated to cost, or what JOB has cost."""
    from spaceport_gs.pipeline.aws.cloud import connect
    from spaceport_gs.pipeline.aws.cost import idle_line, idle_usd_per_month
    from spaceport_gs.pipeline.aws.orders import capture_in
    from spaceport_gs.pipeline.aws.prices import load_prices
    from spaceport_gs.pipeline.capture import as_folder
    from spaceport_gs.pipeline.run import RunSettings

    cloud = connect(region, profile)
    if refresh:
        _refresh(cloud, _teller(json))
    if _is_folder(what):
        settings = RunSettings(device, 0, preset, steps, max_seconds, downscale, eval_every)
        order = _order(settings, instance, spot, max_cost, deadline)
        with as_folder(Path(what)) as folder:
            estimated = order.estimated(capture_in(folder), load_prices(cloud.region))
        finish({"estimate": asdict(estimated)}, json, False, lambda: str(estimated))
        return
    cloud, stack = _stack(region, profile, prefix)
    if what:
        result, lines = _bill(cloud, stack, _scenes(cloud, stack, what))
        finish({"job": what, **result}, json, False, lambda: "\n".join(lines))
    else:
        idle = idle_usd_per_month(stack.parameters)
        finish({"idle_usd_per_month": idle}, json, False, lambda: idle_line(stack.parameters))


def _is_folder(what: str) -> bool:
    """Rather than a job: what looks like an id is one, even where fetch has made a folder of its name."""
    looks_like_a_job = what.startswith(BATCH) or re.fullmatch(r"[0-9a-f]{12}", what)
    return bool(what) and not looks_like_a_job and (os.sep in what or Path(what).exists())


def _refresh(cloud: Cloud, tell: Callable[[str], None]) -> None:
    from datetime import datetime, timezone

    from spaceport_gs.pipeline.aws.cloud import explained
    from spaceport_gs.pipeline.aws.prices import refresh

    with explained():
        prices = refresh(cloud, datetime.now(timezone.utc).date())
    tell(f"prices of {prices.region} from {prices.as_of}")


def _bill(cloud: Cloud, stack: Stack, scenes: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(as JSON, lines) of what all runs of scenes have cost so far."""
    from datetime import datetime, timezone

    from spaceport_gs.pipeline.aws.cost import bill_of
    from spaceport_gs.pipeline.aws.prices import load_prices
    from spaceport_gs.pipeline.aws.scenes import jobs_of, runs

    prices, now = load_prices(cloud.region), datetime.now(timezone.utc)
    jobs = [job for scene in scenes for run in runs(cloud, stack, scene) for job in jobs_of(cloud, run)]
    bills = [bill_of(job.description, prices, now) for job in jobs]
    usd, saved = sum(bill.usd for bill in bills), sum(bill.saved_usd for bill in bills)
    lines = [f"{bill.job}  {bill.instance}: {bill.billed_seconds / 60:.1f} min, {bill.usd:.2f} $" for bill in bills]
    total = f"together  {usd:.2f} $" + (f", {saved:.2f} saved by spot instances" if saved else "")
    source = {"region": prices.region, "as_of": prices.as_of}
    result = {"usd": usd, "saved_usd": saved, "jobs": [asdict(bill) for bill in bills], "prices": source}
    return result, [*lines, total, f"prices    of {prices.region}, {prices.as_of}"]


# ---- What they share ---------------------------------------------------------------------------------------------------------


def _stack(region: str, profile: str, prefix: str) -> tuple[Cloud, Stack]:
    from spaceport_gs.pipeline.aws.cloud import connect
    from spaceport_gs.pipeline.aws.stack import read

    cloud = connect(region, profile)
    return cloud, read(cloud, prefix)


@contextmanager
def _bars(as_json: bool, events: Path = Path(os.devnull)) -> Iterator[Listener]:
    from spaceport_gs.pipeline.events import progress_of

    with progress_of(events, "never" if as_json else "auto") as listen:
        yield listen
