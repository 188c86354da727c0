"""A synthetic drone capture of a spaceport, ray-traced from analytic surfaces: the truth about cameras and depth is known.

Frame of the scene: x east, y north, z up, metres. Textures are functions of the place on a surface, so that every photo sees
the same world; their detail lies at a few pixels, where features are found and Gaussians can still follow.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from spaceport_gs.errors import InputError
from spaceport_gs.files import remove, replacing, write_text
from spaceport_gs.progress import Listener, Progress, ignore
from spaceport_gs.types import Camera

ORIGIN = (5.2370, -52.7600, 12.0)  # latitude, longitude in degrees, altitude in metres
METRES_PER_DEGREE = 111_320.0
ORBIT_RADIUS = 46.0
# Radius and altitude in metres, by turns. The third flies wide, and so sees what lies in the corners of the others' photos.
RINGS = ((ORBIT_RADIUS, 52.0), (ORBIT_RADIUS, 66.0), (66.0, 88.0), (ORBIT_RADIUS, 60.0))
FOCAL_SHARE = 1.2  # focal length in widths of the photo
SENSOR_WIDTH_MM = 13.2
GROUND = (3.2, 1.8)  # metres, wavelengths of what lies on it
SAMPLES = 2  # rays along each side of a pixel
SUN = np.array([0.45, -0.35, 0.82]) / np.linalg.norm([0.45, -0.35, 0.82])
N_POINTS = 6_000
LOG = "flight_log.csv"
MARK = ".synthetic"  # what makes a folder ours
JPEG_QUALITY = 95


@dataclass(frozen=True)
class SynthesizeSettings:
    n_photos: int = 30
    width: int = 480
    """Pixels."""
    height: int = 320
    seed: int = 0
    """Of the textures."""


def synthesize(
    out: Path, settings: SynthesizeSettings = SynthesizeSettings(), listen: Listener = ignore
) -> dict[str, Any]:
    """Writes photos, truth (a COLMAP project with exact cameras, and depth maps) and, last, flight_log.csv to `out`.

    Those of an earlier call are replaced.
    """
    if settings.n_photos < 3 or min(settings.width, settings.height) < 32:
        raise InputError("a capture needs at least 3 photos of 32×32 pixels")
    for name in ("photos", "truth", LOG):
        remove(out / name)
    write_text(out / MARK, "A synthetic capture.\n")
    world = World(settings.seed)
    cameras = orbit(settings)
    names = [f"DJI_{i + 1:04d}.JPG" for i in range(len(cameras))]
    log = []
    for i, (name, camera) in enumerate(zip(names, cameras, strict=True)):
        listen(Progress("synthesize", i, len(cameras), "rendering photos"))
        color, depth = render(world, camera)
        for folder in ("photos", "truth/images"):
            with replacing(out / folder / name) as temporary:
                image = Image.fromarray(color)
                image.save(temporary, "JPEG", quality=JPEG_QUALITY, subsampling=0, exif=_exif(camera, i))
        with (
            replacing(out / "truth" / "depth" / f"{Path(name).stem}.npy") as temporary,
            open(temporary, "wb") as file,
        ):
            np.save(file, depth)
        log.append(_log_line(name, camera, i))
    _write_model(out / "truth", world, cameras, names)
    _write_log(out / LOG, log)
    listen(Progress("synthesize", len(cameras), len(cameras), "done"))
    return {"photos": len(cameras), "width": settings.width, "height": settings.height}


def orbit(settings: SynthesizeSettings) -> list[Camera]:
    """Cameras on circles around the pad, looking at it; x right, y down, z forward."""
    focal = FOCAL_SHARE * settings.width
    cameras = []
    for i in range(settings.n_photos):
        angle = 2 * math.pi * i / settings.n_photos
        radius, altitude = RINGS[i % len(RINGS)]
        center = np.array([radius * math.cos(angle), radius * math.sin(angle), altitude])
        target = np.array([2.0 * math.sin(3 * angle), 2.0 * math.cos(2 * angle), 3.0])
        forward = (target - center) / np.linalg.norm(target - center)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        rotation = np.stack([right, np.cross(forward, right), forward])
        pose = np.concatenate([rotation, (-rotation @ center)[:, None]], axis=1)
        cameras.append(
            Camera(
                pose,
                focal,
                focal,
                settings.width / 2,
                settings.height / 2,
                settings.width,
                settings.height,
            )
        )
    return cameras


def pose_error(estimated: np.ndarray, true: np.ndarray) -> float:
    """Root mean square distance of camera centres [V, 3] after the best similarity (Umeyama, 1991), as a share of the
    orbit's radius."""
    mean_e, mean_t = estimated.mean(axis=0), true.mean(axis=0)
    e, t = estimated - mean_e, true - mean_t
    u, s, vt = np.linalg.svd(t.T @ e)
    flip = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    scale = np.trace(np.diag(s) @ flip) / (e**2).sum()
    rest = t - scale * e @ (u @ flip @ vt).T
    return float(np.sqrt((rest**2).sum(axis=1).mean()) / ORBIT_RADIUS)


