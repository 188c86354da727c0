"""The door for programs written for gsplat: its values, and this engine's reference behind its signature."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scenes import assert_close

from spaceport_gs import reference
from spaceport_gs.compat.gsplat import rasterization
from spaceport_gs.gaussians import Gaussians
from spaceport_gs.pipeline.doctor import cuda_missing
from spaceport_gs.types import Camera, RasterSettings

Tensors = dict[str, torch.Tensor]
WIDTH, HEIGHT = 24, 18
GOLDEN = Path(__file__).parent / "golden" / "gsplat.npz"
GOLDEN_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "features": {"render_mode": "RGB+D"},
    "sh": {"sh_degree": 3, "render_mode": "RGB+ED"},
    "antialiased": {"sh_degree": 1, "rasterize_mode": "antialiased"},
    "limits": {"near_plane": 3.0, "far_plane": 5.0, "radius_clip": 4.0, "eps2d": 0.1, "render_mode": "D"},
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and (missing := cuda_missing()):
        pytest.skip(missing)
    return str(request.param)


def scene(
    n: int = 40,
    n_cameras: int = 2,
    channels: int = 3,
    coefficients: int = 0,
    batch: tuple[int, ...] = (),
    seed: int = 0,
) -> Tensors:
    """A cloud around (0, 0, 4), and cameras side by side; with `coefficients` its colours are spherical harmonics."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*batch, *shape, generator=draw)

    viewmats = torch.eye(4).repeat(*batch, n_cameras, 1, 1)
    for camera in range(n_cameras):
        c, s = math.cos(0.1 + 0.2 * camera), math.sin(0.1 + 0.2 * camera)
        viewmats[..., camera, :3, :] = torch.tensor([[c, 0, s, 0.1 - 0.2 * camera], [0, 1, 0, -0.05], [-s, 0, c, 0.2]])
    intrinsics = torch.tensor([[27.0, 0, 11], [0, 28, 10], [0, 0, 1]])
    return {
        "means": normal(n, 3) * torch.tensor([1.5, 1.0, 0.7]) + torch.tensor([0.0, 0.0, 4.0]),
        "quats": normal(n, 4),
        "scales": (0.7 * normal(n, 3) + math.log(0.12)).exp(),
        "opacities": (2 * normal(n)).sigmoid(),
        "colors": 0.3 * normal(n, coefficients, 3) if coefficients else normal(n, channels).sigmoid(),
        "viewmats": viewmats,
        "Ks": intrinsics.repeat(*batch, n_cameras, 1, 1),
        "backgrounds": normal(n_cameras, 3 if coefficients else channels).sigmoid(),
    }


