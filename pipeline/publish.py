"""publish: one HTML file that holds a scene and the viewer that shows it.

The viewer is @playcanvas/supersplat-viewer, pinned in viewer/package.json. Its files are taken from viewer/node_modules, or
from a cache in the user's home that npm fills on first use. Without npm the page loads the same files from a CDN, which the
browser checks against the hashes in viewer/integrity.json.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spaceport_gs import __version__
from spaceport_gs.errors import InputError
from spaceport_gs.files import replacing
from spaceport_gs.types import Camera

VIEWER = Path(__file__).parent / "viewer"
PACKAGE = "@playcanvas/supersplat-viewer"
SCRIPT, STYLE = "public/index.js", "public/index.css"
CDN = "https://cdn.jsdelivr.net/npm"
CACHE_VARIABLE = "SPACEPORT_CACHE"
NPM_SECONDS = 120
CHUNK = 3 << 20  # a multiple of three, so that base64 pieces join


@dataclass(frozen=True)
class PublishSettings:
    title: str = "Scene"
    camera: Camera | None = None
    """Where the page opens; None = it frames the scene."""
    focus: float = 1.0
    """Distance from the camera to what it looks at: where orbiting turns about."""
    up: tuple[float, float, float] = (0.0, -1.0, 0.0)
    """Up in the scene's frame."""


def publish(sog: Path, out: Path, settings: PublishSettings = PublishSettings()) -> dict[str, Any]:
    """Writes the page; returns its html_bytes and where the viewer comes from (`inline` or `cdn`)."""
    files = viewer_files()
    if sog.stat().st_size == 0:
        raise InputError(f"{sog}: is empty; compress the scene again")
    page = (VIEWER / "page.html").read_text(encoding="utf-8")
    values = {
        "title": html.escape(settings.title),
        "generator": html.escape(f"spaceport-gs {__version__}"),
        "notices": (VIEWER / "NOTICES.txt").read_text(encoding="utf-8").replace("--", "- -"),
        "style": _style(files),
        "settings": _for_script(json.dumps(page_settings(settings), allow_nan=False)),
        "script": _script(files),
    }
    # One pass, so that what is filled in is never filled in itself.
    before, after = (
        re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], piece) for piece in page.split("{{scene}}")
    )
    with replacing(out) as temporary, open(temporary, "wb") as target, open(sog, "rb") as scene:
        target.write(before.encode())
        while chunk := scene.read(CHUNK):
            target.write(base64.b64encode(chunk))
        target.write(after.encode())
    return {"html_bytes": out.stat().st_size, "viewer": "cdn" if files is None else "inline"}


def viewer_version() -> str:
    package = json.loads((VIEWER / "package.json").read_text(encoding="utf-8"))
    return str(package["dependencies"][PACKAGE])


def integrity() -> dict[str, str]:
    """Hash of each of the viewer's files, as browsers expect it."""
    hashes: dict[str, str] = json.loads((VIEWER / "integrity.json").read_text(encoding="utf-8"))
    return hashes


def integrity_of(data: bytes) -> str:
    return "sha384-" + base64.b64encode(hashlib.sha384(data).digest()).decode()


def viewer_files() -> Mapping[str, str] | None:
    """The texts of the viewer's files by name, or None where they cannot be had."""
    for folder in (VIEWER / "node_modules" / PACKAGE, _cached_viewer()):
        if folder is not None and (folder / SCRIPT).is_file():
            data = {name: (folder / name).read_bytes() for name in (SCRIPT, STYLE)}
            if {name: integrity_of(value) for name, value in data.items()} == integrity():
                return {name: value.decode("utf-8") for name, value in data.items()}
    return None


def _cached_viewer() -> Path | None:
    """The viewer in the user's cache; npm brings it there. None where npm is missing or fails."""
    cache = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "spaceport-gs")
    folder = cache / f"viewer-{viewer_version()}"
    package = folder / "node_modules" / PACKAGE
    npm = shutil.which("npm")
    if package.is_dir() or npm is None:
        return package if package.is_dir() else None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            for name in ("package.json", "package-lock.json"):
                shutil.copy(VIEWER / name, temporary)
            command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            subprocess.run(command, cwd=temporary, check=True, capture_output=True, timeout=NPM_SECONDS)
            os.rename(shutil.copytree(temporary, f"{temporary}.done"), folder)
    except (OSError, subprocess.SubprocessError):
        return package if package.is_dir() else None
    return package


def _style(files: Mapping[str, str] | None) -> str:
    if files is not None:
        return f"<style>{files[STYLE]}</style>"
    url = f"{CDN}/{PACKAGE}@{viewer_version()}/{STYLE}"
    return f'<link rel="stylesheet" href="{url}" integrity="{integrity()[STYLE]}" crossorigin="anonymous" />'


