"""The CUDA engine against the CPU engine, on scenes that are too large for the reference."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scenes import assert_close, camera, random_gaussians

from spaceport_gs import _engine, ops
from spaceport_gs.exposure import Exposure
from spaceport_gs.gaussians import Gaussians, Rows
from spaceport_gs.pipeline.doctor import cuda_missing
from spaceport_gs.render import Renderer
from spaceport_gs.step import StepView, TrainingStep, UpdateRule
from spaceport_gs.types import Camera, Depth, DrawKey, GrowthSettings, Image, Projected, RasterSettings, Statistics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(cuda_missing()), reason=cuda_missing())]


SETTINGS = RasterSettings(background=(0.3, 0.2, 0.1))


def to_splats(
    gaussians: Gaussians, view: Camera, photo: torch.Tensor
) -> tuple[Projected, Image, ops.Loss, torch.Tensor]:
    """A view forward, and back to the splats: the last is their gradient."""
    projected = ops.project(gaussians, view, SETTINGS)
    tiles = ops.tile(projected, view)
    image = ops.blend(projected, tiles, view, SETTINGS)
    loss = ops.loss(image.color, photo, ops.LossSettings())
    d_image = Image(loss.d_color, torch.zeros_like(image.transmittance))
    return projected, image, loss, ops.blend_vjp(projected, tiles, view, SETTINGS, image, d_image)


def step(gaussians: Gaussians, view: Camera, photo: torch.Tensor) -> tuple[Image, ops.Loss, Gaussians]:
    projected, image, loss, d_splats = to_splats(gaussians, view, photo)
    return image, loss, ops.project_vjp(gaussians, view, SETTINGS, projected, d_splats)


def photo_for(view: Camera, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (view.height, view.width, 3), generator=draw, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("n", "size", "scale"),
    [(200_000, (800, 533), 0.012), (1_000_000, (640, 427), 0.006), (1_000, (800, 533), 0.4)],
)
def test_large_scenes(n: int, size: tuple[int, int], scale: float) -> None:
    gaussians, view = random_gaussians(n, scale=scale), camera(*size, focal=0.75 * size[0])
    photo = photo_for(view)
    expected = step(gaussians, view, photo)
    result = step(gaussians.map(lambda a: a.cuda()), view, photo.cuda())
    assert_close(result[0].color, expected[0].color, flips=1e-3, size_of_flips=0.02)
    assert result[1].value == pytest.approx(expected[1].value, rel=1e-5)
    for a, b in zip(result[2].arrays(), expected[2].arrays(), strict=True):
        relative = (a.cpu().double() - b.double()).norm() / b.double().norm()
        assert relative < 2e-3


@pytest.mark.parametrize("size", [(4097, 3), (1, 1), (17, 5)])
def test_odd_images_and_principal_points(size: tuple[int, int]) -> None:
    view = replace(camera(*size, focal=40.0), cx=-3.0, cy=9.0)
    gaussians = random_gaussians(333, scale=0.2)
    a = ops.render(gaussians, view, RasterSettings())
    b = ops.render(gaussians.map(lambda x: x.cuda()), view, RasterSettings())
    assert_close(b.color, a.color, flips=0.002, size_of_flips=0.02)


@pytest.mark.parametrize("n", [1, 2_049, 300_001, 2_500_000])
def test_lists_are_sorted(n: int) -> None:
    """By tile, then by depth, then by row: against a sort by torch."""
    gaussians, view = random_gaussians(n, scale=0.01).map(lambda a: a.cuda()), camera(1000, 700, 800.0)
    projected = ops.project(gaussians, view, RasterSettings())
    tiles = ops.tile(projected, view)
    n_of_tile = tiles.offsets[1:] - tiles.offsets[:-1]
    of_instance = torch.repeat_interleave(torch.arange(len(n_of_tile), device="cuda"), n_of_tile)
    splats = tiles.splat_from_instance.long()
    assert len(of_instance) == len(splats) == projected.n_instances
    depths = (projected.depth_keys & 0xFFFFFF)[splats].long()
    key = (of_instance << 48) + (depths << 24) + splats
    assert bool((key[1:] > key[:-1]).all())
    counts = torch.bincount(splats, minlength=len(projected.splats))
    assert torch.equal(counts, projected.instance_offsets[1:] - projected.instance_offsets[:-1])


def test_depths_of_a_large_scene() -> None:
    gaussians, view = random_gaussians(200_000, scale=0.012), camera(800, 533, 600.0)
    settings = replace(SETTINGS, depth=Depth.BOTH)
    images, gradients = [], []
    for device in ("cpu", "cuda"):
        leaves = gaussians.map(lambda a, to=device: a.to(to).clone().requires_grad_())
        image = ops.rasterize(leaves, view, settings)
        (image.depth * image.color.detach()[..., 0]).sum().backward()
        images.append(image)
        gradients.append([a.grad.cpu().double() for a in leaves.arrays()])
    assert_close(images[1].depth, images[0].depth, flips=1e-3, size_of_flips=0.02)
    assert_close(images[1].median_depth, images[0].median_depth, flips=2e-3, size_of_flips=1.0)
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 2e-3 * b.norm()


def all_gradients(gaussians: Gaussians, view: Camera, settings: RasterSettings) -> list[torch.Tensor]:
    """By the Gaussians and by the pose, of a loss that sees all of an image."""
    leaves = gaussians.map(lambda a: a.clone().requires_grad_())
    pose = torch.tensor(view.cam_from_world, requires_grad=True)
    image = ops.rasterize(leaves, view, settings, pose)
    weights = photo_for(view).cuda() / 255.0
    ((image.color * weights).sum() + (image.depth * weights[..., 0]).sum() + image.transmittance.sum()).backward()
    return [*(a.grad for a in leaves.arrays()), pose.grad]


@pytest.mark.parametrize(("n", "size", "scale"), [(300_000, (800, 533), 0.01), (2_000, (1600, 1066), 0.5)])
def test_deterministic_gradients_repeat(n: int, size: tuple[int, int], scale: float) -> None:
    gaussians, view = random_gaussians(n, scale=scale).map(lambda a: a.cuda()), camera(*size, focal=0.75 * size[0])
    settings = replace(SETTINGS, depth=Depth.EXPECTED, deterministic=True)
    first = all_gradients(gaussians, view, settings)
    for _ in range(3):
        again = all_gradients(gaussians, view, settings)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    usual = all_gradients(gaussians, view, replace(settings, deterministic=False))
    for a, b in zip(first, usual, strict=True):
        assert float((a - b).norm()) <= 1e-3 * float(b.norm())


def test_only_deterministic_gradients_need_memory() -> None:
    backend, ordered = _engine.Cuda(0), replace(SETTINGS, deterministic=True)
    assert _engine.blend_vjp_scratch(backend, 1000, 5000, 9, SETTINGS) == 0
    assert _engine.blend_vjp_scratch(backend, 1000, 5000, 9, ordered) > 5000 * 9 * 4
    size = 1000, 5_000_000, 640, 427
    assert _engine.step_scratch(backend, *size, SETTINGS) < _engine.step_scratch(backend, *size, ordered)


def test_projection_is_stable_and_repeats() -> None:
    gaussians, view = random_gaussians(300_001, scale=0.01).map(lambda a: a.cuda()), camera(640, 480, 500.0)
    first = ops.project(gaussians, view, RasterSettings())
    assert bool((first.gaussian_from_splat[1:] > first.gaussian_from_splat[:-1]).all())
    counts = first.instance_offsets[1:] - first.instance_offsets[:-1]
    assert bool((counts > 0).all())
    tiles = ops.tile(first, view)
    for _ in range(3):
        again = ops.project(gaussians, view, RasterSettings())
        assert first.n_instances == again.n_instances == int(first.instance_offsets[-1])
        for name in ("splats", "gaussian_from_splat", "instance_offsets"):
            assert torch.equal(getattr(first, name), getattr(again, name))
        assert torch.equal(ops.tile(again, view).splat_from_instance, tiles.splat_from_instance)


def steps_by_verbs(gaussians: Gaussians, views: list[Camera]) -> tuple[Gaussians, Statistics]:
    values = gaussians.map(lambda a: a.clone())
    moments = ops.AdamMoments(ops.zeros_like(values), ops.zeros_like(values))
    statistics = Statistics.empty(len(values), "cuda")
    for i, view in enumerate(views):
        projected, _, _, d_splats = to_splats(values, view, photo_for(view).cuda())
        ops.density(projected, d_splats, view, statistics)
        ops.project_vjp_update(values, view, SETTINGS, projected, d_splats, moments, rates(i + 1))
    return values, statistics


def recorded_steps(
    gaussians: Gaussians,
    views: list[Camera],
    rule: UpdateRule,
    n_instances: int = 0,
    settings: RasterSettings = SETTINGS,
) -> tuple[Gaussians, Statistics, TrainingStep]:
    values = gaussians.map(lambda a: a.clone())
    moments = ops.AdamMoments(ops.zeros_like(values), ops.zeros_like(values))
    statistics = Statistics.empty(len(values), "cuda")
    step = TrainingStep(values, moments, statistics, rule, n_instances)
    for i, view in enumerate(views):
        seen = StepView(view, photo_for(view).cuda(), settings, ops.LossSettings())
        step.run(seen, rates(i + 1), gathers_statistics=True)
    step.settle()
    return values, statistics, step


def rates(step: int) -> ops.AdamSettings:
    return ops.AdamSettings(1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3, step=step)


def some_views(n: int, width: int = 320) -> list[Camera]:
    view = camera(width, 3 * width // 4, 13 / 16 * width)
    shifts = torch.linspace(-0.1, 0.1, n)
    return [replace(view, cx=view.cx + width * float(x)) for x in shifts]


SMALL = 96  # pixels wide: where tests make many steps, small enough for what checks every access to shared memory


def small_scene(sh_degree: int = 3) -> Gaussians:
    return random_gaussians(2_000, scale=0.1, sh_degree=sh_degree).map(lambda a: a.cuda())


def assert_same_steps(a: tuple[Gaussians, Statistics], b: tuple[Gaussians, Statistics]) -> None:
    """Sums of floats differ in their order from run to run; Adam's first steps are as long for a tiny gradient."""
    for x, y in zip(a[0].arrays(), b[0].arrays(), strict=True):
        assert float((x - y).abs().mean()) < 5e-5
    apart = (a[1].gradient_sums - b[1].gradient_sums).abs() > 1e-6 + 2e-2 * b[1].gradient_sums.abs()
    assert float(apart.float().mean()) < 1e-3
    assert float((a[1].n_visible != b[1].n_visible).float().mean()) < 1e-3