def leaves(inputs: Tensors, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensors:
    return {name: x.to(device, dtype).clone().requires_grad_(name != "Ks") for name, x in inputs.items()}


def weights_like(*tensors: torch.Tensor) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(9)
    return [torch.randn(tensor.shape, generator=draw) for tensor in tensors]


def dense(packed: torch.Tensor, meta: dict[str, Any], shape: tuple[int, ...]) -> torch.Tensor:
    """What has a row for each splat, as [..., C, N] with zeros between."""
    rows = packed.detach().new_zeros(*shape, *packed.shape[1:])
    numbers = (meta["batch_ids"] * shape[-2] + meta["camera_ids"]) * shape[-1] + meta["gaussian_ids"]
    rows.view(-1, *packed.shape[1:])[numbers] = packed.detach()
    return rows


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_values(device: str, case: str, packed: bool) -> None:
    with np.load(GOLDEN) as stored:
        golden = {name.split("/")[1]: torch.from_numpy(stored[name]) for name in stored if name.startswith(case + "/")}
    inputs = leaves({name: golden[name] for name in scene()}, device)
    colors, alphas, meta = rasterization(**inputs, width=WIDTH, height=HEIGHT, packed=packed, **GOLDEN_CASES[case])
    meta["means2d"].retain_grad()
    seen = golden["render_alphas"] > (0.05 if "ED" in GOLDEN_CASES[case].get("render_mode", "") else -1)
    assert_close(colors.cpu() * seen, golden["render_colors"] * seen)
    assert_close(alphas, golden["render_alphas"])
    weights = [golden[f"weights_of_{name}"].to(device) for name in ("colors", "alphas")]
    ((colors * weights[0]).sum() + (alphas * weights[1]).sum()).backward()
    for name, tensor in inputs.items():
        if f"d_{name}" in golden and name != "viewmats":
            assert_close(tensor.grad, golden[f"d_{name}"])
    by_pose = inputs["viewmats"].grad.cpu(), golden["d_viewmats"]
    if "sh_degree" in GOLDEN_CASES[case]:
        by_pose = tuple(along_the_pose(d, golden["viewmats"]) for d in by_pose)
    assert_close(*by_pose)

    shape = golden["radii"].shape[:-1]
    d_means2d, radii = meta["means2d"].grad, meta["radii"]
    if packed:
        d_means2d, radii = dense(d_means2d, meta, shape), dense(radii, meta, shape)
    assert_close(d_means2d, golden["d_means2d"])
    is_seen = (radii > 0).all(dim=-1).cpu()
    by_both = is_seen & (golden["radii"] > 0).all(dim=-1)
    assert by_both.sum() > 10
    assert torch.equal(radii.cpu()[by_both], golden["radii"][by_both])
    assert not golden["d_means2d"][~by_both].any()


def along_the_pose(d_viewmats: torch.Tensor, viewmats: torch.Tensor) -> torch.Tensor:
    """The gradient by a small rotation [..., 3] and translation [..., 3] in front of the viewmats."""
    turned = d_viewmats[..., :3, :] @ viewmats[..., :3, :].transpose(-1, -2)
    by_turn = turned - turned.transpose(-1, -2)
    return torch.stack([by_turn[..., 2, 1], by_turn[..., 0, 2], by_turn[..., 1, 0], *d_viewmats[..., :3, 3].unbind(-1)])


def expected(inputs: Tensors, **options: Any) -> tuple[torch.Tensor, torch.Tensor, list[reference.Splats]]:
    """This engine's reference in place of the kernels, for one batch and all its cameras."""
    mode, is_antialiased = options.get("render_mode", "RGB"), options.get("rasterize_mode") == "antialiased"
    degree = options.get("sh_degree")
    settings = RasterSettings(degree or 0, options.get("near_plane", 0.01), options.get("eps2d", 0.3), 0.999)
    colors, alphas, all_splats = [], [], []
    for c, (viewmat, lens) in enumerate(zip(inputs["viewmats"], inputs["Ks"].tolist(), strict=True)):
        own = inputs["colors"]
        own = own[c] if own.dim() == (3 if degree is None else 4) else own
        sh = own.new_zeros(len(own), 1, 3) if degree is None else own
        shapes = inputs["means"], inputs["scales"].log(), inputs["quats"], inputs["opacities"].logit()
        camera = Camera(np.eye(3, 4), lens[0][0], lens[1][1], lens[0][2], lens[1][2], WIDTH, HEIGHT)
        splats = reference.project(Gaussians(*shapes, sh), camera, settings, viewmat[:3])
        opacities = splats.opacities
        if is_antialiased:
            a, b, k = splats.conics.unbind(1)
            blurred = torch.stack([a, b, b, k], dim=1).view(-1, 2, 2).inverse()
            sharp = blurred - settings.low_pass * torch.eye(2).to(blurred)
            opacities = opacities * (sharp.det().clamp(min=0) / blurred.det()).sqrt()
        seen = splats.colors if degree is not None else own[splats.gaussian_from_splat]
        channels = torch.cat(
            [part for name, part in (("RGB", seen), ("D", splats.depths[:, None])) if name in mode], dim=1
        )
        splats.means.retain_grad()
        all_splats.append(splats)
        planes = []
        for few in channels.split(3, dim=1):
            padded = torch.nn.functional.pad(few, (0, 3 - few.shape[1]))
            parts = splats.gaussian_from_splat, splats.means, splats.conics, opacities, padded, splats.depths
            image = reference.blend(reference.Splats(*parts), camera, settings)
            planes.append(image.color[..., : few.shape[1]])
        color, alpha = torch.cat(planes, dim=-1), 1 - image.transmittance[..., None]
        if "backgrounds" in inputs and "RGB" in mode:
            behind = torch.nn.functional.pad(inputs["backgrounds"][c], (0, color.shape[-1] - seen.shape[1]))
            color = color + (1 - alpha) * behind
        if mode.endswith("ED"):
            color = torch.cat([color[..., :-1], color[..., -1:] / alpha.clamp(min=1e-10)], dim=-1)
        colors.append(color)
        alphas.append(alpha)
    return torch.stack(colors), torch.stack(alphas), all_splats


def compare(device: str, inputs: Tensors, **options: Any) -> dict[str, Any]:
    """Values, and the gradients by everything, are those of the reference in double precision."""
    ours, truth = leaves(inputs, device), leaves(inputs, dtype=torch.float64)
    colors, alphas, meta = rasterization(**ours, width=WIDTH, height=HEIGHT, **options)
    true_colors, true_alphas, splats = expected(truth, **options)
    meta["means2d"].retain_grad()
    weights = weights_like(true_colors, true_alphas)
    if "ED" in options.get("render_mode", ""):
        weights[0] = weights[0] * (true_alphas > 0.05)
        assert_close(colors.cpu() * (true_alphas > 0.05), true_colors * (true_alphas > 0.05))
    else:
        assert_close(colors, true_colors)
    assert_close(alphas, true_alphas)
    sum((x * w.to(device)).sum() for x, w in zip((colors, alphas), weights, strict=True)).backward()
    sum((x * w).sum() for x, w in zip((true_colors, true_alphas), weights, strict=True)).backward()
    for name, tensor in ours.items():
        if truth[name].grad is not None:
            assert_close(tensor.grad, truth[name].grad, flips=0.01, size_of_flips=1e-3)
    if options.get("packed", True):
        for c, own in enumerate(splats):
            rows = dense(meta["means2d"].grad, meta, (1, len(splats), len(inputs["means"])))[0, c]
            assert_close(rows[own.gaussian_from_splat.to(device)], own.means.grad)
    return meta


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "D", "ED", "RGB+D", "RGB+ED"])
def test_render_modes(device: str, mode: str, packed: bool) -> None:
    compare(device, scene(seed=1), render_mode=mode, packed=packed)
    compare(device, scene(seed=2, coefficients=16), render_mode=mode, packed=packed, sh_degree=2)


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 8])
def test_any_number_of_channels(device: str, channels: int) -> None:
    compare(device, scene(seed=channels, channels=channels))
    compare(device, scene(seed=channels, channels=channels), render_mode="RGB+D", packed=False)


