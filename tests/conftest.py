"""What several test files share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spaceport_gs import _engine, ops
from spaceport_gs.pipeline import synthesize as synthesis
from spaceport_gs.pipeline.doctor import cuda_missing
from spaceport_gs.pipeline.synthesize import SynthesizeSettings, synthesize

if TYPE_CHECKING:
    from aws_scenes import SageMaker
    from interpreter import Interpreter

    from spaceport_gs.pipeline.aws.cloud import Cloud

ORBIT = SynthesizeSettings(n_photos=16, width=360, height=240)
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of real captures; tests that need it are skipped where it is missing."""
    folder = Path(os.environ.get("SPACEPORT_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real captures: set SPACEPORT_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def orbit_capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic capture (photos and truth) that structure from motion can place."""
    out = tmp_path_factory.mktemp("orbit")
    synthesize(out, ORBIT)
    return out


@pytest.fixture(scope="session")
def small_capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COLMAP project of small photos with few points, so that stages take seconds."""
    out = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesis, "N_POINTS", 600)
        synthesize(out, SynthesizeSettings(n_photos=12, width=96, height=64))
    return out / "truth"


@pytest.fixture(params=["portable", "avx2", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where tensors go, for each backend and instruction set in turn."""
    if request.param == "cuda":
        if missing := cuda_missing():
            pytest.skip(missing)
        yield "cuda"
        return
    if request.param not in _engine.build_info()["simd"] or (request.param == "avx2" and _engine.Cpu().simd != "avx2"):
        pytest.skip(f"{request.param} is not available on this machine")
    ops.use_cpu(2, request.param)
    yield "cpu"
    ops.use_cpu()


# Scenes on AWS. What they need is imported in the fixtures, because other tests do not need it.


@pytest.fixture(scope="module")
def aws() -> Iterator[Interpreter]:
    """The state machines as they are deployed."""
    from deployed import deployed

    with deployed() as running:
        yield running


@pytest.fixture
def flow(aws: Interpreter) -> Interpreter:
    """Where the results of the compression of a scene lie."""
    from deployed import BUCKET
    from executions import DIGEST
    from interpreter import client_of

    client = client_of("s3")
    for key in ("scene.sog", "index.html"):
        client.put_object(Bucket=BUCKET, Key=f"work/a1/compress/{key}", Body=key.encode())
    manifest = {"outputs": {"index.html": {"sha256": DIGEST + 48 * "0"}}, "metrics": {}}
    client.put_object(Bucket=BUCKET, Key="work/a1/compress/manifest.json", Body=json.dumps(manifest).encode())
    aws.calls.clear()
    aws.slept.clear()
    return aws


@pytest.fixture
def sagemaker(aws: Interpreter) -> SageMaker:
    """Whose jobs are done at once; what a test changes of that is its own."""
    from aws_scenes import SageMaker
    from deployed import USUAL

    service = SageMaker()
    aws.handlers = {**USUAL, **dict.fromkeys(("Sfm", "TrainSpot", "Train", "Compress"), service.run)}
    return service


@pytest.fixture
def cloud(sagemaker: SageMaker, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    import boto3
    from interpreter import REGION

    from spaceport_gs.pipeline.aws import scenes
    from spaceport_gs.pipeline.aws.cloud import Cloud

    monkeypatch.setattr(scenes, "STOP_WAITS", (0.0, 0.0))
    cloud = Cloud(boto3.Session(region_name=REGION))
    cloud._clients["sagemaker"] = sagemaker
    return cloud


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Of another scene for each test."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name in ("a.jpg", "b c é.jpg", "more/d.png"):
        (folder / name).write_bytes(f"{tmp_path} {name}".encode())
    (folder / "notes.md").write_text("not a photo")
    return folder