def assert_moved_alike(a: Gaussians, b: Gaussians, start: Gaussians, share: float) -> None:
    """They differ by no more than a share of the way that b made from the start."""
    for x, y, before in zip(a.arrays(), b.arrays(), start.arrays(), strict=True):
        assert float((x - y).abs().mean()) < share * float((y - before).abs().mean())


@pytest.mark.parametrize("rule", [UpdateRule.ALL, UpdateRule.CONTRIBUTING])
def test_recorded_steps_are_the_verbs(rule: UpdateRule) -> None:
    gaussians, views = random_gaussians(20_000, scale=0.03).map(lambda a: a.cuda()), some_views(6)
    values, statistics, step = recorded_steps(gaussians, views, rule)
    assert_same_steps((values, statistics), steps_by_verbs(gaussians, views))
    total, last = step.settle()
    assert 0 < last < total


@pytest.mark.parametrize("rule", list(UpdateRule))
def test_deterministic_steps_repeat(rule: UpdateRule) -> None:
    """Also when the memory for the tiles' lists has to grow on the way."""
    gaussians, views = small_scene(), some_views(20, SMALL)
    settings = replace(SETTINGS, deterministic=True)
    values, statistics, _ = recorded_steps(gaussians, views, rule, settings=settings)
    for n_instances in (0, 1):
        again = recorded_steps(gaussians, views, rule, n_instances, settings)
        assert all(torch.equal(a, b) for a, b in zip(values.arrays(), again[0].arrays(), strict=True))
        assert torch.equal(statistics.gradient_sums, again[1].gradient_sums)
        assert torch.equal(statistics.n_visible, again[1].n_visible)
    usual = recorded_steps(gaussians, views, rule)[0]
    for start, a, b in zip(*(g.arrays() for g in (gaussians, values, usual)), strict=True):
        assert float((a - b).abs().mean()) < 0.02 * float((a - start).abs().mean())


