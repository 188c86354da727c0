"""Published pages: what they contain, and what a browser shows."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spaceport_gs import ops
from spaceport_gs.errors import InputError
from spaceport_gs.gaussians import Gaussians
from spaceport_gs.pipeline import publish as publishing
from spaceport_gs.pipeline.compress import compress
from spaceport_gs.pipeline.publish import PublishSettings, page_settings, publish, up_of
from spaceport_gs.pipeline.view import server_for
from spaceport_gs.types import Camera, RasterSettings

BROWSER = Path(__file__).parent / "browser"
SIZE = (480, 320)


def rolled_camera() -> Camera:
    c, s = np.cos(0.25), np.sin(0.25)
    pose = np.array([[c, -s, 0, 0.1], [s, c, 0, 0.2], [0, 0, 1, 0.3]])
    return Camera(pose, 400.0, 400.0, SIZE[0] / 2, SIZE[1] / 2, *SIZE)


def scene() -> Gaussians:
    """A cloud whose colour tells the place, and whose SH tell the direction."""
    draw = np.random.default_rng(0)
    places = draw.uniform(-1, 1, (2000, 3))
    sh = np.zeros((2000, 16, 3))
    sh[:, 0] = places * 1.8
    sh[:, 1:4] = draw.normal(0, 0.3, (1, 3, 3))
    arrays = (
        places * [1.5, 1, 1] + [0.3, 0.1, 5],
        draw.normal(-2.8, 0.5, (2000, 3)),
        draw.normal(0, 1, (2000, 4)),
        draw.normal(0, 1.5, 2000),
        sh,
    )
    return Gaussians(*(torch.tensor(array, dtype=torch.float32) for array in arrays))


@pytest.fixture(scope="module")
def sog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sog") / "scene.sog"
    compress(scene(), path)
    return path


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((a - b) ** 2)))


def test_a_browser_shows_what_we_render(sog: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None or shutil.which("node") is None:
        pytest.skip("chromium or node is not installed")
    if not (BROWSER / "node_modules" / "playwright-core").is_dir():
        pytest.skip("playwright-core is not installed: npm ci in tests/browser")
    figures = publish(sog, tmp_path / "index.html", PublishSettings("Test", rolled_camera(), 5.0))
    if figures["viewer"] != "inline":
        pytest.skip("the viewer is not at hand and npm cannot bring it")
    command = [
        "node",
        "screenshot.mjs",
        chromium,
        str(tmp_path / "index.html"),
        str(tmp_path / "shot.png"),
    ]
    subprocess.run([*command, *map(str, SIZE)], cwd=BROWSER, check=True, timeout=120)
    ours = ops.render(scene(), rolled_camera(), RasterSettings()).color.clamp(0, 1).numpy()
    with Image.open(tmp_path / "shot.png") as image:
        shot = np.asarray(image.convert("RGB")) / 255
    assert psnr(ours, shot) > 20
    assert psnr(ours, shot) > psnr(ours, np.zeros_like(ours)) + 6


def test_the_page_holds_the_scene_and_nothing_of_this_machine(sog: Path, tmp_path: Path) -> None:
    publish(sog, tmp_path / "a.html", PublishSettings('<b>"{{scene}}"', rolled_camera()))
    publish(sog, tmp_path / "b.html", PublishSettings('<b>"{{scene}}"', rolled_camera()))
    page = (tmp_path / "a.html").read_text()
    assert page == (tmp_path / "b.html").read_text()
    assert "<title>&lt;b&gt;&quot;{{scene}}&quot;</title>" in page
    carried = re.search('<script type="text/plain" id="scene">(.*?)</script>', page, re.S)
    assert carried is not None and base64.b64decode(carried[1]) == sog.read_bytes()
    assert str(tmp_path) not in page and str(sog.parent) not in page
    assert "MIT License" in page


def test_without_npm_the_page_loads_pinned_files(sog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv(publishing.CACHE_VARIABLE, str(tmp_path / "cache"))
    assert publish(sog, tmp_path / "index.html")["viewer"] == "cdn"
    page = (tmp_path / "index.html").read_text()
    version = publishing.viewer_version()
    for name, hashed in publishing.integrity().items():
        url = f"https://cdn.jsdelivr.net/npm/@playcanvas/supersplat-viewer@{version}/{name}"
        assert re.search(f'href="{re.escape(url)}" integrity="{re.escape(hashed)}"', page)


def test_hashes_are_those_of_the_pinned_files() -> None:
    lock = json.loads((publishing.VIEWER / "package-lock.json").read_text())
    assert lock["packages"][f"node_modules/{publishing.PACKAGE}"]["version"] == publishing.viewer_version()
    files = publishing.viewer_files()
    if files is None:
        pytest.skip("the viewer is not at hand and npm cannot bring it")
    assert {n: publishing.integrity_of(t.encode()) for n, t in files.items()} == publishing.integrity()


def test_the_page_opens_upright_at_the_camera() -> None:
    from scipy.spatial.transform import Rotation

    camera = rolled_camera()
    settings = page_settings(PublishSettings("Test", camera, 2.0, up_of([camera])))
    initial = settings["experience"]["cameras"][0]["initial"]
    turn = Rotation.from_quat(settings["rotation"])
    np.testing.assert_allclose(turn.apply(camera.center), initial["position"], atol=1e-9)
    ahead = np.subtract(initial["target"], initial["position"])
    np.testing.assert_allclose(turn.apply(camera.cam_from_world[2, :3]) * 2, ahead, atol=1e-9)
    np.testing.assert_allclose(turn.apply(camera.cam_from_world[0, :3])[1], 0, atol=1e-9)
    np.testing.assert_allclose(turn.apply(-camera.cam_from_world[1, :3])[1], 1, atol=1e-9)


def test_the_server_serves_the_result_and_nothing_else(sog: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="index.html"):
        server_for(tmp_path)
    publish(sog, tmp_path / "index.html")
    (tmp_path / "secret.txt").write_text("secret")
    server = server_for(tmp_path)
    assert server.server_address[0] == "127.0.0.1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with urllib.request.urlopen(f"{url}/?webgl", timeout=10) as answer:
            assert answer.read() == (tmp_path / "index.html").read_bytes()
        for path, headers in (
            ("/secret.txt", {}),
            ("/../secret.txt", {}),
            ("/%2e%2e/secret.txt", {}),
            ("/", {"Host": "evil.example"}),
        ):
            with pytest.raises(urllib.error.HTTPError) as refusal:
                urllib.request.urlopen(urllib.request.Request(url + path, headers=headers), timeout=10)
            assert refusal.value.code in (403, 404)
    finally:
        server.shutdown()
        server.server_close()
