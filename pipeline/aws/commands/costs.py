"""The command for money: cost."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    connected,
    order_of,
    scenes_of,
    teller,
)
from spaceport_gs.pipeline.options import (
    DeviceOption,
    Downscale,
    EvalEvery,
    Json,
    MaxSeconds,
    Preset,
    Steps,
    finish,
)

if TYPE_CHECKING:
    from spaceport_gs.pipeline.aws.cloud import Cloud
    from spaceport_gs.pipeline.aws.stack import Stack


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
        _refresh(cloud, teller(json))
    if _is_folder(what):
        settings = RunSettings(device, 0, preset, steps, max_seconds, downscale, eval_every)
        order = order_of(settings, instance, spot, max_cost, deadline)
        with as_folder(Path(what)) as folder:
            estimated = order.estimated(capture_in(folder), load_prices(cloud.region))
        finish({"estimate": asdict(estimated)}, json, False, lambda: str(estimated))
        return
    cloud, stack = connected(region, profile, prefix)
    if what:
        result, lines = bill_for(cloud, stack, scenes_of(cloud, stack, what))
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


def bill_for(cloud: Cloud, stack: Stack, scenes: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(as JSON, lines) of what all runs of scenes have cost so far."""
    from datetime import datetime, timezone

    from spaceport_gs.pipeline.aws.cost import bill_of
    from spaceport_gs.pipeline.aws.prices import load_prices
    from spaceport_gs.pipeline.aws.runs import runs_of
    from spaceport_gs.pipeline.aws.status import jobs_of

    prices, now = load_prices(cloud.region), datetime.now(timezone.utc)
    jobs = [job for scene in scenes for run in runs_of(cloud, stack, scene) for job in jobs_of(cloud, run)]
    bills = [bill_of(job.description, prices, now) for job in jobs]
    usd, saved = sum(bill.usd for bill in bills), sum(bill.saved_usd for bill in bills)
    lines = [f"{bill.job}  {bill.instance}: {bill.billed_seconds / 60:.1f} min, {bill.usd:.2f} $" for bill in bills]
    total = f"together  {usd:.2f} $" + (f", {saved:.2f} saved by spot instances" if saved else "")
    source = {"region": prices.region, "as_of": prices.as_of}
    result = {"usd": usd, "saved_usd": saved, "jobs": [asdict(bill) for bill in bills], "prices": source}
    return result, [*lines, total, f"prices    of {prices.region}, {prices.as_of}"]