def test_steps_that_do_not_fit_are_repeated() -> None:
    gaussians, views = random_gaussians(20_000, scale=0.03).map(lambda a: a.cuda()), some_views(6)
    values, statistics, step = recorded_steps(gaussians, views, UpdateRule.CONTRIBUTING, n_instances=1)
    assert step.n_instances > 20_000
    assert_same_steps((values, statistics), steps_by_verbs(gaussians, views))


@pytest.mark.parametrize("padding", list(ops.SsimPadding))
@pytest.mark.parametrize(("parts", "n_instances"), [("mask", 0), ("exposure", 1), ("mask and exposure", 1)])
def test_recorded_steps_with_masks_and_exposures(parts: str, n_instances: int, padding: ops.SsimPadding) -> None:
    """Also of steps that are repeated: an exposure makes each of them once."""
    gaussians, views = small_scene(), some_views(6, SMALL)
    settings, photo = ops.LossSettings(0.2, padding), photo_for(views[0]).cuda()
    mask = photo_for(views[0], seed=1)[..., 0].contiguous().cuda() if "mask" in parts else None
    routes = []
    for is_recorded in (False, True):
        values = gaussians.map(lambda a: a.clone())
        moments = ops.AdamMoments(ops.zeros_like(values), ops.zeros_like(values))
        exposures = Exposure.identity(3, "cuda")
        step = TrainingStep(values, moments, Statistics.empty(len(values), "cuda"), UpdateRule.ALL, n_instances)
        losses = []
        for i, view in enumerate(views):
            adam = replace(rates(i + 1), exposure=1e-2)
            exposure = exposures.of(i % 2) if "exposure" in parts else None
            if is_recorded:
                step.run(StepView(view, photo, SETTINGS, settings, mask, exposure), adam)
                continue
            projected = ops.project(values, view, SETTINGS)
            tiles = ops.tile(projected, view)
            image = ops.blend(projected, tiles, view, SETTINGS)
            target = ops.LossTarget(photo, mask, None if exposure is None else exposure.values)
            loss = ops.loss(image.color, target, settings)
            d_image = Image(loss.d_color, torch.zeros_like(image.transmittance))
            d_splats = ops.blend_vjp(projected, tiles, view, SETTINGS, image, d_image)
            if exposure is not None:
                exposure.update(loss.d_exposure, adam)
            ops.project_vjp_update(values, view, SETTINGS, projected, d_splats, moments, adam)
            losses.append(loss.value)
        if is_recorded:
            losses.append(step.settle()[1])
        routes.append((values, exposures, losses[-1]))
    for a, b in zip(routes[0][0].arrays(), routes[1][0].arrays(), strict=True):
        assert float((a - b).abs().mean()) < 5e-5
    assert routes[0][2] == pytest.approx(routes[1][2], rel=1e-4)
    for a, b in zip(routes[0][1].tensors(), routes[1][1].tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5)
    assert routes[1][1].n_steps.tolist() == ([3, 3, 0] if "exposure" in parts else [0, 0, 0])