class Noise:
    """Smooth noise in [0, 1]: random numbers on a lattice, blended; the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._table = np.random.default_rng(seed).random((256, 256))

    def __call__(self, x: np.ndarray, y: np.ndarray, wavelength: float) -> np.ndarray:
        x, y = x / wavelength, y / wavelength
        i, j = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        u, v = x - i, y - j
        u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
        t = self._table
        i0, i1, j0, j1 = i & 255, (i + 1) & 255, j & 255, (j + 1) & 255
        return (t[i0, j0] * (1 - u) + t[i1, j0] * u) * (1 - v) + (t[i0, j1] * (1 - u) + t[i1, j1] * u) * v

    def layered(self, x: np.ndarray, y: np.ndarray, wavelengths: tuple[float, ...]) -> np.ndarray:
        """Mean of several wavelengths, each from another part of the lattice; spread to use the range."""
        layers = [self(x + 37.3 * k, y - 91.7 * k, w) for k, w in enumerate(wavelengths)]
        return np.clip((np.mean(layers, axis=0) - 0.5) * 4.0 + 0.5, 0, 1)


@dataclass(frozen=True)
class Box:
    """Upright, turned about z."""

    center: tuple[float, float]
    half: tuple[float, float]
    height: float
    angle: float
    color: tuple[float, float, float]


@dataclass(frozen=True)
class Cone:
    """A frustum about the z axis; equal radii make it a cylinder."""

    bottom: float
    top: float
    radius_bottom: float
    radius_top: float
    center: tuple[float, float] = (0.0, 0.0)
    kind: str = "hull"


BOXES = (
    Box((-17, 12), (6, 4), 6.0, 0.3, (0.78, 0.72, 0.62)),
    Box((16, 15), (4.5, 5.5), 9.0, -0.2, (0.55, 0.62, 0.7)),
    Box((19, -12), (7, 3.5), 4.5, 0.8, (0.74, 0.5, 0.4)),
    Box((-15, -16), (4, 4), 11.0, 0.1, (0.66, 0.68, 0.6)),
    Box((-26, -3), (3, 6), 3.5, -0.5, (0.5, 0.56, 0.5)),
    Box((4, -24), (5, 3), 5.0, 0.15, (0.7, 0.66, 0.72)),
    Box((2, 26), (6.5, 3), 4.0, -0.1, (0.6, 0.5, 0.46)),
    Box((4.2, 0), (0.9, 0.9), 15.0, 0.0, (0.62, 0.24, 0.2)),  # the tower beside the rocket
    Box((2.6, 1.9), (0.12, 1.3), 3.2, 0.78, (0.32, 0.34, 0.4)),  # fins
    Box((-1.9, 1.9), (0.12, 1.3), 3.2, -0.78, (0.32, 0.34, 0.4)),
    Box((-1.9, -1.9), (0.12, 1.3), 3.2, 0.78, (0.32, 0.34, 0.4)),
    Box((1.9, -1.9), (0.12, 1.3), 3.2, -0.78, (0.32, 0.34, 0.4)),
)
CONES = (
    Cone(0.0, 0.8, 8.0, 7.2, kind="pad"),
    Cone(0.8, 13.0, 1.7, 1.7),
    Cone(13.0, 17.5, 1.7, 0.05, kind="nose"),
    Cone(0.0, 7.0, 3.0, 3.0, (-8.5, -24.0), "tank"),
    Cone(0.0, 5.0, 2.4, 2.4, (27.0, 3.0), "tank"),
)


@dataclass
class Hit:
    """What rays meet: distance along the ray, the normal, and colour before light."""

    distance: np.ndarray  # [R]
    normal: np.ndarray  # [R, 3]
    color: np.ndarray  # [R, 3]


class World:
    def __init__(self, seed: int) -> None:
        self._noise = Noise(seed)

    def trace(self, origin: np.ndarray, direction: np.ndarray) -> Hit:
        """The first surface along rays [R, 3]; the sky has infinite distance."""
        n = len(direction)
        hit = Hit(np.full(n, np.inf), np.zeros((n, 3)), self._sky(direction))
        self._ground(origin, direction, hit)
        for k, box in enumerate(BOXES):
            self._box(origin, direction, hit, box, k)
        for k, cone in enumerate(CONES):
            self._cone(origin, direction, hit, cone, k)
        return hit

    def shade(self, origin: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(colour [R, 3] in 0 … 1, distance [R]) of rays, lit by the sun, with shadows."""
        hit = self.trace(origin, direction)
        solid = np.isfinite(hit.distance)
        place = origin[solid] + hit.distance[solid, None] * direction[solid] + 1e-3 * hit.normal[solid]
        lit = self._is_lit(place)
        light = 0.45 + 0.62 * np.clip(hit.normal[solid] @ SUN, 0, 1) * lit
        color = hit.color.copy()
        color[solid] *= light[:, None]
        return np.clip(color, 0, 1), hit.distance

    def _is_lit(self, place: np.ndarray) -> np.ndarray:
        lit = np.ones(len(place), bool)
        direction = np.broadcast_to(SUN, place.shape)
        for body in (*BOXES, *CONES):
            rows = _may_meet(place, direction, _sphere_of(body))
            if isinstance(body, Box):
                distance = _box_entry(place[rows], direction[rows], body)[0]
            else:
                distance = _cone_entry(place[rows], direction[rows], body)[0]
            lit[rows[np.isfinite(distance)]] = False
        return lit

    def _sky(self, direction: np.ndarray) -> np.ndarray:
        height = np.clip(direction[:, 2] * 2 + 0.3, 0, 1)[:, None]
        return (1 - height) * np.array([0.8, 0.86, 0.92]) + height * np.array([0.38, 0.58, 0.86])

    def _ground(self, origin: np.ndarray, direction: np.ndarray, hit: Hit) -> None:
        with np.errstate(divide="ignore", invalid="ignore"):
            t = -origin[:, 2] / direction[:, 2]
        near = (t > 0) & (t < hit.distance) & (t < 400)
        x, y = (origin[near, i] + t[near] * direction[near, i] for i in (0, 1))
        noise = self._noise
        grass = noise.layered(x, y, GROUND)
        tone = noise(x - 500, y + 300, 9.0)
        color = np.stack(
            [0.03 + 0.82 * grass + 0.14 * tone, 0.09 + 0.87 * grass, 0.03 + 0.6 * grass - 0.02 * tone],
            axis=1,
        )
        gravel = noise.layered(x + 900, y, GROUND)[:, None]
        on_apron = np.maximum(np.abs(x), np.abs(y)) < 11.5
        concrete = 0.08 + 0.9 * gravel * np.array([1.0, 0.97, 0.9])
        color = np.where(on_apron[:, None], concrete, color)
        wave = 32 + 3 * np.sin(x / 17)
        on_road = (np.abs(y - wave + 64) < 2.6) | (np.abs(x + 33 - 2 * np.sin(y / 13)) < 2.6)
        asphalt = 0.05 + 0.6 * noise.layered(x, y + 700, GROUND)[:, None] * np.ones(3)
        color = np.where(on_road[:, None], asphalt, color)
        stripe = on_apron & ((np.abs(np.hypot(x, y) - 10) < 0.28) | ((np.abs(x - y) < 0.3) & (np.hypot(x, y) > 8.2)))
        color = np.where(stripe[:, None], np.array([0.92, 0.78, 0.2]) * (0.7 + 0.4 * gravel), color)
        hit.distance[near] = t[near]
        hit.normal[near] = [0.0, 0.0, 1.0]
        hit.color[near] = color

    def _box(self, origin: np.ndarray, direction: np.ndarray, hit: Hit, box: Box, k: int) -> None:
        rows = _may_meet(origin, direction, _sphere_of(box))
        t, normal, local = _box_entry(origin[rows], direction[rows], box)
        near = t < hit.distance[rows]
        if not near.any():
            return
        rows, p, n = rows[near], local[near], normal[near]
        is_roof = n[:, 2] > 0.5
        c, s = math.cos(box.angle), math.sin(box.angle)
        n_local_x = n[:, 0] * c + n[:, 1] * s
        along = np.where(np.abs(n_local_x) > 0.5, p[:, 1], p[:, 0])
        face = np.sign(n_local_x) * 20 + np.where(np.abs(n_local_x) > 0.5, 60, 140) + 311 * k
        noise = self._noise
        dirt = noise.layered(along + face, p[:, 2] + 13 * k, (3.0, 1.5))
        wall = np.array(box.color) * (0.35 + 0.95 * dirt)[:, None]
        u, v = along / 1.5 % 1, p[:, 2] / 1.7 % 1
        is_window = (
            (np.abs(u - 0.5) < 0.27) & (np.abs(v - 0.55) < 0.26) & (p[:, 2] < box.height - 0.4) & (min(box.half) > 1)
        )
        glass = np.array([0.16, 0.24, 0.34]) * (0.5 + 1.3 * noise(along * 3 + face, p[:, 2] * 3, 1.9))[:, None]
        roof = (0.1 + 0.88 * noise.layered(p[:, 0] + 71 * k, p[:, 1], (2.4, 1.4)))[:, None] * np.array(
            [0.95, 0.75, 0.66]
        )
        color = np.where(is_window[:, None], glass, wall)
        hit.color[rows] = np.where(is_roof[:, None], roof, color)
        hit.distance[rows] = t[near]
        hit.normal[rows] = n

    def _cone(self, origin: np.ndarray, direction: np.ndarray, hit: Hit, cone: Cone, k: int) -> None:
        rows = _may_meet(origin, direction, _sphere_of(cone))
        t, normal = _cone_entry(origin[rows], direction[rows], cone)
        near = t < hit.distance[rows]
        if not near.any():
            return
        rows, t, n = rows[near], t[near], normal[near]
        p = origin[rows] + t[:, None] * direction[rows] - np.array([*cone.center, 0.0])
        around = np.arctan2(p[:, 1], p[:, 0]) * max(cone.radius_bottom, cone.radius_top)
        noise = self._noise
        streaks = noise.layered(around + 57 * k, p[:, 2] * 0.8 + 5 * k, (2.0, 0.9))[:, None]
        if cone.kind == "pad":
            streaks = noise.layered(p[:, 0] + 9, p[:, 1], (2.0, 1.0))[:, None]
            color = 0.18 + 0.5 * streaks * np.array([1.0, 0.98, 0.94])
        elif cone.kind == "tank":
            color = (0.5 + 0.5 * streaks) * np.array([0.8, 0.85, 0.88])
        else:
            white = (0.55 + 0.45 * streaks) * np.array([0.95, 0.94, 0.92])
            checks = ((np.floor(p[:, 2] / 2.2) + np.floor(around / 1.335)) % 2 == 0) & (p[:, 2] < 5.4)
            band = (np.abs(p[:, 2] - 9.6) < 0.8) | (cone.kind == "nose")
            red = (0.5 + 0.5 * streaks) * np.array([0.8, 0.2, 0.13])
            color = np.where(checks[:, None], 0.08 + 0.22 * streaks, np.where(band[:, None], red, white))
        hit.color[rows] = color
        hit.distance[rows] = t
        hit.normal[rows] = n


