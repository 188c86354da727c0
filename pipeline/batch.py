"""Many captures, each a main job in a process of its own: what fails in one stops no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spaceport_gs.errors import InputError
from spaceport_gs.files import write_json
from spaceport_gs.pipeline.capture import list_photos

SUMMARY = "batch.json"
PROGRAM = "import sys; sys.path[:] = filter(None, sys.path); from spaceport_gs.pipeline.cli import main; main()"
"""The command as installed, not what may lie in the folder that it is called from."""


@dataclass(frozen=True)
class Outcome:
    """Of one capture."""

    name: str
    seconds: float
    error: str = ""
    """One line; empty if all went well."""
    report: Mapping[str, Any] | None = None
    """What report.json holds."""
    was_done: bool = False
    """On AWS: by an earlier run with the same photos and settings."""


def captures_in(folder: Path) -> dict[str, Path]:
    """Folders of photos and .zip files in `folder`, by the name that their results get."""
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder that holds captures: folders of photos, .zip files")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        is_capture = path.suffix.lower() == ".zip" if path.is_file() else bool(list_photos(path))
        if path.name.startswith(".") or not is_capture:
            continue
        name = path.stem if path.is_file() else path.name
        if name in found:
            raise InputError(f"{path}: {found[name].name} would get the same name {name}; rename one of them")
        found[name] = path
    if not found:
        raise InputError(f"{folder}: holds no captures: no folder with photos, no .zip file")
    return found


def run_batch(
    captures: Mapping[str, Path],
    out: Path,
    arguments: Sequence[str],
    n_jobs: int,
    tell: Callable[[str], None],
) -> list[Outcome]:
    """Runs `spaceport reconstruct` with these arguments on every capture, `n_jobs` at a time, into folders of their names in
    `out`; `out`/batch.json says after each how all stand. KeyboardInterrupt and the like end those that run.
    """
    running: dict[str, subprocess.Popen[str]] = {}
    outcomes: dict[str, Outcome] = {}
    is_over = False

    def reconstruct(name: str) -> Outcome:
        started = time.monotonic()
        command = [sys.executable, "-c", PROGRAM, "reconstruct", str(captures[name]), "-o", str(out / name)]
        if is_over:
            return Outcome(name, 0.0, "not begun")
        tell(f"{name}: starts")
        process = subprocess.Popen(
            [*command, "--json", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # ours are the signals of the terminal
        )
        running[name] = process
        printed, errors = process.communicate()
        del running[name]
        seconds = round(time.monotonic() - started, 1)
        if process.returncode == 0:
            return Outcome(name, seconds, report=json.loads(printed))
        return Outcome(name, seconds, _reason(errors, process.returncode))

    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(n_jobs) as pool:
        jobs = [pool.submit(reconstruct, name) for name in captures]
        try:
            for done in as_completed(jobs):
                outcome = done.result()
                outcomes[outcome.name] = outcome
                write_json(out / SUMMARY, [asdict(outcomes[name]) for name in captures if name in outcomes])
                tell(f"{_line(outcome)} ({len(outcomes)} of {len(captures)})")
        except BaseException:
            is_over = True
            for process in list(running.values()):
                os.killpg(process.pid, signal.SIGTERM)
            raise
    return [outcomes[name] for name in captures]


def _reason(errors: str, code: int) -> str:
    lines = [line for line in errors.strip().splitlines() if line.strip()]
    if code < 0:
        return (
            f"ended by {signal.Signals(-code).name}; if that was the system's, it had too little memory: fewer --jobs"
        )
    return lines[-1].removeprefix("spaceport: error: ") if lines else f"exit code {code}"


def _line(outcome: Outcome) -> str:
    if outcome.error:
        return f"{outcome.name}: failed after {outcome.seconds:.0f} s: {outcome.error}"
    report = outcome.report or {}
    score = "" if report.get("psnr") is None else f", {report['psnr']:.2f} dB"
    return f"{outcome.name}: {report['gaussians']:,} Gaussians{score} in {outcome.seconds:.0f} s"
