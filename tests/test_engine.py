"""The engine's kernels against the reference: values and gradients, also where it hurts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from scenes import assert_close, camera, random_gaussians

import spaceport_gs
from spaceport_gs import _engine, ops, reference
from spaceport_gs.exposure import Exposure
from spaceport_gs.gaussians import Gaussians, Rows
from spaceport_gs.pipeline.doctor import cuda_missing
from spaceport_gs.types import Camera, Depth, DrawKey, GrowthSettings, Image, RasterSettings

SETTINGS = RasterSettings(background=(0.2, 0.5, 0.7))
RATES = ops.AdamSettings(1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3, step=7)


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


def leaves(gaussians: Gaussians, dtype: torch.dtype, device: str = "cpu") -> Gaussians:
    return gaussians.map(lambda array: array.detach().to(device, dtype).clone().requires_grad_())


def on(device: str, gaussians: Gaussians) -> Gaussians:
    return gaussians.map(lambda array: array.to(device))


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    """To the bit; on a GPU, where sums are made in no fixed order, nearly."""
    if a.device.type == "cpu":
        assert torch.equal(a, b)
    else:
        assert_close(a, b)


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


@pytest.mark.parametrize(("width", "height"), [(70, 45), (1, 1), (17, 5), (4097, 3), (3, 300)])
def test_loss(device: str, width: int, height: int) -> None:
    draw = torch.Generator().manual_seed(width)
    photo = torch.randint(0, 256, (height, width, 3), generator=draw, dtype=torch.uint8)
    color = torch.rand(height, width, 3, generator=draw)
    truth = color.double().requires_grad_()
    expected = reference.loss(truth, photo, 0.2)
    expected.backward()
    result = ops.loss(color.to(device), photo.to(device), ops.LossSettings(0.2))
    assert result.value == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_close(result.d_color.cpu(), truth.grad)


def test_loss_of_a_perfect_image(device: str) -> None:
    photo = torch.randint(0, 256, (30, 40, 3), dtype=torch.uint8)
    result = ops.loss((photo / 255.0).to(device), photo.to(device), ops.LossSettings(0.2))
    assert result.value == pytest.approx(0.0, abs=1e-6)
    assert result.ssim == pytest.approx(1.0, abs=1e-6)


def images(width: int, height: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A colour, a photo and a mask with all of nothing, something and everything in it."""
    draw = torch.Generator().manual_seed(width)
    photo = torch.randint(0, 256, (height, width, 3), generator=draw, dtype=torch.uint8)
    mask = (torch.randn(height, width, generator=draw) * 200 + 128).clamp(0, 255).to(torch.uint8)
    return torch.rand(height, width, 3, generator=draw), photo, mask


EXPOSURE = torch.tensor([[0.9, 0.05, -0.1, 0.02], [0.1, 1.2, 0.03, -0.04], [-0.06, 0.07, 0.8, 0.05]])


@pytest.mark.parametrize("padding", list(ops.SsimPadding))
@pytest.mark.parametrize("parts", ["", "mask", "exposure", "mask and exposure"])
@pytest.mark.parametrize(("width", "height"), [(70, 45), (17, 11), (195, 130)])
def test_loss_with_all_its_parts(device: str, width: int, height: int, parts: str, padding: ops.SsimPadding) -> None:
    color, photo, mask = images(width, height)
    if "mask" not in parts:
        mask = torch.full_like(mask, 255)
    truth, exposure = color.double().requires_grad_(), EXPOSURE.double().requires_grad_()
    exposed = reference.expose(truth, exposure) if "exposure" in parts else truth
    expected = reference.masked_loss(exposed, photo, mask, 0.3, is_padded=padding is ops.SsimPadding.ZERO)
    expected.backward()
    target = ops.LossTarget(
        photo.to(device),
        mask.to(device) if "mask" in parts else None,
        EXPOSURE.to(device) if "exposure" in parts else None,
    )
    result = ops.loss(color.to(device), target, ops.LossSettings(0.3, padding))
    assert result.value == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_close(result.d_color, truth.grad)
    if "exposure" in parts:
        assert_close(result.d_exposure, exposure.grad)


def test_what_a_mask_hides_has_no_influence(device: str) -> None:
    color, photo, mask = (image.to(device) for image in images(70, 45))
    hidden = mask < 100
    mask[hidden] = 0
    results = []
    for level in (0, 255):
        photo[hidden], color[hidden] = level, 1 - level / 200
        results.append(ops.loss(color, ops.LossTarget(photo, mask), ops.LossSettings()))
    assert torch.equal(results[0].means, results[1].means)
    assert torch.equal(results[0].d_color, results[1].d_color)
    assert not results[0].d_color[hidden].any() and results[0].d_color[~hidden].any()


