"""How a scene was made on AWS, as a section of its report: when each job waited and ran, and what it cost."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

from spaceport_gs.pipeline.aws.cloud import Cloud
from spaceport_gs.pipeline.aws.cost import Bill, bill_of
from spaceport_gs.pipeline.aws.prices import Prices, load_prices
from spaceport_gs.pipeline.aws.runs import Run, runs_of
from spaceport_gs.pipeline.aws.stack import Stack
from spaceport_gs.pipeline.aws.status import JobState, history_of
from spaceport_gs.pipeline.aws.watch import ASKING, PUBLISHING
from spaceport_gs.pipeline.manifest import record_change
from spaceport_gs.pipeline.report import put_section

REPORT = "report.html"
WORKING = ("TaskStarted", "TaskSubmitted")
"""Events of a task between its begin and its end."""
FAILED = "#f97316"
WIDTH = 1000  # of a bar that is as long as its run
MOST_REASON = 300  # characters


@dataclass(frozen=True)
class Bar:
    """Something that took time: a try at a stage, a wait for hardware, the publication."""

    stage: str
    asked: datetime
    ended: datetime
    began: datetime | None = None
    """When it ran after it had waited; None: it never ran."""
    machine: str = ""
    outcome: str = ""
    reason: str = ""

    @property
    def is_failure(self) -> bool:
        return bool(self.outcome) and not self.outcome.startswith(("Completed", "InProgress"))


def add_to_report(cloud: Cloud, stack: Stack, scene: str, folder: Path) -> None:
    """The timeline and the bill of all of a scene's runs, to the report that was fetched into `folder`, if there is one, and the
    report's new size to the manifest there.
    """
    if not (folder / REPORT).is_file():
        return
    histories = [(run, *history_of(cloud, run)) for run in runs_of(cloud, stack, scene)]
    now, prices = datetime.now(timezone.utc), load_prices(cloud.region)
    charts = [_chart(run, bars_of(events, jobs, now)) for run, events, jobs in histories if events]
    bills = [(job.stage, bill_of(job.description, prices, now)) for _, _, jobs in histories for job in jobs]
    put_section(folder / REPORT, "cloud", "\n".join(["<h2>On AWS</h2>", *charts, _table_of(bills, prices)]))
    record_change(folder, REPORT)


def bars_of(events: Sequence[Mapping[str, Any]], jobs: Sequence[JobState], now: datetime) -> list[Bar]:
    """Of a run's history, in its order. `now`: where what has not ended yet ends."""
    known, bars, state = {job.name: job for job in jobs}, list[Bar](), ""
    for place, event in enumerate(events):
        state = event.get("stateEnteredEventDetails", {}).get("name", state)
        if event["type"] == "WaitStateEntered":
            bars.append(Bar("wait", event["timestamp"], _end(events, place, now), reason="no hardware"))
        elif event.get("taskScheduledEventDetails", {}).get("resourceType") == "sagemaker":
            bars.append(_try_of(events, place, known, ASKING.get(state, state), now))
    # A run that is redriven may come to publish twice.
    states = (event for event in events if _state_of(event) or event["type"] == "ExecutionRedriven")
    for is_publishing, stretch in groupby(states, lambda event: _state_of(event) in PUBLISHING):
        times = [event["timestamp"] for event in stretch]
        if is_publishing:
            bars.append(Bar("publish", times[0], times[-1], times[0]))
    return bars


def _state_of(event: Mapping[str, Any]) -> str:
    """That is entered or left."""
    details = event.get("stateEnteredEventDetails") or event.get("stateExitedEventDetails") or {}
    return str(details.get("name", ""))


def _next(events: Sequence[Mapping[str, Any]], place: int) -> Mapping[str, Any] | None:
    """What ends the task or the state that begins at `place`: one comes after the other."""
    later = (events[i] for i in range(place + 1, len(events)))
    return next((event for event in later if event["type"] not in WORKING), None)


def _end(events: Sequence[Mapping[str, Any]], place: int, now: datetime) -> datetime:
    event = _next(events, place)
    return event["timestamp"] if event else now


def _try_of(
    events: Sequence[Mapping[str, Any]], place: int, known: Mapping[str, JobState], stage: str, now: datetime
) -> Bar:
    """A job that was asked for; SageMaker may have refused it."""
    request = json.loads(events[place]["taskScheduledEventDetails"]["parameters"])
    asked, ended = events[place]["timestamp"], _end(events, place, now)
    job = known.get(request.get("TrainingJobName") or request["ProcessingJobName"])
    if job is None:
        error, cause = _failure_in(_next(events, place))
        return Bar(stage, asked, ended, None, _machine_of(request), error, cause)
    began, over = (job.description.get(f"{job.kind}{when}Time") for when in ("Start", "End"))
    ended = max(asked, ended, over or ended)
    began = min(max(asked, began), ended) if began else None  # clocks may disagree
    return Bar(stage, asked, ended, began, _machine_of(request), _outcome_of(job), job.reason)


