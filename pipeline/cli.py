"""The command `spaceport`: the main job, its stages, and helpers.

A user's mistake is one line on stderr and exit code 2; a traceback is a bug of ours.
"""

from __future__ import annotations

import errno
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from spaceport_gs import __version__
from spaceport_gs.errors import BackendError, InputError, Interrupted
from spaceport_gs.pipeline.aws.cli import app as aws
from spaceport_gs.pipeline.aws.commands.batches import make_batch
from spaceport_gs.pipeline.images import LOCAL_PREFIX
from spaceport_gs.pipeline.options import (
    EXCLUSIVE,
    EXIT_INTERRUPTED,
    EXIT_MISTAKE,
    EXIT_SOME_FAILED,
    EXIT_TERMINATED,
    BuildArgument,
    CheckpointEvery,
    Deterministic,
    DeviceOption,
    Downscale,
    EvalEvery,
    ExposureRate,
    ImagePrefix,
    ImageTag,
    Input,
    Json,
    MaxSeconds,
    Moments,
    OnlyImage,
    Output,
    Overwrite,
    Preset,
    Quiet,
    Resume,
    Seed,
    Steps,
    Threads,
    Title,
    Tool,
    chosen_images,
    fail,
    finish,
    tell,
)

app = typer.Typer(
    name="spaceport",
    help="Photos in, a published 3D Gaussian-splat scene out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(aws)


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Exit code of the command with these arguments."""
    remedy = "the same command goes on" if arguments[:1] == ["aws"] else "go on with --resume"
    try:
        code = app(arguments, standalone_mode=False)
        return int(code or 0)
    except typer.TyperException as error:
        message = error.format_message()
        return fail(f"{message.rstrip('.')}. See `spaceport --help`.") if message.strip() else EXIT_MISTAKE
    except (InputError, BackendError) as error:
        return fail(str(error))
    except Interrupted as error:
        return fail(str(error), EXIT_TERMINATED if "SIGTERM" in str(error) else EXIT_INTERRUPTED)
    except (KeyboardInterrupt, typer.Abort):
        return fail(f"interrupted; {remedy}", EXIT_INTERRUPTED)
    except _Terminated:
        return fail(f"terminated; {remedy}", EXIT_TERMINATED)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return fail("training and rendering need torch: pip install 'torch>=2.4'")
    except MemoryError as error:
        return fail(f"not enough memory ({error}): take a larger --downscale, or fewer photos")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which may not be there
            raise
        return fail("not enough memory on the GPU: take a larger --downscale, or --device cpu")
    except BrokenPipeError:
        return 0
    except OSError as error:
        if error.errno is None:
            raise
        return fail(_system_error(error))


def _system_error(error: OSError) -> str:
    culprit = error.filename2 or error.filename
    where = f"{culprit}: " if culprit else ""
    remedy = {
        errno.ENOSPC: "; free some space and go on with --resume",
        errno.EDQUOT: "; free some space and go on with --resume",
        errno.EFBIG: "; free some space and go on with --resume",
        errno.EROFS: "; give an output folder that can be written to",
        errno.EACCES: "; check its permissions",
        errno.EPERM: "; give an output folder that can be written to",
        errno.ENOENT: "; check the path",
    }.get(error.errno or 0, "")
    return f"{where}{error.strerror}{remedy}"


class _Terminated(BaseException):
    """SIGTERM outside of training."""


def _terminate(number: int, frame: object) -> None:
    raise _Terminated


def _version(wanted: bool) -> None:
    if wanted:
        print(f"spaceport-gs {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@contextmanager
def _work(
    source: Path, output: Path, config: dict[str, Any], existing: tuple[bool, bool], quiet: bool
) -> Iterator[Any]:
    """(workspace, listener) for a command that writes to a folder."""
    from spaceport_gs.pipeline.events import progress_of
    from spaceport_gs.pipeline.workspace import Existing, open_workspace

    resume, overwrite = existing
    if resume and overwrite:
        raise InputError(EXCLUSIVE)
    if not source.exists():
        raise InputError(f"{source}: there is no such file or folder")
    mode = Existing.RESUME if resume else Existing.OVERWRITE if overwrite else Existing.REFUSE
    config = {"version": __version__, "input": str(source), **config}
    with open_workspace(output, source, mode, config) as workspace:
        with progress_of(output / "events.jsonl", "never" if quiet else "auto") as listen:
            yield workspace, listen


def _use_threads(threads: int) -> None:
    if threads:
        from spaceport_gs import ops

        ops.use_cpu(threads)


def _unused(report: dict[str, Any]) -> str:
    """A line for every photo that could not be read or placed."""
    skipped = [f"{name}: {reason}" for name, reason in report["skipped"].items()]
    return "".join(f"\nnot used: {line}" for line in [*skipped, *(f"{n}: not placed" for n in report["left_out"])])


def _decibels(value: float | None) -> str:
    return "no held-out views" if value is None else f"PSNR {value:.2f} dB on held-out views"


@app.command(name="reconstruct")
def reconstruct_command(
    photos: Input, output: Output, device: DeviceOption = "auto", seed: Seed = 0, preset: Preset = "standard",
    steps: Steps = 0, max_seconds: MaxSeconds = 0, downscale: Downscale = 1, eval_every: EvalEvery = 8,
    checkpoint_every: CheckpointEvery = 0, exposure_rate: ExposureRate = 0, moments: Moments = "full",
    deterministic: Deterministic = False, threads: Threads = 0, title: Title = "", resume: Resume = False,
    overwrite: Overwrite = False, quiet: Quiet = False, json: Json = False,
    backend: Annotated[str, typer.Option("--backend", help="local, or container: each stage in its image, by podman or docker.")] = "local",
    image_prefix: ImagePrefix = LOCAL_PREFIX, image_tag: ImageTag = __version__,
) -> None:  # fmt: skip
    """The main job: photos (a folder, a .zip, a COLMAP project) to scene, page and report."""
    from functools import partial

    from spaceport_gs.pipeline import contained
    from spaceport_gs.pipeline import run as stages

    settings = stages.RunSettings(
        device,
        seed,
        preset,
        steps,
        max_seconds,
        downscale,
        eval_every,
        checkpoint_every,
        "deterministic" if deterministic else "fast",
        title,
        exposure_rate,
        moments,
    )
    reconstruct: Callable[..., dict[str, Any]] = stages.reconstruct
    if backend == "container":
        if threads:
            raise InputError("--threads: a container takes every core; leave it out with --backend container")
        contained.check(settings)
        reconstruct = partial(contained.reconstruct, containers=contained.find_containers(image_prefix, image_tag))
    elif backend == "local":
        stages.check(settings)
    else:
        raise InputError(f"--backend {backend}: choose local or container")
    with _work(
        photos,
        output,
        {"command": "reconstruct", **asdict(settings)},
        (resume, overwrite),
        quiet or json,
    ) as work:
        tell(stages.estimate(photos, settings, output), quiet or json)
        _use_threads(threads)
        report = reconstruct(photos, work[0], settings, listen=work[1])
    finish(report, json, quiet, lambda: (
        f"{report['registered']} of {report['photos']} photos placed, {report['gaussians']:,} Gaussians,"
        f" {_decibels(report['psnr'])}{_unused(report)}"
        f"\npage    {output / 'index.html'}\nreport  {output / 'report.html'}"
    ))  # fmt: skip


@app.command(name="batch")
def batch_command(
    captures: Input, output: Output,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Captures at a time.")] = 1,
    device: DeviceOption = "auto", seed: Seed = 0, preset: Preset = "standard", steps: Steps = 0,
    max_seconds: MaxSeconds = 0, downscale: Downscale = 1, eval_every: EvalEvery = 8,
    backend: Annotated[str, typer.Option("--backend", help="local; container: by podman or docker; or aws: see `spaceport aws`.")] = "local",
    image_prefix: ImagePrefix = LOCAL_PREFIX, image_tag: ImageTag = __version__,
    resume: Resume = False, overwrite: Overwrite = False, quiet: Quiet = False, json: Json = False,
) -> None:  # fmt: skip
    """Many captures: the main job for every folder of photos and every .zip in INPUT."""
    import os

    from spaceport_gs.pipeline import contained
    from spaceport_gs.pipeline import run as stages
    from spaceport_gs.pipeline.batch import SUMMARY, captures_in, run_batch

    if resume and overwrite:
        raise InputError(EXCLUSIVE)
    if backend not in ("local", "container", "aws"):
        raise InputError(f"--backend {backend}: choose local, container or aws")
    settings = stages.RunSettings(device, seed, preset, steps, max_seconds, downscale, eval_every)
    where = [f"--threads={max(1, len(os.sched_getaffinity(0)) // jobs)}"]
    if backend == "local":
        stages.check(settings)
    elif backend == "container":
        contained.check(settings)
        contained.find_containers(image_prefix, image_tag)
        where = ["--backend=container", f"--image-prefix={image_prefix}", f"--image-tag={image_tag}"]
    found = captures_in(captures)
    done = [name for name in found if (output / name).exists()]
    if done and not (resume or overwrite):
        raise InputError(f"{output / done[0]}: exists; go on with --resume, or replace results with --overwrite")
    if backend == "aws":
        outcomes = make_batch(found, output, settings, jobs, quiet or json)
    else:
        arguments = [
            f"--device={device}", f"--seed={seed}", f"--preset={preset}", f"--steps={steps}",
            f"--max-seconds={max_seconds}", f"--downscale={downscale}", f"--eval-every={eval_every}", *where,
            *(["--resume"] if resume else []), *(["--overwrite"] if overwrite else []),
        ]  # fmt: skip
        outcomes = run_batch(found, output, arguments, jobs, lambda line: tell(line, quiet or json))
    n_failed = sum(bool(outcome.error) for outcome in outcomes)
    result = {"captures": [asdict(outcome) for outcome in outcomes], "failed": n_failed}
    finish(result, json, quiet, lambda: f"{len(outcomes) - n_failed} of {len(outcomes)} captures: {output / SUMMARY}")
    if n_failed:
        raise typer.Exit(EXIT_SOME_FAILED)


@app.command(name="images")
def images_command(
    image: OnlyImage = None, build_arg: BuildArgument = None, tool: Tool = "",
    device: Annotated[str, typer.Option("--device", help="That 3dgs trains on: cuda or cpu.")] = "cuda",
    image_prefix: ImagePrefix = LOCAL_PREFIX, image_tag: ImageTag = __version__, json: Json = False,
) -> None:  # fmt: skip
    """Builds the images of the containers for this machine: see `batch --backend container`."""
    from spaceport_gs.pipeline.contained import BUILDERS
    from spaceport_gs.pipeline.images import CPU, build, find_tool

    if device not in ("cuda", "cpu"):
        raise InputError(f"--device {device}: choose cuda or cpu")
    wanted, given = chosen_images(image, build_arg)
    arguments = {**(CPU if device == "cpu" else {}), **given}
    names = build(
        wanted, image_prefix, image_tag, arguments, find_tool(BUILDERS, tool), lambda line: print(line, file=sys.stderr)
    )
    finish(names, json, False, lambda: "\n".join(names.values()))


@app.command(name="sfm")
def sfm_command(
    photos: Input, output: Output, device: DeviceOption = "auto", seed: Seed = 0, deterministic: Deterministic = False,
    resume: Resume = False, overwrite: Overwrite = False, quiet: Quiet = False, json: Json = False,
) -> None:  # fmt: skip
    """Photos to a COLMAP project: poses, points and undistorted photos."""
    from spaceport_gs.pipeline import run as stages

    _check_device(device)
    settings = stages.RunSettings("cpu", seed, sfm="deterministic" if deterministic else "fast")
    config = {"command": "sfm", "seed": seed, "sfm": settings.sfm}
    with _work(photos, output, config, (resume, overwrite), quiet or json) as (workspace, listen):
        tell(stages.estimate(photos, settings, output), quiet or json)
        report = stages.sfm_alone(photos, workspace, settings, listen)
    finish(report, json, quiet, lambda: (
        f"{report['registered']} of {report['photos']} photos placed, {report['points']:,} points,"
        f" {report['reprojection_error_px']:.2f} px" + _unused(report)
    ))  # fmt: skip


@app.command(name="train")
def train_command(
    project: Input, output: Output, device: DeviceOption = "auto", seed: Seed = 0, preset: Preset = "standard",
    steps: Steps = 0, max_seconds: MaxSeconds = 0, downscale: Downscale = 1, eval_every: EvalEvery = 8,
    checkpoint_every: CheckpointEvery = 0, exposure_rate: ExposureRate = 0, moments: Moments = "full",
    threads: Threads = 0, resume: Resume = False, overwrite: Overwrite = False, quiet: Quiet = False, json: Json = False,
) -> None:  # fmt: skip
    """A COLMAP project to scene.ply and report.json."""
    from spaceport_gs.pipeline import run as stages

    settings = stages.RunSettings(
        device, seed, preset, steps, max_seconds, downscale, eval_every, checkpoint_every,
        exposure_rate=exposure_rate, moments=moments,
    )  # fmt: skip
    stages.check(settings)
    with _work(
        project,
        output,
        {"command": "train", **asdict(settings)},
        (resume, overwrite),
        quiet or json,
    ) as work:
        tell(stages.estimate(project, settings, output), quiet or json)
        _use_threads(threads)
        report = stages.train_project(project, work[0], settings, work[1])
    finish(report, json, quiet, lambda: (
        f"{report['gaussians']:,} Gaussians, {_decibels(report['psnr'])}: {output / 'scene.ply'}"
    ))  # fmt: skip


def _target(output: Path, name: str) -> Path:
    """The file to write: `output`, or `name` in it if it is a folder."""
    return output / name if output.is_dir() else output


def _is_finished(target: Path, resume: bool, overwrite: bool) -> bool:
    """Whether `target` is there and shall stay: files are renamed to their names when they are whole."""
    if resume and overwrite:
        raise InputError(EXCLUSIVE)
    if not target.exists() or overwrite:
        return False
    if resume:
        return True
    raise InputError(f"{target}: exists; keep it with --resume, or replace it with --overwrite")


def _check_device(device: str) -> None:
    """Refuses a device that is not there; `auto` is not looked for, since for these commands it is the CPU."""
    from spaceport_gs.pipeline.run import device_of

    if device != "auto":
        device_of(device)


def _scene_file(source: Path, *suffixes: str) -> Path:
    """The scene of an OUT folder, or the file itself."""
    if source.is_dir():
        for suffix in suffixes:
            if (source / f"scene{suffix}").is_file():
                return source / f"scene{suffix}"
        raise InputError(f"{source}: no scene{' or scene'.join(suffixes)} in this folder")
    if not source.exists():
        raise InputError(f"{source}: there is no such file or folder")
    if source.suffix.lower() not in suffixes:
        raise InputError(f"{source}: expected {' or '.join(suffixes)}, or a folder with a result")
    return source


def _read_scene(path: Path) -> Any:
    from spaceport_gs.pipeline.compress import read_sog
    from spaceport_gs.ply import read_ply

    return read_ply(path) if path.suffix.lower() == ".ply" else read_sog(path)


@app.command(name="compress")
def compress_command(
    scene: Input, output: Output, device: DeviceOption = "auto", seed: Seed = 0, resume: Resume = False,
    overwrite: Overwrite = False, quiet: Quiet = False, json: Json = False,
) -> None:  # fmt: skip
    """A .ply to a .sog."""
    from spaceport_gs.pipeline.compress import CompressSettings, compress
    from spaceport_gs.ply import read_ply

    _check_device(device)
    source, target = _scene_file(scene, ".ply"), _target(output, "scene.sog")
    if _is_finished(target, resume, overwrite):
        n_bytes = target.stat().st_size
        figures = {"sog_bytes": n_bytes, "ply_bytes": source.stat().st_size, "ratio": source.stat().st_size / n_bytes}
    else:
        chosen = CompressSettings(seed=seed, device="cpu" if device == "auto" else device)
        figures = compress(read_ply(source), target, chosen)
    finish(figures, json, quiet, lambda: (
        f"{target}: {figures['sog_bytes'] / 1e6:.1f} MB, {figures['ratio']:.1f} times smaller"
    ))  # fmt: skip


@app.command(name="publish")
def publish_command(
    scene: Input, output: Output, title: Title = "Scene", resume: Resume = False, overwrite: Overwrite = False,
    quiet: Quiet = False, json: Json = False,
) -> None:  # fmt: skip
    """A .ply, a .sog or an OUT folder to one HTML page."""
    import tempfile

    from spaceport_gs.pipeline.compress import compress, read_sog
    from spaceport_gs.pipeline.publish import PublishSettings, opening_of, publish
    from spaceport_gs.ply import read_ply

    source = _scene_file(scene, ".sog", ".ply")
    target = _target(output, "index.html")
    if _is_finished(target, resume, overwrite):
        figures: dict[str, Any] = {"html_bytes": target.stat().st_size}
    else:
        settings = opening_of(scene, title) if scene.is_dir() else PublishSettings(title)
        with tempfile.TemporaryDirectory() as temporary:
            sog = source
            if source.suffix.lower() == ".ply":
                sog = Path(temporary) / "scene.sog"
                compress(read_ply(source), sog)
            else:
                read_sog(source)  # a page around a broken scene helps nobody
            figures = publish(sog, target, settings)
    finish(figures, json, quiet, lambda: f"{target}: {figures['html_bytes'] / 1e6:.1f} MB")


@app.command(name="view")
def view_command(
    scene: Input,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: the first free one from 8008 on.")] = 0,
    host: Annotated[
        str,
        typer.Option("--host", help="Address to listen on; others than 127.0.0.1 open it to the network."),
    ] = "127.0.0.1",
) -> None:
    """Shows a .ply, a .sog or an OUT folder in the browser."""
    from spaceport_gs.pipeline.view import page_folder, serve, server_for

    if not scene.exists():
        raise InputError(f"{scene}: there is no such file or folder")
    folder, temporary = page_folder(scene)
    try:
        serve(server_for(folder, host, port), lambda text: print(text, flush=True))
    finally:
        if temporary is not None:
            temporary.cleanup()


@app.command(name="render")
def render_command(
    scene: Input, output: Output,
    cameras: Annotated[Path | None, typer.Option("--cameras", help="COLMAP project with the cameras; default: that of the OUT folder.")] = None,
    device: DeviceOption = "auto", downscale: Downscale = 1, threads: Threads = 0, resume: Resume = False,
    overwrite: Overwrite = False, quiet: Quiet = False, json: Json = False,
) -> None:  # fmt: skip
    """Pictures of a .ply, a .sog or an OUT folder, as PNG files in OUTPUT."""
    from PIL import Image

    from spaceport_gs.files import replacing
    from spaceport_gs.pipeline.run import device_of
    from spaceport_gs.render import Renderer, to_8bit
    from spaceport_gs.scene import load_scene

    device = device_of(device)
    views = load_scene(_project(scene, cameras), downscale).views
    gaussians = _read_scene(_scene_file(scene, ".ply", ".sog"))
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; give a folder for the pictures")
    _use_threads(threads)
    images, written = Renderer(gaussians.torch(device)), []
    for view in views:
        target = output / (view.name if view.name.lower().endswith(".png") else f"{view.name}.png")
        if not _is_finished(target, resume, overwrite):
            with replacing(target) as temporary:
                Image.fromarray(to_8bit(images.render([view.camera])[0])).save(temporary, "PNG")
        written.append(str(target))
    finish({"pictures": written}, json, quiet, lambda: f"{len(written)} pictures in {output}")


@app.command(name="evaluate")
def evaluate_command(
    scene: Input,
    cameras: Annotated[Path | None, typer.Option("--cameras", help="COLMAP project with the photos; default: that of the OUT folder.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Also write the scores to this JSON file.")] = None,
    device: DeviceOption = "auto",
    downscale: Annotated[float | None, typer.Option("--downscale", min=1, help="Default: as it was trained, or 1.")] = None,
    eval_every: Annotated[int | None, typer.Option("--eval-every", min=0, help="Default: as it was trained, or 8.")] = None,
    threads: Threads = 0, overwrite: Overwrite = False, quiet: Quiet = False, json: Json = False,
) -> None:  # fmt: skip
    """PSNR and SSIM of a .ply, a .sog or an OUT folder on its held-out photos (all photos with --eval-every 0)."""
    from spaceport_gs.evaluate import evaluate
    from spaceport_gs.files import write_json
    from spaceport_gs.pipeline.run import device_of
    from spaceport_gs.scene import load_scene, split

    device = device_of(device)
    trained = _settings_of(scene)
    downscale = trained.get("downscale", 1.0) if downscale is None else downscale
    eval_every = trained.get("eval_every", 8) if eval_every is None else eval_every
    training, held_out = split(load_scene(_project(scene, cameras), downscale), eval_every)
    target = None if output is None else _target(output, "evaluation.json")
    if target is not None:
        _is_finished(target, False, overwrite)
    _use_threads(threads)
    gaussians = _read_scene(_scene_file(scene, ".ply", ".sog"))
    result = evaluate(gaussians.torch(device), held_out or training)
    if target is not None:
        write_json(target, asdict(result))
    finish(asdict(result), json, quiet, lambda: "\n".join(
        [*(f"{s.name}  {s.psnr:.2f} dB  {s.ssim:.4f}" for s in result.views), f"mean  {result.psnr:.2f} dB  {result.ssim:.4f}"]
    ))  # fmt: skip


def _settings_of(scene: Path) -> dict[str, Any]:
    """What the scene of an OUT folder was trained with; nothing is known of other files."""
    from spaceport_gs.pipeline.workspace import MARK

    try:
        config = json.loads((scene / MARK).read_text())
        return {name: type(default)(config[name]) for name, default in (("downscale", 1.0), ("eval_every", 8))}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _project(scene: Path, cameras: Path | None) -> Path:
    """The COLMAP project that belongs to a scene."""
    if cameras is not None:
        return cameras
    folder = scene if scene.is_dir() else scene.parent
    if (folder / "sfm").is_dir():
        return folder / "sfm"
    raise InputError(f"{scene}: no cameras beside it; name a COLMAP project with --cameras")


@app.command(name="synthesize")
def synthesize_command(
    output: Output,
    photos: Annotated[int, typer.Option("--photos", min=3, help="How many.")] = 30,
    width: Annotated[int, typer.Option("--width", min=32)] = 480,
    height: Annotated[int, typer.Option("--height", min=32)] = 320,
    seed: Seed = 0, resume: Resume = False, overwrite: Overwrite = False, quiet: Quiet = False, json: Json = False,
) -> None:  # fmt: skip
    """A synthetic drone capture: photos with GPS, a flight log, and the truth about cameras and depth."""
    from spaceport_gs.pipeline.events import progress_of
    from spaceport_gs.pipeline.synthesize import LOG, MARK, SynthesizeSettings, synthesize

    if _is_finished(output / LOG, resume, overwrite):
        return
    if output.exists() and not (output / MARK).exists() and any(output.iterdir()):
        raise InputError(f"{output}: holds other files; give an empty or a new folder")
    with progress_of(Path("/dev/null"), "never" if quiet or json else "auto") as listen:
        figures = synthesize(output, SynthesizeSettings(photos, width, height, seed), listen)
    finish(figures, json, quiet, lambda: f"{figures['photos']} photos in {output / 'photos'}")


@app.command(name="doctor")
def doctor_command(
    stage: Annotated[str, typer.Option("--stage", help="Fail if this stage cannot run: sfm, train or compress.")] = "",
    json: Json = False,
) -> None:
    """What is built, what is found, and how to get what is missing."""
    from spaceport_gs.pipeline.doctor import as_text, check_stage, examine

    if stage:
        check_stage(stage)
    report = examine()
    finish(report, json, False, lambda: as_text(report))


if __name__ == "__main__":
    main()
