"""SOG version 2: Gaussians as lossless WebP images in a zip, which web viewers stream; and its reader.

The format is PlayCanvas' (meta.json, version 2). Rows are stored along a Morton curve; positions in 16 bits, scales and
colours through codebooks of 256 entries, higher SH coefficients through a palette of whole rows.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spaceport_gs import __version__, _engine
from spaceport_gs.errors import InputError
from spaceport_gs.files import replacing
from spaceport_gs.gaussians import Gaussians
from spaceport_gs.ply import n_bytes
from spaceport_gs.progress import Listener, Progress, ignore
from spaceport_gs.types import Array

CODEBOOK_SIZE = 256
MAX_SIDE = 16_383  # of a WebP image
MAX_PALETTE = 65_536  # labels have 16 bits
PALETTE_ROW = 64  # entries in one row of the centroids' image
QUATERNION_TAG = 252  # alpha of the quaternion image: this plus the index of the component left out
SCALE_BOUND = 40.0  # |ln scale| and logits beyond this are held here
MAX_META_BYTES = 1 << 24
COEFFICIENTS = {1: 3, 2: 8, 3: 15}  # of a colour channel beyond the constant one, by degree


@dataclass(frozen=True)
class CompressSettings:
    min_ratio: float = 8.0
    """Smaller than the PLY by at least this factor, as far as the SH palette can do it."""
    max_palette: int = MAX_PALETTE
    """Most rows of the SH palette."""
    iterations: int = 8
    """Of k-means for the SH palette."""
    seed: int = 0
    device: str = "cpu"
    """Where k-means runs: cpu or cuda."""


def compress(
    gaussians: Gaussians,
    path: Path,
    settings: CompressSettings = CompressSettings(),
    listen: Listener = ignore,
) -> dict[str, float | int]:
    """Writes a SOG bundle; returns sog_bytes, ply_bytes (the same rows as PLY), ratio and palette.

    The same Gaussians give the same bytes. InputError: there are no Gaussians, or they hold NaN.
    """
    rows = _checked(gaussians.numpy())
    n, degree = len(rows), rows.sh_degree
    n_steps = 5
    listen(Progress("compress", 0, n_steps, "ordering"))
    rows = _select(rows, morton_order(rows.means))
    files, meta = _encode_base(rows, listen)
    ply_bytes, palette = n_bytes(n, degree), 0
    base_bytes = sum(map(len, files.values()))
    if degree > 0:
        budget = ply_bytes / settings.min_ratio - base_bytes - 8192
        size = _palette_size(n, degree, budget, settings.max_palette)
        weights = _visual_weights(rows)
        while True:
            listen(Progress("compress", 3, n_steps, f"clustering SH into {size}"))
            sh_files, sh_meta = _encode_sh(rows, size, weights, settings)
            if sum(map(len, sh_files.values())) <= budget or size <= PALETTE_ROW:
                break
            size = max(PALETTE_ROW, int(size * 0.8) // PALETTE_ROW * PALETTE_ROW)
        files.update(sh_files)
        meta["shN"], palette = sh_meta, sh_meta["count"]
    listen(Progress("compress", 4, n_steps, "writing"))
    _write_bundle(path, meta, files)
    sog_bytes = path.stat().st_size
    listen(Progress("compress", n_steps, n_steps, "done"))
    return {
        "sog_bytes": sog_bytes,
        "ply_bytes": ply_bytes,
        "ratio": ply_bytes / sog_bytes,
        "palette": palette,
    }


def _checked(rows: Gaussians) -> Gaussians:
    if len(rows) == 0:
        raise InputError("the scene has no Gaussians: there is nothing to compress")
    for name, array in zip(("means", "log_scales", "quaternions", "opacities", "sh"), rows.arrays(), strict=True):
        if np.isnan(array).any():
            raise InputError(f"the scene holds NaN in {name}: export it again")
    if not (np.isfinite(rows.means).all() and np.isfinite(rows.sh).all()):
        raise InputError("the scene holds infinite positions or colours: export it again")
    return rows


def _select(rows: Gaussians, index: np.ndarray) -> Gaussians:
    return Gaussians(*(np.ascontiguousarray(array[index]) for array in rows.arrays()))


def to_log(positions: np.ndarray) -> np.ndarray:
    """sign(v) ln(1 + |v|): evens out near and far."""
    return np.sign(positions) * np.log1p(np.abs(positions.astype(np.float64)))


def from_log(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.expm1(np.abs(values))


def morton_order(means: np.ndarray) -> np.ndarray:
    """Row order along a Morton curve of 21 bits an axis through the log positions."""
    values = to_log(means)
    low, high = values.min(axis=0), values.max(axis=0)
    span = np.where(high > low, high - low, 1.0)
    cells = ((values - low) / span * ((1 << 21) - 1)).astype(np.uint64)
    code = np.zeros(len(means), np.uint64)
    for axis in range(3):
        code |= _spread(cells[:, axis]) << np.uint64(axis)
    return np.argsort(code, kind="stable")


def _spread(x: np.ndarray) -> np.ndarray:
    """Two zero bits between the 21 bits of each number."""
    for shift, mask in (
        (32, 0x1F00000000FFFF), (16, 0x1F0000FF0000FF), (8, 0x100F00F00F00F00F),
        (4, 0x10C30C30C30C30C3), (2, 0x1249249249249249),
    ):  # fmt: skip
        x = (x | (x << np.uint64(shift))) & np.uint64(mask)
    return x


def _encode_base(rows: Gaussians, listen: Listener) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Everything but the higher SH coefficients."""
    n = len(rows)
    width = math.ceil(math.sqrt(n) / 4) * 4
    height = math.ceil(n / width / 4) * 4
    if max(width, height) > MAX_SIDE:
        raise InputError(f"{n:,} Gaussians are more than one SOG file holds ({MAX_SIDE**2:,}): split the scene")

    def image(pixels: np.ndarray) -> np.ndarray:
        out = np.zeros((height * width, pixels.shape[1]), np.uint8)
        out[:n] = pixels
        return out.reshape(height, width, -1)

    listen(Progress("compress", 1, 5, "codebooks"))
    log_means = to_log(rows.means)
    low, high = log_means.min(axis=0), log_means.max(axis=0)
    span = np.where(high > low, high - low, 1.0)
    steps = np.rint((log_means - low) / span * 65535).astype(np.uint16)
    log_scales = np.clip(rows.log_scales, -SCALE_BOUND, SCALE_BOUND)
    scale_codebook = optimal_codebook(log_scales)
    color_codebook = optimal_codebook(rows.sh[:, 0])
    opacity = 1 / (1 + np.exp(-np.clip(rows.opacities.astype(np.float64), -SCALE_BOUND, SCALE_BOUND)))
    colors = np.column_stack([nearest(color_codebook, rows.sh[:, 0]), np.rint(255 * opacity).astype(np.uint8)])
    listen(Progress("compress", 2, 5, "images"))
    files = _encode_images({
        "means_l.webp": image((steps & 255).astype(np.uint8)),
        "means_u.webp": image((steps >> 8).astype(np.uint8)),
        "scales.webp": image(nearest(scale_codebook, log_scales)),
        "quats.webp": image(_pack_quaternions(rows.quaternions)),
        "sh0.webp": image(colors),
    })  # fmt: skip
    meta: dict[str, Any] = {
        "version": 2,
        "count": n,
        "asset": {"generator": f"spaceport-gs {__version__}"},
        "means": {
            "mins": low.tolist(),
            "maxs": high.tolist(),
            "files": ["means_l.webp", "means_u.webp"],
        },
        "scales": {"codebook": scale_codebook.tolist(), "files": ["scales.webp"]},
        "quats": {"files": ["quats.webp"]},
        "sh0": {"codebook": color_codebook.tolist(), "files": ["sh0.webp"]},
    }
    return files, meta


