"""The engine's images and their gradients against the reference, also where it hurts."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scenes import GROWTH, assert_close, assert_same, camera, leaves, on, random_gaussians

import spaceport_gs
from spaceport_gs import _engine, ops, reference
from spaceport_gs.gaussians import Gaussians, Rows
from spaceport_gs.types import Camera, Depth, Image, RasterSettings

SETTINGS = RasterSettings(background=(0.2, 0.5, 0.7))


def weights_like(image: Image) -> Image:
    draw = torch.Generator().manual_seed(9)
    color, transmittance, depth = (
        torch.randn(shape, generator=draw).to(image.color.device)
        for shape in (image.color.shape, image.transmittance.shape, image.transmittance.shape)
    )
    return Image(color, transmittance, depth=None if image.depth is None else depth)


def weighted_sum(image: Image, weights: Image) -> torch.Tensor:
    total = (image.color * weights.color).sum() + (image.transmittance * weights.transmittance).sum()
    return total if weights.depth is None else total + (image.depth * weights.depth).sum()


def compare(device: str, gaussians: Gaussians, view: Camera, settings: RasterSettings = SETTINGS) -> None:
    """Image and all gradients of the engine equal those of the reference in double precision."""
    ours, truth = leaves(gaussians, torch.float32, device), leaves(gaussians, torch.float64)
    image = ops.rasterize(ours, view, settings)
    expected = reference.render(truth, view, settings)
    assert_close(image.color, expected.color, flips=0.002, size_of_flips=0.02)
    assert_close(image.transmittance, expected.transmittance, flips=0.002, size_of_flips=0.02)
    assert (image.depth is None) == (Depth.EXPECTED not in settings.depth)
    assert (image.median_depth is None) == (Depth.MEDIAN not in settings.depth)
    if image.depth is not None:
        assert_close(image.depth, expected.depth, flips=0.002, size_of_flips=0.02)
    if image.median_depth is not None:
        assert_close(image.median_depth, expected.median_depth, flips=0.003, size_of_flips=1.0)
    weights = weights_like(image)
    weighted_sum(image, weights).backward()
    weights = weights_like(replace(image, color=image.color.cpu()))
    if truth.means.requires_grad and expected.color.requires_grad:
        weighted_sum(expected, weights).backward()
    for value, correct in zip(ours.arrays(), truth.arrays(), strict=True):
        gradient = torch.zeros_like(correct) if correct.grad is None else correct.grad
        assert_close(value.grad, gradient.nan_to_num(), flips=0.02, size_of_flips=0.03)


@pytest.mark.parametrize(
    ("n", "size", "scale"),
    [
        (300, (64, 48), 0.08),
        (57, (17, 5), 0.2),
        (9, (1, 1), 0.5),
        (201, (70, 33), 0.6),
        (64, (257, 3), 0.1),
    ],
)
def test_random_scenes(device: str, n: int, size: tuple[int, int], scale: float) -> None:
    compare(device, random_gaussians(n, seed=n, scale=scale), camera(*size))


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_sh_degrees(device: str, degree: int) -> None:
    compare(device, random_gaussians(60, sh_degree=degree), camera(32, 24, 30))
    compare(device, random_gaussians(60), camera(32, 24, 30), replace(SETTINGS, sh_degree=degree))


@pytest.mark.parametrize("depth", [Depth.EXPECTED, Depth.MEDIAN, Depth.BOTH])
def test_depths(device: str, depth: Depth) -> None:
    settings = replace(SETTINGS, depth=depth)
    compare(device, random_gaussians(150, seed=150), camera(40, 30, 32), settings)
    compare(device, random_gaussians(57, seed=57, scale=0.2), camera(17, 5), settings)
    opaque = random_gaussians(60, seed=6, scale=0.6)
    opaque.opacities[:] = 4.0
    compare(device, opaque, camera(24, 18, 20), settings)


def test_depths_do_not_change_the_rest(device: str) -> None:
    gaussians, view = on(device, random_gaussians(200, scale=0.2)), camera()
    plain, deep = (ops.render(gaussians, view, replace(SETTINGS, depth=d)) for d in (Depth.NONE, Depth.BOTH))
    assert torch.equal(plain.color, deep.color)
    assert torch.equal(plain.transmittance, deep.transmittance)
    gradients = []
    for depth in (Depth.NONE, Depth.BOTH):
        ours = leaves(gaussians, torch.float32, device)
        ops.rasterize(ours, view, replace(SETTINGS, depth=depth)).color.sum().backward()
        gradients.append([array.grad for array in ours.arrays()])
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_gradient_by_the_pose(device: str, degree: int) -> None:
    """Of a pose that is not the camera's own, in several groups of eight and blocks of threads."""
    settings, view = replace(SETTINGS, depth=Depth.EXPECTED), camera(40, 30, 32)
    gaussians = random_gaussians(300, sh_degree=degree, scale=0.08)
    start = torch.tensor(view.cam_from_world)
    start[0, 3] += 0.3
    ours, truth = start.float().to(device).requires_grad_(), start.clone().requires_grad_()
    image = ops.rasterize(on(device, gaussians), view, settings, ours)
    weights = weights_like(image)
    weighted_sum(image, weights).backward()
    expected = reference.render(gaussians.map(lambda array: array.double()), view, settings, truth)
    assert_close(image.color, expected.color, flips=0.002, size_of_flips=0.02)
    weighted_sum(expected, weights_like(replace(image, color=image.color.cpu()))).backward()
    assert ours.grad.dtype == torch.float32
    assert_close(ours.grad, truth.grad, flips=1.0, size_of_flips=1e-3)


