"""The containers' images: what they are built from, and the command that builds one.

The build context is the source distribution. An installed package can lay it out again: it holds its Python sources as they
are, and the others beside the Dockerfiles.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import spaceport_gs
from spaceport_gs import __version__
from spaceport_gs.errors import InputError

IMAGES: Mapping[str, str] = {"sfm": "sfm", "train": "3dgs", "compress": "compressor"}
"""The image of each stage: the name of its folder below containers, and of its repository."""
CONTAINERS = Path(__file__).parent / "containers"
SOURCE = CONTAINERS / "source"  # in an installed package
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


def _root() -> Path:
    """The folder with the sources that are not Python: of the installed package, or the repository that it runs in."""
    return SOURCE if SOURCE.is_dir() else Path(__file__).resolve().parent.parent


def _ignored(folder: str, names: list[str]) -> set[str]:
    """What a build or a run left, and the pipeline where it lies in the package: it is laid out beside it."""
    left = {name for name in names if name in ("__pycache__", "node_modules") or name.endswith((".so", ".pyc"))}
    inner = {"pipeline"} if Path(folder) == Path(spaceport_gs.__file__).parent else set()
    return left | inner | ({SOURCE.name} if Path(folder) == CONTAINERS else set())