def _may_meet(origin: np.ndarray, direction: np.ndarray, sphere: np.ndarray) -> np.ndarray:
    """Row numbers of the rays that pass through a sphere (x, y, z, radius): few, of many."""
    offset = sphere[:3] - origin
    along = np.einsum("ij,ij->i", offset, direction)
    apart = np.einsum("ij,ij->i", offset, offset) - along * along
    return np.flatnonzero((apart <= sphere[3] ** 2) & (along > -sphere[3]))


def _sphere_of(body: Box | Cone) -> np.ndarray:
    if isinstance(body, Box):
        radius = math.hypot(*body.half, body.height / 2)
        return np.array([*body.center, body.height / 2, radius])
    half = (body.top - body.bottom) / 2
    radius = math.hypot(half, max(body.radius_bottom, body.radius_top))
    return np.array([*body.center, body.bottom + half, radius])


def _box_entry(origin: np.ndarray, direction: np.ndarray, box: Box) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(distance [R], inf where missed; world normal [R, 3]; place in the box's frame [R, 3])."""
    c, s = math.cos(box.angle), math.sin(box.angle)
    turn = np.array([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]])  # box from world
    o = (origin - np.array([*box.center, 0.0])) @ turn.T
    d = direction @ turn.T
    low, high = np.array([-box.half[0], -box.half[1], 0.0]), np.array([*box.half, box.height])
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = (low - o) / d, (high - o) / d
    entry, leave = np.minimum(a, b), np.maximum(a, b)
    axis = entry.argmax(axis=1)
    t = entry.max(axis=1)
    t = np.where((t <= leave.min(axis=1)) & (t > 0), t, np.inf)
    normal = np.zeros_like(o)
    rows = np.arange(len(o))
    normal[rows, axis] = -np.sign(d[rows, axis])
    return t, normal @ turn, o + np.where(np.isfinite(t), t, 0)[:, None] * d


