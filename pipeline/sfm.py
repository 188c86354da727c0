"""Structure from motion with COLMAP (through pycolmap, on the CPU): camera poses and points from photos.

The result is a COLMAP project whose cameras are pinholes: `out/images`, `out/sparse/0`. `out/sfm.json` is written last and
marks it finished. With several threads COLMAP's result differs a little from run to run; `deterministic` costs time and
gives the same files again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from spaceport_gs.errors import InputError
from spaceport_gs.files import replacing, write_json
from spaceport_gs.pipeline.capture import MIN_PHOTOS, Capture, Photo
from spaceport_gs.progress import Listener, Progress, ignore
from spaceport_gs.scene import check_mask, mask_of, read_mask

STAGE = "sfm"
EXHAUSTIVE_UP_TO = 80  # photos: every pair is matched
SEQUENTIAL_OVERLAP = 15
SPATIAL_NEIGHBOURS = 40
SIMILAR_PHOTOS = 40  # that a photo in no known order is matched with
MAX_WORDS, FEATURES_PER_WORD = 8192, 40  # of the vocabulary that finds them
DISK_RESERVE = 1 << 24  # bytes; with less than this free, a failure of COLMAP is one of the disk
TELL_SECONDS = 1.0  # between two looks at what COLMAP has done
BATCH = 8  # photos per call of the extraction: how often progress is told
ENOUGH_REGISTERED = 0.9  # a smaller share is tried again with looser limits
WELL_SEEN_LENS = 30  # photos of one camera from which its lens is modelled with four distortion terms


@dataclass(frozen=True)
class SfmSettings:
    deterministic: bool = False
    """One thread and fixed seeds: the same files again, at the price of time."""
    seed: int = 0
    """Of COLMAP's random numbers, if deterministic."""
    n_threads: int = 0
    """0 = every core."""
    max_features: int = 8192
    """SIFT features of a photo."""
    max_image_size: int = 3200
    """Longer photos are scaled down to this many pixels for finding features."""


@dataclass(frozen=True)
class SfmReport:
    photos: int
    registered: int
    left_out: tuple[str, ...]
    """Names of the photos without a pose."""
    points: int
    reprojection_error_px: float
    """Mean over all observations."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Files that could not be read, and why."""