def _script(files: Mapping[str, str] | None) -> str:
    opening = (VIEWER / "open.js").read_text(encoding="utf-8")
    if files is not None:
        code = files[SCRIPT].split("\n//# sourceMappingURL=")[0]
        return f'<script type="module">{_for_script(code, "<script", "</script")}\n{{{opening}}}</script>'
    url = f"{CDN}/{PACKAGE}@{viewer_version()}/{SCRIPT}"
    return (
        f'<link rel="modulepreload" href="{url}" integrity="{integrity()[SCRIPT]}" crossorigin="anonymous" />\n'
        f'<script type="module">import {{ createViewer }} from "{url}";\n{{{opening}}}</script>'
    )


def _for_script(text: str, *dangers: str) -> str:
    """Text that cannot end the script element that it stands in."""
    if not dangers:
        return text.replace("<", "\\u003c")
    for danger in dangers:
        text = text.replace(danger, danger.replace("<", "\\x3c"))
    return text


def page_settings(settings: PublishSettings) -> dict[str, Any]:
    """The viewer's settings, and the rotation that turns the scene upright (its world is y up)."""
    up = np.array(settings.up, dtype=np.float64)
    viewer_from_world = upright(up, settings.camera)
    cameras: list[dict[str, Any]] = []
    extent = None
    if settings.camera is not None:
        camera = settings.camera
        position = viewer_from_world @ camera.center
        target = position + settings.focus * (viewer_from_world @ camera.cam_from_world[2, :3])
        extent = [camera.width / 2 / camera.fx, camera.height / 2 / camera.fy]
        fov = 2 * math.degrees(math.atan(max(extent)))
        cameras = [{"initial": {"position": position.tolist(), "target": target.tolist(), "fov": fov}}]
    off = {"enabled": False}
    experience = {
        "version": 2,
        "tonemapping": "none",
        "highPrecisionRendering": False,
        "background": {"color": [0, 0, 0]},
        "postEffectSettings": {
            "sharpness": {**off, "amount": 0},
            "bloom": {**off, "intensity": 1, "blurLevel": 2},
            "grading": {**off, "brightness": 1, "contrast": 1, "saturation": 1, "tint": [1, 1, 1]},
            "vignette": {**off, "intensity": 0.5, "inner": 0.3, "outer": 0.75, "curvature": 1},
            "fringing": {**off, "intensity": 0.5},
        },
        "animTracks": [],
        "cameras": cameras,
        "annotations": [],
        "startMode": "default",
    }
    return {"experience": experience, "rotation": _quaternion(viewer_from_world), "extent": extent}


def upright(up: np.ndarray, camera: Camera | None) -> np.ndarray:
    """[3, 3] rotation from the scene's frame to one with y up.

    The viewer's camera never rolls, a photographer's hand does: up is taken within the camera's own vertical plane, so that
    the page opens on exactly what the photo shows.
    """
    up = up / np.linalg.norm(up)
    if camera is None:
        helper = np.eye(3)[np.abs(up).argmin()]
        right = np.cross(up, helper)
    else:
        right = camera.cam_from_world[0, :3]
        up = up - right * (up @ right)
        if np.linalg.norm(up) < 1e-3 or up @ -camera.cam_from_world[1, :3] < -0.2:
            up = -camera.cam_from_world[1, :3]  # the camera lies on its side, or hangs upside down
    up = up / np.linalg.norm(up)
    right = right / np.linalg.norm(right)
    return np.stack([right, up, np.cross(right, up)])


def up_of(cameras: list[Camera]) -> tuple[float, float, float]:
    """Up in the world, as the cameras of a capture suggest: their own up, or against their view if they all look down."""
    ups = -np.mean([camera.cam_from_world[1, :3] for camera in cameras], axis=0)
    if np.linalg.norm(ups) < 0.4:
        ups = -np.mean([camera.cam_from_world[2, :3] for camera in cameras], axis=0)
    x, y, z = (float(value) for value in ups / max(float(np.linalg.norm(ups)), 1e-9))
    return (x, y, z)


def _quaternion(rotation: np.ndarray) -> list[float]:
    """x, y, z, w."""
    from scipy.spatial.transform import Rotation

    return [float(value) for value in Rotation.from_matrix(rotation).as_quat()]


def opening_of(result: Path, title: str) -> PublishSettings:
    """Where the page of an OUT folder opens: at its first photo's camera, if its SfM is there."""
    if not (result / "sfm").is_dir():
        return PublishSettings(title)
    from spaceport_gs.scene import load_scene

    scene = load_scene(result / "sfm")
    first = scene.views[0].camera
    depths = scene.points @ first.cam_from_world[2, :3] + first.cam_from_world[2, 3]
    focus = float(np.median(depths[depths > 0])) if (depths > 0).any() else 1.0
    return PublishSettings(title, first, focus, up_of([view.camera for view in scene.views]))