def _failure_in(event: Mapping[str, Any] | None) -> tuple[str, str]:
    """(error, cause) of a task that was never a job."""
    for name, details in (event or {}).items():
        if name.endswith("EventDetails") and "error" in details:
            return str(details["error"]), str(details.get("cause", ""))
    return ("refused" if event else "", "")


def _outcome_of(job: JobState) -> str:
    transitions = job.description.get("SecondaryStatusTransitions") or ()
    n = sum(transition.get("Status") == "Interrupted" for transition in transitions)
    status = job.detail if job.status in ("Stopped", "Stopping") and job.detail else job.status
    return f"{status}, interrupted {'once' if n == 1 else f'{n} times'}" if n else status


def _machine_of(request: Mapping[str, Any]) -> str:
    resources = request.get("ResourceConfig") or request["ProcessingResources"]["ClusterConfig"]
    return str(resources["InstanceType"]) + (", spot" if request.get("EnableManagedSpotTraining") else "")


# ---- As HTML -----------------------------------------------------------------------------------------------------------------


def _chart(run: Run, bars: Sequence[Bar]) -> str:
    """A table with a row for each bar, all of them on one scale."""
    if not bars:
        return ""
    start, end = bars[0].asked, max(bar.ended for bar in bars)
    rows = "".join(_row(bar, start, (end - start).total_seconds() or 1.0) for bar in bars)
    when = f"{start.astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"
    words = f"{run.name}: {run.status.lower()}, {when}, {_minutes((end - start).total_seconds())}"
    reason = f"<p>{_text(run.reason)}</p>" if run.reason else ""
    return (
        f"<h3>{_text(words)}</h3>{reason}<table><tr><th>stage</th><th>machine</th><th>waited</th><th>ran</th><th>end</th>"
        f'<th style="width: 40%">pale: waited, full: ran, orange: failed</th></tr>{rows}</table>'
    )


def _row(bar: Bar, start: datetime, seconds: float) -> str:
    def x(when: datetime) -> float:
        return (when - start).total_seconds() / seconds * WIDTH

    begun = bar.began or bar.ended
    ran = _minutes((bar.ended - begun).total_seconds()) if bar.began else "–"
    end = ": ".join(part for part in (bar.outcome, bar.reason) if part)
    color = FAILED if bar.is_failure else "var(--line)"
    parts = ((x(bar.asked), x(begun), 0.3), (x(begun), x(bar.ended), 1.0))
    drawn = "".join(
        f'<rect x="{left:.1f}" width="{max(right - left, 1):.1f}" height="12" fill="{color}" fill-opacity="{opacity:g}"/>'
        for left, right, opacity in parts
    )
    return (
        f"<tr><td>{_text(bar.stage)}</td><td>{_text(bar.machine)}</td><td>{_minutes((begun - bar.asked).total_seconds())}</td>"
        f"<td>{ran}</td><td>{_text(end)}</td><td>"
        f'<svg viewBox="0 0 {WIDTH} 12" width="100%" height="12" preserveAspectRatio="none" role="img"'
        f' aria-label="{_text(bar.stage)}">{drawn}</svg></td></tr>'
    )


def _table_of(bills: Sequence[tuple[str, Bill]], prices: Prices) -> str:
    """What each job cost, by (stage, bill), and all of them together."""
    rows = "".join(
        f"<tr><td>{_text(stage)}</td><td>{_text(bill.instance)}</td><td>{bill.seconds:,.0f} s</td>"
        f"<td>{bill.billed_seconds:,.0f} s</td><td>{bill.usd_per_hour:.3f} $</td><td>{bill.usd:.3f} $</td>"
        f"<td>{bill.saved_usd:.3f} $</td></tr>"
        for stage, bill in bills
    )
    usd, saved = sum(bill.usd for _, bill in bills), sum(bill.saved_usd for _, bill in bills)
    return (
        "<h3>The bill</h3><table><tr><th>stage</th><th>machine</th><th>ran</th><th>billed</th><th>an hour</th><th>cost</th>"
        f"<th>saved by spot</th></tr>{rows}<tr><th>together</th><td></td><td></td><td></td><td></td><th>{usd:.3f} $</th>"
        f"<th>{saved:.3f} $</th></tr></table><p>Prices of {_text(prices.region)}, {_text(prices.as_of)} ({_text(prices.source)});"
        " storage and requests are not in it, and AWS’s own bill is what counts.</p>"
    )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}\N{NO-BREAK SPACE}min"


def _text(words: str) -> str:
    """Anything, as HTML."""
    short = words if len(words) <= MOST_REASON else words[:MOST_REASON] + "…"
    return html.escape(" ".join(short.split()))