@pytest.mark.parametrize(("degree", "coefficients"), [(0, 1), (0, 3), (1, 9), (2, 10), (3, 25)])
def test_coefficients_that_the_engine_does_not_hold(device: str, degree: int, coefficients: int) -> None:
    compare(device, scene(seed=3, coefficients=coefficients), sh_degree=degree)


def test_colors_of_each_camera(device: str) -> None:
    inputs = scene(seed=4)
    inputs["colors"] = torch.stack([inputs["colors"], inputs["colors"].flip(0)])
    compare(device, inputs)
    inputs = scene(seed=4, coefficients=4)
    inputs["colors"] = torch.stack([inputs["colors"], inputs["colors"].flip(0)])
    compare(device, inputs, sh_degree=1, packed=False)


@pytest.mark.parametrize("scale", [0.02, 0.2, 1.0])
def test_antialiased(device: str, scale: float) -> None:
    inputs = scene(seed=5)
    inputs["scales"] *= scale
    meta = compare(device, inputs, rasterize_mode="antialiased")
    assert (meta["opacities"] >= 1 / 255).all()
    compare(device, inputs, rasterize_mode="antialiased", eps2d=0.8, packed=False)


def test_extreme_rows(device: str) -> None:
    """Full and no opacity, no size, one size, a negative size, and a place beside the image."""
    inputs = scene(seed=6)
    inputs["opacities"][:3] = torch.tensor([1 - 1e-6, 0.9999, 1e-6])
    inputs["scales"][3:6] = torch.tensor([[1e-6, 1e-6, 1e-6], [2.0, 1e-5, 1e-5], [0.1, 0.1, 0.1]])
    inputs["means"][6] = torch.tensor([9.0, 1.0, 3.0])
    inputs["scales"][6] = 2.0
    compare(device, inputs)
    flipped, limits = {**inputs, "scales": -inputs["scales"]}, dict(inputs, opacities=inputs["opacities"].clone())
    assert torch.equal(rendered(device, inputs), rendered(device, flipped))
    limits["opacities"][0], limits["scales"] = 1.0, inputs["scales"].clone()
    limits["scales"][3] = 0.0
    assert_close(rendered(device, limits), rendered(device, inputs))


