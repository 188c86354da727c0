"""What is made of a scene, brought here and checked."""

from __future__ import annotations

from pathlib import Path

import pytest
from aws_scenes import STACK, make, put_results, wait_for
from deployed import BUCKET
from interpreter import client_of

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws.cloud import Cloud
from spaceport_gs.pipeline.aws.results import fetch
from spaceport_gs.pipeline.aws.uploads import plan
from spaceport_gs.progress import Progress, ignore


def test_results_are_fetched_once_and_checked(cloud: Cloud, photos: Path, tmp_path: Path) -> None:
    upload, _ = make(cloud, photos, tmp_path)
    wait_for(cloud, upload.scene)
    out, told = tmp_path / "out", list[Progress]()
    fetch(cloud, STACK, upload.scene, out, told.append)
    assert f"scene.sog of {upload.scene}" in (out / "scene.sog").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "manifest.json", "report.html", "scene.sog"]
    assert told[-1].step == told[-1].n_steps > 0
    stamp = (out / "index.html").stat().st_mtime_ns
    (out / "scene.sog").write_bytes(bytes((out / "scene.sog").stat().st_size))
    fetch(cloud, STACK, upload.scene, out, ignore)
    assert f"scene.sog of {upload.scene}" in (out / "scene.sog").read_text()
    assert (out / "index.html").stat().st_mtime_ns == stamp


def test_results_that_are_not_what_the_manifest_says(cloud: Cloud, photos: Path, tmp_path: Path) -> None:
    upload, s3 = plan(photos), client_of("s3")
    with pytest.raises(InputError, match="no finished result"):
        fetch(cloud, STACK, upload.scene, tmp_path / "out", ignore)
    put_results(upload.scene, "compress", tmp_path)
    key = f"work/{upload.scene}/compress/"
    s3.put_object(Bucket=BUCKET, Key=f"{key}scene.sog", Body=b"damaged")
    with pytest.raises(InputError, match="run the stage compress again"):
        fetch(cloud, STACK, upload.scene, tmp_path / "out", ignore)
    for text, word in (("{", "not a manifest"), ('{"outputs": {"../x": {"bytes": 1, "sha256": ""}}}', "outside")):
        s3.put_object(Bucket=BUCKET, Key=f"{key}manifest.json", Body=text.encode())
        with pytest.raises(InputError, match=word):
            fetch(cloud, STACK, upload.scene, tmp_path / "out", ignore)
    assert not (tmp_path / "x").exists()
