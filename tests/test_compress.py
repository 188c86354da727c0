"""SOG files: what goes in comes out within the format's quantisation, here and in PlayCanvas' own reader."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spaceport_gs.errors import InputError
from spaceport_gs.gaussians import Gaussians
from spaceport_gs.pipeline.compress import (
    CompressSettings,
    compress,
    morton_order,
    nearest,
    optimal_codebook,
    read_sog,
)
from spaceport_gs.ply import read_ply, write_ply

SPLAT_TRANSFORM = Path(__file__).parent / "node" / "node_modules" / ".bin" / "splat-transform"


def scene(n: int, sh_degree: int = 3, seed: int = 0) -> Gaussians:
    """Rows whose SH come in groups, as neighbours' do."""
    draw = np.random.default_rng(seed)
    k = (sh_degree + 1) ** 2
    groups = draw.normal(0, 0.1, (50, k, 3))
    arrays = (
        draw.normal(0, 3, (n, 3)),
        draw.normal(-4, 1, (n, 3)),
        draw.normal(0, 1, (n, 4)),
        draw.normal(0, 2, n),
        groups[draw.integers(0, 50, n)] + draw.normal(0, 0.02, (n, k, 3)),
    )
    return Gaussians(*(array.astype(np.float32) for array in arrays))


def assert_decodes(decoded: Gaussians, rows: Gaussians, sh_error: float) -> None:
    """`decoded` in the order of the file; `rows` as they were given."""
    truth = rows.select(morton_order(rows.means))
    np.testing.assert_allclose(decoded.means, truth.means, atol=2e-3)
    np.testing.assert_allclose(decoded.log_scales, truth.log_scales, atol=0.08)
    unit = truth.quaternions / np.linalg.norm(truth.quaternions, axis=1, keepdims=True)
    assert np.abs((unit * decoded.quaternions).sum(axis=1)).min() > 0.9999
    opacity = 1 / (1 + np.exp(-truth.opacities))
    np.testing.assert_allclose(1 / (1 + np.exp(-decoded.opacities)), opacity, atol=0.5 / 255 + 1e-6)
    np.testing.assert_allclose(decoded.sh[:, 0], truth.sh[:, 0], atol=0.03)
    assert np.sqrt(((decoded.sh[:, 1:] - truth.sh[:, 1:]) ** 2).mean()) <= sh_error if truth.sh.shape[1] > 1 else True


@pytest.mark.parametrize(("n", "degree"), [(1, 3), (5, 1), (999, 2), (2500, 3), (333, 0)])
def test_round_trip(tmp_path: Path, n: int, degree: int) -> None:
    rows = scene(n, degree)
    figures = compress(rows, tmp_path / "scene.sog", CompressSettings(min_ratio=1))
    decoded = read_sog(tmp_path / "scene.sog")
    assert len(decoded) == n and decoded.sh_degree == degree
    assert_decodes(decoded, rows, sh_error=0.01)
    assert figures["sog_bytes"] == (tmp_path / "scene.sog").stat().st_size


def test_ratio_is_reached_and_the_bytes_repeat(tmp_path: Path) -> None:
    rows = scene(20_000)
    figures = compress(rows, tmp_path / "a.sog")
    compress(rows, tmp_path / "b.sog")
    assert figures["ratio"] >= 8
    assert (tmp_path / "a.sog").read_bytes() == (tmp_path / "b.sog").read_bytes()
    assert_decodes(read_sog(tmp_path / "a.sog"), rows, sh_error=0.02)


def test_an_unbundled_folder_reads_alike(tmp_path: Path) -> None:
    compress(scene(100), tmp_path / "scene.sog")
    with zipfile.ZipFile(tmp_path / "scene.sog") as bundle:
        bundle.extractall(tmp_path / "folder")
    a, b = read_sog(tmp_path / "scene.sog"), read_sog(tmp_path / "folder")
    assert all(np.array_equal(x, y) for x, y in zip(a.arrays(), b.arrays(), strict=True))


@pytest.mark.skipif(
    shutil.which("node") is None or not SPLAT_TRANSFORM.exists(),
    reason="splat-transform is not installed: npm ci in tests/node",
)
def test_playcanvas_decodes_our_file(tmp_path: Path) -> None:
    """Each colour channel and coefficient has a size of its own, so that no exchange of them goes unseen."""
    rows = scene(600)
    sizes = np.linspace(0.02, 0.3, 45).reshape(15, 3).astype(np.float32)
    rows.sh[:, 1:] = sizes * np.where(np.arange(600)[:, None, None] % 7 < 3, 1, -1)
    compress(rows, tmp_path / "scene.sog", CompressSettings(min_ratio=1))
    command = [str(SPLAT_TRANSFORM), str(tmp_path / "scene.sog"), str(tmp_path / "scene.ply")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    theirs, ours = read_ply(tmp_path / "scene.ply"), read_sog(tmp_path / "scene.sog")
    order = [np.lexsort(np.round(g.means, 4).T) for g in (theirs, ours)]
    theirs, ours = theirs.select(order[0]), ours.select(order[1])
    np.testing.assert_allclose(theirs.means, ours.means, atol=1e-4)
    np.testing.assert_allclose(theirs.log_scales, ours.log_scales, atol=1e-4)
    np.testing.assert_allclose(theirs.sh, ours.sh, atol=1e-4)
    np.testing.assert_allclose(theirs.opacities, ours.opacities, atol=0.02)
    assert np.abs((theirs.quaternions * ours.quaternions).sum(axis=1)).min() > 0.9999


@settings(max_examples=25, deadline=None)
@given(
    st.one_of(
        st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=400),
        st.lists(st.floats(-(2**-10), 2**-10, width=32), min_size=300, max_size=400).map(
            lambda v: v + [0.0] * 900 + [1.0]
        ),
    )
)
def test_codebook_entries_are_near(values: list[float]) -> None:
    array = np.array(values, np.float32)
    codebook = optimal_codebook(array)
    assert codebook.shape == (256,) and bool((np.diff(codebook) >= 0).all())
    decoded = codebook[nearest(codebook, array)]
    assert np.abs(decoded - array).max() <= np.ptp(array) / 64 + 1e-5


