"""The folder OUT of a run: who may write to it, which stages in it are finished, and what was asked for."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from spaceport_gs.errors import InputError
from spaceport_gs.files import remove, write_json

LOG = logging.getLogger("spaceport")
MARK = "config.json"  # what makes a folder ours
COSTLY = ("sfm", "train")  # stages that are not done again with other settings unless the user says so
EVERY_COMMAND = ("stages", "events.jsonl", "spaceport.log", MARK)
WRITTEN = {
    "sfm": ("images", "masks", "sparse", "photos", "unzipped", "given", "work", "sfm.json"),
    "train": ("scene.ply", "report.json", "sfm", "pictures", "checkpoints", "preview.jpg"),
    "reconstruct": (
        "scene.ply", "scene.sog", "index.html", "report.html", "report.json", "sfm", "pictures", "checkpoints",
        "preview.jpg", "jobs",
    ),
}  # fmt: skip
"""What each command writes to its folder, beside EVERY_COMMAND."""
WORTH_KEEPING = ("checkpoints", "sfm/work", "work", "jobs", "scene.ply")  # of a run that finished no stage


class Existing(Enum):
    """What to do with a result that is there already."""

    REFUSE = "refuse"
    RESUME = "resume"
    OVERWRITE = "overwrite"


@dataclass(frozen=True)
class Record:
    """A finished stage."""

    settings: dict[str, Any]
    seconds: float
    peak_bytes: int
    result: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Another one for every time that the stage was done."""
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Workspace:
    folder: Path

    def record_of(self, stage: str) -> Record | None:
        try:
            return Record(**json.loads(self._record_path(stage).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def stage(
        self,
        name: str,
        settings: Mapping[str, Any],
        work: Callable[[], dict[str, Any]],
        outputs: tuple[str, ...],
    ) -> Record:
        """Does `work` and records its result, unless that is recorded already for these settings and its `outputs` are there.

        InputError: the stage is costly, and was begun with other settings.
        """
        wanted = json.loads(json.dumps(settings))
        done = self.record_of(name)
        if done is not None and done.settings == wanted and all((self.folder / o).exists() for o in outputs):
            LOG.info("%s: finished earlier", name)
            return done
        self._check_begun(name, wanted)
        self._record_path(name).unlink(missing_ok=True)
        write_json(self._begun_path(name), wanted)
        LOG.info("%s: starts", name)
        _reset_peak()
        started = time.monotonic()
        result = json.loads(json.dumps(work()))
        record = Record(wanted, round(time.monotonic() - started, 3), peak_bytes(), result)
        write_json(self._record_path(name), vars(record))
        LOG.info("%s: %.1f s, %.0f MB at most", name, record.seconds, record.peak_bytes / 1e6)
        return record

    def _record_path(self, stage: str) -> Path:
        return self.folder / "stages" / f"{stage}.json"

    def _begun_path(self, stage: str) -> Path:
        return self.folder / "stages" / f"{stage}.begun"

    def _check_begun(self, name: str, wanted: Mapping[str, Any]) -> None:
        try:
            begun = json.loads(self._begun_path(name).read_text())
        except (OSError, ValueError):
            return
        changed = [key for key in wanted if begun.get(key) != wanted[key]]
        if name in COSTLY and changed:
            raise InputError(
                f"{self.folder}: {name} was begun with another value of {', '.join(changed)};"
                " give that of then, or start again with --overwrite"
            )


@contextmanager
def open_workspace(folder: Path, source: Path, existing: Existing, config: Mapping[str, Any]) -> Iterator[Workspace]:
    """The folder for the results of `source`: created, locked for this process, and logged to.

    InputError: another run holds it, it holds what is not ours, or a result or an input that must not be touched.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; give a folder for the results")
    if folder.resolve() == source.resolve():
        raise InputError(f"{folder}: is the input itself; give another folder for the results")
    folder.mkdir(parents=True, exist_ok=True)
    command = _command_of(folder)
    if command is None and not all(p.name == ".lock" or _is_partial(p) for p in folder.iterdir()):
        raise InputError(f"{folder}: holds files that are not a result of spaceport; give an empty or a new folder")
    with _lock(folder):
        if command is not None and existing is Existing.REFUSE and _is_worth_keeping(folder):
            raise InputError(f"{folder}: holds a result; go on with --resume, or replace it with --overwrite")
        for partial in filter(_is_partial, folder.rglob(".*.partial")):
            partial.unlink(missing_ok=True)
        if command is not None and existing is not Existing.RESUME:
            _clear(folder, command, source)
        if not (folder / MARK).exists():
            write_json(folder / MARK, dict(config))
        with _logging_to(folder / "spaceport.log"):
            yield Workspace(folder)
        write_json(folder / MARK, dict(config))  # a resumed run may have changed what can be changed


def _command_of(folder: Path) -> str | None:
    """The command whose results the folder holds, or None if it is not ours."""
    try:
        config = json.loads((folder / MARK).read_text())
        return config["command"] if "version" in config and config["command"] in WRITTEN else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_partial(path: Path) -> bool:
    """What a killed process left of a file that it was writing."""
    return path.name.startswith(".") and path.name.endswith(".partial") and path.is_file()


def _is_worth_keeping(folder: Path) -> bool:
    return any((folder / "stages").glob("*.json")) or any((folder / name).exists() for name in WORTH_KEEPING)


def _clear(folder: Path, command: str, source: Path) -> None:
    """Removes what `command` wrote; InputError if the input lies in there."""
    targets = [folder / name for name in (*WRITTEN[command], *EVERY_COMMAND)]
    for target in targets:
        if source.resolve().is_relative_to(target.resolve()):
            raise InputError(f"{source}: the input lies in the result that would be replaced; give another folder")
    for target in targets:
        remove(target)


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    handler = _Log(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    try:
        yield
    except BaseException as error:
        LOG.error("%s: %s", type(error).__name__, error)
        raise
    finally:
        LOG.removeHandler(handler)
        with suppress(OSError):
            handler.close()


class _Log(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A log that cannot be written, on a full disk, is not worth a traceback: what else fails there is told."""


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """The kernel gives the lock back however the process ends."""
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"{folder}: another run (process {file.read().strip() or 'unknown'}) works in it; wait for it, or take another folder"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _reset_peak() -> None:
    """Lets the kernel count the peak memory anew, where it allows that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_bytes() -> int:
    """Peak resident memory of this process since the last reset."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