@pytest.mark.parametrize("padding", list(ops.SsimPadding))
def test_where_all_is_hidden_the_loss_is_zero(device: str, padding: ops.SsimPadding) -> None:
    color, photo, mask = (image.to(device) for image in images(17, 12))
    target = ops.LossTarget(photo, torch.zeros_like(mask), EXPOSURE.to(device))
    result = ops.loss(color, target, ops.LossSettings(0.2, padding))
    assert result.value == 0 and result.d_exposure is not None
    assert not result.d_color.any() and not result.d_exposure.any()


def test_images_without_a_window_have_no_valid_padding(device: str) -> None:
    color, photo, mask = (image.to(device) for image in images(40, 10))
    with pytest.raises(ValueError, match="color: expected at least 11x11 pixels"):
        ops.loss(color, photo, ops.LossSettings(0.2, ops.SsimPadding.VALID))
    with pytest.raises(ValueError, match="mask: expected shape"):
        ops.loss(color, ops.LossTarget(photo, mask[:5]), ops.LossSettings())


def test_exposure_moves_as_adam_does(device: str) -> None:
    """Each view at its own pace."""
    exposures, draw = Exposure.identity(3, device), torch.Generator().manual_seed(0)
    truth = torch.eye(3, 4).double()
    moments = reference.Moments(torch.zeros_like(truth), torch.zeros_like(truth))
    for step in range(1, 4):
        gradient = torch.randn(3, 4, generator=draw)
        exposures.of(1).update(gradient.to(device), replace(RATES, exposure=1e-2, step=70 + step))
        truth, moments = reference.update(truth, gradient.double(), moments, 1e-2, step)
    torch.testing.assert_close(exposures.values[1].cpu().double(), truth, rtol=1e-4, atol=1e-6)
    assert torch.equal(exposures.values[[0, 2]].cpu(), torch.eye(3, 4).repeat(2, 1, 1))
    assert exposures.n_steps.tolist() == [0, 3, 0]


def test_update_is_adam(device: str) -> None:
    values, truth = on(device, random_gaussians(37)), random_gaussians(37)
    first, second = ops.zeros_like(values), ops.zeros_like(values)
    rates = {"means": 1e-3, "log_scales": 2e-3, "quaternions": 3e-3, "opacities": 4e-3}
    moments = [reference.Moments(torch.zeros_like(a).double(), torch.zeros_like(a).double()) for a in truth.arrays()]
    expected = [array.double() for array in truth.arrays()]
    for step in (1, 2, 3):
        gradient = random_gaussians(37, seed=100 + step)
        ops.update(
            values,
            on(device, gradient),
            first,
            second,
            ops.AdamSettings(**rates, sh_dc=5e-3, sh_rest=6e-3, step=step),
        )
        for k, (name, array) in enumerate(zip(vars(gradient), gradient.arrays(), strict=True)):
            if name == "sh":
                rate = torch.full(array.shape, 6e-3, dtype=torch.float64)
                rate[:, 0] = 5e-3
            else:
                rate = rates[name]
            expected[k], moments[k] = reference.update(expected[k], array.double(), moments[k], rate, step)
    for value, correct in zip(values.arrays(), expected, strict=True):
        torch.testing.assert_close(value.cpu().double(), correct, rtol=1e-5, atol=1e-6)


def random_moments(n: int, sh_degree: int = 3) -> ops.AdamMoments:
    squares = random_gaussians(n, seed=2, sh_degree=sh_degree).map(lambda array: 1e-3 * array**2)
    return ops.AdamMoments(random_gaussians(n, seed=1, sh_degree=sh_degree), squares)


def test_compact_moments_take_half_of_the_memory_and_lose_little() -> None:
    full = random_moments(1000)
    compact = full.stored(ops.MomentStorage.COMPACT)
    n_bytes = [sum(a.nbytes for g in (m.first, m.second) for a in g.arrays()) for m in (full, compact)]
    assert n_bytes[0] - n_bytes[1] == 180 * 1000
    back = compact.stored(ops.MomentStorage.FULL)
    for a, b in ((back.first.sh, full.first.sh), (back.second.sh, full.second.sh)):
        assert torch.equal(a[:, 0], b[:, 0])
        torch.testing.assert_close(a, b, rtol=2**-8, atol=0)
    empty = ops.AdamMoments.zeros(random_gaussians(5), ops.MomentStorage.COMPACT)
    assert not any(a.any() for g in (empty.first, empty.second) for a in g.arrays())
    for a, b in ((empty.first, compact.first), (empty.second, compact.second)):
        assert [(x.dtype, x.shape[1:]) for x in a.arrays()] == [(x.dtype, x.shape[1:]) for x in b.arrays()]