def test_codebook_of_many_equal_values_and_an_outlier() -> None:
    draw = np.random.default_rng(0)
    values = np.concatenate([np.zeros(70_000), draw.normal(0, 1e-3, 30_000), [1.0]])
    codebook = optimal_codebook(values)
    assert np.isfinite(codebook).all() and np.abs(codebook[nearest(codebook, values)] - values).max() < 0.01


def test_codebook_beats_an_even_one() -> None:
    values = np.random.default_rng(0).laplace(0, 1, 50_000)
    codebook = optimal_codebook(values)
    even = np.linspace(values.min(), values.max(), 256)
    errors = [((c[nearest(c, values)] - values) ** 2).mean() for c in (codebook, even)]
    assert errors[0] < 0.25 * errors[1]


def broken(tmp_path: Path, **meta: object) -> Path:
    compress(scene(50), tmp_path / "scene.sog")
    with zipfile.ZipFile(tmp_path / "scene.sog") as bundle:
        files = {name: bundle.read(name) for name in bundle.namelist()}
    files["meta.json"] = json.dumps({**json.loads(files["meta.json"]), **meta}).encode()
    with zipfile.ZipFile(tmp_path / "broken.sog", "w") as bundle:
        for name, data in files.items():
            bundle.writestr(name, data)
    return tmp_path / "broken.sog"


@pytest.mark.parametrize(
    "meta",
    [
        {"version": 1},
        {"count": 10**15},
        {"count": -1},
        {"count": 5000},
        {"means": {}},
        {"scales": {"codebook": [0.0], "files": ["scales.webp"]}},
        {"quats": {"files": ["../../etc/passwd"]}},
        {
            "shN": {
                "count": 10**6,
                "bands": 3,
                "codebook": [0.0] * 256,
                "files": ["shN_centroids.webp", "shN_labels.webp"],
            }
        },
    ],
)
def test_broken_meta_is_refused(tmp_path: Path, meta: dict[str, object]) -> None:
    with pytest.raises(InputError, match="broken.sog"):
        read_sog(broken(tmp_path, **meta))


def test_meta_that_is_no_object_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "list.sog", "w") as bundle:
        bundle.writestr("meta.json", "[]")
    with pytest.raises(InputError, match="list.sog"):
        read_sog(tmp_path / "list.sog")


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    compress(scene(50), tmp_path / "scene.sog")
    data = (tmp_path / "scene.sog").read_bytes()
    for content in (b"", b"PK\x03\x04", data[: len(data) // 2], b"ply\n" * 100):
        (tmp_path / "bad.sog").write_bytes(content)
        with pytest.raises(InputError, match="bad.sog"):
            read_sog(tmp_path / "bad.sog")


def test_what_cannot_be_compressed_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no Gaussians"):
        compress(scene(0), tmp_path / "scene.sog")
    rows = scene(5)
    rows.means[2, 1] = np.nan
    with pytest.raises(InputError, match="NaN in means"):
        compress(rows, tmp_path / "scene.sog")


def test_ply_round_trip(tmp_path: Path) -> None:
    for degree in range(4):
        rows = scene(37, degree)
        write_ply(rows, tmp_path / "scene.ply")
        for a, b in zip(read_ply(tmp_path / "scene.ply").arrays(), rows.arrays(), strict=True):
            assert np.array_equal(a, b)


def test_ply_layout(tmp_path: Path) -> None:
    """f_rest is channel by channel, rotations start with w."""
    from plyfile import PlyData

    rows = scene(3)
    write_ply(rows, tmp_path / "scene.ply")
    vertex = PlyData.read(str(tmp_path / "scene.ply"))["vertex"]
    assert vertex["f_rest_0"][1] == rows.sh[1, 1, 0]
    assert vertex["f_rest_15"][1] == rows.sh[1, 1, 1]
    assert vertex["f_rest_44"][2] == rows.sh[2, 15, 2]
    assert vertex["rot_0"][0] == rows.quaternions[0, 0]
    assert vertex["opacity"][0] == rows.opacities[0]
    assert (vertex["nx"] == 0).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-10],
        lambda data: data[:100],
        lambda data: b"",
        lambda data: b"not a ply at all",
        lambda data: data.replace(b"element vertex 5", b"element vertex 9999999999999"),
        lambda data: data.replace(b"property float opacity", b"property float opaciti"),
        lambda data: data.replace(b"property float x", b"property list uchar int x"),
        lambda data: data[:-4] + b"\xff\xff\xff\x7f",
    ],
)
def test_broken_ply_is_refused(tmp_path: Path, change: object) -> None:
    write_ply(scene(5), tmp_path / "scene.ply")
    data = (tmp_path / "scene.ply").read_bytes()
    (tmp_path / "bad.ply").write_bytes(change(data))  # type: ignore[operator]
    with pytest.raises(InputError, match="bad.ply"):
        read_ply(tmp_path / "bad.ply")
