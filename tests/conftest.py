"""What several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from spaceport_gs import _engine, ops
from spaceport_gs.pipeline.doctor import cuda_missing
from spaceport_gs.pipeline.synthesize import SynthesizeSettings, synthesize

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
