"""manifest.json: what a finished stage made of what. Written last, so that whoever finds one finds everything in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from spaceport_gs import __version__
from spaceport_gs.errors import InputError
from spaceport_gs.files import write_json

NAME = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """Of one stage's results."""

    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    """SHA-256 of the manifest of each input that has one."""
    outputs: Mapping[str, Mapping[str, Any]]
    """`bytes` and `sha256` of each file, by its path in the folder."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    version: str = __version__
    format: int = FORMAT


def write_manifest(
    folder: Path, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, Path], metrics: Mapping[str, Any]
) -> Manifest:
    """Of all files that lie in `folder` now. `inputs`: folders with manifests of their own."""
    hashes = {name: sha256_of(path / NAME) for name, path in inputs.items() if (path / NAME).is_file()}
    outputs = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / NAME
    }
    manifest = Manifest(stage, dict(settings), hashes, outputs, dict(metrics))
    write_json(folder / NAME, asdict(manifest))
    return manifest


def record_change(folder: Path, name: str) -> None:
    """Lets the manifest in `folder` say what its file `name` is now."""
    manifest = json.loads((folder / NAME).read_text(encoding="utf-8"))
    path = folder / name
    manifest["outputs"][name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_json(folder / NAME, manifest)


def read_manifest(folder: Path, stage: str) -> Manifest:
    """That of the results of `stage` in `folder`; InputError unless every file is there as it was written."""
    path = folder / NAME
    again = f"run the stage {stage} again"
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        files = {name: (int(file["bytes"]), str(file["sha256"])) for name, file in manifest.outputs.items()}
    except OSError as error:
        raise InputError(f"{folder}: no finished result of the stage {stage} ({NAME} is missing); {again}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not a manifest; {again}") from error
    if manifest.format != FORMAT or manifest.stage != stage:
        raise InputError(f"{path}: of the stage {manifest.stage} in format {manifest.format}, not {stage} in {FORMAT}")
    for name, (n_bytes, sha256) in files.items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise InputError(f"{path}: names a file outside of its folder, {name}")
        file = folder / name
        if not file.is_file() or file.stat().st_size != n_bytes or sha256_of(file) != sha256:
            raise InputError(f"{file}: missing, or not what the stage {stage} wrote; {again}")
    return manifest


def sha256_of(path: Path) -> str:
    """Of a file, hexadecimal."""
    known = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            known.update(block)
    return known.hexdigest()
