"""The portable kernels, compiled for aarch64 and run under qemu, agree with those of this machine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from spaceport_gs import ops
from spaceport_gs.gaussians import Gaussians
from spaceport_gs.types import Camera, Image, RasterSettings

REPOSITORY = Path(__file__).parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
WIDTH, HEIGHT, N = 75, 43, 301


@pytest.fixture(scope="module")
def run_step(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs the step under emulation."""
    for tool in (COMPILER, EMULATOR, "cmake"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    build = tmp_path_factory.mktemp("aarch64")
    configure = [
        "cmake", "-S", str(REPOSITORY), "-B", str(build), "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}",
        "-DCMAKE_BUILD_TYPE=Release", "-DSPACEPORT_PYTHON=OFF", "-DSPACEPORT_NATIVE_TESTS=ON", "-DSPACEPORT_CUDA=OFF",
    ]  # fmt: skip
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(build), "--target", "run_step"], check=True, capture_output=True)
    return [EMULATOR, "-L", "/usr/aarch64-linux-gnu", str(build / "run_step")]


def scene() -> tuple[Gaussians, Camera, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    gaussians = Gaussians(
        means=torch.randn(N, 3, generator=draw) + torch.tensor([0.0, 0.0, 4.0]),
        log_scales=0.5 * torch.randn(N, 3, generator=draw) - 2.5,
        quaternions=torch.randn(N, 4, generator=draw),
        opacities=2 * torch.randn(N, generator=draw),
        sh=0.3 * torch.randn(N, 16, 3, generator=draw),
    )
    camera = Camera(np.eye(3, 4), 60.0, 62.0, 36.0, 22.5, WIDTH, HEIGHT)
    photo = torch.randint(0, 256, (HEIGHT, WIDTH, 3), generator=draw, dtype=torch.uint8)
    return gaussians, camera, photo


def step_here(gaussians: Gaussians, camera: Camera, photo: torch.Tensor) -> list[np.ndarray]:
    settings = RasterSettings(background=(0.1, 0.2, 0.3))
    projected = ops.project(gaussians, camera, settings)
    tiles = ops.tile(projected, camera)
    image = ops.blend(projected, tiles, camera, settings)
    loss = ops.loss(image.color, photo, ops.LossSettings())
    d_image = Image(loss.d_color, torch.zeros(HEIGHT, WIDTH))
    d_splats = ops.blend_vjp(projected, tiles, camera, settings, image, d_image)
    gradient = ops.project_vjp(gaussians, camera, settings, projected, d_splats)
    rates = ops.AdamSettings(1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3, step=1)
    values = Gaussians(*(a.clone() for a in gaussians.arrays()))
    ops.update(values, gradient, ops.zeros_like(values), ops.zeros_like(values), rates)
    return [
        np.array([len(projected.splats), len(tiles.splat_from_instance)]),
        loss.means.numpy(),
        *(a.numpy() for a in (image.color, image.transmittance)),
        *(a.numpy() for a in (*gradient.arrays(), *values.arrays())),
    ]


def test_step_on_aarch64(run_step: list[str], tmp_path: Path) -> None:
    gaussians, camera, photo = scene()
    lens = [camera.fx, camera.fy, camera.cx, camera.cy]
    pose = np.concatenate([camera.cam_from_world.ravel(), camera.center, lens])
    with open(tmp_path / "input", "wb") as file:
        np.array([N, 16, WIDTH, HEIGHT], np.int64).tofile(file)
        pose.astype(np.float32).tofile(file)
        for array in gaussians.arrays():
            array.numpy().tofile(file)
        photo.numpy().tofile(file)
    subprocess.run([*run_step, str(tmp_path / "input"), str(tmp_path / "output")], check=True)

    ops.use_cpu(simd="portable")
    try:
        expected = step_here(gaussians, camera, photo)
    finally:
        ops.use_cpu()
    with open(tmp_path / "output", "rb") as file:
        results = [np.fromfile(file, e.dtype, e.size).reshape(e.shape) for e in expected]
        assert not file.read()
    assert results[0].tolist() == expected[0].tolist()
    for result, value in zip(results[1:], expected[1:], strict=True):
        np.testing.assert_allclose(result, value, rtol=1e-4, atol=1e-5 * np.abs(value).max())
