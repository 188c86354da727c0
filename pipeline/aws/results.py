"""What is made of a scene, brought here."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from spaceport_gs.errors import InputError
from spaceport_gs.files import replacing
from spaceport_gs.pipeline.aws.cloud import Cloud, explained
from spaceport_gs.pipeline.aws.objects import text_of
from spaceport_gs.pipeline.aws.runs import checked_id
from spaceport_gs.pipeline.aws.stack import Stack
from spaceport_gs.pipeline.manifest import NAME as MANIFEST
from spaceport_gs.pipeline.manifest import read_manifest, sha256_of
from spaceport_gs.progress import Listener, Progress


@explained()
def fetch(cloud: Cloud, stack: Stack, scene: str, out: Path, listen: Listener) -> None:
    """The scene's file, its page and the manifest, checked, in `out`; what is there already is not fetched again."""
    s3, folder = cloud.client("s3"), f"work/{checked_id(scene)}/compress"
    text = text_of(cloud, stack.bucket, f"{folder}/{MANIFEST}")
    if text is None:
        raise InputError(f"scene {scene}: there is no finished result; see its status")
    try:
        files = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in json.loads(text)["outputs"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"scene {scene}: {folder}/{MANIFEST} is not a manifest; retry it") from error
    total, done = sum(n_bytes for n_bytes, _ in files.values()), 0
    for name, (n_bytes, sha256) in files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"scene {scene}: its manifest names a file outside of its folder, {name}")
        listen(Progress("fetch", done, total, name))
        if not (out / name).is_file() or sha256_of(out / name) != sha256:
            with replacing(out / name) as path:
                s3.download_file(stack.bucket, f"{folder}/{name}", str(path))
        done += n_bytes
    with replacing(out / MANIFEST) as path:
        path.write_text(text, encoding="utf-8")
    read_manifest(out, "compress")
    listen(Progress("fetch", total, total))
