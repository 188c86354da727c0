"""One stage of the pipeline as a SageMaker job: python -m spaceport_gs.pipeline.aws.entrypoint STAGE [NAME=VALUE …]

    sfm        photos → sfm            a processing job
    train      sfm → scene.ply         a training job; resumes from its checkpoints
    compress   train (, sfm) → scene.sog, index.html (, report.html, report.json)   a processing job

It needs no network. Exit codes: 0 done, or stopped with a checkpoint (then there is no manifest); 2 the user's mistake; 70 any
other failure; 143 stopped with nothing to go on from. SPACEPORT_DRILL has it fail on purpose: see drills.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from spaceport_gs import __version__
from spaceport_gs.errors import BackendError, InputError, Interrupted
from spaceport_gs.pipeline import doctor, run
from spaceport_gs.pipeline.aws import drills
from spaceport_gs.pipeline.aws.contract import STAGES, Places, Reporter, Watchdog, settings_of, unpacked
from spaceport_gs.pipeline.aws.drills import Rehearsal
from spaceport_gs.pipeline.manifest import read_manifest, write_manifest
from spaceport_gs.pipeline.run import RunSettings
from spaceport_gs.pipeline.workspace import Existing, Workspace, open_workspace
from spaceport_gs.progress import Listener

EXIT_MISTAKE, EXIT_FAILURE, EXIT_TERMINATED = 2, 70, 143


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run_stage(sys.argv[1:]))


def run_stage(arguments: Sequence[str]) -> int:
    """Exit code of the job with these arguments."""
    if not arguments or arguments[0] not in STAGES:
        print(f"give a stage: {', '.join(STAGES)}", file=sys.stderr)
        return EXIT_MISTAKE
    places = Places.of(arguments[0])
    try:
        print(doctor.as_text(doctor.examine()), flush=True)
        settings = settings_of(places, arguments[1:])
        run.check(_here(places, settings))
        rehearsal = Rehearsal(places.stage)
        _STAGES[places.stage](places, settings, rehearsal)
        return 0
    except Interrupted as error:
        print(error, flush=True)
        if rehearsal.is_interruption:
            _start_again(places)
        return 0
    except _Terminated:
        return _terminated(places)
    except BaseException as error:
        kind, sentence, code = _failure_of(error)
        reason = f"{kind}: {' '.join(sentence.split())}"
        print(reason, file=sys.stderr, flush=True)
        places.write_failure(reason)
        return code


def _here(places: Places, settings: RunSettings) -> RunSettings:
    """Settings on the machine of this stage: `cuda` is a demand on the training, the others take what is there."""
    return settings if places.is_training or settings.device != "cuda" else replace(settings, device="auto")


class _Terminated(BaseException):
    """SIGTERM outside of training."""


def _terminate(number: int, frame: object) -> None:
    raise _Terminated


def _terminated(places: Places) -> int:
    """A training that has not begun yet loses nothing."""
    if places.is_training:
        print("stopped before training began", flush=True)
        return 0
    places.write_failure("interrupted: the job was stopped; start the stage again")
    return EXIT_TERMINATED


def _start_again(places: Places) -> None:
    """As SageMaker does with a training whose spot instance was taken back: of it only the checkpoints are left."""
    shutil.rmtree(places.work)
    environment = {name: value for name, value in os.environ.items() if name != drills.VARIABLE}
    os.execve(sys.executable, sys.orig_argv, environment)


def _failure_of(error: BaseException) -> tuple[str, str, int]:
    """(class, sentence, exit code) of what went wrong."""
    if isinstance(error, InputError):
        return "input", str(error), EXIT_MISTAKE
    if isinstance(error, BackendError):
        return "gpu", str(error), EXIT_MISTAKE
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be there
        return "memory", "take a larger instance, a larger downscale or fewer photos", EXIT_FAILURE
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk", f"{error.filename or 'the volume'} is full; give the job a larger volume", EXIT_FAILURE
    traceback.print_exception(error)
    return "internal", f"{type(error).__name__}: {error}", EXIT_FAILURE


def _sfm(places: Places, settings: RunSettings, rehearsal: Rehearsal) -> None:
    photos = places.channel("photos")
    with _workspace(places, photos, rehearsal) as (workspace, listen):
        run.sfm_stage(photos, workspace, settings, listen)
        _deliver(places, workspace, ("sfm/sparse", "sfm/images", "sfm/masks"), settings, {})


def _train(places: Places, settings: RunSettings, rehearsal: Rehearsal) -> None:
    before = places.channel("sfm")
    read_manifest(before, "sfm")
    with _workspace(places, before, rehearsal) as (workspace, listen):
        places.progress.mkdir(parents=True, exist_ok=True)
        _link(workspace.folder / "checkpoints", places.progress)
        _take(workspace, before, "sfm")
        run.train_stage(workspace, settings, listen, places.progress / "preview.jpg")
        _deliver(places, workspace, ("scene.ply", "pictures"), settings, {"sfm": before})


def _compress(places: Places, settings: RunSettings, rehearsal: Rehearsal) -> None:
    channel = places.channel("train")
    with _workspace(places, channel, rehearsal) as (workspace, listen):
        before = unpacked(channel, workspace.folder)
        read_manifest(before, "train")
        inputs = {"train": before}
        _take(workspace, before, "train")
        if (places.base / "processing/input/sfm").is_dir():  # then the page opens where the first photo was taken
            inputs["sfm"] = places.channel("sfm")
            read_manifest(inputs["sfm"], "sfm")
            _take(workspace, inputs["sfm"], "sfm")
        run.compress_stage(workspace, _here(places, settings), listen, scores=False)
        run.publish_stage(workspace, settings, listen)
        if "sfm" in inputs:
            run.write_report(workspace, settings)
        _deliver(places, workspace, ("scene.sog", "index.html", "report.html", "report.json"), settings, inputs)


_STAGES: Mapping[str, Callable[[Places, RunSettings, Rehearsal], None]] = {
    "sfm": _sfm,
    "train": _train,
    "compress": _compress,
}


@contextmanager
def _workspace(places: Places, source: Path, rehearsal: Rehearsal) -> Iterator[tuple[Workspace, Listener]]:
    config = {"version": __version__, "command": "reconstruct", "input": str(source)}
    reporter = Reporter(places.progress)
    with open_workspace(places.work, source, Existing.RESUME, config) as workspace:
        with Watchdog(places, reporter).watching():
            yield workspace, rehearsal.around(reporter)


def _take(workspace: Workspace, results: Path, stage: str) -> None:
    """Lets a workspace hold what a stage left in another job."""
    (workspace.folder / "stages").mkdir(exist_ok=True)
    for entry in results.iterdir():
        if entry.name == "stages":
            shutil.copy(entry / f"{stage}.json", workspace.folder / "stages")
        elif entry.name != "manifest.json":
            _link(workspace.folder / entry.name, entry)


def _link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target.resolve(), target_is_directory=target.is_dir())


def _deliver(
    places: Places, workspace: Workspace, names: Sequence[str], settings: RunSettings, inputs: Mapping[str, Path]
) -> None:
    """Copies the stage's results to where SageMaker takes them from, and at last their manifest."""
    record = workspace.record_of(places.stage)
    assert record is not None
    for name in (*names, f"stages/{places.stage}.json"):
        source, target = workspace.folder / name, places.output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        elif source.exists():
            shutil.copy(source, target)
    metrics: dict[str, Any] = {"seconds": record.seconds, "peak_bytes": record.peak_bytes, **record.result}
    write_manifest(places.output, places.stage, asdict(settings), inputs, metrics)


if __name__ == "__main__":
    main()