def test_views_of_all_kinds_share_a_step() -> None:
    values = random_gaussians(3_000, scale=0.05).map(lambda a: a.cuda())
    moments = ops.AdamMoments(ops.zeros_like(values), ops.zeros_like(values))
    step, view = TrainingStep(values, moments, Statistics.empty(len(values), "cuda")), camera()
    photo, exposure = photo_for(view).cuda(), Exposure.identity(1, "cuda").of(0)
    nothing = torch.zeros(view.height, view.width, dtype=torch.uint8, device="cuda")
    losses = []
    for i, (mask, own) in enumerate([(None, None), (nothing, None), (None, exposure), (nothing, exposure)]):
        step.run(StepView(view, photo, SETTINGS, ops.LossSettings(), mask, own), replace(rates(i + 1), exposure=1e-2))
        losses.append(step.settle()[1])
    assert losses[0] > 0.1 and losses[2] > 0.1 and losses[1] == losses[3] == 0
    assert float(exposure.n_steps) == 2


def test_what_is_hidden_is_not_listed_until_it_can_be_seen() -> None:
    """Views come again to a scene in which much is hidden; then all of it becomes transparent at once."""
    gaussians, views = random_gaussians(60_000, scale=0.08).map(lambda a: a.cuda()), some_views(3)
    gaussians.opacities.add_(3)
    photo = photo_for(views[0]).cuda()
    values, by_verbs = (gaussians.map(lambda a: a.clone()) for _ in range(2))
    moments, of_verbs = (ops.AdamMoments(ops.zeros_like(values), ops.zeros_like(values)) for _ in range(2))
    statistics, verbs_statistics = (Statistics.empty(len(values), "cuda") for _ in range(2))
    step = TrainingStep(values, moments, statistics, UpdateRule.ALL)
    step_views = [StepView(view, photo, SETTINGS, ops.LossSettings()) for view in views]
    n_listed, n_rendered_again = [], 0
    for i in range(12):
        if i == 6:
            step.settle()
            n_rendered_again = step.n_rendered_again
            assert n_rendered_again < 3
            values.opacities.sub_(6)
            by_verbs.opacities.sub_(6)
        step.run(step_views[i % 3], rates(i + 1), gathers_statistics=True)
        step.wait()
        n_listed.append(int(step._seen["n_instances"][0]))
        projected, _, _, d_splats = to_splats(by_verbs, views[i % 3], photo)
        ops.density(projected, d_splats, views[i % 3], verbs_statistics)
        ops.project_vjp_update(by_verbs, views[i % 3], SETTINGS, projected, d_splats, of_verbs, rates(i + 1))
    step.settle()
    assert sum(n_listed[3:6]) < 0.8 * sum(n_listed[:3])
    assert step.n_rendered_again >= n_rendered_again + 3
    assert_same_steps((values, statistics), (by_verbs, verbs_statistics))


