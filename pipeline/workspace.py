"""The folder OUT of a run: who may write to it, which stages in it are finished, and what was asked for."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from spaceport_gs.errors import InputError
from spaceport_gs.files import write_json

LOG = logging.getLogger("spaceport")
MARK = "config.json"  # what makes a folder ours
OURS = (
    "scene.ply", "scene.sog", "index.html", "report.html", "report.json", "sfm", "sparse", "images", "photos",
    "unzipped", "given", "work", "sfm.json", "pictures", "checkpoints", "stages", "events.jsonl", "spaceport.log", MARK,
)  # fmt: skip


class Existing(Enum):
    """What to do with a result that is there already."""

    REFUSE = "refuse"
    RESUME = "resume"
    OVERWRITE = "overwrite"


@dataclass(frozen=True)
class Record:
    """A finished stage."""

    fingerprint: str
    seconds: float
    peak_bytes: int
    result: dict[str, Any]


@dataclass(frozen=True)
class Workspace:
    folder: Path

    def record_of(self, stage: str) -> Record | None:
        try:
            return Record(**json.loads((self.folder / "stages" / f"{stage}.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def stage(
        self,
        name: str,
        settings: Mapping[str, Any],
        work: Callable[[], dict[str, Any]],
        clean: tuple[str, ...] = (),
    ) -> Record:
        """Does `work` and records its result, unless that is recorded already for the same settings.

        `clean`: what an earlier attempt with other settings may have left and must not be gone on from.
        """
        fingerprint = fingerprint_of(settings)
        done = self.record_of(name)
        if done is not None and done.fingerprint == fingerprint:
            LOG.info("%s: finished earlier", name)
            return done
        started_with = self.folder / "stages" / f"{name}.started"
        if not started_with.exists() or started_with.read_text() != fingerprint:
            for entry in clean:
                _remove(self.folder / entry)
            started_with.parent.mkdir(parents=True, exist_ok=True)
            started_with.write_text(fingerprint)
        LOG.info("%s: starts", name)
        _reset_peak()
        started = time.monotonic()
        result = work()
        record = Record(fingerprint, round(time.monotonic() - started, 3), peak_bytes(), result)
        write_json(self.folder / "stages" / f"{name}.json", vars(record))
        LOG.info("%s: %.1f s, %.0f MB at most", name, record.seconds, record.peak_bytes / 1e6)
        return record


def fingerprint_of(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def open_workspace(folder: Path, existing: Existing, config: Mapping[str, Any]) -> Iterator[Workspace]:
    """The folder, created, locked for this process, and logged to.

    InputError: another run holds it, it holds what is not ours, or a result that must not be touched.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; give a folder for the results")
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if not created and not (folder / MARK).exists() and any(p.name != ".lock" for p in folder.iterdir()):
        raise InputError(f"{folder}: holds files that are not a result of spaceport; give an empty or a new folder")
    with _lock(folder):
        if (folder / MARK).exists() and existing is Existing.REFUSE:
            raise InputError(f"{folder}: holds a result; go on with --resume, or replace it with --overwrite")
        if existing is Existing.OVERWRITE:
            for name in OURS:
                _remove(folder / name)
        write_json(folder / MARK, dict(config))
        handler = logging.FileHandler(folder / "spaceport.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOG.addHandler(handler)
        LOG.setLevel(logging.INFO)
        LOG.propagate = False
        try:
            yield Workspace(folder)
        except BaseException as error:
            LOG.error("%s: %s", type(error).__name__, error)
            raise
        finally:
            LOG.removeHandler(handler)
            handler.close()


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


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