def _cone_entry(origin: np.ndarray, direction: np.ndarray, cone: Cone) -> tuple[np.ndarray, np.ndarray]:
    """(distance [R], inf where missed; normal [R, 3]) of a frustum with its top disc."""
    o = origin - np.array([*cone.center, cone.bottom])
    slope = (cone.radius_top - cone.radius_bottom) / (cone.top - cone.bottom)
    height = cone.top - cone.bottom
    radius = cone.radius_bottom + slope * o[:, 2]
    a = direction[:, 0] ** 2 + direction[:, 1] ** 2 - (slope * direction[:, 2]) ** 2
    b = o[:, 0] * direction[:, 0] + o[:, 1] * direction[:, 1] - slope * radius * direction[:, 2]
    c = o[:, 0] ** 2 + o[:, 1] ** 2 - radius**2
    with np.errstate(divide="ignore", invalid="ignore"):
        side = (-b - np.sqrt(b * b - a * c)) / a
        z = o[:, 2] + side * direction[:, 2]
        side = np.where((side > 0) & (z >= 0) & (z <= height), side, np.inf)
        lid = (height - o[:, 2]) / direction[:, 2]
        at = o[:, :2] + lid[:, None] * direction[:, :2]
        lid = np.where((lid > 0) & ((at**2).sum(axis=1) <= cone.radius_top**2), lid, np.inf)
    t = np.minimum(side, lid)
    place = o + np.where(np.isfinite(t), t, 0.0)[:, None] * direction
    normal = np.concatenate([place[:, :2], -slope * (cone.radius_bottom + slope * place[:, 2])[:, None]], axis=1)
    normal[lid < side] = [0.0, 0.0, 1.0]
    return t, normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)


