"""Faults that users have happen to jobs of theirs, to see what the flow, its alarms and they themselves make of them.

A drill is written STAGE:FAULT, and happens as the stage begins, or train:FAULT@STEP. It breaks a job that costs money, so it needs
SPACEPORT_DRILLS=1 both where it is asked for and, brought there by it, in the job.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spaceport_gs.errors import InputError
from spaceport_gs.progress import Listener, Progress

ALLOWED, VARIABLE = "SPACEPORT_DRILLS", "SPACEPORT_DRILL"
EXIT_KILLED = 137  # as a shell and SageMaker tell of SIGKILL
INTERRUPT, STALL = "interrupt", "stall"
_WRITTEN = re.compile(r"(sfm|train|compress):([a-z-]+)(?:@(\d{1,9}))?")


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _crash() -> None:
    os._exit(EXIT_KILLED)  # a container's first process cannot kill itself


def _fail() -> None:
    raise RuntimeError("a drill: an error of this program")


def _refuse() -> None:
    raise InputError("a drill: this input cannot be used")


def _lack_memory() -> None:
    raise MemoryError("a drill")


def _fill_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the volume, by a drill,")


def _stall(told: str) -> None:
    """Until a signal comes, which the job has its way to answer; none is missed that comes after `told` was printed."""
    signals, written = os.pipe()
    os.set_blocking(written, False)
    before = signal.set_wakeup_fd(written)
    print(told, flush=True)
    os.read(signals, 1)
    signal.set_wakeup_fd(before)
    os.close(signals)
    os.close(written)


FAULTS: Mapping[str, Callable[[], None]] = {
    INTERRUPT: _interrupt,
    "crash": _crash,
    "error": _fail,
    "bad-input": _refuse,
    "out-of-memory": _lack_memory,
    "disk-full": _fill_disk,
}
NAMES = (*FAULTS, STALL)


@dataclass(frozen=True)
class Drill:
    """What is to happen to the job of a stage."""

    stage: str
    fault: str
    """One of NAMES."""
    step: int = 0
    """Of the training, from which on."""

    def __str__(self) -> str:
        return f"{self.stage}:{self.fault}" + (f"@{self.step}" if self.step else "")

    @property
    def environment(self) -> dict[str, str]:
        """Of the job."""
        return {ALLOWED: "1", VARIABLE: str(self)}


def ordered(texts: Sequence[str]) -> dict[str, Drill]:
    """By stage. InputError where they are not allowed, or are none."""
    drills = [parsed(text) for text in texts]
    if drills and os.environ.get(ALLOWED) != "1":
        raise InputError(f"--drill {drills[0]}: breaks a job on purpose; set {ALLOWED}=1 to allow that")
    by_stage = {drill.stage: drill for drill in drills}
    if len(by_stage) < len(drills):
        raise InputError("--drill: one for each stage")
    return by_stage


def parsed(text: str) -> Drill:
    found = _WRITTEN.fullmatch(text)
    if found is None or found[2] not in NAMES:
        raise InputError(f"drill {text}: expected STAGE:FAULT or train:FAULT@STEP; faults are {', '.join(NAMES)}")
    drill = Drill(found[1], found[2], int(found[3] or 0))
    if drill.stage != "train" and (drill.step or drill.fault == INTERRUPT):
        raise InputError(f"drill {text}: only the training counts steps, and runs where it can be interrupted")
    return drill


def without(stages: Mapping[str, Any]) -> dict[str, Any]:
    """Requests for jobs as they are when nothing is rehearsed."""
    return {
        stage: {**request, "Environment": {n: v for n, v in request["Environment"].items() if n not in (ALLOWED, VARIABLE)}}
        for stage, request in stages.items()
    }  # fmt: skip


class Rehearsal:
    """Of a job: what its environment asks for, once."""

    def __init__(self, stage: str) -> None:
        text = os.environ.get(VARIABLE, "")
        if text and os.environ.get(ALLOWED) != "1":
            raise InputError(f"{VARIABLE}={text}: breaks this job on purpose; that needs {ALLOWED}=1 as well")
        drill = parsed(text) if text else None
        self._drill = drill if drill and drill.stage == stage else None
        self._has_happened = False

    @property
    def is_interruption(self) -> bool:
        """Whether it has had the job interrupted."""
        return self._has_happened and self._drill is not None and self._drill.fault == INTERRUPT

    def around(self, listen: Listener) -> Listener:
        """A listener to whom it happens."""
        drill = self._drill
        if drill is None:
            return listen

        def hear(progress: Progress) -> None:
            listen(progress)
            if not self._has_happened and progress.step >= drill.step:
                self._has_happened = True
                if drill.fault == STALL:
                    _stall(f"drill {drill}")
                    return
                print(f"drill {drill}", flush=True)
                FAULTS[drill.fault]()

        return hear
