"""What the commands have in common: options, exit codes, and how they tell their result."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.images import IMAGES

EXCLUSIVE = "--resume and --overwrite exclude each other"
EXIT_SOME_FAILED, EXIT_MISTAKE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143

Input = Annotated[Path, typer.Argument(metavar="INPUT", show_default=False)]
Output = Annotated[Path, typer.Option("-o", "--output", help="Where the result goes.", show_default=False)]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Of everything random.")]
Preset = Annotated[str, typer.Option("--preset", help="standard, or baseline (3DGS as published).")]
Steps = Annotated[
    int,
    typer.Option("--steps", min=0, help="Training steps; 0: the preset's. All step counts scale with it."),
]
MaxSeconds = Annotated[float, typer.Option("--max-seconds", min=0, help="Time for training; 0: no limit.")]
Downscale = Annotated[float, typer.Option("--downscale", min=1, help="Train on photos this many times smaller.")]
EvalEvery = Annotated[
    int,
    typer.Option("--eval-every", min=0, help="Hold out every so-many-th photo for evaluation; 0: none."),
]
CheckpointEvery = Annotated[
    int,
    typer.Option("--checkpoint-every", min=0, help="Steps of training between two checkpoints; 0: half a minute."),
]
ExposureRate = Annotated[
    float,
    typer.Option("--exposure-rate", min=0, help="Learn each photo's exposure this fast, such as 0.001; 0: not at all."),
]
Moments = Annotated[
    str,
    typer.Option("--moments", help="full, or compact: on a GPU, 180 bytes less for each Gaussian."),
]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="SfM with one thread and fixed seeds: the same files again."),
]
Threads = Annotated[
    int,
    typer.Option("--threads", min=0, help="CPU threads of training and rendering; 0: every core."),
]
Title = Annotated[str, typer.Option("--title", help="Of the published page.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the result that is in OUTPUT.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the result that is in OUTPUT.")]
OnlyImage = Annotated[
    list[str] | None, typer.Option("--image", help="Only this one: sfm, 3dgs or compressor. May be repeated.")
]
BuildArgument = Annotated[
    list[str] | None, typer.Option("--build-arg", help="NAME=VALUE, of the Dockerfiles. May be repeated.")
]
Tool = Annotated[str, typer.Option("--tool", help="docker, podman or buildah; default: the first that works.")]
ImagePrefix = Annotated[str, typer.Option("--image-prefix", help="Of the containers' images: PREFIX/sfm and so on.")]
ImageTag = Annotated[str, typer.Option("--image-tag", help="Of the containers' images; default: this version.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no summary.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]


def chosen_images(images: list[str] | None, arguments: list[str] | None) -> tuple[list[str], dict[str, str]]:
    """(stages, arguments of their Dockerfiles) that --image and --build-arg mean."""
    chosen = images or list(IMAGES.values())
    for name in chosen:
        if name not in IMAGES.values():
            raise InputError(f"--image {name}: choose {', '.join(IMAGES.values())}")
    for argument in arguments or ():
        if "=" not in argument:
            raise InputError(f"--build-arg {argument}: expected NAME=VALUE")
    return [s for s, name in IMAGES.items() if name in chosen], dict(a.split("=", 1) for a in arguments or ())


def finish(result: dict[str, Any], as_json: bool, quiet: bool, summary: Callable[[], str]) -> None:
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    elif not quiet:
        print(summary())


def tell(line: str, is_silent: bool) -> None:
    if not is_silent:
        print(line)


def fail(message: str, code: int = EXIT_MISTAKE) -> int:
    """The exit code, once a line on stderr has said why."""
    print(f"spaceport: error: {' '.join(message.split())}", file=sys.stderr)
    return code