def rays(camera: Camera, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(origins, unit directions) [R, 3] through image positions in pixels."""
    local = np.stack([(x - camera.cx) / camera.fx, (y - camera.cy) / camera.fy, np.ones_like(x)], axis=1)
    direction = local @ camera.cam_from_world[:, :3]
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return np.broadcast_to(camera.center, direction.shape), direction


def render(world: World, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """(photo [H, W, 3] uint8, depth [H, W] float32: z in the camera at pixel centres, inf in the sky)."""
    y, x = np.mgrid[0 : camera.height, 0 : camera.width] + 0.5
    total = np.zeros((camera.height * camera.width, 3))
    offsets = (np.arange(SAMPLES) + 0.5) / SAMPLES - 0.5
    for dy in offsets:
        for dx in offsets:
            color, _ = world.shade(*rays(camera, (x + dx).ravel(), (y + dy).ravel()))
            total += color
    origin, direction = rays(camera, x.ravel(), y.ravel())
    depth = world.trace(origin, direction).distance * (direction @ camera.cam_from_world[2, :3])
    photo = (total / SAMPLES**2 * 255 + 0.5).astype(np.uint8)
    return photo.reshape(camera.height, camera.width, 3), depth.reshape(camera.height, camera.width).astype(np.float32)


def geodetic(place: np.ndarray) -> tuple[float, float, float]:
    """Latitude, longitude (degrees) and altitude (metres) of a place in the scene's frame."""
    latitude = ORIGIN[0] + place[1] / METRES_PER_DEGREE
    longitude = ORIGIN[1] + place[0] / (METRES_PER_DEGREE * math.cos(math.radians(ORIGIN[0])))
    return float(latitude), float(longitude), float(ORIGIN[2] + place[2])


def _time(i: int) -> str:
    return f"2026:01:15 10:{i // 20:02d}:{i % 20 * 3:02d}"


def _exif(camera: Camera, i: int) -> Image.Exif:
    latitude, longitude, altitude = geodetic(camera.center)
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Model] = "Spaceport", "Synthetic drone"
    exif[ExifTags.Base.DateTime] = _time(i)
    details = exif.get_ifd(ExifTags.IFD.Exif)
    details[ExifTags.Base.DateTimeOriginal] = _time(i)
    details[ExifTags.Base.FocalLength] = _ratio(camera.fx / camera.width * SENSOR_WIDTH_MM)
    details[ExifTags.Base.FocalLengthIn35mmFilm] = round(camera.fx / max(camera.width, camera.height) * 36)
    gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    gps[ExifTags.GPS.GPSLatitudeRef] = "N" if latitude >= 0 else "S"
    gps[ExifTags.GPS.GPSLatitude] = _sexagesimal(abs(latitude))
    gps[ExifTags.GPS.GPSLongitudeRef] = "E" if longitude >= 0 else "W"
    gps[ExifTags.GPS.GPSLongitude] = _sexagesimal(abs(longitude))
    gps[ExifTags.GPS.GPSAltitudeRef] = b"\x00"
    gps[ExifTags.GPS.GPSAltitude] = _ratio(altitude)
    return exif


