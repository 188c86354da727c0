"""The engine's kernels against the reference: values and gradients, also where it hurts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from scenes import assert_close, camera, random_gaussians

from spaceport_gs import _engine, ops, reference
from spaceport_gs.exposure import Exposure
from spaceport_gs.gaussians import Gaussians
from spaceport_gs.pipeline.doctor import cuda_missing
from spaceport_gs.types import Camera, Image, RasterSettings

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
    return Image(
        torch.randn(image.color.shape, generator=draw).to(image.color.device),
        torch.randn(image.transmittance.shape, generator=draw).to(image.color.device),
    )


def weighted_sum(image: Image, weights: Image) -> torch.Tensor:
    return (image.color * weights.color).sum() + (image.transmittance * weights.transmittance).sum()


def compare(device: str, gaussians: Gaussians, view: Camera, settings: RasterSettings = SETTINGS) -> None:
    """Image and all gradients of the engine equal those of the reference in double precision."""
    ours, truth = leaves(gaussians, torch.float32, device), leaves(gaussians, torch.float64)
    image = ops.rasterize(ours, view, settings)
    expected = reference.render(truth, view, settings)
    assert_close(image.color, expected.color, flips=0.002, size_of_flips=0.02)
    assert_close(image.transmittance, expected.transmittance, flips=0.002, size_of_flips=0.02)
    weights = weights_like(image)
    weighted_sum(image, weights).backward()
    weights = Image(weights.color.cpu(), weights.transmittance.cpu())
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
    for gaussians in (random_gaussians(0), with_row(random_gaussians(1), 0, means=[0, 0, -5])):
        ours = leaves(gaussians, torch.float32, device)
        image = ops.rasterize(ours, view, SETTINGS)
        assert torch.equal(image.color.cpu(), torch.tensor(SETTINGS.background).expand(10, 20, 3))
        assert torch.equal(image.transmittance.cpu(), torch.ones(10, 20))
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
    gradient = ops.project_vjp(gaussians, view, SETTINGS, projected, d_splats)
    ops.use_cpu()
    return [image.color, torch.tensor([loss.value]), d_splats, *gradient.arrays()]


def test_same_bytes_with_any_number_of_threads() -> None:
    alone = one_step(1)
    for n_threads in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(alone, one_step(n_threads), strict=True))


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
