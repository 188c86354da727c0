"""What a SageMaker job finds and leaves below /opt/ml, and how it says what went wrong.

Training jobs get channels, hyperparameters and checkpoints, and leave a model; processing jobs get inputs and arguments, and
leave outputs. SAGEMAKER_BASE_DIR stands in for /opt/ml.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from spaceport_gs.errors import InputError
from spaceport_gs.files import write_json, write_text
from spaceport_gs.pipeline.events import Clock
from spaceport_gs.pipeline.run import RunSettings
from spaceport_gs.progress import Progress

STAGES = ("sfm", "train", "compress")
MOST_FAILURE_BYTES = 1024  # that SageMaker takes of a reason
TELL_SECONDS = 2.0
STALLED_SECONDS = 1800.0  # without a word from the stage
LATE = 1.5  # times the estimate
LOOK_SECONDS = 15.0
MODEL = "model.tar.gz"  # what SageMaker makes of a training job's model


@dataclass(frozen=True)
class Places:
    """Of one job."""

    base: Path
    stage: str

    @staticmethod
    def of(stage: str) -> Places:
        return Places(Path(os.environ.get("SAGEMAKER_BASE_DIR", "/opt/ml")), stage)

    @property
    def is_training(self) -> bool:
        return self.stage == "train"

    def input(self, name: str) -> Path:
        """The folder of an input."""
        return self.base / ("input/data" if self.is_training else "processing/input") / name

    def channel(self, name: str) -> Path:
        """An input; InputError if there is nothing in it."""
        folder = self.input(name)
        if not folder.is_dir() or not any(folder.iterdir()):
            raise InputError(f"{folder}: no files; the job of the stage {self.stage} needs the input {name}")
        return folder

    @property
    def output(self) -> Path:
        return self.base / ("model" if self.is_training else "processing/output")

    @property
    def progress(self) -> Path:
        """Copied to S3 while the job runs."""
        return self.base / ("checkpoints" if self.is_training else "processing/progress")

    @property
    def work(self) -> Path:
        return self.base / "work"

    @property
    def reason(self) -> Path:
        """The file that says why the job failed."""
        return self.base / "output" / ("failure" if self.is_training else "message")

    def write_failure(self, reason: str) -> None:
        """`class: sentence`; the first that is written stays."""
        if not self.reason.exists():
            write_text(self.reason, reason.encode()[:MOST_FAILURE_BYTES].decode(errors="ignore"))


def settings_of(places: Places, arguments: Sequence[str]) -> RunSettings:
    """From hyperparameters.json, if there is one, and arguments NAME=VALUE; values are JSON, or text as it stands."""
    given: dict[str, str] = {}
    path = places.base / "input/config/hyperparameters.json"
    if path.is_file():
        try:
            given = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: not a JSON object of hyperparameters") from error
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            raise InputError(f"argument {argument}: expected NAME=VALUE, such as seed=1")
        given[name] = value
    types = {field.name: str(field.type) for field in fields(RunSettings)}
    own = {name: value for name, value in given.items() if not name.startswith("sagemaker_")}
    return RunSettings(**{name: _value(name, value, types) for name, value in own.items()})


def _value(name: str, text: Any, types: Mapping[str, str]) -> Any:
    if name not in types:
        raise InputError(f"{name}: no such setting; there are {', '.join(types)}")
    wanted, value = types[name], text
    if isinstance(text, str) and (wanted != "str" or text.startswith('"')):
        try:
            value = json.loads(text)
        except ValueError:
            pass
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if wanted == "float" and is_number:
        return float(value)
    if (wanted == "int" and isinstance(value, int) and is_number) or (wanted == "str" and isinstance(value, str)):
        return value
    raise InputError(f"{name}: expected {'text' if wanted == 'str' else 'a number'}, not {text!r}")


def unpacked(channel: Path, work: Path) -> Path:
    """The folder of a training job's results: the channel, or what its archive holds. Only plain files are taken."""
    archive = channel / MODEL
    if not archive.is_file():
        return channel
    target = work / "unpacked"
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                parts = PurePosixPath(member.name)
                if member.isdir():
                    continue
                if not member.isreg() or parts.is_absolute() or ".." in parts.parts:
                    raise InputError(f"{archive}: {member.name} is no plain file in it")
                source, path = tar.extractfile(member), target / member.name
                assert source is not None
                path.parent.mkdir(parents=True, exist_ok=True)
                with source, open(path, "wb") as file:
                    shutil.copyfileobj(source, file)
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{archive}: not a readable archive; run the stage train again") from error
    return target


class Reporter:
    """A listener: one JSON line and progress.json every few seconds, and a line of metrics for CloudWatch."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._clock, self._told, self._stage, self._step = folder, Clock(), 0.0, "", 0
        self.heard = time.monotonic()
        """When there was progress last, whether or not it was told."""

    def __call__(self, progress: Progress) -> None:
        self.heard = time.monotonic()
        event = self._clock.event(progress)
        is_over = progress.step >= progress.n_steps
        if event is None or (
            progress.stage == self._stage and not is_over and time.monotonic() - self._told < TELL_SECONDS
        ):
            return
        now, is_same = time.monotonic(), progress.stage == self._stage
        rate = (progress.step - self._step) / (now - self._told) if is_same else 0.0
        self._told, self._stage, self._step = now, progress.stage, progress.step
        write_json(self._folder / "progress.json", event)
        print(json.dumps(event, ensure_ascii=False), flush=True)
        if progress.figures:
            metrics = {"step": progress.step, **progress.figures, "steps_per_second": rate}
            print("metric " + " ".join(f"{name}={value:g}" for name, value in metrics.items()), flush=True)


class Watchdog:
    """What the stack's alarms go by: lines in the log for a job that stands still, or takes half as long again as estimated.

    SPACEPORT_PREFIX says whose alarms, SPACEPORT_EXPECTED_SECONDS what was estimated.
    """

    def __init__(self, places: Places, reporter: Reporter) -> None:
        self._common = {"prefix": os.environ.get("SPACEPORT_PREFIX", ""), "stage": places.stage}
        expected = os.environ.get("SPACEPORT_EXPECTED_SECONDS", "")
        self._limit = LATE * float(expected) if expected.isdecimal() and int(expected) else math.inf
        self._reporter, self._began, self._is_late, self._stalled_since = reporter, time.monotonic(), False, math.nan

    def look(self, now: float) -> list[dict[str, Any]]:
        """What is to be told at this time of the monotonic clock: each stop and being late once."""
        alarms = []
        if now - self._reporter.heard > STALLED_SECONDS and self._stalled_since != self._reporter.heard:
            self._stalled_since = self._reporter.heard
            alarms.append({"alarm": "stalled", **self._common, "seconds": round(now - self._reporter.heard)})
        if now - self._began > self._limit and not self._is_late:
            self._is_late = True
            alarms.append({"alarm": "late", **self._common, "seconds": round(now - self._began)})
        return alarms

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Looks every few seconds, from a thread of its own."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(LOOK_SECONDS):
                for alarm in self.look(time.monotonic()):
                    print(f"{json.dumps(alarm)}\n", end="", flush=True)  # in one piece, beside other lines

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