@pytest.mark.parametrize("degree", [0, 2, 3])
def test_compact_moments_grow_as_full_ones_do(device: str, degree: int) -> None:
    """To the bit, and are selected so; relocation clears them."""
    values, moments = random_gaussians(500, sh_degree=degree), random_moments(500, degree)
    moments = moments.stored(ops.MomentStorage.COMPACT).stored(ops.MomentStorage.FULL)
    scores = torch.rand(500, generator=torch.Generator().manual_seed(1)).to(device)
    settings = GrowthSettings(0.7, math.log(0.08), -2.0, DrawKey(1, 2))
    order = torch.randperm(500, generator=torch.Generator().manual_seed(2)).int().to(device)
    results = []
    for storage in ops.MomentStorage:
        stored = moments.stored(storage)
        rows = Rows(on(device, values), (on(device, stored.first), on(device, stored.second)))
        grown = ops.grow(rows, scores, settings)
        selected = ops.select_rows(grown, order[:300] % len(grown.values))
        ops.relocate(selected, -1.0, DrawKey(3, 4))
        results.append([ops.AdamMoments(*r.companions).stored(ops.MomentStorage.FULL) for r in (grown, selected)])
    for full, compact in zip(*results, strict=True):
        for a, b in zip(
            (*full.first.arrays(), *full.second.arrays()),
            (*compact.first.arrays(), *compact.second.arrays()),
            strict=True,
        ):
            assert torch.equal(a, b)
    cleared = results[0][1].first.sh.flatten(1).eq(0).all(dim=1)
    assert cleared.any() and not cleared.all()


def test_the_cpu_has_no_compact_moments() -> None:
    values, moments = random_gaussians(9), random_moments(9).stored(ops.MomentStorage.COMPACT)
    with pytest.raises(ValueError, match="sh: expected float32, got int32"):
        ops.update(values, values, moments.first, moments.second, RATES)