def _encode_images(images: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    with ThreadPoolExecutor() as pool:
        return dict(zip(images, pool.map(_to_webp, images.values()), strict=True))


def _to_webp(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    # exact: colours under zero alpha are data here.
    Image.fromarray(pixels).save(out, "WEBP", lossless=True, exact=True, method=4, quality=100)
    return out.getvalue()


def _pack_quaternions(quaternions: np.ndarray) -> np.ndarray:
    """[N, 4] bytes: the three smaller components, and which one was left out."""
    norms = np.linalg.norm(quaternions.astype(np.float64), axis=1, keepdims=True)
    unit = np.where(norms > 1e-12, quaternions / np.maximum(norms, 1e-12), [1.0, 0.0, 0.0, 0.0])
    largest = np.abs(unit).argmax(axis=1)
    unit = unit * np.where(np.take_along_axis(unit, largest[:, None], 1) < 0, -1.0, 1.0)
    others = np.array([[j for j in range(4) if j != i] for i in range(4)])[largest]
    small = np.take_along_axis(unit, others, 1)
    packed = np.empty((len(unit), 4), np.uint8)
    packed[:, :3] = np.clip(np.rint(255 * (small * math.sqrt(0.5) + 0.5)), 0, 255)
    packed[:, 3] = QUATERNION_TAG + largest
    return packed


def optimal_codebook(values: np.ndarray, n_bins: int = 1024) -> np.ndarray:
    """[256] float32, ascending: the codebook of least squared error for a histogram of the values.

    Dynamic programming over the bins: best(k, j) = min over i of best(k - 1, i) + error of one entry for bins i … j - 1.
    """
    flat = np.sort(values.ravel().astype(np.float64))
    distinct = flat[np.concatenate([[True], np.diff(flat) > 0])]
    if len(distinct) <= CODEBOOK_SIZE:
        return np.pad(distinct, (0, CODEBOOK_SIZE - len(distinct)), mode="edge").astype(np.float32)
    even = np.linspace(flat[0], flat[-1], n_bins // 2)
    frequent = np.quantile(flat, np.linspace(0, 1, n_bins // 2))
    edges = np.unique(np.concatenate([even, frequent]))
    splits = np.concatenate([[0], np.searchsorted(flat, edges[1:-1], side="left"), [len(flat)]])
    splits = np.unique(splits)
    centered = flat - flat.mean()
    sums = np.concatenate([[0.0], np.cumsum(centered)])[splits]
    squares = np.concatenate([[0.0], np.cumsum(centered**2)])[splits]
    counts = splits.astype(np.float64)
    n = len(splits) - 1
    if n <= CODEBOOK_SIZE:
        means = np.array([flat[a:b].mean() for a, b in pairwise(splits)])
        return np.pad(means, (0, CODEBOOK_SIZE - n), mode="edge").astype(np.float32)
    # error[i, j]: squared error of bins i … j - 1 under their mean; impossible pairs cost infinity
    n_in = counts[None, :] - counts[:, None]
    total = sums[None, :] - sums[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        error = squares[None, :] - squares[:, None] - total**2 / n_in
    error = np.where(n_in > 0, np.maximum(error, 0.0), np.inf)
    best = error[0].copy()
    choices = np.zeros((CODEBOOK_SIZE, n + 1), np.int32)
    for k in range(1, CODEBOOK_SIZE):
        cost = best[:, None] + error
        choices[k] = cost.argmin(axis=0)
        best = np.take_along_axis(cost, choices[k][None], 0)[0]
    entries, j = [], n
    for k in range(CODEBOOK_SIZE - 1, -1, -1):
        i = int(choices[k][j]) if k else 0
        entries.append(flat[splits[i] : splits[j]].mean())
        j = i
    return np.sort(np.array(entries)).astype(np.float32)


def nearest(codebook: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Index of the nearest entry of an ascending codebook, uint8, of the same shape as the values."""
    middles = (codebook[1:].astype(np.float64) + codebook[:-1]) / 2
    return np.searchsorted(middles, values).astype(np.uint8)


def _visual_weights(rows: Gaussians) -> np.ndarray:
    """[N] how much of a picture a row covers: opacity times the area of its two largest axes."""
    scales = np.sort(np.clip(rows.log_scales, -SCALE_BOUND, SCALE_BOUND).astype(np.float64), axis=1)
    opacity = 1 / (1 + np.exp(-np.clip(rows.opacities.astype(np.float64), -SCALE_BOUND, SCALE_BOUND)))
    weights = opacity * np.exp(scales[:, 1] + scales[:, 2])
    weights = weights / max(weights.mean(), 1e-300)
    return np.clip(weights, 1e-3, 1e3).astype(np.float32)


def _palette_size(n: int, degree: int, budget: float, limit: int) -> int:
    """Rows of the palette that should fit the budget: labels take their entropy, entries about 0.8 bytes a number."""
    entry_bytes = 0.8 * 3 * COEFFICIENTS[degree]
    size = min(n, limit, MAX_PALETTE)
    while size > PALETTE_ROW and n * math.log2(size) / 8 + size * entry_bytes > budget:
        size = int(size * 0.95)
    return size if size == n else max(min(n, PALETTE_ROW), size // PALETTE_ROW * PALETTE_ROW)


def _encode_sh(
    rows: Gaussians, size: int, weights: np.ndarray, settings: CompressSettings
) -> tuple[dict[str, bytes], dict[str, Any]]:
    n, n_rest = len(rows), rows.sh.shape[1] - 1
    points = np.ascontiguousarray(rows.sh[:, 1:].reshape(n, 3 * n_rest))
    centroids, labels = make_palette(points, weights, size, settings)
    codebook = optimal_codebook(centroids)
    n_rows = math.ceil(len(centroids) / PALETTE_ROW)
    table = np.zeros((n_rows * PALETTE_ROW, n_rest, 3), np.uint8)
    table[: len(centroids)] = nearest(codebook, centroids).reshape(-1, n_rest, 3)
    width = math.ceil(math.sqrt(n) / 4) * 4
    height = math.ceil(n / width / 4) * 4
    pixels = np.zeros((width * height, 3), np.uint8)
    pixels[:n, 0], pixels[:n, 1] = labels & 255, labels >> 8
    files = _encode_images({
        "shN_centroids.webp": table.reshape(n_rows, PALETTE_ROW * n_rest, 3),
        "shN_labels.webp": pixels.reshape(height, width, 3),
    })  # fmt: skip
    meta = {
        "count": len(centroids),
        "bands": rows.sh_degree,
        "codebook": codebook.tolist(),
        "files": ["shN_centroids.webp", "shN_labels.webp"],
    }
    return files, meta


class _Clusters:
    """What k-means works on: NumPy arrays, or tensors on a GPU. Both find the same to the bit where the CPU has AVX2."""

    def __init__(self, device: str, points: np.ndarray, weights: np.ndarray, centroids: np.ndarray) -> None:
        self.place: Callable[[np.ndarray], Array] = np.asarray
        """Brings an array to the backend's memory."""
        self.host: Callable[[Array], np.ndarray] = np.asarray
        """Brings it back."""
        self._backend: _engine.Backend = _engine.Cpu()
        if device != "cpu":
            import torch

            from spaceport_gs import ops

            self.place, self.host = (lambda a: torch.from_numpy(a).to(device)), (lambda tensor: tensor.cpu().numpy())
            self._backend = ops.backend_of(torch.empty(0, device=device))
        self._points, self._weights = self.place(points), self.place(weights)
        self.centroids: Array = self.place(centroids)
        self.labels = self.place(np.empty(len(points), np.int32))
        self.distances = self.place(np.empty(len(points), np.float32))
        self._centroid_weights = self.place(np.empty(len(centroids), np.float32))
        n_bytes = max(
            _engine.cluster_assign_scratch(self._backend, self.centroids),
            _engine.cluster_update_scratch(self._backend, self._points, self.centroids),
        )
        self._scratch = self.place(np.empty(n_bytes, np.uint8))

    def assign(self) -> None:
        _engine.cluster_assign(self._backend, self._points, self.centroids, self._scratch, self.labels, self.distances)

    def update(self) -> np.ndarray:
        """[K], weights of the points of each."""
        _engine.cluster_update(
            self._backend, self._points, self.labels, self._weights, self.centroids, self._scratch,
            self._centroid_weights,
        )  # fmt: skip
        return self.host(self._centroid_weights)


def make_palette(
    points: np.ndarray, weights: np.ndarray, size: int, settings: CompressSettings
) -> tuple[np.ndarray, np.ndarray]:
    """(centroids [K, D], labels [N] int32) by weighted k-means; entries in the order of their first use."""
    n = len(points)
    if size >= n:
        return points, np.arange(n, dtype=np.int32)
    draw = np.random.default_rng(settings.seed)
    first = points[np.sort(draw.choice(n, size, replace=False))]
    clusters = _Clusters(settings.device, points, weights, first)
    for _ in range(settings.iterations):
        clusters.assign()
        empty = np.flatnonzero(clusters.update() == 0)
        if len(empty):  # they take over the points that fare worst
            worst = np.argsort(-clusters.host(clusters.distances) * weights, kind="stable")[: len(empty)]
            clusters.centroids[clusters.place(empty)] = clusters.place(points[worst])
    clusters.assign()
    centroids, labels = clusters.host(clusters.centroids), clusters.host(clusters.labels)
    used, first = np.unique(labels, return_index=True)
    order = used[np.argsort(first, kind="stable")]
    rank = np.zeros(size, np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return centroids[order], rank[labels]


def _write_bundle(path: Path, meta: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    entries = {"meta.json": json.dumps(meta, allow_nan=False).encode(), **files}
    with (
        replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as bundle,
    ):
        for name, data in entries.items():
            bundle.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)


def read_sog(path: Path) -> Gaussians:
    """Reads a SOG version 2 bundle, or a folder with its meta.json, as NumPy arrays.

    InputError: it is not one, it is truncated, or its parts do not fit together.
    """
    path = Path(path)
    try:
        if path.is_dir() or path.name == "meta.json":
            folder = path if path.is_dir() else path.parent
            return _decode(path, lambda name: (folder / Path(name).name).read_bytes())
        with zipfile.ZipFile(path) as bundle:
            size = path.stat().st_size

            def read(name: str) -> bytes:
                entry = bundle.getinfo(name)
                if entry.file_size > 64 * size:
                    raise ValueError(f"{name} promises {entry.file_size:,} bytes")
                return bundle.read(entry)

            return _decode(path, read)
    except InputError:
        raise
    except (
        zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, KeyError, ValueError, TypeError, IndexError, EOFError,
        NotImplementedError, SyntaxError, Image.DecompressionBombError, RuntimeError, RecursionError,
    ) as error:  # fmt: skip
        raise InputError(f"{path}: not a SOG file that can be read ({error})") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise InputError(f"{path}: not a SOG file that can be read ({error})") from error


def _decode(path: Path, read: Callable[[str], bytes]) -> Gaussians:
    text = read("meta.json")
    if len(text) > MAX_META_BYTES:
        raise ValueError("meta.json is too long")
    meta = json.loads(text)
    if not isinstance(meta, dict):
        raise ValueError("meta.json is not an object")
    if meta.get("version") != 2:
        raise InputError(f"{path}: SOG version {meta.get('version', 1)}; expected 2: convert it with splat-transform")
    n = meta["count"]
    if not isinstance(n, int) or not 0 < n <= MAX_SIDE**2:
        raise ValueError(f"count is {n!r}")

    def pixels(name: str, n_channels: int) -> np.ndarray:
        image = _image(read(name), name, n_channels)
        if image.shape[0] * image.shape[1] < n:
            raise ValueError(f"{name} has fewer pixels than the {n} Gaussians")
        return image.reshape(-1, n_channels)[:n]

    means = meta["means"]
    low, high = _numbers(means["mins"], 3), _numbers(means["maxs"], 3)
    lower, upper = (pixels(name, 3).astype(np.uint32) for name in means["files"])
    log_means = low + (lower + (upper << 8)) / 65535.0 * (high - low)
    scales = _numbers(meta["scales"]["codebook"], CODEBOOK_SIZE)[pixels(meta["scales"]["files"][0], 3)]
    colors = pixels(meta["sh0"]["files"][0], 4)
    opacity = np.clip(colors[:, 3] / 255.0, 1e-6, 1 - 1e-6)
    sh = np.zeros((n, 1, 3))
    sh[:, 0] = _numbers(meta["sh0"]["codebook"], CODEBOOK_SIZE)[colors[:, :3]]
    if "shN" in meta:
        sh = np.concatenate([sh, _decode_sh(meta["shN"], read, pixels)], axis=1)
    arrays = (
        from_log(log_means),
        scales,
        _unpack_quaternions(pixels(meta["quats"]["files"][0], 4)),
        np.log(opacity / (1 - opacity)),
        sh,
    )
    return Gaussians(*(np.ascontiguousarray(array, np.float32) for array in arrays))


def _decode_sh(
    meta: Mapping[str, Any], read: Callable[[str], bytes], pixels: Callable[[str, int], np.ndarray]
) -> np.ndarray:
    n_rest, count = COEFFICIENTS[meta["bands"]], meta["count"]
    centroids_name, labels_name = meta["files"]
    table = _image(read(centroids_name), centroids_name, 3)
    if table.shape[1] != PALETTE_ROW * n_rest or not 0 < count <= table.shape[0] * PALETTE_ROW:
        raise ValueError(f"{centroids_name} is {table.shape[1]}×{table.shape[0]} for {count} entries")
    entries = _numbers(meta["codebook"], CODEBOOK_SIZE)[table.reshape(-1, n_rest, 3)[:count]]
    labels = pixels(labels_name, 3).astype(np.int64)
    labels = labels[:, 0] + (labels[:, 1] << 8)
    known = labels < count
    return np.where(known[:, None, None], entries[np.where(known, labels, 0)], 0.0)


def _numbers(values: Any, n: int) -> np.ndarray:
    numbers = np.array(values, dtype=np.float64)
    if numbers.shape != (n,) or not np.isfinite(numbers).all():
        raise ValueError(f"expected {n} finite numbers")
    return numbers


def _image(data: bytes, name: str, n_channels: int) -> np.ndarray:
    """[H, W, n_channels] uint8."""
    with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
        if max(image.size) > MAX_SIDE:
            raise ValueError(f"{name} is {image.width}×{image.height}")
        return np.asarray(image.convert("RGBA"))[:, :, :n_channels]


def _unpack_quaternions(packed: np.ndarray) -> np.ndarray:
    """[N, 4] w, x, y, z."""
    small = (packed[:, :3] / 255.0 * 2 - 1) * math.sqrt(0.5)
    left_out = packed[:, 3].astype(np.int64) - QUATERNION_TAG
    quaternions = np.zeros((len(packed), 4))
    for component in range(4):
        is_here = left_out == component
        others = [j for j in range(4) if j != component]
        chosen = np.flatnonzero(is_here)
        quaternions[chosen[:, None], others] = small[chosen]
        quaternions[chosen, component] = np.sqrt(np.maximum(0.0, 1 - (small[chosen] ** 2).sum(axis=1)))
    quaternions[(left_out < 0) | (left_out > 3)] = [1.0, 0.0, 0.0, 0.0]
    return quaternions