def finished_report(out: Path) -> SfmReport | None:
    """The report of a finished stage in `out`, or None."""
    try:
        values = json.loads((out / "sfm.json").read_text(encoding="utf-8"))
        return SfmReport(**{**values, "left_out": tuple(values["left_out"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{out / 'sfm.json'}: not a report of SfM ({error}); remove {out}") from error


def reconstruct_cameras(
    capture: Capture, out: Path, settings: SfmSettings = SfmSettings(), listen: Listener = ignore
) -> SfmReport:
    """Poses, points and undistorted photos of a capture, written to `out`; a finished `out` is returned as it is.

    InputError: no reconstruction is possible; says which photos had no matches and what to do.
    """
    done = finished_report(out)
    if done is not None:
        return done
    from spaceport_gs.colmap import pycolmap

    if settings.deterministic:
        pycolmap.set_random_seed(settings.seed)
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    try:
        if capture.reconstruction is None:
            model = _reconstruct(capture, work, settings, listen)
        else:
            model = _given_model(capture, work, settings, listen)
        report = _report(capture, model)
        _undistort(capture, model, out, settings, listen)
    except RuntimeError as error:  # what COLMAP raises, a full disk among it
        raise InputError(_colmap_failure(error, out)) from error
    shutil.rmtree(work, ignore_errors=True)
    write_json(out / "sfm.json", asdict(report))
    return report


def _colmap_failure(error: RuntimeError, out: Path) -> str:
    if shutil.disk_usage(out).free < DISK_RESERVE:
        return f"{out}: the disk is full; free some space and go on with --resume"
    return f"{out}: COLMAP failed ({str(error).splitlines()[0]}); try --resume, or --overwrite with other photos"


def _report(capture: Capture, model: Any) -> SfmReport:
    registered = {image.name for image in model.images.values() if image.has_pose}
    return SfmReport(
        photos=len(capture.photos),
        registered=len(registered),
        left_out=tuple(p.original for p in capture.photos if p.name not in registered),
        points=model.num_points3D(),
        reprojection_error_px=float(model.compute_mean_reprojection_error()),
        skipped={s.name: s.reason for s in capture.skipped},
    )


def _reconstruct(capture: Capture, work: Path, settings: SfmSettings, listen: Listener) -> Any:
    database = work / "database.db"
    _extract(_lenses(capture.photos), capture, database, settings, listen)
    _match(capture, database, settings, listen)
    model = None
    for attempt, is_loose in enumerate((False, True)):
        found = _map(capture, database, work / f"models_{attempt}", settings, is_loose, listen)
        if found is not None and (model is None or found.num_reg_images() > model.num_reg_images()):
            model = found
        if model is not None and model.num_reg_images() >= ENOUGH_REGISTERED * len(capture.photos):
            break
    if model is None or model.num_reg_images() < MIN_PHOTOS:
        raise InputError(_failure(capture, database))
    return model


def _n_threads(settings: SfmSettings) -> int:
    return 1 if settings.deterministic else settings.n_threads or len(os.sched_getaffinity(0))


def _seed(settings: SfmSettings) -> int:
    return settings.seed if settings.deterministic else -1


@dataclass(frozen=True)
class _Lens:
    """Photos that share their intrinsics, and what is known of these in COLMAP's words."""

    photos: list[Photo]
    model: str
    params: str
    """Comma-separated; empty = nothing is known."""


def _extract(
    lenses: Sequence[_Lens], capture: Capture, database: Path, settings: SfmSettings, listen: Listener
) -> None:
    from spaceport_gs.colmap import pycolmap

    options = pycolmap.FeatureExtractionOptions()
    options.use_gpu = False
    options.num_threads = _n_threads(settings)
    options.max_image_size = settings.max_image_size
    options.sift.max_num_features = settings.max_features
    n_done = 0
    for lens in lenses:
        camera_id = -1
        for start in range(0, len(lens.photos), BATCH):
            batch = lens.photos[start : start + BATCH]
            reader = pycolmap.ImageReaderOptions()
            reader.camera_model, reader.camera_params = lens.model, lens.params
            reader.existing_camera_id = camera_id
            _call(
                pycolmap.extract_features,
                database_path=database,
                image_path=capture.folder,
                image_names=[photo.name for photo in batch],
                camera_mode=pycolmap.CameraMode.SINGLE,
                reader_options=reader,
                extraction_options=options,
            )
            if camera_id < 0:
                camera_id = _camera_of(database, batch[0].name)
            n_done += len(batch)
            listen(Progress(STAGE, n_done, len(capture.photos), "finding features"))


def _lenses(photos: Sequence[Photo]) -> list[_Lens]:
    """Photos of one camera, size and focal length share a lens, whose focal length EXIF may tell."""
    groups: dict[tuple[str, int, int], list[Photo]] = {}
    for photo in photos:
        groups.setdefault((photo.camera, photo.width, photo.height), []).append(photo)
    return [_lens_of(group) for group in groups.values()]


def _lens_of(photos: list[Photo]) -> _Lens:
    first, is_well_seen = photos[0], len(photos) >= WELL_SEEN_LENS
    model, n_distortions = ("OPENCV", 4) if is_well_seen else ("SIMPLE_RADIAL", 1)
    if first.focal_px is None:
        return _Lens(photos, model, "")
    focal = [first.focal_px] * (2 if is_well_seen else 1)
    values = [*focal, first.width / 2, first.height / 2, *([0.0] * n_distortions)]
    return _Lens(photos, model, ",".join(repr(float(value)) for value in values))


def _camera_of(database: Path, name: str) -> int:
    from spaceport_gs.colmap import pycolmap

    with pycolmap.Database.open(database) as opened:
        return int(opened.read_image_with_name(name).camera_id)


def _match(capture: Capture, database: Path, settings: SfmSettings, listen: Listener) -> None:
    from spaceport_gs.colmap import pycolmap

    matching = pycolmap.FeatureMatchingOptions()
    matching.use_gpu = False
    matching.num_threads = _n_threads(settings)
    verification = pycolmap.TwoViewGeometryOptions()
    verification.ransac.random_seed = _seed(settings)
    arguments: dict[str, Any] = {
        "database_path": database, "matching_options": matching, "verification_options": verification,
    }  # fmt: skip
    n = len(capture.photos)
    with_position = sum(photo.position is not None for photo in capture.photos)
    if n <= EXHAUSTIVE_UP_TO:
        run, n_pairs = pycolmap.match_exhaustive, n * (n - 1) // 2
    elif with_position == n:
        pairing = pycolmap.SpatialPairingOptions()
        pairing.max_num_neighbors = SPATIAL_NEIGHBOURS
        run, n_pairs = pycolmap.match_spatial, n * SPATIAL_NEIGHBOURS // 2
        arguments["pairing_options"] = pairing
    elif _are_frames(capture.photos):
        pairing = pycolmap.SequentialPairingOptions()
        pairing.overlap = SEQUENTIAL_OVERLAP
        run, n_pairs = pycolmap.match_sequential, n * SEQUENTIAL_OVERLAP
        arguments["pairing_options"] = pairing
    else:
        vocabulary = pycolmap.VocabTreePairingOptions()
        vocabulary.num_images = SIMILAR_PHOTOS
        vocabulary.num_threads = _n_threads(settings)
        vocabulary.vocab_tree_path = str(_vocabulary(database, settings, listen))
        run, n_pairs = pycolmap.match_vocabtree, n * SIMILAR_PHOTOS // 2
        arguments["pairing_options"] = vocabulary

    # Opened before the matching, for to open a database is to write to it: of two who do so at a time one is refused, and
    # COLMAP aborts if that is its own thread.
    with pycolmap.Database.open(database) as opened:

        def tell() -> None:
            n_done = min(int(opened.num_verified_image_pairs()), n_pairs)
            listen(Progress(STAGE, n_done, n_pairs, "matching pairs"))

        _call(run, tell, **arguments)
    listen(Progress(STAGE, n_pairs, n_pairs, "matching pairs"))


def _vocabulary(database: Path, settings: SfmSettings, listen: Listener) -> Path:
    """A file of visual words, learnt from the capture's own features: by them similar photos are found."""
    from spaceport_gs.colmap import pycolmap

    listen(Progress(STAGE, 0, 1, "learning visual words"))
    with pycolmap.Database.open(database) as opened:
        tables = [opened.read_descriptors(image.image_id) for image in opened.read_all_images()]
    descriptors = np.concatenate([np.asarray(table.data, dtype=np.float32) for table in tables])
    n_words = max(1, min(MAX_WORDS, len(descriptors) // FEATURES_PER_WORD))
    chosen = np.random.default_rng(settings.seed).permutation(len(descriptors))[: n_words * FEATURES_PER_WORD]
    options = pycolmap.VisualIndex.BuildOptions()
    options.num_visual_words = n_words
    options.num_iterations, options.num_rounds = 10, 1
    options.num_threads = _n_threads(settings)
    index = pycolmap.VisualIndex.create(descriptors.shape[1], descriptors.shape[1] // 2)
    index.build(options, pycolmap.FeatureDescriptorsFloat(tables[0].type, descriptors[chosen]))
    path = database.with_name("vocabulary.bin")
    index.write(path)
    return path


def _are_frames(photos: Sequence[Photo]) -> bool:
    """Whether names count up like the frames of a video: one prefix, and numbers with even gaps."""
    prefixes, numbers = set(), []
    for photo in photos:
        found = re.fullmatch(r"(.*?)(\d+)", str(PurePosixPath(photo.original).with_suffix("")), re.S)
        if found is None:
            return False
        prefixes.add(found[1])
        numbers.append(int(found[2]))
    gaps = np.diff(np.sort(numbers))
    return len(prefixes) == 1 and len(gaps) > 0 and gaps.min() > 0 and bool(gaps.max() <= 4 * np.median(gaps))


def _map(
    capture: Capture,
    database: Path,
    out: Path,
    settings: SfmSettings,
    is_loose: bool,
    listen: Listener,
) -> Any:
    """The largest model that incremental mapping finds, or None."""
    from spaceport_gs.colmap import pycolmap

    options = pycolmap.IncrementalPipelineOptions()
    options.num_threads = _n_threads(settings)
    options.random_seed = options.mapper.random_seed = options.triangulation.random_seed = _seed(settings)
    options.min_model_size = MIN_PHOTOS
    options.triangulation.ignore_two_view_tracks = len(capture.photos) >= EXHAUSTIVE_UP_TO
    if is_loose:
        options.mapper.init_min_tri_angle = 4.0
        options.mapper.init_min_num_inliers = 40
        options.mapper.abs_pose_min_num_inliers = 15
        options.mapper.abs_pose_min_inlier_ratio = 0.15
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    n, n_registered = len(capture.photos), 0

    def registered(count: int) -> None:
        nonlocal n_registered
        n_registered = min(n_registered + count, n)
        listen(Progress(STAGE, n_registered, n, "placing cameras"))

    models = _call(
        pycolmap.incremental_mapping,
        database_path=database,
        image_path=capture.folder,
        output_path=out,
        options=options,
        initial_image_pair_callback=lambda: registered(2),
        next_image_callback=lambda: registered(1),
    )
    return largest_model(models.values())


def largest_model(models: Any) -> Any:
    """The model with the most registered images, then the most points: COLMAP numbers stray ones first at times."""
    return max(models, key=lambda m: (m.num_reg_images(), m.num_points3D()), default=None)


def _failure(capture: Capture, database: Path) -> str:
    from spaceport_gs.colmap import pycolmap

    with pycolmap.Database.open(database) as opened:
        names = {image.image_id: image.name for image in opened.read_all_images()}
        pair_ids, geometries = opened.read_two_view_geometries()
        matched: set[str] = set()
        for pair_id, geometry in zip(pair_ids, geometries, strict=True):
            if len(geometry.inlier_matches) >= 15:
                matched.update(names[image_id] for image_id in pycolmap.pair_id_to_image_pair(pair_id))
    lonely = [photo.original for photo in capture.photos if photo.name not in matched]
    advice = "photograph with at least 60 % overlap between neighbours, sharp and from different places"
    if not lonely:
        return f"the photos match, but their cameras cannot be placed: {advice}"
    shown = ", ".join(lonely[:10]) + (f" and {len(lonely) - 10} more" if len(lonely) > 10 else "")
    return f"the photos do not overlap enough: no matches for {shown}; {advice}"


def _call(function: Callable[..., Any], tell: Callable[[], None] | None = None, **arguments: Any) -> Any:
    """Runs a COLMAP call in a thread, so that signals reach us, calling `tell` every TELL_SECONDS meanwhile."""
    from spaceport_gs.colmap import pycolmap

    token = pycolmap.CancellationToken()
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = function(cancellation_token=token, **arguments)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(TELL_SECONDS)
            if tell is not None and thread.is_alive():
                tell()
    except BaseException:
        token.cancel()
        thread.join(10.0)
        raise
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def _given_model(capture: Capture, work: Path, settings: SfmSettings, listen: Listener) -> Any:
    from spaceport_gs.colmap import pycolmap

    folder = capture.reconstruction
    try:
        model = pycolmap.Reconstruction(str(folder))
    except (RuntimeError, ValueError, IndexError, MemoryError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{folder}: not a COLMAP model that can be read ({first_line})") from error
    by_original = {photo.original: photo for photo in capture.photos}
    missing = [i.name for i in model.images.values() if i.has_pose and i.name not in by_original]
    if model.num_reg_images() - len(missing) < MIN_PHOTOS:
        example = f", such as {missing[0]}" if missing else ""
        raise InputError(
            f"{folder}: the photos of {len(missing)} of its {model.num_reg_images()} images are missing{example}"
        )
    for image in list(model.images.values()):
        if image.name not in by_original or not image.has_pose:
            if image.has_pose:
                model.deregister_frame(image.frame_id)
            continue
        photo, camera = by_original[image.name], model.cameras[image.camera_id]
        if (photo.width, photo.height) != (camera.width, camera.height):
            raise InputError(
                f"{folder}: {image.name} is {photo.width}×{photo.height} pixels, its camera {camera.width}×{camera.height};"
                " use the photos that the model was made from"
            )
        image.name = photo.name
    if model.num_points3D() == 0:
        model = _triangulate(capture, model, work, settings, listen)
    return model


def _triangulate(capture: Capture, model: Any, work: Path, settings: SfmSettings, listen: Listener) -> Any:
    """Points for given poses."""
    from spaceport_gs.colmap import pycolmap

    database, photos = work / "database.db", {photo.name: photo for photo in capture.photos}
    lenses = []
    for camera_id, camera in model.cameras.items():
        mine = [photos[i.name] for i in model.images.values() if i.camera_id == camera_id and i.has_pose]
        lenses.append(_Lens(mine, camera.model_name, camera.params_to_string()))
    _extract(lenses, capture, database, settings, listen)
    _match(capture, database, settings, listen)
    out = work / "triangulated"
    out.mkdir(exist_ok=True)
    listen(Progress(STAGE, 0, 1, "triangulating points"))
    return _call(
        pycolmap.triangulate_points,
        reconstruction=_numbered_as(database, model),
        database_path=database,
        image_path=capture.folder,
        output_path=out,
    )


def _numbered_as(database: Path, model: Any) -> Any:
    """The model's cameras and poses under the numbers that they have in the database."""
    from spaceport_gs.colmap import pycolmap

    by_name = {image.name: image for image in model.images.values() if image.has_pose}
    renumbered = pycolmap.Reconstruction()
    with pycolmap.Database.open(database) as opened:
        for camera in opened.read_all_cameras():
            renumbered.add_camera_with_trivial_rig(camera)
        for row in opened.read_all_images():
            image = pycolmap.Image(name=row.name, camera_id=row.camera_id, image_id=row.image_id)
            renumbered.add_image_with_trivial_frame(image, by_name[row.name].cam_from_world())
    return renumbered


def _undistort(capture: Capture, model: Any, out: Path, settings: SfmSettings, listen: Listener) -> None:
    """Writes the photos as pinholes see them, and the model that belongs to them."""
    from spaceport_gs.colmap import pycolmap

    photos = {photo.name: photo for photo in capture.photos}
    images = sorted((i for i in model.images.values() if i.has_pose), key=lambda image: image.name)
    lenses = {c: _copy(camera) for c, camera in model.cameras.items()}
    pinholes = {c: _pinhole(camera) for c, camera in lenses.items()}
    folder = out / "images"
    if capture.masks is not None:
        (out / "masks").mkdir(parents=True, exist_ok=True)

    def undistort(image: Any) -> str:
        photo, lens = photos[image.name], lenses[image.camera_id]
        name = undistort_photo(photo, lens)
        mask = None if capture.masks is None else mask_of(capture.masks, photo.original)
        if mask is not None:
            _undistort_mask(mask, lens, out / "masks" / f"{name}.png")
        return name

    def undistort_photo(photo: Photo, lens: Any) -> str:
        if lens.is_undistorted():
            name = photo.name
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                os.link(photo.path, target)
            except OSError:
                shutil.copyfile(photo.path, target)
            return name
        name = photo.name if photo.name.lower().endswith(".png") else f"{photo.name}.png"
        bitmap = pycolmap.Bitmap.read(str(photo.path), as_rgb=True)
        if bitmap is None:
            raise InputError(f"{photo.path}: COLMAP cannot read this photo; save it as JPEG or PNG")
        flat, _ = pycolmap.undistort_image(pycolmap.UndistortCameraOptions(), bitmap, lens)
        with replacing(folder / name) as temporary:
            from PIL import Image as PillowImage

            PillowImage.fromarray(np.asarray(flat.to_array())).save(temporary, "PNG", compress_level=1)
        return name

    with ThreadPoolExecutor(_n_threads(settings)) as pool:
        for i, (image, name) in enumerate(zip(images, pool.map(undistort, images), strict=True)):
            _move_points(image, lenses[image.camera_id], pinholes[image.camera_id])
            image.name = name
            listen(Progress(STAGE, i + 1, len(images), "undistorting photos"))
    for camera_id, pinhole in pinholes.items():
        camera = model.cameras[camera_id]
        camera.model, camera.width, camera.height = pinhole.model, pinhole.width, pinhole.height
        camera.params = pinhole.params
    partial, target = out / "sparse" / "0.partial", out / "sparse" / "0"
    for stale in (partial, target):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    model.write_binary(str(partial))
    _check_written(model, partial)
    partial.rename(target)


def _undistort_mask(mask: Path, lens: Any, target: Path) -> None:
    """As a pinhole sees it; what the lens did not see does not count."""
    from spaceport_gs.colmap import pycolmap

    check_mask(mask, lens.width, lens.height)
    values = read_mask(mask)
    if not lens.is_undistorted():
        bitmap = pycolmap.Bitmap.from_array(values)
        values = np.asarray(pycolmap.undistort_image(pycolmap.UndistortCameraOptions(), bitmap, lens)[0].to_array())
    with replacing(target) as temporary:
        from PIL import Image as PillowImage

        PillowImage.fromarray(values).save(temporary, "PNG", compress_level=1)


def _check_written(model: Any, folder: Path) -> None:
    """COLMAP does not notice when the disk is full."""
    from spaceport_gs.colmap import pycolmap

    def size(of: Any) -> tuple[int, int, int]:
        return of.num_reg_images(), of.num_points3D(), of.compute_num_observations()

    try:
        is_whole = size(pycolmap.Reconstruction(str(folder))) == size(model)
    except (RuntimeError, ValueError, IndexError, MemoryError):
        is_whole = False
    if not is_whole:
        shutil.rmtree(folder)
        raise InputError(
            f"{folder.parent}: the model could not be written whole; free some space and go on with --resume"
        )


def _copy(camera: Any) -> Any:
    from spaceport_gs.colmap import pycolmap

    return pycolmap.Camera(camera.todict())


def _pinhole(camera: Any) -> Any:
    from spaceport_gs.colmap import pycolmap

    if camera.is_undistorted():
        pinhole = _copy(camera)
        if camera.model_name != "PINHOLE":
            pinhole.model = pycolmap.CameraModelId.PINHOLE
            pinhole.params = [camera.focal_length_x, camera.focal_length_y,
                              camera.principal_point_x, camera.principal_point_y]  # fmt: skip
        return pinhole
    return pycolmap.undistort_camera(pycolmap.UndistortCameraOptions(), camera)


def _move_points(image: Any, lens: Any, pinhole: Any) -> None:
    """The image's 2D points, from the lens to the pinhole."""
    points = image.points2D
    if len(points) == 0:
        return
    rays = lens.cam_from_img(np.array([point.xy for point in points]))
    center = [pinhole.principal_point_x, pinhole.principal_point_y]
    moved = rays * [pinhole.focal_length_x, pinhole.focal_length_y] + center
    for point, xy in zip(points, moved, strict=True):
        point.xy = xy
