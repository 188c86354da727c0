"""What the user brings: a folder of photos, a .zip of one, or a finished COLMAP project; made ready for the stages.

Photos end up upright, 8-bit and sRGB under `work/photos`. A photo that is so already is linked, not re-encoded.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from spaceport_gs.errors import InputError
from spaceport_gs.files import replacing
from spaceport_gs.progress import Listener, Progress, ignore
from spaceport_gs.scene import MAX_PIXELS

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp"})
HEIC_SUFFIXES = frozenset({".heic", ".heif"})
MODEL_SUFFIXES = frozenset({".bin", ".txt", ".json"})
MIN_PHOTOS = 3
MAX_ZIP_BYTES = 1 << 40
MAX_ZIP_ENTRIES = 1_000_000


@dataclass(frozen=True)
class Photo:
    """One photo, ready for SfM."""

    name: str
    """Path below `work/photos`, with forward slashes; the image's name in COLMAP."""
    original: str
    """Path below the capture."""
    path: Path
    width: int
    height: int
    camera: str
    """Photos of equal `camera`, width and height share their intrinsics: make, model and focal length."""
    focal_px: float | None
    """Focal length by EXIF, pixels."""
    position: tuple[float, float, float] | None
    """Latitude and longitude in degrees, altitude in metres, by EXIF."""


@dataclass(frozen=True)
class Skipped:
    """A file that could not be used."""

    name: str
    reason: str


@dataclass(frozen=True)
class Capture:
    photos: tuple[Photo, ...]
    """Sorted by name."""
    skipped: tuple[Skipped, ...]
    reconstruction: Path | None
    """Folder of a COLMAP model that came with the photos, or of one made from transforms.json (which has no points)."""
    folder: Path
    """`work/photos`."""
    masks: Path | None = None
    """Folder of masks that came with a COLMAP project: see spaceport_gs.scene.mask_of."""


def open_capture(path: Path, work: Path, listen: Listener = ignore) -> Capture:
    """Reads `path`, checks every photo by decoding it, and makes it ready below `work`.

    InputError: nothing usable is there, or what is there must not be trusted.
    """
    # Here, on the main thread, and not when the first photo needs it: see spaceport_gs.colmap.
    import spaceport_gs.colmap  # noqa: F401

    path, work = Path(path), Path(work)
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder")
    if path.is_file():
        if path.suffix.lower() != ".zip":
            raise InputError(f"{path}: expected a folder of photos, a .zip of one, or a COLMAP project")
        path = unzipped(path, work / "unzipped")
    root = _single_folder(path)
    reconstruction, images = _find_project(root, work)
    names = _find_photos(images, work)
    if not names:
        raise InputError(f"{path}: no photos found (looked for {', '.join(sorted(PHOTO_SUFFIXES))})")
    photos, skipped = _prepare(images, names, work / "photos", reconstruction is None, listen)
    if len(photos) < MIN_PHOTOS:
        unreadable = f" ({len(skipped)} could not be read: {skipped[0].name})" if skipped else ""
        raise InputError(f"{path}: {len(photos)} usable photos{unreadable}; at least {MIN_PHOTOS} are needed")
    masks = images.parent / "masks" if images != root and (images.parent / "masks").is_dir() else None
    return Capture(tuple(photos), tuple(skipped), reconstruction, work / "photos", masks)


@contextmanager
def as_folder(path: Path) -> Iterator[Path]:
    """The path, or for a .zip a folder with what is wanted of it, which is gone afterwards. InputError: it cannot be read, or
    what was said of the folder, said of the .zip.
    """
    if not path.is_file() or path.suffix.lower() != ".zip":
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="spaceport-") as temporary:
        folder = _single_folder(unzipped(path, Path(temporary)))
        try:
            yield folder
        except InputError as error:
            raise InputError(str(error).replace(str(folder), str(path))) from error


def list_photos(path: Path) -> list[Path]:
    """The photos of a capture, without looking into them; a .zip itself stands for what it holds."""
    if path.is_file():
        return [path]
    root = _single_folder(path)
    images = root / "images" if _model_in(root) is not None and (root / "images").is_dir() else root
    return [images / name for name in _find_photos(images, images / "work")]