@pytest.mark.parametrize(("n", "degree", "held"), [(300, 3, 3), (129, 1, 3), (128, 2, 2), (77, 0, 1), (5, 0, 0)])
def test_fused_update_is_the_two_verbs(device: str, n: int, degree: int, held: int) -> None:
    """Also of rows that are not visible: their moments decay, and their values go on."""
    view, settings = camera(40, 30, 32), replace(SETTINGS, sh_degree=degree)
    start = random_gaussians(n, seed=n, sh_degree=held)
    start.means[::3, 2] = -5.0  # behind the camera
    routes = []
    for is_fused in (False, True):
        values = on(device, start.map(lambda array: array.clone()))
        moments = ops.AdamMoments(
            on(device, random_gaussians(n, seed=1, sh_degree=held)),
            on(device, random_gaussians(n, seed=2, sh_degree=held).map(lambda array: array.abs())),
        )
        adam = RATES
        projected = ops.project(values, view, settings)
        draw = torch.Generator().manual_seed(3)
        d_splats = torch.randn(len(projected.splats), 9, generator=draw).to(device)
        if is_fused:
            ops.project_vjp_update(values, view, settings, projected, d_splats, moments, adam)
        else:
            gradient = ops.project_vjp(values, view, settings, projected, d_splats)
            ops.update(values, gradient, moments.first, moments.second, adam)
        routes.append((*values.arrays(), *moments.first.arrays(), *moments.second.arrays()))
    for a, b in zip(*routes, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


def test_density_statistics(device: str) -> None:
    from spaceport_gs.types import Statistics

    gaussians, view = on(device, random_gaussians(50)), camera()
    projected = ops.project(gaussians, view, SETTINGS)
    d_splats = torch.randn(len(projected.splats), 9, device=device)
    statistics = Statistics.empty(50, device)
    for _ in range(2):
        ops.density(projected, d_splats, view, statistics)
    norms = torch.hypot(d_splats[:, 0] * view.width / 2, d_splats[:, 1] * view.height / 2)
    expected = torch.zeros(50, device=device)
    expected[projected.gaussian_from_splat.long()] = 2 * norms
    torch.testing.assert_close(statistics.gradient_sums, expected)
    visible = torch.zeros(50, device=device)
    visible[projected.gaussian_from_splat.long()] = 2
    assert torch.equal(statistics.n_visible, visible)


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


def rows_of(n: int, degree: int = 3) -> Rows:
    """Some of the rows are broken."""
    values = random_gaussians(n, seed=n, sh_degree=degree)
    for i, array in enumerate(values.arrays()):
        array.view(n, -1)[7 * i + 3 :: 101, -1] = (math.nan, math.inf, -math.inf)[i % 3]
    return Rows(values, (random_gaussians(n, seed=1, sh_degree=degree), random_gaussians(n, seed=2, sh_degree=degree)))


def rows_on(device: str, rows: Rows) -> Rows:
    """A copy there."""
    values, *companions = (g.map(lambda a: a.clone().to(device)) for g in (rows.values, *rows.companions))
    return Rows(values, tuple(companions))


def assert_rows_close(rows: Rows, truth: Rows) -> None:
    for gaussians, correct in zip((rows.values, *rows.companions), (truth.values, *truth.companions), strict=True):
        for a, b in zip(gaussians.arrays(), correct.arrays(), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_draws_are_those_of_philox() -> None:
    """Known answers of the generator's authors."""
    counter = np.array([[0] * 4, [0xFFFFFFFF] * 4], np.uint64)
    assert [hex(w) for w in reference.philox(counter, 0)[0]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    last = reference.philox(counter, 2**64 - 1)[1]
    assert [hex(w) for w in last] == ["0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd"]


GROWTH = GrowthSettings(
    threshold=0.6, split_log_scale=math.log(0.08), min_opacity=-2.0, key=DrawKey(2**40 + 3, 7), max_log_scale=-1.9
)


@pytest.mark.parametrize(("n", "degree"), [(0, 3), (1, 0), (255, 0), (700, 1), (257, 2), (3000, 3)])
@pytest.mark.parametrize("share", [None, 0.0, 0.1, 0.9])
def test_growth(device: str, n: int, degree: int, share: float | None) -> None:
    """Also with a limit that leaves room for this share of the rows; scores come in few sizes, so that they tie."""
    rows = rows_of(n, degree) if n > 0 else Rows(random_gaussians(0), (random_gaussians(0), random_gaussians(0)))
    scores = torch.randint(0, 11, (n,), generator=torch.Generator().manual_seed(0)) / 10
    scores[::17] = math.nan
    settings = GROWTH if share is None else replace(GROWTH, max_rows=max(n + int(share * n), 1))
    grown = ops.grow(rows_on(device, rows), scores.to(device), settings)
    assert_rows_close(grown, reference.grow(rows, scores, settings))


def test_children_are_samples_of_their_parent(device: str) -> None:
    """Whitened, their offsets have mean 0 and covariance 1."""
    n = 20_000
    parents = random_gaussians(n, sh_degree=0)
    settings = replace(GROWTH, split_log_scale=-math.inf, min_opacity=-math.inf, max_log_scale=math.inf)
    grown = ops.grow(Rows(on(device, parents), ()), torch.ones(n, device=device), settings).values.means.cpu()
    offsets = (grown.view(2, n, 3) - parents.means).double()
    turn = reference.rotation(parents.quaternions.double())
    white = (turn.mT @ offsets[..., None])[..., 0] / parents.log_scales.double().exp()
    together = torch.cat([white[0], white[1]], dim=1)  # the two are independent of each other
    assert together.mean(dim=0).abs().max() < 0.03
    assert (together.T.cov() - torch.eye(6)).abs().max() < 0.05


def test_selection(device: str) -> None:
    rows = rows_of(300, 2)
    numbers = torch.randint(0, 300, (777,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    selected = ops.select_rows(rows_on(device, rows), numbers.to(device))
    assert_rows_close(selected, Rows(rows.values.select(numbers), tuple(c.select(numbers) for c in rows.companions)))
    assert len(ops.select_rows(rows_on(device, rows), numbers[:0].to(device)).values) == 0
    if device == "cpu":
        with pytest.raises(ValueError, match="rows: expected below 300, got 300"):
            ops.select_rows(rows, torch.tensor([300], dtype=torch.int32))


def test_morton_order(device: str) -> None:
    means = random_gaussians(3000).means
    means[5], means[6, 1], means[100:200] = math.nan, -math.inf, means[99]
    order = ops.morton_order(means.to(device)).cpu()
    assert sorted(order.tolist()) == list(range(3000)) and order[-2:].tolist() == [5, 6]
    finite = means[order[:-2]].double()
    low, high = finite.amin(dim=0), finite.amax(dim=0)
    cells = ((finite - low) / (high - low) * (2**21 - 1)).long() >> 9  # rounding moves a cell or two
    code = sum((cells >> bit & 1)[:, axis] << (3 * bit + axis) for bit in range(12) for axis in range(3))
    assert ((code[1:] < code[:-1]).double().mean()) < 0.005
    equal = order[(means[order] == means[99]).all(dim=1)]
    assert torch.equal(equal, torch.arange(99, 200, dtype=torch.int32))
    assert ops.morton_order(torch.ones(4, 3, device=device)).tolist() == [0, 1, 2, 3]
    assert len(ops.morton_order(torch.ones(0, 3, device=device))) == 0


@pytest.mark.parametrize(("n", "min_opacity"), [(1, -9.0), (40, 0.0), (500, 1.0), (3000, -1.0), (50, 99.0)])
def test_relocation(device: str, n: int, min_opacity: float) -> None:
    rows, key = rows_of(n, 1), DrawKey(5, 6)
    moved = rows_on(device, rows)
    ops.relocate(moved, min_opacity, key)
    nothing_stays = not bool((rows.values.opacities >= min_opacity).any())
    assert_rows_close(moved, rows if nothing_stays else reference.relocate(rows, min_opacity, key))


@pytest.mark.parametrize("n", [1, 2, 5, 30])
@pytest.mark.parametrize("opacity", [0.02, 0.5, 0.99])
def test_copies_look_as_one_did(n: int, opacity: float) -> None:
    """Blended along a line through the middle, by numbers: the sum over it stays."""
    shared, size = reference.relocated(opacity, n)
    x = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    one = opacity * torch.exp(-(x**2) / 2)
    several = 1 - (1 - shared * torch.exp(-(x**2) / (2 * size**2))) ** n
    assert float(several.sum() / one.sum()) == pytest.approx(1.0, rel=1e-6)
    assert float(several.max()) == pytest.approx(opacity)


@pytest.mark.parametrize(
    ("n", "k", "d"), [(1, 1, 1), (0, 3, 2), (100, 7, 3), (300, 129, 24), (1003, 130, 45), (517, 260, 9), (129, 300, 17)]
)
def test_cluster(device: str, n: int, k: int, d: int) -> None:
    draw = torch.Generator().manual_seed(n)
    points, centroids = torch.randn(n, d, generator=draw), torch.randn(k, d, generator=draw)
    weights = torch.rand(n, generator=draw) * (torch.arange(n) % 5 > 0)
    labels, distances = ops.cluster_assign(points.to(device), centroids.to(device))
    apart = ((points[:, None].double() - centroids) ** 2).sum(dim=2)
    _, expected = reference.cluster_assign(points.double(), centroids.double())
    torch.testing.assert_close(distances.cpu().double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(apart.gather(1, labels.cpu().long()[:, None])[:, 0], expected, rtol=1e-5, atol=1e-5)
    moved = centroids.to(device)
    totals = ops.cluster_update(points.to(device), labels, weights.to(device), moved)
    means, sums = reference.cluster_update(points.double(), labels.cpu().long(), weights.double(), centroids.double())
    torch.testing.assert_close(moved.cpu().double(), means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(totals.cpu().double(), sums, rtol=1e-5, atol=1e-6)
    assert torch.equal(moved.cpu()[sums == 0], centroids[sums == 0])


def test_equally_near_centroids_give_the_lowest_label(device: str) -> None:
    """Whole numbers, so that distances are exact: many centroids are equal, or as far on the other side."""
    draw = torch.Generator().manual_seed(0)
    centroids = torch.randint(-1, 2, (700, 3), generator=draw).float()
    points = torch.randint(-2, 3, (500, 3), generator=draw).float()
    labels, distances = ops.cluster_assign(points.to(device), centroids.to(device))
    expected, correct = reference.cluster_assign(points, centroids)
    assert torch.equal(labels.cpu().long(), expected) and torch.equal(distances.cpu(), correct)


def test_labels_that_name_no_centroid(device: str) -> None:
    points, centroids = torch.ones(4, 2, device=device), torch.zeros(3, 2, device=device)
    labels = torch.tensor([0, -1, 3, 0], dtype=torch.int32, device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match="labels: expected rows of centroids, got -1"):
            ops.cluster_update(points, labels, points[:, 0].contiguous(), centroids)
    else:
        totals = ops.cluster_update(points, labels, points[:, 0].contiguous(), centroids)
        assert totals.tolist() == [2, 0, 0] and centroids.tolist() == [[1, 1], [0, 0], [0, 0]]


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