def test_parameters_may_be_parts_of_a_larger_tensor(device: str) -> None:
    inputs = scene(seed=15, coefficients=4)
    strided = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in inputs.items()}
    expected_colors = rendered(device, inputs, sh_degree=1)
    inside = {
        name: torch.nn.functional.pad(x.flatten().to(device), (1, 0))[1:].view(x.shape) for name, x in inputs.items()
    }
    assert torch.equal(rendered(device, inside, sh_degree=1), expected_colors)
    assert torch.equal(rendered(device, strided, sh_degree=1), expected_colors)


def rendered(device: str, inputs: Tensors, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
        return rasterization(**on_device, width=WIDTH, height=HEIGHT, **options)[0]


def test_deep_scenes_are_sorted(device: str) -> None:
    """Behind 65,536 times the near plane, too, and of the same depth in another's shadow."""
    inputs = scene(seed=7, n=60)
    inputs["opacities"] = inputs["opacities"].clamp(min=0.4)
    inputs["means"] = inputs["means"] * 10 ** torch.linspace(0, 3, 60)[:, None]
    inputs["scales"] = inputs["scales"] * 10 ** torch.linspace(0, 3, 60)[:, None]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    for name in ("means", "scales"):
        inputs[name] = inputs[name][order]
    compare(device, inputs, near_plane=1e-3)


def test_limits(device: str) -> None:
    inputs = scene(seed=8)
    depths = rasterization(**inputs, width=WIDTH, height=HEIGHT)[2]["depths"]
    far = float(depths.median())
    meta = compare(device, inputs, near_plane=far)
    assert (meta["depths"] >= far).all()
    meta = rasterization(**leaves(inputs, device), width=WIDTH, height=HEIGHT, far_plane=far, radius_clip=3.0)[2]
    assert (meta["depths"] <= far).all()
    assert (meta["radii"].amax(dim=1) > 3).all()
    assert 0 < len(meta["depths"]) < len(depths) / 2
    kept = meta["gaussian_ids"][meta["camera_ids"] == 0].cpu()
    alone = {
        name: x[kept] if name in ("means", "quats", "scales", "opacities", "colors") else x
        for name, x in inputs.items()
    }
    alone = {name: x[:1] if name in ("viewmats", "Ks", "backgrounds") else x for name, x in alone.items()}
    limited = rendered(device, inputs, far_plane=far, radius_clip=3.0)[:1]
    assert torch.equal(limited, rendered(device, alone))


def test_batches_are_scenes_side_by_side(device: str) -> None:
    inputs = scene(seed=9, batch=(2, 1), coefficients=4)
    for packed in (True, False):
        ours = leaves(inputs, device)
        options = {"width": WIDTH, "height": HEIGHT, "sh_degree": 1, "packed": packed, "render_mode": "RGB+D"}
        colors, alphas, meta = rasterization(**ours, **options)
        assert colors.shape == (2, 1, 2, HEIGHT, WIDTH, 4)
        assert alphas.shape == (2, 1, 2, HEIGHT, WIDTH, 1)
        assert (meta["n_batches"], meta["n_cameras"]) == (2, 2)
        (weight,) = weights_like(colors)
        (colors * weight.to(device)).sum().backward()
        for i in range(2):
            alone = leaves({name: x[i, 0] for name, x in inputs.items()}, device)
            own_colors, _, own_meta = rasterization(**alone, **options)
            assert torch.equal(own_colors, colors[i, 0])
            (own_colors * weight[i, 0].to(device)).sum().backward()
            for name, tensor in alone.items():
                if tensor.requires_grad:
                    assert_close(ours[name].grad[i, 0], tensor.grad)
            radii = meta["radii"][meta["batch_ids"] == i] if packed else meta["radii"][i, 0]
            assert torch.equal(radii, own_meta["radii"])


def test_packed_or_not_is_a_matter_of_layout(device: str) -> None:
    inputs = {name: x.to(device) for name, x in scene(seed=10).items()}
    packed, apart = (rasterization(**inputs, width=WIDTH, height=HEIGHT, packed=p) for p in (True, False))
    assert torch.equal(packed[0], apart[0])
    assert torch.equal(packed[1], apart[1])
    for name in ("radii", "means2d", "depths", "conics", "opacities", "tiles_per_gauss"):
        assert torch.equal(dense(packed[2][name], packed[2], (2, 40)), apart[2][name])
    assert apart[2]["gaussian_ids"] is None
    for _, _, meta in (packed, apart):
        assert (meta["width"], meta["height"], meta["tile_width"], meta["tile_height"]) == (WIDTH, HEIGHT, 2, 2)
        assert meta["isect_offsets"].shape == (2, 2, 2)
        counts = torch.bincount(meta["flatten_ids"].long(), minlength=meta["tiles_per_gauss"].numel())
        assert torch.equal(counts.int(), meta["tiles_per_gauss"].flatten())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "RGB+D"])