def _ratio(value: float) -> TiffImagePlugin.IFDRational:
    return TiffImagePlugin.IFDRational(round(value * 10_000), 10_000)


def _sexagesimal(degrees: float) -> tuple[Any, Any, Any]:
    minutes = degrees % 1 * 60
    return (
        TiffImagePlugin.IFDRational(int(degrees), 1),
        TiffImagePlugin.IFDRational(int(minutes), 1),
        TiffImagePlugin.IFDRational(round(minutes % 1 * 60 * 1_000_000), 1_000_000),
    )


def _log_line(name: str, camera: Camera, i: int) -> dict[str, Any]:
    latitude, longitude, altitude = geodetic(camera.center)
    forward = camera.cam_from_world[2, :3]
    return {
        "photo": name,
        "time": _time(i),
        "latitude": f"{latitude:.9f}",
        "longitude": f"{longitude:.9f}",
        "altitude_m": f"{altitude:.3f}",
        "heading_deg": f"{math.degrees(math.atan2(forward[0], forward[1])) % 360:.3f}",
        "pitch_deg": f"{math.degrees(math.asin(forward[2])):.3f}",
    }


def _write_log(path: Path, lines: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def _write_model(folder: Path, world: World, cameras: list[Camera], names: list[str]) -> None:
    """The exact cameras, and points on the surfaces with the photos that see them, as a COLMAP model."""
    from spaceport_gs.colmap import pycolmap

    model = pycolmap.Reconstruction()
    first = cameras[0]
    model.add_camera_with_trivial_rig(
        pycolmap.Camera(
            model="PINHOLE",
            width=first.width,
            height=first.height,
            params=[first.fx, first.fy, first.cx, first.cy],
            camera_id=1,
        )
    )
    points, colors, seen = _surface_points(world, cameras)
    for i, (camera, name) in enumerate(zip(cameras, names, strict=True)):
        pose = pycolmap.Rigid3d(pycolmap.Rotation3d(camera.cam_from_world[:, :3]), camera.cam_from_world[:, 3])
        image = pycolmap.Image(name=name, camera_id=1, image_id=i + 1)
        image.points2D = pycolmap.Point2DList([pycolmap.Point2D(xy) for xy in _project(camera, points[seen[i]])[:, :2]])
        model.add_image_with_trivial_frame(image, pose)
    place_in_image = np.cumsum(seen, axis=1) - 1
    for p in range(len(points)):
        track = pycolmap.Track()
        for view in np.flatnonzero(seen[:, p]):
            track.add_element(int(view) + 1, int(place_in_image[view, p]))
        model.add_point3D(points[p], track, colors[p])
    target = folder / "sparse" / "0"
    target.mkdir(parents=True, exist_ok=True)
    model.write_binary(str(target))


def _project(camera: Camera, points: np.ndarray) -> np.ndarray:
    """[P, 3]: x, y in pixels and depth."""
    local = points @ camera.cam_from_world[:, :3].T + camera.cam_from_world[:, 3]
    with np.errstate(divide="ignore", invalid="ignore"):
        x = camera.fx * local[:, 0] / local[:, 2] + camera.cx
        y = camera.fy * local[:, 1] / local[:, 2] + camera.cy
    return np.stack([x, y, local[:, 2]], axis=1)


def _surface_points(world: World, cameras: list[Camera]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(points [P, 3], colours [P, 3] uint8, seen [V, P]): places that rays of the cameras meet, seen by at least two."""
    draw = np.random.default_rng(1)
    each = -(-N_POINTS // len(cameras))
    points, colors = [], []
    for camera in cameras:
        origin, direction = rays(camera, draw.random(each) * camera.width, draw.random(each) * camera.height)
        color, distance = world.shade(origin, direction)
        near = distance < 4 * ORBIT_RADIUS
        points.append(origin[near] + distance[near, None] * direction[near])
        colors.append((color[near] * 255 + 0.5).astype(np.uint8))
    places, tints = np.concatenate(points), np.concatenate(colors)
    seen = np.zeros((len(cameras), len(places)), bool)
    for i, camera in enumerate(cameras):
        x, y, depth = _project(camera, places).T
        inside = (depth > 0) & (x > 0) & (x < camera.width) & (y > 0) & (y < camera.height)
        origin, direction = rays(camera, np.where(inside, x, 0.5), np.where(inside, y, 0.5))
        true = np.linalg.norm(places - camera.center, axis=1)
        seen[i] = inside & (np.abs(world.trace(origin, direction).distance - true) < 1e-3 * true)
    kept = seen.sum(axis=0) >= 2
    return places[kept], tints[kept], seen[:, kept]