def test_rows_that_miss_steps_make_up_for_them() -> None:
    """Views to the left, then to the right: most rows end with steps behind them that they did not make. And there and
    back: rows come back with one step from where they were left, where a dense Adam would have carried them on."""
    gaussians, view = small_scene(), camera(SMALL // 2, 72, 78.0)
    left, right = replace(view, cx=72.0), replace(view, cx=-24.0)
    for views, share in (([left] * 8 + [right] * 24, 0.01), (([left] * 8 + [right] * 8) * 2, 0.15)):
        dense = recorded_steps(gaussians, views, UpdateRule.ALL)[0]
        lazy = recorded_steps(gaussians, views, UpdateRule.CONTRIBUTING)[0]
        assert_moved_alike(lazy, dense, gaussians, share)


def test_steps_without_memory_for_them_are_made_once_there_is() -> None:
    gaussians, views = random_gaussians(20_000, scale=0.03).map(lambda a: a.cuda()), some_views(3)
    photo = photo_for(views[0]).cuda()
    values = gaussians.map(lambda a: a.clone())
    moments = ops.AdamMoments(ops.zeros_like(values), ops.zeros_like(values))
    statistics = Statistics.empty(len(values), "cuda")
    step = TrainingStep(values, moments, statistics, n_instances=1 << 28)  # more than what torch keeps free could hold
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            step.run(StepView(views[0], photo, SETTINGS, ops.LossSettings()), rates(1), gathers_statistics=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for i, view in enumerate(views):
        step.run(StepView(view, photo, SETTINGS, ops.LossSettings()), rates(i + 1), gathers_statistics=True)
    step.settle()
    assert_same_steps((values, statistics), steps_by_verbs(gaussians, views))


def test_recorded_steps_of_views_of_several_sizes() -> None:
    """Rows that the one pixel leaves out are seen next where they were left, unless all rows move."""
    sizes = [(64, 48), (640, 427), (64, 48), (1, 1), (640, 427)]
    start = random_gaussians(3_000, scale=0.05).map(lambda a: a.cuda())
    views = [camera(*size, focal=0.8 * size[0]) for size in sizes]
    values, statistics, _ = recorded_steps(start, views, UpdateRule.ALL)
    assert_same_steps((values, statistics), steps_by_verbs(start, views))
    contributing = recorded_steps(start, views, UpdateRule.CONTRIBUTING)[0]
    assert_moved_alike(contributing, values, start, share=0.05)


def test_a_step_with_nothing_visible() -> None:
    values = random_gaussians(100).map(lambda a: a.cuda())
    before = values.map(lambda a: a.clone())
    values.means[:, 2] = -5.0
    moments = ops.AdamMoments(ops.zeros_like(values), ops.zeros_like(values))
    step = TrainingStep(values, moments, Statistics.empty(len(values), "cuda"))
    view = camera()
    step.run(StepView(view, photo_for(view).cuda(), SETTINGS, ops.LossSettings()), rates(1))
    assert step.settle()[1] > 0
    assert torch.equal(values.sh, before.sh)


@pytest.mark.parametrize(("degree", "n_instances"), [(0, 0), (1, 0), (2, 0), (3, 1)])
@pytest.mark.parametrize("storage", list(ops.MomentStorage))
def test_deferred_steps_are_adam_but_a_little_late(degree: int, n_instances: int, storage: ops.MomentStorage) -> None:
    """Forty steps, at the true learning rate of the SH coefficients; with degrees that change between the steps."""
    gaussians, views = small_scene(degree), some_views(8, SMALL) * 5
    photo, results = photo_for(views[0]).cuda(), []
    for rule in (UpdateRule.ALL, UpdateRule.DEFERRED):
        values = gaussians.map(lambda a: a.clone())
        moments = ops.AdamMoments.zeros(values, storage)
        step = TrainingStep(values, moments, Statistics.empty(len(values), "cuda"), rule, n_instances)
        for i, view in enumerate(views):
            raster = replace(SETTINGS, sh_degree=i // 10)
            adam = replace(rates(i + 1), sh_rest=1.25e-4, means=1e-5)
            step.run(StepView(view, photo, raster, ops.LossSettings()), adam)
        step.settle()
        results.append((values, moments.stored(ops.MomentStorage.FULL)))
    (prompt, of_prompt), (late, of_late) = results
    for start, a, b in zip(gaussians.arrays(), prompt.arrays(), late.arrays(), strict=True):
        assert float((a - b).abs().mean()) <= 0.05 * float((a - start).abs().mean())
    rest = [(g.sh - gaussians.sh)[:, 1:] for g in (prompt, late)]
    if degree > 0:
        assert float((rest[0] - rest[1]).abs().mean()) < 0.05 * float(rest[0].abs().mean())
        assert rest[1].abs().amax() > 1e-3
    for a, b in zip(of_late.second.arrays(), of_prompt.second.arrays(), strict=True):
        assert float((a.double().sum() / b.double().sum()).log().abs()) < 1e-2


def test_deferred_steps_that_are_asked_for_are_in_time() -> None:
    gaussians, views = random_gaussians(20_000, scale=0.03).map(lambda a: a.cuda()), some_views(6)
    photo, results = photo_for(views[0]).cuda(), []
    for rule in (UpdateRule.ALL, UpdateRule.DEFERRED):
        values = gaussians.map(lambda a: a.clone())
        moments = ops.AdamMoments.zeros(values)
        step = TrainingStep(values, moments, Statistics.empty(len(values), "cuda"), rule)
        for i, view in enumerate(views):
            step.run(StepView(view, photo, SETTINGS, ops.LossSettings()), replace(rates(i + 1), means=1e-6))
            step.settle()
        results.append((values, moments))
    for a, b in zip(results[0][0].arrays(), results[1][0].arrays(), strict=True):
        assert float((a - b).abs().mean()) < 5e-5
    for a, b in zip(results[0][1].second.arrays(), results[1][1].second.arrays(), strict=True):
        assert float((a - b).norm() / b.norm()) < 2e-3


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_compact_moments_are_right_in_the_mean(degree: int) -> None:
    """Averages that move by a thousandth a step, up and down again, of which rounding to the nearest would lose all."""
    start = random_gaussians(4_000, sh_degree=degree).map(lambda a: a.cuda())
    draw = torch.Generator("cuda").manual_seed(0)
    routes = {s: (start.map(lambda a: a.clone()), ops.AdamMoments.zeros(start, s)) for s in ops.MomentStorage}
    large = [start.map(lambda a: 1 + torch.randn(a.shape, generator=draw, device="cuda")) for _ in range(20)]
    small = [gradient.map(lambda a: 0.01 * a) for gradient in large]
    for i, gradient in enumerate(large * 10 + small * 10):
        for values, moments in routes.values():
            ops.update(values, gradient, moments.first, moments.second, rates(i + 1))
    full, compact = (routes[s] for s in (ops.MomentStorage.FULL, ops.MomentStorage.COMPACT))
    unpacked = compact[1].stored(ops.MomentStorage.FULL)
    for name in ("first", "second"):
        a, b = getattr(unpacked, name).sh, getattr(full[1], name).sh
        assert float((a.double().mean() / b.double().mean()).log().abs()) < 2e-3
        assert float((a - b).abs().mean()) < 0.05 * float(b.abs().mean())
    moved, apart = full[0].sh - start.sh, compact[0].sh - full[0].sh
    assert abs(float(apart.mean())) < 1e-3 * float(moved.abs().mean())
    assert float(apart.abs().mean()) < 0.02 * float(moved.abs().mean())
    assert torch.equal(compact[0].sh[:, 0], full[0].sh[:, 0])
    for a, b in zip(compact[0].arrays()[:4], full[0].arrays()[:4], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("rule", list(UpdateRule))
def test_recorded_steps_with_compact_moments(rule: UpdateRule, degree: int) -> None:
    gaussians, views = small_scene(degree), some_views(8, SMALL) * 5
    photo, results = photo_for(views[0]).cuda(), []
    for storage in ops.MomentStorage:
        values = gaussians.map(lambda a: a.clone())
        moments = ops.AdamMoments.zeros(values, storage)
        step = TrainingStep(values, moments, Statistics.empty(len(values), "cuda"), rule)
        for i, view in enumerate(views):
            step.run(StepView(view, photo, SETTINGS, ops.LossSettings()), rates(i + 1))
        step.settle()
        results.append((values, moments.stored(ops.MomentStorage.FULL)))
    (full, of_full), (compact, of_compact) = results
    for start, a, b in zip(gaussians.arrays(), full.arrays(), compact.arrays(), strict=True):
        assert float((a - b).abs().mean()) < 0.05 * float((a - start).abs().mean())
    a, b = of_compact.second.sh.double().sum(), of_full.second.sh.double().sum()
    assert float((a / b).log().abs()) < 5e-3


def test_clusters_are_those_of_the_cpu_to_the_bit() -> None:
    draw = torch.Generator().manual_seed(0)
    points, centroids = torch.randn(20_000, 45, generator=draw), torch.randn(1_000, 45, generator=draw)
    weights = torch.rand(20_000, generator=draw)
    results = []
    for device in ("cpu", "cuda"):
        place = [a.to(device) for a in (points, weights, centroids.clone())]
        labels, distances = ops.cluster_assign(place[0], place[2])
        totals = ops.cluster_update(place[0], labels, place[1], place[2])
        results.append([a.cpu() for a in (labels, distances, place[2], totals)])
    if ops.cpu().simd == "avx2":
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_scene_is_compressed_to_the_same_bytes(tmp_path: Path) -> None:
    from spaceport_gs.pipeline.compress import CompressSettings, compress

    rows = random_gaussians(3_000).numpy()
    for device in ("cpu", "cuda"):
        compress(rows, tmp_path / device, CompressSettings(device=device))
    if ops.cpu().simd == "avx2":
        assert (tmp_path / "cpu").read_bytes() == (tmp_path / "cuda").read_bytes()


def test_large_growth_is_that_of_the_cpu() -> None:
    """To the order of the rows, and to rounding of the children's offsets; whatever it was that it repeats to the bit."""
    n = 1_000_003
    values, moments = random_gaussians(n, scale=0.01), random_gaussians(n, seed=1)
    rows, scores = Rows(values, (moments, moments)), torch.rand(n, generator=torch.Generator().manual_seed(2))
    settings = GrowthSettings(0.9, math.log(0.015), -3.0, DrawKey(1, 2), max_log_scale=-2.5, max_rows=n + n // 20)
    expected = ops.grow(rows, scores, settings)
    on_gpu = Rows(*(values.map(lambda a: a.cuda()), (moments.map(lambda a: a.cuda()),) * 2))
    first, second = (ops.grow(on_gpu, scores.cuda(), settings) for _ in range(2))
    for result, again, correct in zip(*([r.values, *r.companions] for r in (first, second, expected)), strict=True):
        for a, b, c in zip(result.arrays(), again.arrays(), correct.arrays(), strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a.cpu(), c, rtol=1e-5, atol=1e-6)


def test_large_orders_and_relocations_are_those_of_the_cpu() -> None:
    values = random_gaussians(300_000)
    assert torch.equal(ops.morton_order(values.means.cuda()).cpu(), ops.morton_order(values.means))
    results = []
    for device in ("cpu", "cuda"):
        rows = Rows(values.map(lambda a, device=device: a.clone().to(device)), ())
        ops.relocate(rows, -1.0, DrawKey(3, 4))
        results.append(rows.values)
    for a, b in zip(*(r.arrays() for r in results), strict=True):
        apart = (a - b.cpu()).abs().flatten(1).amax(dim=1) if a.dim() > 1 else (a - b.cpu()).abs()
        assert float((apart > 1e-4).double().mean()) < 1e-4  # a draw at the edge of two rows


@pytest.mark.parametrize("sizes", [[(320, 240)] * 5, [(64, 48), (640, 427), (1, 1), (64, 48)]])
def test_a_renderer_makes_the_same_images(sizes: list[tuple[int, int]]) -> None:
    """Its first memory does not suffice for Gaussians as large as these."""
    gaussians = random_gaussians(20_000, scale=0.2).map(lambda a: a.cuda())
    views = [replace(camera(*size, focal=0.8 * size[0]), cx=5.0 * i) for i, size in enumerate(sizes)]
    renderer = Renderer(gaussians, SETTINGS)
    for _ in range(2):
        for view, image in zip(views, renderer.render(views), strict=True):
            expected = ops.render(gaussians, view, SETTINGS)
            assert torch.equal(image.color, expected.color)
            assert torch.equal(image.transmittance, expected.transmittance)
    assert renderer.render([]) == []


def test_a_renderer_makes_what_one_list_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    gaussians, view = random_gaussians(20_000, scale=0.3).map(lambda array: array.cuda()), camera(200, 130, 150.0)
    whole, n_instances = ops.render(gaussians, view, SETTINGS), ops.project(gaussians, view, SETTINGS).n_instances
    assert n_instances > 6 * len(gaussians), "more than a renderer has room for at first"
    monkeypatch.setattr(ops, "MOST_INSTANCES", n_instances // 3)
    for image in Renderer(gaussians, SETTINGS).render([view, view]):
        assert_close(image.color, whole.color)
        assert_close(image.transmittance, whole.transmittance)


def test_two_streams_at_once() -> None:
    view, scenes = camera(320, 240, 260.0), [random_gaussians(50_000, seed=s).map(lambda a: a.cuda()) for s in (1, 2)]
    photo = photo_for(view).cuda()
    expected = [step(scene, view, photo)[0].color for scene in scenes]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(5):
        results = []
        for scene, stream in zip(scenes, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(scene, view, photo)[0].color)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_memory_that_does_not_suffice_leaves_a_usable_state() -> None:
    gaussians, view = random_gaussians(1000).map(lambda a: a.cuda()), camera()
    before = ops.render(gaussians, view, RasterSettings()).color
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(1 << 44, dtype=torch.uint8, device="cuda")
    assert torch.equal(ops.render(gaussians, view, RasterSettings()).color, before)


def test_wrong_places_are_named() -> None:
    gaussians = random_gaussians(10)
    mixed = replace(gaussians.map(lambda a: a.cuda()), sh=gaussians.sh)
    with pytest.raises(ValueError, match="sh: expected a tensor on cuda"):
        ops.render(mixed, camera(), RasterSettings())


@pytest.mark.parametrize(("rate", "moments"), [(0, "full"), (1e-3, "full"), (0, "compact")])
def test_training_on_the_gpu_is_as_good(orbit_capture: Path, tmp_path: Path, rate: float, moments: str) -> None:
    """Also with exposures, and with compact moments."""
    from spaceport_gs.evaluate import evaluate
    from spaceport_gs.scene import load_scene, split
    from spaceport_gs.schedule import TrainSettings
    from spaceport_gs.train import train

    scene = load_scene(orbit_capture / "truth")
    _, held_out = split(scene, 8)
    scores = []
    for device in ("cpu", "cuda"):
        settings = TrainSettings(steps=600, device=device, exposure_rate=rate, moments=moments)
        report = train(scene, settings, tmp_path / device)
        scores.append(evaluate(report.gaussians, held_out).psnr)
    assert all(score is not None and math.isfinite(score) for score in scores)
    assert scores[1] == pytest.approx(scores[0], abs=0.5)