def list_files(path: Path) -> list[Path]:
    """The photos of a capture, and the model and masks that came with them."""
    files = list_photos(path)
    if path.is_dir():
        root = _single_folder(path)
        model = _model_in(root) or root
        files += sorted(p for p in model.iterdir() if p.suffix in MODEL_SUFFIXES and p.is_file())
        if model != root:
            files += sorted((root / "masks").rglob("*.png"))
    return files


def stamp_of(path: Path) -> dict[str, Any]:
    """What tells a capture from another one: names, sizes and times of its photos, and of a model that came with them."""
    files = list_files(path)
    digest = hashlib.sha256()
    for file in files:
        about = file.stat(follow_symlinks=False)
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        digest.update(f"{name}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
    return {"files": len(files), "sha256": digest.hexdigest()}


def unzipped(archive: Path, folder: Path) -> Path:
    """The photos and model files of a .zip; nothing outside `folder` is ever written."""
    done = folder / ".complete"
    stamp = f"{archive.resolve()} {archive.stat().st_size} {archive.stat().st_mtime_ns}"
    if done.exists() and done.read_text() == stamp:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with zipfile.ZipFile(archive) as zipped:
            entries = zipped.infolist()
            if len(entries) > MAX_ZIP_ENTRIES:
                raise InputError(f"{archive}: {len(entries)} entries; zip the photos alone")
            for entry in entries:
                _check_entry(archive, entry)
            budget = min(MAX_ZIP_BYTES, int(shutil.disk_usage(folder).free * 0.9))
            for entry in entries:
                if not entry.is_dir() and _is_wanted(entry.filename):
                    budget = _extract(archive, zipped, entry, folder, budget)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{archive}: not a readable zip file ({error}); zip the photos again") from error
    done.write_text(stamp)
    return folder


def _check_entry(archive: Path, entry: zipfile.ZipInfo) -> None:
    name = entry.filename.replace("\\", "/")
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or (parts and ":" in parts[0]) or "\0" in name:
        raise InputError(f"{archive}: entry {entry.filename!r} points outside the archive; zip the photos again")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise InputError(f"{archive}: entry {entry.filename!r} is a link; zip the photos themselves")


def _is_wanted(name: str) -> bool:
    path = PurePosixPath(name)
    suffixes = PHOTO_SUFFIXES | HEIC_SUFFIXES | MODEL_SUFFIXES
    return path.suffix.lower() in suffixes and not any(_is_hidden(part) for part in path.parts)


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


def _extract(archive: Path, zipped: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path, budget: int) -> int:
    """Writes one entry and returns what is left of the budget; counts true bytes, whatever the header promised."""
    target = folder / entry.filename.replace("\\", "/")
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipped.open(entry) as source, open(target, "wb") as out:
        while chunk := source.read(1 << 20):
            budget -= len(chunk)
            if budget < 0:
                raise InputError(f"{archive}: unpacks to more than the disk holds; free some space or split it")
            out.write(chunk)
    return budget


def _single_folder(path: Path) -> Path:
    """Steps into folders that hold nothing but one folder, as zips of a folder do."""
    while True:
        inside = [p for p in path.iterdir() if not _is_hidden(p.name)]
        if len(inside) != 1 or not inside[0].is_dir() or inside[0].is_symlink():
            return path
        path = inside[0]


def _find_project(root: Path, work: Path) -> tuple[Path | None, Path]:
    """(folder of the COLMAP model that is there, folder of the photos)."""
    images, model = root / "images", _model_in(root)
    if model is not None:
        if not images.is_dir():
            raise InputError(f"{root}: a COLMAP project without its folder images")
        return model, images
    if (root / "transforms.json").is_file():
        return model_from_transforms(root / "transforms.json", work / "given"), root
    return None, root


def _model_in(root: Path) -> Path | None:
    """Folder of the COLMAP model of a project."""
    for model in (root / "sparse" / "0", root / "sparse"):
        if any((model / f"cameras{suffix}").is_file() for suffix in (".bin", ".txt")):
            return model
    return None


def _find_photos(folder: Path, work: Path) -> list[str]:
    names = []
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        folders[:] = sorted(f for f in folders if not _is_hidden(f) and not _is_ours(here / f) and here / f != work)
        for file in files:
            suffix = Path(file).suffix.lower()
            if suffix in HEIC_SUFFIXES:
                _register_heic(here / file)
            if suffix in PHOTO_SUFFIXES | HEIC_SUFFIXES and not _is_hidden(file):
                names.append((here / file).relative_to(folder).as_posix())
    return sorted(names)


def _is_ours(folder: Path) -> bool:
    """A result of ours inside the capture is not read as photos."""
    return (folder / "events.jsonl").is_file() and (folder / "config.json").is_file()


def _register_heic(example: Path) -> None:
    try:
        import pillow_heif
    except ImportError:
        raise InputError(f"{example}: HEIC photos need the extra: pip install 'spaceport-gs[heic]'") from None
    pillow_heif.register_heif_opener()


def _prepare(
    folder: Path, names: list[str], out: Path, honour_rotation: bool, listen: Listener
) -> tuple[list[Photo], list[Skipped]]:
    targets = _targets(names)
    photos: list[Photo] = []
    skipped: list[Skipped] = []

    def prepare(name: str) -> Photo | Skipped:
        return _prepare_photo(folder, name, out / targets[name], honour_rotation)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, result in enumerate(pool.map(prepare, names)):
            if isinstance(result, Photo):
                photos.append(result)
            else:
                skipped.append(result)
            listen(Progress("sfm", i + 1, len(names), "checking photos"))
    return sorted(photos, key=lambda photo: photo.name), skipped


def _targets(names: Iterable[str]) -> dict[str, str]:
    """Where each photo goes if it has to be converted: its own name, as .png; told apart where two would meet."""
    taken = set(names)
    targets = {}
    for name in names:
        target = name
        if not name.lower().endswith(".png"):
            while target in taken:
                target += ".png"
            taken.add(target)
        targets[name] = target
    return targets


def _prepare_photo(folder: Path, name: str, converted: Path, honour_rotation: bool) -> Photo | Skipped:
    source = folder / name
    if source.is_symlink() and not source.resolve().is_relative_to(folder.resolve()):
        return Skipped(name, "a link to outside the capture")
    try:
        with open(source, "rb") as file:
            if not file.read(1):
                return Skipped(name, "empty file")
    except OSError as error:
        return Skipped(name, f"cannot be opened ({error.strerror})")
    out = converted.parents[len(PurePosixPath(name).parts) - 1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _opened(source) as image:
                about = _about(image)
                is_turned = about.is_turned and honour_rotation
                is_plain = image.mode == "RGB" and image.format in ("JPEG", "PNG") and not is_turned
                if is_plain and not _is_deep(image) and _is_srgb(image):
                    image.load()
                    size, target = image.size, out / name
                    linked(source, target)
                else:
                    upright = ImageOps.exif_transpose(image) if is_turned else image
                    plain = _to_srgb(upright)
                    size, target = plain.size, converted
                    with replacing(target) as temporary:
                        plain.save(temporary, "PNG", compress_level=1)
    except Image.DecompressionBombError:
        raise InputError(f"{source}: unpacks to more pixels than any camera makes; remove it") from None
    except UnidentifiedImageError:
        return Skipped(name, "not an image")
    except (OSError, ValueError, SyntaxError) as error:
        if isinstance(error, InputError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        return Skipped(name, f"damaged ({error})".replace(str(source), name))
    return Photo(
        target.relative_to(out).as_posix(),
        name,
        target,
        size[0],
        size[1],
        about.camera,
        None if about.focal_share is None else about.focal_share * max(size),
        about.position,
    )


@dataclass(frozen=True)
class _About:
    """What a photo's EXIF tells."""

    is_turned: bool = False
    camera: str = "|"
    focal_share: float | None = None
    """Focal length in longer sides of the photo."""
    position: tuple[float, float, float] | None = None


def _about(image: Image.Image) -> _About:
    """What the EXIF tells; nothing where it is damaged, in whatever way."""
    try:
        exif = image.getexif()
        camera, focal_share = _lens_of(exif, image.size)
        is_turned = exif.get(ExifTags.Base.Orientation, 1) in range(2, 9)
        return _About(is_turned, camera, focal_share, _position_of(exif))
    except Exception:
        return _About()


def _opened(source: Path) -> Image.Image:
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses what is larger than twice this
    try:
        return Image.open(source)
    except UnidentifiedImageError:
        if source.suffix.lower() not in (".tif", ".tiff"):
            raise
    # Pillow does not know TIFF with 16 bits in three channels; COLMAP's reader does.
    from spaceport_gs.colmap import pycolmap

    bitmap = pycolmap.Bitmap.read(str(source), as_rgb=True)
    if bitmap is None:
        raise UnidentifiedImageError(f"cannot identify image file {source.name!r}")
    return Image.fromarray(np.asarray(bitmap.to_array()))


def linked(source: Path, target: Path) -> None:
    """Lets `target` hold what `source` does: as a link if that can be, and a copy elsewhere."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and target.stat().st_size == source.stat().st_size:
        return
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        with replacing(target) as temporary:
            shutil.copyfile(source, temporary)


def _is_deep(image: Image.Image) -> bool:
    """Whether the file holds 16 bits a channel, of which Pillow gives the upper eight."""
    return any("16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def _is_srgb(image: Image.Image) -> bool:
    profile = image.info.get("icc_profile")
    if not profile:
        return True
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    except (ImageCms.PyCMSError, OSError):
        return True
    return "srgb" in name.lower()


def _to_srgb(image: Image.Image) -> Image.Image:
    """8-bit RGB in sRGB; what is transparent becomes black."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _from_deep_grey(image)
    if image.mode in ("P", "PA", "LA", "1") or (image.mode == "RGB" and "transparency" in image.info):
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image).convert("RGB")
    if profile and image.mode in ("RGB", "L", "CMYK"):
        try:
            return ImageCms.profileToProfile(
                image,
                ImageCms.ImageCmsProfile(io.BytesIO(profile)),
                ImageCms.createProfile("sRGB"),
                outputMode="RGB",
            ) or image.convert("RGB")
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile says nothing
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    top = 255.0 if values.max(initial=0.0) <= 255.0 else 65535.0
    grey = np.clip(values / top * 255.0 + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _number(value: object) -> float:
    """A finite number from EXIF, or 0."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, ZeroDivisionError):
        return 0.0
    return number if np.isfinite(number) else 0.0


def _lens_of(exif: Image.Exif, size: tuple[int, int]) -> tuple[str, float | None]:
    """(what identifies the camera and its focal length, focal length in longer sides of the photo)."""
    details = exif.get_ifd(ExifTags.IFD.Exif)
    longer = max(size)
    focal_mm = _number(details.get(ExifTags.Base.FocalLength))
    focal_35 = _number(details.get(ExifTags.Base.FocalLengthIn35mmFilm))
    per_unit = _number(details.get(ExifTags.Base.FocalPlaneXResolution))
    focal_share: float | None = None
    if focal_35 > 0:
        focal_share = focal_35 / 36.0
    elif focal_mm > 0 and per_unit > 0:
        millimetres = {2: 25.4, 3: 10.0, 4: 1.0}.get(
            int(_number(details.get(ExifTags.Base.FocalPlaneResolutionUnit))), 25.4
        )
        sensor_px = _number(details.get(ExifTags.Base.ExifImageWidth)) or longer
        focal_share = focal_mm * per_unit / millimetres / sensor_px
    if focal_share is not None and not 0.2 < focal_share < 20:
        focal_share = None
    make, model = (str(exif.get(tag, "")).strip("\0 ") for tag in (ExifTags.Base.Make, ExifTags.Base.Model))
    return f"{make}|{model}|{focal_mm:g}|{focal_35:g}", focal_share


def _position_of(exif: Image.Exif) -> tuple[float, float, float] | None:
    gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    try:
        latitude, longitude = (_degrees(gps[tag]) for tag in (ExifTags.GPS.GPSLatitude, ExifTags.GPS.GPSLongitude))
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    if gps.get(ExifTags.GPS.GPSLatitudeRef) == "S":
        latitude = -latitude
    if gps.get(ExifTags.GPS.GPSLongitudeRef) == "W":
        longitude = -longitude
    altitude = _number(gps.get(ExifTags.GPS.GPSAltitude))
    if gps.get(ExifTags.GPS.GPSAltitudeRef) in (1, b"\x01"):
        altitude = -altitude
    if not (abs(latitude) <= 90 and abs(longitude) <= 180) or (latitude == 0 and longitude == 0):
        return None
    return latitude, longitude, altitude


def _degrees(parts: tuple[object, object, object]) -> float:
    degrees, minutes, seconds = (_number(part) for part in parts)
    return degrees + minutes / 60 + seconds / 3600


def model_from_transforms(path: Path, out: Path) -> Path:
    """A COLMAP model without points from a transforms.json (poses camera-to-world, y up, z backward)."""
    from spaceport_gs.colmap import pycolmap

    try:
        transforms = json.loads(path.read_text(encoding="utf-8"))
        frames = sorted(transforms["frames"], key=lambda frame: str(frame["file_path"]))
        model = pycolmap.Reconstruction()
        cameras: dict[str, int] = {}
        for i, frame in enumerate(frames, start=1):
            name = _frame_name(path.parent, str(frame["file_path"]))
            world_from_gl = np.array(frame["transform_matrix"], dtype=np.float64)
            if world_from_gl.shape != (4, 4) or not np.isfinite(world_from_gl).all():
                raise ValueError(f"transform_matrix of {name} is not a finite 4×4 matrix")
            camera = _frame_camera({**transforms, **frame}, path.parent / name)
            key = str(camera.params_to_string()) + f"{camera.width}x{camera.height}"
            if key not in cameras:
                camera.camera_id = cameras[key] = len(cameras) + 1
                model.add_camera_with_trivial_rig(camera)
            world_from_cam = world_from_gl[:3] * np.array([1.0, -1.0, -1.0, 1.0])
            rotation = world_from_cam[:, :3].T
            pose = pycolmap.Rigid3d(pycolmap.Rotation3d(rotation), -rotation @ world_from_cam[:, 3])
            image = pycolmap.Image(name=name, camera_id=cameras[key], image_id=i)
            model.add_image_with_trivial_frame(image, pose)
    except (KeyError, TypeError, ValueError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a transforms.json of images and poses ({error})") from error
    out.mkdir(parents=True, exist_ok=True)
    model.write_binary(str(out))
    return out


def _frame_name(folder: Path, file_path: str) -> str:
    """The name of a frame's photo below `folder`; the file's suffix may be missing."""
    name = PurePosixPath(os.path.normpath(file_path))
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"{file_path} points outside its folder")
    if name.suffix:
        return str(name)
    for suffix in sorted(PHOTO_SUFFIXES):
        if (folder / f"{name}{suffix}").is_file():
            return f"{name}{suffix}"
    raise ValueError(f"no photo {file_path}")


def _frame_camera(values: dict[str, object], photo: Path) -> Any:
    from spaceport_gs.colmap import pycolmap

    with _opened(photo) as image:
        width, height = image.size
    scale_x = width / (_number(values.get("w")) or width)
    scale_y = height / (_number(values.get("h")) or height)
    fx = _number(values.get("fl_x")) * scale_x
    if not fx and _number(values.get("camera_angle_x")):
        fx = 0.5 * width / float(np.tan(0.5 * _number(values["camera_angle_x"])))
    if not fx > 0:
        raise ValueError("no fl_x and no camera_angle_x")
    fy = _number(values.get("fl_y")) * scale_y or fx
    cx = _number(values.get("cx")) * scale_x or width / 2
    cy = _number(values.get("cy")) * scale_y or height / 2
    distortion = [_number(values.get(name)) for name in ("k1", "k2", "p1", "p2")]
    return pycolmap.Camera(
        model="OPENCV",
        width=width,
        height=height,
        params=[fx, fy, cx, cy, *distortion],
        camera_id=1,
    )
