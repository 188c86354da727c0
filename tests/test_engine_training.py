"""What training needs of the engine besides images: loss, Adam, compact moments and statistics."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scenes import assert_close, camera, on, random_gaussians

from spaceport_gs import ops, reference
from spaceport_gs.exposure import Exposure
from spaceport_gs.gaussians import Rows
from spaceport_gs.types import DrawKey, GrowthSettings, RasterSettings

SETTINGS = RasterSettings(background=(0.2, 0.5, 0.7))
RATES = ops.AdamSettings(1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3, step=7)


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
