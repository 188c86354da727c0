"""The containers' images: what they are built from, and the command that builds one.

The build context is the source distribution. An installed package can lay it out again: it holds its Python sources as they
are, and the others beside the Dockerfiles.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import spaceport_gs
from spaceport_gs import __version__
from spaceport_gs.errors import InputError

IMAGES: Mapping[str, str] = {"sfm": "sfm", "train": "3dgs", "compress": "compressor"}
"""The image of each stage: the name of its folder below containers, and of its repository."""
CONTAINERS = Path(__file__).parent / "containers"
SOURCE = CONTAINERS / "source"  # in an installed package
BUILDERS = ("docker", "podman", "buildah")
LOCAL_PREFIX = "localhost/spaceport"
CPU: Mapping[str, str] = {
    "BASE": "debian:bookworm-slim",
    "BUILD_BASE": "debian:bookworm-slim",
    "CMAKE_ARGS": "-DSPACEPORT_CUDA=OFF",
    "TORCH": "2.13.0+cpu",
    "TORCH_INDEX": "https://download.pytorch.org/whl/cpu",
}
"""Arguments of the Dockerfile of 3dgs by which it trains on the CPU."""
STDERR = 2
ROOT_FILES = ("CMakeLists.txt", "LICENSE", "NOTICE", "README.md", "pyproject.toml")


def write_context(folder: Path) -> None:
    """Lays out the build context in `folder`, which must not be there yet."""
    if folder.exists():
        raise InputError(f"{folder}: exists; give a new folder for the build context")
    root = _root()
    packages = {"spaceport_gs": Path(spaceport_gs.__file__).parent, "pipeline": Path(__file__).parent}
    for name, source in {"csrc": root / "csrc", **packages}.items():
        shutil.copytree(source, folder / name, ignore=_ignored)
    for name in ROOT_FILES:
        shutil.copy(root / name, folder)


def commit() -> str:
    """That the package was made from, with -dirty if its files differed from it; unknown if git did not know."""
    if _root() == SOURCE:
        return (SOURCE / "commit").read_text(encoding="utf-8").strip()
    command = ["git", "-C", str(_root()), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def build_command(image: str, context: Path, tag: str, arguments: Mapping[str, str], tool: str) -> list[str]:
    """Of `tool`, docker, podman or buildah; `arguments` are the Dockerfile's, beside version and commit."""
    given = {"VERSION": __version__, "COMMIT": commit(), **arguments}
    return [
        tool, "build", f"--file={context / 'pipeline/containers' / image / 'Dockerfile'}", f"--tag={tag}",
        *([] if tool == "docker" else ["--format=docker"]),  # OCI's format knows no HEALTHCHECK
        *(f"--build-arg={name}={value}" for name, value in given.items()), str(context),
    ]  # fmt: skip


def name_of(stage: str, prefix: str = LOCAL_PREFIX, tag: str = __version__) -> str:
    """Of a stage's image on this machine."""
    return f"{prefix}/{IMAGES[stage]}:{tag}"


def build(
    stages: Sequence[str], prefix: str, tag: str, arguments: Mapping[str, str], tool: str, tell: Callable[[str], None]
) -> dict[str, str]:
    """Builds the images of these stages for this machine; returns their names."""
    names = {stage: name_of(stage, prefix, tag) for stage in stages}
    with tempfile.TemporaryDirectory() as temporary:
        context = Path(temporary) / "context"
        write_context(context)
        for stage, name in names.items():
            tell(f"{IMAGES[stage]}: builds {name}")
            run_tool(build_command(IMAGES[stage], context, name, arguments, tool), f"building {IMAGES[stage]}")
    return names


def find_tool(tools: Sequence[str] = BUILDERS, wanted: str = "", what: str = "the images are built with one") -> str:
    """The first of `tools` that works here, or the one that is wanted; InputError, which says `what` for, if there is none."""
    if wanted and wanted not in tools:
        raise InputError(f"--tool {wanted}: choose {', '.join(tools)}")
    said = []
    for tool in (wanted,) if wanted else tools:
        if shutil.which(tool):
            answer = subprocess.run([tool, "version"], capture_output=True, text=True)  # fails where no daemon answers
            if answer.returncode == 0:
                return tool
            said.append(f"{tool}: {last_line(answer.stderr)}")
    tried = f" ({'; '.join(said)})" if said else ""
    names = wanted or f"{', '.join(tools[:-1])} or {tools[-1]}"
    raise InputError(f"no {names} that works here{tried}: {what}")


def run_tool(command: Sequence[str], what: str) -> None:
    """What it says goes to stderr."""
    # SageMaker wants an image, not the list of an image and of where it comes from that docker makes.
    environment = {**os.environ, "BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=STDERR, env=environment)
    if done.returncode:
        raise InputError(f"{what}: {command[0]} failed with exit code {done.returncode}; its own lines above say why")


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it says nothing"


def _root() -> Path:
    """The folder with the sources that are not Python: of the installed package, or the repository that it runs in."""
    return SOURCE if SOURCE.is_dir() else Path(__file__).resolve().parent.parent


def _ignored(folder: str, names: list[str]) -> set[str]:
    """What a build or a run left, and the pipeline where it lies in the package: it is laid out beside it."""
    left = {name for name in names if name in ("__pycache__", "node_modules") or name.endswith((".so", ".pyc"))}
    inner = {"pipeline"} if Path(folder) == Path(spaceport_gs.__file__).parent else set()
    return left | inner | ({SOURCE.name} if Path(folder) == CONTAINERS else set())