def test_absolute_gradients(device: str, mode: str, packed: bool) -> None:
    """Of every pixel alone: the reference's splats get a mean for each."""
    inputs = scene(seed=11, n_cameras=1)
    ours = leaves(inputs, device)
    colors, _, meta = rasterization(**ours, width=WIDTH, height=HEIGHT, absgrad=True, packed=packed, render_mode=mode)
    (weight,) = weights_like(colors)
    (colors * weight.to(device)).sum().backward()

    fx, fy, cx, cy = (inputs["Ks"][0, i, j].item() for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    camera = Camera(inputs["viewmats"][0, :3].double().numpy(), fx, fy, cx, cy, WIDTH, HEIGHT)
    shapes = inputs["means"], inputs["scales"].log(), inputs["quats"], inputs["opacities"].logit()
    gaussians = Gaussians(*(x.double() for x in shapes), torch.zeros(40, 1, 3).double())
    settings = RasterSettings(0, 0.01, alpha_max=0.999)
    splats = reference.project(gaussians, camera, settings)
    of_pixels = splats.means[:, :, None, None].repeat(1, 1, HEIGHT, WIDTH).requires_grad_()
    seen = inputs["colors"].double()[splats.gaussian_from_splat]
    parts = splats.gaussian_from_splat, of_pixels, splats.conics, splats.opacities, seen, splats.depths
    image = reference.blend(reference.Splats(*parts), camera, settings)
    background = image.transmittance[..., None] * inputs["backgrounds"][0].double()
    truth = torch.cat([image.color + background, *([image.depth[..., None]] if "D" in mode else [])], dim=-1)
    (truth * weight[0]).sum().backward()
    absolute = meta["means2d"].absgrad
    rows = dense(absolute, meta, (1, 40))[0] if packed else absolute[0]
    assert_close(rows[splats.gaussian_from_splat.to(device)], of_pixels.grad.abs().sum(dim=(2, 3)))
    with pytest.raises(NotImplementedError, match="absgrad"):
        rasterization(**scene(channels=5), width=WIDTH, height=HEIGHT, absgrad=True)


def test_nothing_to_see(device: str) -> None:
    for inputs in (scene(n=0), {**scene(n=3), "opacities": torch.zeros(3)}):
        for options in (
            {"packed": False},
            {"rasterize_mode": "antialiased", "render_mode": "RGB+ED"},
            {"absgrad": True},
        ):
            ours = leaves(inputs, device)
            colors, alphas, meta = rasterization(**ours, width=WIDTH, height=HEIGHT, **options)
            expected_colors = inputs["backgrounds"][:, None, None].expand(2, HEIGHT, WIDTH, 3)
            assert torch.equal(colors[..., :3].cpu(), expected_colors)
            assert not alphas.any()
            (colors.sum() + alphas.sum()).backward()
            assert not ours["means"].grad.any()
            assert meta["flatten_ids"].numel() == 0


def test_what_is_returned_may_be_changed_in_place(device: str) -> None:
    gradients = []
    for in_place in (False, True):
        ours = leaves(scene(seed=13), device)
        backgrounds = ours.pop("backgrounds")
        colors, alphas, _ = rasterization(**ours, width=WIDTH, height=HEIGHT)
        if in_place:
            colors.mul_(2).clamp_(0, 1)
            alphas.mul_(3)
        else:
            colors, alphas = (2 * colors).clamp(0, 1), 3 * alphas
        (colors.sum() + (alphas * backgrounds.mean()).sum()).backward()
        gradients.append(ours["means"].grad)
    assert_close(*gradients)


def test_deterministic_algorithms_of_torch(device: str) -> None:
    """Then gradients are the same bits from run to run, on a GPU too."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = []
        for _ in range(2):
            ours = leaves(scene(n=300, seed=14), device)
            colors, _, _ = rasterization(**ours, width=WIDTH, height=HEIGHT, absgrad=True, packed=False)
            (weight,) = weights_like(colors)
            (colors * weight.to(device)).sum().backward()
            runs.append([tensor.grad for tensor in ours.values() if tensor.requires_grad])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


UNSHARED: dict[str, Any] = {
    "camera_model": "fisheye",
    "sparse_grad": True,
    "distributed": True,
    "covars": torch.eye(3).repeat(40, 1, 1),
    "with_ut": True,
    "with_eval3d": True,
    "radial_coeffs": torch.zeros(2, 6),
    "rolling_shutter": "ROLLING_TOP_TO_BOTTOM",
    "viewmats_rs": torch.zeros(2, 4, 4),
    "sh_degree": 4,
}


@pytest.mark.parametrize("name", UNSHARED)
def test_what_is_not_shared_is_named(name: str) -> None:
    with pytest.raises(NotImplementedError, match=name):
        rasterization(**scene(), width=WIDTH, height=HEIGHT, **{name: UNSHARED[name]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("means", torch.zeros(40, 2)),
        ("quats", torch.zeros(39, 4)),
        ("opacities", torch.zeros(40).double()),
        ("colors", torch.zeros(3, 40, 3)),
        ("viewmats", torch.zeros(2, 3, 4)),
        ("Ks", torch.zeros(1, 3, 3)),
        ("backgrounds", torch.zeros(2, 4)),
        ("render_mode", "depth"),
        ("rasterize_mode", "sharp"),
    ],
)
def test_what_does_not_fit_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        rasterization(**{**scene(), name: value}, width=WIDTH, height=HEIGHT)
    with pytest.raises(ValueError, match="colors"):
        rasterization(**scene(coefficients=4), width=WIDTH, height=HEIGHT, sh_degree=2)


def test_the_signature_is_gsplats() -> None:
    names = """means quats scales opacities colors viewmats Ks width height near_plane far_plane radius_clip eps2d sh_degree
        packed tile_size backgrounds render_mode sparse_grad absgrad rasterize_mode channel_chunk distributed camera_model
        segmented covars with_ut with_eval3d radial_coeffs tangential_coeffs thin_prism_coeffs ftheta_coeffs rolling_shutter
        viewmats_rs"""
    assert list(inspect.signature(rasterization).parameters) == names.split()


def test_a_training_loop_that_was_written_for_gsplat(device: str) -> None:
    """With its habits: activations outside, a gradient kept on the means, statistics from `meta`."""
    target = rendered(device, scene(seed=12, coefficients=4), sh_degree=1)
    start = {name: x.to(device) for name, x in scene(seed=12, coefficients=4).items()}
    draw = torch.Generator().manual_seed(0)
    params = {
        "means": start["means"] + 0.05 * torch.randn(40, 3, generator=draw).to(device),
        "quats": start["quats"],
        "scales": start["scales"].log() + 0.2,
        "opacities": start["opacities"].logit() - 0.5,
        "sh": torch.zeros_like(start["colors"]),
    }
    params = {name: torch.nn.Parameter(value) for name, value in params.items()}
    optimizer = torch.optim.Adam(params.values(), lr=0.02)
    gradient_sums, losses = torch.zeros(40, device=device), []
    for _ in range(60):
        renders, _, info = rasterization(
            params["means"],
            params["quats"],
            params["scales"].exp(),
            params["opacities"].sigmoid(),
            params["sh"],
            start["viewmats"],
            start["Ks"],
            WIDTH,
            HEIGHT,
            sh_degree=1,
            backgrounds=start["backgrounds"],
            absgrad=True,
        )
        info["means2d"].retain_grad()
        loss = (renders - target).abs().mean()
        loss.backward()
        assert (info["means2d"].absgrad >= info["means2d"].grad.abs() - 1e-6).all()
        gradient_sums.index_add_(0, info["gaussian_ids"], info["means2d"].grad.norm(dim=-1))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.35 * losses[0]
    assert gradient_sums.count_nonzero() > 20