def test_the_pose_of_nothing_has_no_gradient(device: str) -> None:
    pose = torch.tensor(camera().cam_from_world, requires_grad=True)
    ops.rasterize(on(device, random_gaussians(0)), camera(), SETTINGS, pose).color.sum().backward()
    assert not pose.grad.any()
    with pytest.raises(ValueError, match="cam_from_world"):
        ops.rasterize(on(device, random_gaussians(1)), camera(), SETTINGS, torch.eye(4))


def test_what_one_list_does_not_hold_is_made_in_bands(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of Gaussians so far aside that their projection is held back, which depends on the whole image."""
    settings, view = replace(SETTINGS, depth=Depth.BOTH), replace(camera(70, 75, 40), cy=20.0)
    gaussians = random_gaussians(300, scale=0.3)
    gaussians.means[:, 1] *= 3
    images, gradients = [], []
    for most in (ops.MOST_INSTANCES, ops.project(on(device, gaussians), view, settings).n_instances // 3):
        monkeypatch.setattr(ops, "MOST_INSTANCES", most)
        ours = leaves(gaussians, torch.float32, device)
        pose = torch.tensor(view.cam_from_world, dtype=torch.float32, device=device, requires_grad=True)
        image = ops.rasterize(ours, view, settings, pose)
        weighted_sum(image, weights_like(image)).backward()
        images += [image, ops.render(on(device, gaussians), view, settings)]
        gradients.append([array.grad for array in (*ours.arrays(), pose)])
    for image in images[1:]:
        for name in ("color", "transmittance", "depth"):
            assert_close(getattr(image, name), getattr(images[0], name))
        assert_close(image.median_depth, images[0].median_depth, flips=0.003, size_of_flips=1.0)
    for of_bands, of_all in zip(*reversed(gradients), strict=True):
        assert_close(of_bands, of_all)
    monkeypatch.setattr(ops, "MOST_INSTANCES", 5)
    with pytest.raises(MemoryError, match="at most 5 are possible"):
        ops.render(on(device, gaussians), view, settings)


def test_a_band_is_the_same_in_the_reference() -> None:
    gaussians, view = random_gaussians(300, scale=0.3).map(lambda array: array.double()), camera(40, 40, 20)
    gaussians.means[:, 1] *= 3
    whole = reference.render(gaussians, view, SETTINGS).color
    bands = [reference.render(gaussians, view.band(*rows), SETTINGS).color for rows in ((0, 16), (16, 40))]
    torch.testing.assert_close(torch.cat(bands), whole)


@pytest.mark.parametrize("depth", [Depth.NONE, Depth.BOTH])
def test_deterministic_gradients(device: str, depth: Depth) -> None:
    settings = replace(SETTINGS, deterministic=True, depth=depth)
    compare(device, random_gaussians(100, seed=100, scale=0.3), camera(50, 33), settings)
    compare(device, random_gaussians(1, scale=0.5), camera(300, 200, 150), settings)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("depth", [Depth.NONE, Depth.EXPECTED])
def test_absolute_gradients(device: str, depth: Depth, deterministic: bool) -> None:
    """Each pixel's own gradient by a splat's mean; the other columns are as without them."""
    gaussians, view = random_gaussians(80, seed=80, scale=0.15), camera(40, 30, 32)
    settings = replace(SETTINGS, depth=depth, deterministic=deterministic)
    projected = ops.project(on(device, gaussians), view, settings)
    tiles = ops.tile(projected, view)
    image = ops.blend(projected, tiles, view, settings)
    d_image = weights_like(image)
    asks = replace(settings, absolute_gradients=True)
    plain, more = (ops.blend_vjp(projected, tiles, view, s, image, d_image) for s in (settings, asks))
    assert_same(more[:, :-2].contiguous(), plain)
    d_gaussians = [ops.project_vjp(on(device, gaussians), view, settings, projected, d) for d in (plain, more)]
    for a, b in zip(*(d.arrays() for d in d_gaussians), strict=True):
        assert_same(a, b)

    splats = reference.project(gaussians.map(lambda array: array.double()), view, settings)
    means = splats.means[:, :, None, None].repeat(1, 1, view.height, view.width).requires_grad_()
    expected = reference.blend(replace(splats, means=means), view, settings)
    weighted_sum(expected, weights_like(replace(image, color=image.color.cpu()))).backward()
    row_of = {int(row): splat for splat, row in enumerate(splats.gaussian_from_splat)}
    rows = [row_of[int(row)] for row in projected.gaussian_from_splat]
    truth = means.grad[rows]
    assert_close(more[:, -2:], truth.abs().sum(dim=(2, 3)), flips=0.02, size_of_flips=0.03)
    assert_close(more[:, :2], truth.sum(dim=(2, 3)), flips=0.02, size_of_flips=0.03)


def with_row(gaussians: Gaussians, row: int, **values: object) -> Gaussians:
    """The Gaussians with one row changed."""
    changed = gaussians.map(lambda array: array.clone())
    for name, value in values.items():
        getattr(changed, name)[row] = torch.as_tensor(value, dtype=torch.float32)
    return changed


NEEDLE = {"log_scales": [-9.0, 0.5, -9.0]}
DEGENERATE = {
    "behind the camera": {"means": [0.0, 0.0, -3.0]},
    "nearer than the near plane": {"means": [0.0, 0.0, -0.1]},
    "no opacity": {"opacities": -40.0},
    "full opacity": {"opacities": 30.0, "log_scales": [-1.0, -1.0, -1.0]},
    "huge": {"log_scales": [3.0, 3.5, 3.0]},
    "needle": NEEDLE,
    "a point": {"log_scales": [-20.0, -20.0, -20.0]},
    "zero quaternion": {"quaternions": [0.0, 0.0, 0.0, 0.0]},
    "far outside the image": {"means": [14.0, -9.0, 3.0], "log_scales": [1.4, 1.0, 1.2]},
    "beside the camera": {"means": [2.0, 0.3, 0.5], "log_scales": [0.0, 0.0, 0.0]},
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_rows(device: str, case: str) -> None:
    compare(device, with_row(random_gaussians(20, seed=3), 7, **DEGENERATE[case]), camera(40, 30, 32))


BREAKABLE = ("means", "log_scales", "quaternions", "opacities", "sh")
INFINITE = ("means", "log_scales", "quaternions", "sh")  # an infinite logit is an opacity of one


@pytest.mark.parametrize(("name", "value"), [*((n, math.nan) for n in BREAKABLE), *((n, math.inf) for n in INFINITE)])
def test_a_broken_row_leaves_the_others_alone(device: str, name: str, value: float) -> None:
    gaussians = random_gaussians(20, seed=4)
    rows = [i for i in range(20) if i != 7]
    broken = gaussians.map(lambda array: array.clone())
    getattr(broken, name).view(20, -1)[7, 0] = value
    view = camera(40, 30, 32)
    ours = leaves(broken, torch.float32, device)
    image = ops.rasterize(ours, view, SETTINGS)
    without = leaves(gaussians.select(torch.tensor(rows)), torch.float32, device)
    expected = ops.rasterize(without, view, SETTINGS)
    assert torch.equal(image.color, expected.color)
    weights = weights_like(image)
    weighted_sum(image, weights).backward()
    weighted_sum(expected, weights).backward()
    for with_broken, correct in zip(ours.arrays(), without.arrays(), strict=True):
        assert_same(with_broken.grad[rows], correct.grad)
        assert not with_broken.grad[7].any()


def test_nothing_to_see(device: str) -> None:
    view = camera(20, 10)
    nothing = random_gaussians(0), with_row(random_gaussians(1), 0, means=[0, 0, -5])
    for gaussians, deterministic in itertools.product(nothing, (False, True)):
        ours = leaves(gaussians, torch.float32, device)
        image = ops.rasterize(ours, view, replace(SETTINGS, depth=Depth.BOTH, deterministic=deterministic))
        assert torch.equal(image.color.cpu(), torch.tensor(SETTINGS.background).expand(10, 20, 3))
        assert torch.equal(image.transmittance.cpu(), torch.ones(10, 20))
        assert not image.depth.any()
        assert not image.median_depth.any()
        weighted_sum(image, weights_like(image)).backward()
        assert all(not array.grad.any() for array in ours.arrays())


def test_equal_depths_keep_the_order_of_rows(device: str) -> None:
    flat = random_gaussians(12, seed=5, scale=0.3)
    flat.means[:, 2] = 4.0
    straight = replace(camera(24, 18, 20), cam_from_world=np.eye(3, 4))
    compare(device, flat, straight)


def test_saturated_pixels_stop(device: str) -> None:
    wall = random_gaussians(60, seed=6, scale=1.0)
    wall.opacities[:] = 6.0
    compare(device, wall, camera(24, 18, 20))


@pytest.mark.parametrize("alpha_max", [0.6, 0.999])
def test_alpha_max(device: str, alpha_max: float) -> None:
    gaussians = random_gaussians(30, seed=7, scale=0.3)
    gaussians.opacities[:] += 3.0
    compare(device, gaussians, camera(24, 18, 20), replace(SETTINGS, alpha_max=alpha_max))


def test_tiles_hold_every_pixel_that_is_reached(device: str) -> None:
    gaussians, view = on(device, random_gaussians(200, seed=8, scale=0.15)), camera(75, 43)
    projected = ops.project(gaussians, view, SETTINGS)
    tiles = ops.tile(projected, view)
    offsets = tiles.offsets.tolist()
    listed = set()
    for t in range(len(offsets) - 1):
        splats = tiles.splat_from_instance[offsets[t] : offsets[t + 1]].long()
        depths = projected.splats[splats, 9]
        assert bool((depths[1:] >= depths[:-1] * (1 - 2e-6)).all())  # a GPU sorts by a little less than a float
        listed |= {(t, int(s)) for s in splats}
    assert len(listed) == len(tiles.splat_from_instance) == projected.n_instances
    if tiles.number_from_instance is not None:
        assert sorted(tiles.number_from_instance.tolist()) == list(range(projected.n_instances))
    y, x = np.mgrid[0:43, 0:75] + 0.5
    for s, (mx, my, a, b, c, opacity) in enumerate(projected.splats[:, :6].double().cpu().numpy()):
        dx, dy = x - mx, y - my
        alpha = opacity * np.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)
        rows, columns = np.nonzero(alpha >= 1 / 255)
        assert {(int(r) // 16 * 5 + int(k) // 16, s) for r, k in zip(rows, columns, strict=True)} <= listed


def one_step(n_threads: int) -> list[torch.Tensor]:
    ops.use_cpu(n_threads)
    gaussians, view = random_gaussians(5000, scale=0.05), camera(300, 200, 220)
    projected = ops.project(gaussians, view, SETTINGS)
    tiles = ops.tile(projected, view)
    image = ops.blend(projected, tiles, view, SETTINGS)
    photo = torch.full((200, 300, 3), 90, dtype=torch.uint8)
    loss = ops.loss(image.color, photo, ops.LossSettings())
    d_image = Image(loss.d_color, torch.ones(200, 300))
    d_splats = ops.blend_vjp(projected, tiles, view, SETTINGS, image, d_image)
    d_pose = torch.empty(3, 4, dtype=torch.float64)
    gradient = ops.project_vjp(gaussians, view, SETTINGS, projected, d_splats, d_cam_from_world=d_pose)
    points, centroids = gaussians.sh.flatten(1), gaussians.sh[:200].flatten(1).clone()
    labels, distances = ops.cluster_assign(points, centroids)
    totals = ops.cluster_update(points, labels, distances, centroids)
    found = [labels, distances, centroids, totals]
    rows = Rows(gaussians, (gradient,))
    scores = gradient.opacities.abs()
    grown = ops.grow(rows, scores, replace(GROWTH, threshold=float(scores.median()), max_rows=6000))
    ops.relocate(grown, 0.0, GROWTH.key)
    changed = [*grown.values.arrays(), *grown.companions[0].arrays(), ops.morton_order(grown.values.means)]
    ops.use_cpu()
    return [image.color, torch.tensor([loss.value]), d_splats, d_pose, *gradient.arrays(), *found, *changed]


def test_same_bytes_with_any_number_of_threads() -> None:
    alone = one_step(1)
    for n_threads in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(alone, one_step(n_threads), strict=True))


def test_the_door_for_users_takes_what_the_gaussians_have() -> None:
    gaussians, view = random_gaussians(50, sh_degree=1), camera()
    image = spaceport_gs.rasterize(gaussians, view)
    assert torch.equal(image.color, ops.render(gaussians, view, RasterSettings(sh_degree=1)).color)
    with pytest.raises(AttributeError, match="nothing"):
        spaceport_gs.nothing  # noqa: B018


def test_both_routes_give_the_same_gradient(device: str) -> None:
    gaussians, view = on(device, random_gaussians(100)), camera()
    photo = torch.full((view.height, view.width, 3), 90, dtype=torch.uint8, device=device)
    leaf = leaves(gaussians, torch.float32, device)
    image = ops.rasterize(leaf, view, SETTINGS)
    loss = ops.loss(image.color.detach(), photo, ops.LossSettings())
    image.color.backward(loss.d_color)
    projected = ops.project(gaussians, view, SETTINGS)
    tiles = ops.tile(projected, view)
    d_image = Image(loss.d_color, torch.zeros(view.height, view.width, device=device))
    plain = ops.blend(projected, tiles, view, SETTINGS)
    d_splats = ops.blend_vjp(projected, tiles, view, SETTINGS, plain, d_image)
    fused = ops.project_vjp(gaussians, view, SETTINGS, projected, d_splats)
    for a, b in zip(leaf.arrays(), fused.arrays(), strict=True):
        assert_same(a.grad, b)


def test_numpy_arrays_serve_as_well() -> None:
    gaussians, view = random_gaussians(30), camera()
    rows = gaussians.numpy()
    splats = np.empty((30, _engine.SPLAT_STRIDE), np.float32)
    from spaceport_gs.types import Projected

    out = Projected(splats, np.empty(30, np.int32), np.empty(31, np.int64))
    cpu = _engine.Cpu()
    scratch = np.empty(_engine.project_scratch(cpu, 30), np.uint8)
    n, _ = _engine.project(cpu, rows, view, SETTINGS, scratch, out)
    assert np.array_equal(splats[:n], ops.project(gaussians, view, SETTINGS).splats.numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"means": torch.zeros(30, 4)}, "means"),
        ({"log_scales": torch.zeros(29, 3)}, "log_scales"),
        ({"opacities": torch.zeros(30, dtype=torch.float64)}, "opacities"),
        ({"sh": torch.zeros(30, 5, 3)}, "sh"),
        ({"quaternions": torch.zeros(4, 30).T}, "quaternions"),
    ],
)
def test_bad_arrays_are_named(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.project(replace(random_gaussians(30), **change), camera(), SETTINGS)


def test_bad_settings_are_named() -> None:
    gaussians, view = random_gaussians(100), camera()
    for settings in (replace(SETTINGS, alpha_max=1.0), replace(SETTINGS, near=math.nan)):
        with pytest.raises(ValueError, match="alpha_max|near"):
            ops.render(gaussians, view, settings)
    projected = ops.project(gaussians, view, SETTINGS)
    with pytest.raises(ValueError, match="projected"):
        ops.tile(projected, replace(view, width=20, height=16))
