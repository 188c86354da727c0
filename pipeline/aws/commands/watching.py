"""Commands that say where scenes stand: watch, status, logs."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spaceport_gs.errors import InputError, Interrupted
from spaceport_gs.pipeline.aws import PREFIX
from spaceport_gs.pipeline.aws.commands.common import (
    BATCH,
    EXIT_FAILED,
    Into,
    Job,
    Prefix,
    Profile,
    Region,
    bars,
    command_line,
    connected,
    scenes_of,
    teller,
)
from spaceport_gs.pipeline.options import EXIT_MISTAKE, EXIT_SOME_FAILED, Json, fail, finish

if TYPE_CHECKING:
    from spaceport_gs.pipeline.aws.cloud import Cloud
    from spaceport_gs.pipeline.aws.stack import Stack
    from spaceport_gs.pipeline.aws.status import JobState, Status
    from spaceport_gs.pipeline.aws.watch import Line


def watch_command(
    job: Job, output: Into = None,
    web: Annotated[bool, typer.Option("--web", help="Also show it in the browser, from 127.0.0.1.")] = False,
    region: Region = "", profile: Profile = "", prefix: Prefix = PREFIX, json: Json = False,
) -> None:  # fmt: skip
    """Follows a scene until it is over: bars as of a run on this machine, its preview and events in OUTPUT.

    The exit code is 0 if it is done, 2 if it failed by the user's mistake, 70 if by anything else, 1 if it was stopped.
    """
    cloud, stack = connected(region, profile, prefix)
    if not job.startswith(BATCH):
        watch_scene(cloud, stack, job, output, json, web)
    elif web:
        raise InputError("--web shows one scene; watch those of a batch one by one")
    else:
        watch_batch(cloud, stack, job, json)


def watch_scene(cloud: Cloud, stack: Stack, scene: str, output: Path | None, as_json: bool, web: bool = False) -> None:
    """Ends with the exit code that a scene's end has."""
    from spaceport_gs.pipeline.aws.page import Page
    from spaceport_gs.pipeline.aws.status import status
    from spaceport_gs.pipeline.aws.watch import follow

    status(cloud, stack, scene)  # before a folder is made for what may not exist
    folder = output or Path(scene)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as open_for_it:
            page = Page(cloud)
            if web:
                teller(as_json)(f"{open_for_it.enter_context(page.served())} shows it")
            listen = open_for_it.enter_context(bars(as_json, folder / "events.jsonl"))
            found = follow(cloud, stack, scene, listen, folder, page.show)
    except KeyboardInterrupt:
        raise Interrupted(
            f"scene {scene} goes on without you; `{command_line('stop', scene, stack)}` ends it"
        ) from None
    finish(state_of(found), as_json, False, lambda: "\n".join(state_lines(found)))
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


def watch_batch(cloud: Cloud, stack: Stack, job: str, as_json: bool) -> list[Status]:
    from spaceport_gs.pipeline.aws.watch import follow_batch

    try:
        found = follow_batch(cloud, stack, job.removeprefix(BATCH), teller(as_json))
    except KeyboardInterrupt:
        raise Interrupted(f"{job} goes on without you; `{command_line('stop', job, stack)}` ends it") from None
    n_failed = sum(map(bool, map(_exit_code, found)))
    result = {"batch": job.removeprefix(BATCH), "failed": n_failed, "scenes": [state_of(one) for one in found]}
    finish(result, as_json, False, lambda: f"{len(found) - n_failed} of {len(found)} scenes")
    if n_failed:
        raise typer.Exit(EXIT_SOME_FAILED)
    return found


def status_command(
    job: Job, region: Region = "", profile: Profile = "", prefix: Prefix = PREFIX, json: Json = False
) -> None:
    """Where a scene stands: its run, its jobs, and what the latest of them said last."""
    from spaceport_gs.pipeline.aws.status import status

    cloud, stack = connected(region, profile, prefix)
    found = [status(cloud, stack, scene) for scene in scenes_of(cloud, stack, job)]
    result = {"batch": job.removeprefix(BATCH), "scenes": [state_of(one) for one in found]} if job.startswith(BATCH) else state_of(found[0])  # fmt: skip
    finish(result, json, False, lambda: "\n".join(line for one in found for line in state_lines(one)))


def state_of(found: Status) -> dict[str, Any]:
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


def state_lines(found: Status) -> Iterator[str]:
    run, event = found.run, found.progress
    yield f"{run.name}: {run.status.lower()}" + (f", {run.reason}" if run.reason else "")
    for job in found.jobs:
        detail = f", {job.detail}" if job.detail not in ("", job.status) else ""
        yield f"  {job.stage:9} {job.status}{detail}  {job.name}" + (f"  {job.reason}" if job.reason else "")
    if event and run.status == "RUNNING":
        yield f"  {event.get('stage', '')}: {event.get('message') or 'step'} {event.get('step', 0)} of {event.get('n_steps', 0)}"
    if page := (run.output or {}).get("page"):
        yield f"page    {page}"


def logs_command(
    job: Job,
    stage: Annotated[str, typer.Option("--stage", help="Only of this one: sfm, train or compress.")] = "",
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the run is over; --json: one object a line.")] = False,
    region: Region = "", profile: Profile = "", prefix: Prefix = PREFIX, json: Json = False,
) -> None:  # fmt: skip
    """What the jobs of a scene's latest run printed."""
    from spaceport_gs.pipeline.aws.contract import STAGES
    from spaceport_gs.pipeline.aws.status import status
    from spaceport_gs.pipeline.aws.watch import log_lines

    if stage and stage not in STAGES:
        raise InputError(f"--stage {stage}: choose {', '.join(STAGES)}")
    cloud, stack = connected(region, profile, prefix)
    if follow:
        _follow_logs(cloud, stack, job, stage, json)
        return
    jobs = [
        one
        for scene in scenes_of(cloud, stack, job)
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
        raise Interrupted(f"scene {job} goes on without you; `{command_line('stop', job, stack)}` ends it") from None
    teller(True)(f"{found.run.name}: {found.run.status.lower()}")
