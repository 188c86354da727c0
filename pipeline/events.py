"""Where a run tells how it stands: events.jsonl for programs, a progress bar for people."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spaceport_gs.progress import Listener, Progress

TELL_SECONDS = 0.2  # events of one stage and message come at most this often


@contextmanager
def progress_of(events: Path, show: str = "auto") -> Iterator[Listener]:
    """A listener that appends to `events` and, where `show` is `auto` and stderr a terminal, draws a bar."""
    with open(events, "a", encoding="utf-8") as file, _bar(show) as draw:
        clock = Clock()

        def listen(progress: Progress) -> None:
            event = clock.event(progress)
            if event is None:
                return
            file.write(json.dumps(event, ensure_ascii=False) + "\n")
            file.flush()
            draw(progress, event)

        yield listen


class Clock:
    """Turns progress into events with times; drops those that come too fast."""

    def __init__(self) -> None:
        self._key = ("", "")
        self._started = self._told = 0.0
        self._first_step = 0

    def event(self, progress: Progress) -> dict[str, Any] | None:
        now = time.time()
        # Training changes its message with every step; the other stages' messages are phases of their own.
        key = (progress.stage, "" if progress.stage == "train" else progress.message)
        if key != self._key:
            self._key, self._started, self._first_step = key, now, progress.step
        elif now - self._told < TELL_SECONDS and progress.step < progress.n_steps:
            return None
        self._told = now
        fraction = progress.step / progress.n_steps if progress.n_steps else 1.0
        done = progress.step - self._first_step
        left = (now - self._started) / done * (progress.n_steps - progress.step) if done else None
        return {
            "time": round(now, 3),
            "stage": progress.stage,
            "step": progress.step,
            "n_steps": progress.n_steps,
            "fraction": round(fraction, 4),
            "seconds_left": None if left is None else round(left, 1),
            "message": progress.message,
            **progress.figures,
        }


def progress_in(event: Mapping[str, Any], stage: str) -> Progress:
    """An event, which another machine wrote, as progress."""
    known = ("time", "stage", "step", "n_steps", "fraction", "seconds_left", "message")
    figures = {
        str(name): value for name, value in event.items() if name not in known and isinstance(value, int | float)
    }
    try:
        return Progress(
            str(event.get("stage", stage)), int(event["step"]), int(event["n_steps"]), str(event.get("message", "")), figures
        )  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return Progress(stage, 0, 1, "runs")


@contextmanager
def _bar(show: str) -> Iterator[Any]:
    if show != "auto" or not sys.stderr.isatty():
        yield lambda progress, event: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import (
        Progress as Bar,
    )

    columns = (
        TextColumn("{task.description:<9}"), BarColumn(), TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Bar(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def draw(progress: Progress, event: dict[str, Any]) -> None:
            task = tasks.get(progress.stage)
            if task is None:
                task = tasks[progress.stage] = bar.add_task(progress.stage, figures="")
            bar.update(
                task, completed=progress.step, total=progress.n_steps,
                figures=" ".join([progress.message, *(_figure(k, v) for k, v in progress.figures.items())]),
            )  # fmt: skip

        yield draw


def _figure(name: str, value: float) -> str:
    unit = {"psnr": "PSNR {:.2f} dB", "loss": "loss {:.4f}", "gaussians": "{:,} Gaussians"}.get(name)
    return unit.format(value) if unit else f"{name} {value:g}"
