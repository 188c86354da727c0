"""Speed of every kernel on the random clouds that the field's engines are compared on.

On the CPU each row gives the median time on one core and on all, what was worked through per second, the share of one core's
peak that this is (peak: a loop of fused multiply-adds on registers, measured in the same run), and what bounds it. On a GPU
it gives the median time by CUDA events over eight rotating views, with what Python adds to the launches in it.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import machine
import numpy as np
import torch

from spaceport_gs import _engine, ops
from spaceport_gs.exposure import Exposure
from spaceport_gs.gaussians import Gaussians, Rows
from spaceport_gs.render import Renderer
from spaceport_gs.step import StepView, TrainingStep, UpdateRule
from spaceport_gs.types import Camera, Depth, DrawKey, GrowthSettings, Image, RasterSettings, Statistics


@dataclass(frozen=True)
class Cloud:
    """Gaussians in a box of 4 × 2.8 × 2 at depth 4, and the image that they are seen in."""

    n: int
    scale: float
    """Median standard deviation."""
    width: int
    height: int
    focal: float


CLOUDS = {
    "250k-half": Cloud(250_000, 0.012, 800, 533, 600.0),
    "250k": Cloud(250_000, 0.012, 1600, 1066, 1200.0),
    "1M": Cloud(1_000_000, 0.008, 1600, 1066, 1200.0),
    "3M": Cloud(3_000_000, 0.006, 1600, 1066, 1200.0),
}
N_POINTS, N_CENTROIDS = 20_000, 4_096  # of the palette for SH coefficients
GPU_CENTROIDS = 65_536  # for all Gaussians of a cloud
REPEATS = 9
N_VIEWS, GPU_WARM_UP, GPU_REPEATS = 8, 24, 64
RENDER_BATCH = 32  # images that a renderer is asked for at once
OPAQUE = 1e-2  # transmittance below which a pixel counts as opaque: it stops before 1e-4


@dataclass(frozen=True)
class Kernel:
    """What a kernel's time is set against."""

    name: str
    run: Callable[[], object]
    n_items: float
    """Items worked through in one call."""
    unit: str
    flops_per_item: float
    """Floating-point operations that one item needs at least; a fused multiply-add counts as two."""
    bound: str


def random_cloud(cloud: Cloud, device: str) -> Gaussians:
    """Scales log-normal around the cloud's, logit opacities N(0, 2), degree-3 SH."""
    draw = torch.Generator().manual_seed(0)
    n, box = cloud.n, torch.tensor([4.0, 2.8, 2.0])
    return Gaussians(
        means=(torch.rand(n, 3, generator=draw) - 0.5) * box + torch.tensor([0.0, 0.0, 4.0]),
        log_scales=math.log(cloud.scale) + 0.5 * torch.randn(n, 3, generator=draw),
        quaternions=torch.randn(n, 4, generator=draw),
        opacities=2 * torch.randn(n, generator=draw),
        sh=0.2 * torch.randn(n, 16, 3, generator=draw),
    ).map(lambda array: array.to(device))


def camera(cloud: Cloud, view: int = 0) -> Camera:
    """Views turn about the middle of the box, by two degrees each."""
    angle = math.radians(2 * view)
    c, s = math.cos(angle), math.sin(angle)
    turn, middle = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]), np.array([0.0, 0.0, 4.0])
    pose = np.concatenate([turn, (middle - turn @ middle)[:, None]], axis=1)
    return Camera(pose, cloud.focal, cloud.focal, cloud.width / 2, cloud.height / 2, cloud.width, cloud.height)


def photo_for(cloud: Cloud, device: str) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (cloud.height, cloud.width, 3), generator=draw, dtype=torch.uint8).to(device)


def target_of(photo: torch.Tensor) -> ops.LossTarget:
    """With every part that a target may have."""
    return ops.LossTarget(photo, photo[..., 0].contiguous(), Exposure.identity(1, photo.device).values[0])


def kernels(cloud: Cloud) -> tuple[list[Kernel], dict[str, float]]:
    """The rows to measure on the CPU, and the figures of the scene they run on."""
    gaussians, view, settings = random_cloud(cloud, "cpu"), camera(cloud), RasterSettings()
    projected = ops.project(gaussians, view, settings)
    tiles = ops.tile(projected, view)
    image = ops.blend(projected, tiles, view, settings)
    cpu = _engine.Cpu()
    n_evaluated, n_blended = _engine.count_pairs(cpu, projected, tiles, view, settings)
    photo = photo_for(cloud, "cpu")
    d_color = ops.loss(image.color, photo, ops.LossSettings()).d_color
    target = target_of(photo)
    d_image = Image(d_color, torch.zeros_like(image.transmittance))
    d_splats = ops.blend_vjp(projected, tiles, view, settings, image, d_image)
    deep, absolute = replace(settings, depth=Depth.BOTH), replace(settings, absolute_gradients=True)
    deep_image, d_deep_image = ops.blend(projected, tiles, view, deep), replace(d_image, depth=d_image.transmittance)
    d_gaussians, d_pose = ops.empty_like(gaussians), torch.empty(3, 4, dtype=torch.float64)
    moments = ops.zeros_like(gaussians), ops.zeros_like(gaussians)
    rates = ops.AdamSettings(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, step=1)
    statistics_of = Statistics.empty(cloud.n)

    def forward() -> Image:
        splats = ops.project(gaussians, view, settings)
        return ops.blend(splats, ops.tile(splats, view), view, settings)

    def backward() -> Gaussians:
        d = ops.blend_vjp(projected, tiles, view, settings, image, d_image)
        return ops.project_vjp(gaussians, view, settings, projected, d, d_gaussians)

    points, weights = gaussians.sh[:N_POINTS, 1:].reshape(N_POINTS, -1).contiguous(), torch.ones(N_POINTS)
    centroids = points[:N_CENTROIDS].clone()
    labels, _ = ops.cluster_assign(points, centroids)

    growing, growth = Rows(gaussians, moments), growth_settings(gaussians)
    scores = torch.rand(cloud.n, generator=torch.Generator().manual_seed(2))

    n, n_pixels, n_values = cloud.n, cloud.width * cloud.height, cloud.n * 59
    n_instances = len(tiles.splat_from_instance)
    n_dimensions = points.shape[1]
    rows = [
        Kernel(
            "project",
            lambda: ops.project(gaussians, view, settings),
            n,
            "Gaussians",
            620,
            "gathering 59 floats a row",
        ),
        Kernel(
            "tile",
            lambda: ops.tile(projected, view),
            n_instances,
            "instances",
            20,
            "latency: a logarithm and roots a splat, scattered writes",
        ),
        Kernel(
            "blend",
            lambda: ops.blend(projected, tiles, view, settings),
            n_evaluated,
            "pairs",
            23,
            "instruction issue; vectors outside the ellipse are skipped",
        ),
        Kernel(
            "blend, with depths",
            lambda: ops.blend(projected, tiles, view, deep),
            n_evaluated,
            "pairs",
            23,
            "as blend, and four more loads and stores a vector",
        ),
        Kernel(
            "forward (project, tile, blend)",
            forward,
            n_evaluated,
            "pairs",
            23,
            "blend for half of it",
        ),
        Kernel(
            "blend'",
            lambda: ops.blend_vjp(projected, tiles, view, settings, image, d_image),
            n_evaluated,
            "pairs",
            52,
            "instruction issue and one division a vector",
        ),
        Kernel(
            "blend', with depth",
            lambda: ops.blend_vjp(projected, tiles, view, deep, deep_image, d_deep_image),
            n_evaluated,
            "pairs",
            52,
            "as blend'",
        ),
        Kernel(
            "blend', absolute gradients",
            lambda: ops.blend_vjp(projected, tiles, view, absolute, image, d_image),
            n_evaluated,
            "pairs",
            62,
            "as blend'",
        ),
        Kernel(
            "project'",
            lambda: ops.project_vjp(gaussians, view, settings, projected, d_splats, d_gaussians),
            n,
            "Gaussians",
            1300,
            "memory: 118 floats a row",
        ),
        Kernel(
            "project', with the pose",
            lambda: ops.project_vjp(gaussians, view, settings, projected, d_splats, d_gaussians, d_pose),
            n,
            "Gaussians",
            1400,
            "memory: 118 floats a row",
        ),
        Kernel(
            "backward (blend', project')",
            backward,
            n_evaluated,
            "pairs",
            52,
            "blend' for most of it",
        ),
        Kernel(
            "loss and gradient",
            lambda: ops.loss(image.color, photo, ops.LossSettings()),
            n_pixels,
            "pixels",
            1180,
            "loads of the filters' taps",
        ),
        Kernel(
            "loss with a mask and an exposure",
            lambda: ops.loss(image.color, target, ops.LossSettings()),
            n_pixels,
            "pixels",
            1240,
            "loads of the filters' taps",
        ),
        Kernel(
            "update",
            lambda: ops.update(gaussians, d_gaussians, *moments, rates),
            n_values,
            "values",
            14,
            "memory: 28 bytes a value",
        ),
        Kernel(
            "density",
            lambda: ops.density(projected, d_splats, view, statistics_of),
            n,
            "Gaussians",
            12,
            "memory",
        ),
        Kernel(
            "growth (refinement)",
            lambda: ops.grow(growing, scores, growth),
            3 * n_values,
            "values",
            1,
            "memory: 8 bytes a value",
        ),
        Kernel(
            "Morton order",
            lambda: ops.morton_order(gaussians.means),
            n,
            "Gaussians",
            30,
            "comparisons of a sort on one core",
        ),
        Kernel(
            "cluster, assignment",
            lambda: ops.cluster_assign(points, centroids),
            N_POINTS * N_CENTROIDS,
            "distances",
            2 * n_dimensions,
            "loads of the centroids' values",
        ),
        Kernel(
            "cluster, means",
            lambda: ops.cluster_update(points, labels, weights, centroids),
            N_POINTS * n_dimensions,
            "values",
            2,
            "memory: points in the order of their labels",
        ),
    ]
    scene = {
        "gaussians": n,
        "visible": len(projected.splats),
        "instances": n_instances,
        "pairs_evaluated_per_pixel": n_evaluated / n_pixels,
        "pairs_blended_per_pixel": n_blended / n_pixels,
    }
    return rows, scene


def median_seconds(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_flops(n_threads: int) -> float:
    cpu, n_pieces = _engine.Cpu(n_threads), 4 * n_threads
    seconds = median_seconds(lambda: _engine.multiply_adds(cpu, n_pieces))
    return float(n_pieces * _engine.MULTIPLY_ADD_FLOPS / seconds)


def measure_cpu(cloud: Cloud) -> dict[str, object]:
    """Prints the table, and returns its figures."""
    torch.set_num_threads(1)
    n_cores = _engine.Cpu().n_threads
    rows, scene = kernels(cloud)
    peak_one, peak_all = peak_flops(1), peak_flops(n_cores)
    gain = peak_all / peak_one
    print(f"{machine.name()}, {n_cores} cores, {_engine.Cpu().simd}, commit {machine.commit()}")
    print(
        f"{scene['gaussians']:,} Gaussians, {scene['instances']:,} instances at {cloud.width}×{cloud.height}; "
        f"per pixel {scene['pairs_evaluated_per_pixel']:.0f} pairs evaluated, "
        f"{scene['pairs_blended_per_pixel']:.0f} blended"
    )
    print(f"peak of a core {peak_one / 1e9:.1f} GFLOP/s; {n_cores} cores gain {gain:.2f}×\n")
    print(
        f"{'kernel':32}{'1 core':>10}{f'{n_cores} cores':>10}{'gain':>7}{'of FMA':>8}{'per core-second':>24}{'of peak':>9}"
        "  bound by"
    )
    results = []
    for row in rows:
        ops.use_cpu(1)
        one = median_seconds(row.run)
        ops.use_cpu(n_cores)
        several = median_seconds(row.run)
        rate, share = row.n_items / one, row.n_items * row.flops_per_item / one / peak_one
        print(
            f"{row.name:32}{one * 1e3:7.1f} ms{several * 1e3:7.1f} ms{one / several:6.2f}×{one / several / gain:8.2f}"
            f"{rate / 1e6:12,.1f} M {row.unit:9}{share:9.0%}  {row.bound}"
        )
        results.append(
            {
                "kernel": row.name,
                "seconds_one_core": one,
                "seconds_all_cores": several,
                "items_per_core_second": rate,
                "unit": row.unit,
                "share_of_peak": share,
                "bound": row.bound,
            }
        )
    return {
        "simd": _engine.Cpu().simd,
        "peak_flops_one_core": peak_one,
        "fma_gain": gain,
        "scene": scene,
        "rows": results,
    }


def growth_settings(gaussians: Gaussians) -> GrowthSettings:
    """Of rows with scores between 0 and 1, 5 % are cloned, 2 % split and 3 % dropped."""
    sizes = np.quantile(gaussians.log_scales.amax(dim=1).cpu().numpy(), 5 / 7)
    faint = np.quantile(gaussians.opacities.cpu().numpy(), 0.03)
    return GrowthSettings(0.93, float(sizes), float(faint), DrawKey(0, 1))


def gpu_kernels(cloud: Cloud) -> dict[str, Callable[[int], object]]:
    """What to measure on a GPU, each for a view."""
    gaussians, settings, photo = random_cloud(cloud, "cuda"), RasterSettings(), photo_for(cloud, "cuda")
    moments = ops.AdamMoments(ops.zeros_like(gaussians), ops.zeros_like(gaussians))
    d_gaussians, rates = ops.empty_like(gaussians), ops.AdamSettings(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, step=1)
    statistics_of = Statistics.empty(cloud.n, "cuda")
    target, valid = target_of(photo), ops.LossSettings(padding=ops.SsimPadding.VALID)
    views = [camera(cloud, i) for i in range(N_VIEWS)]
    projected = [ops.project(gaussians, view, settings) for view in views]
    tiles = [ops.tile(p, view) for p, view in zip(projected, views, strict=True)]
    images = [ops.blend(p, t, view, settings) for p, t, view in zip(projected, tiles, views, strict=True)]
    d_images = [
        Image(ops.loss(image.color, photo, ops.LossSettings()).d_color, torch.zeros_like(image.transmittance))
        for image in images
    ]

    deep, ordered = replace(settings, depth=Depth.BOTH), replace(settings, deterministic=True)
    absolute = replace(settings, absolute_gradients=True)
    deep_images = [ops.blend(p, t, view, deep) for p, t, view in zip(projected, tiles, views, strict=True)]
    d_deep_images = [replace(d, depth=d.color[..., 0].contiguous()) for d in d_images]

    def blend_vjp(i: int) -> torch.Tensor:
        return ops.blend_vjp(projected[i], tiles[i], views[i], settings, images[i], d_images[i])

    d_splats = [blend_vjp(i) for i in range(N_VIEWS)]
    d_pose = torch.empty(3, 4, dtype=torch.float64, device="cuda")

    def forward(i: int) -> tuple[object, ...]:
        p = ops.project(gaussians, views[i], settings)
        t = ops.tile(p, views[i])
        return p, t, ops.blend(p, t, views[i], settings)

    renderer = Renderer(gaussians, settings)
    points, weights = gaussians.sh[:, 1:].reshape(cloud.n, -1).contiguous(), torch.ones(cloud.n, device="cuda")
    centroids = points[:GPU_CENTROIDS].clone()
    labels, _ = ops.cluster_assign(points, centroids)

    rows, growth = Rows(gaussians, (moments.first, moments.second)), growth_settings(gaussians)
    scores = torch.rand(cloud.n, generator=torch.Generator().manual_seed(2)).to("cuda")
    order = ops.morton_order(gaussians.means)
    in_order, relocated = ops.select_rows(rows, order), ops.select_rows(rows, order)
    compact = moments.stored(ops.MomentStorage.COMPACT)
    compact_rows = Rows(gaussians, (compact.first, compact.second))
    exposures = Exposure.identity(N_VIEWS, "cuda")

    def steps(
        rule: UpdateRule,
        of: Rows = rows,
        settings: RasterSettings = settings,
        target: ops.LossTarget | None = None,
        limits: bool = True,
    ) -> Callable[[int], None]:
        step_views = [StepView(view, photo, settings, ops.LossSettings()) for view in views]
        if target is not None:
            step_views = [
                replace(view, mask=target.mask, exposure=exposures.of(i)) for i, view in enumerate(step_views)
            ]
        recorded = TrainingStep(of.values, ops.AdamMoments(*of.companions), statistics_of, rule)
        recorded.uses_depth_limits = limits
        numbers = itertools.count(1)
        return lambda i: recorded.run(step_views[i], replace(rates, step=next(numbers)))

    return {
        "project": lambda i: ops.project(gaussians, views[i], settings),
        "tile": lambda i: ops.tile(projected[i], views[i]),
        "blend": lambda i: ops.blend(projected[i], tiles[i], views[i], settings),
        "blend, with depths": lambda i: ops.blend(projected[i], tiles[i], views[i], deep),
        "forward (project, tile, blend)": forward,
        f"renderer, a batch of {RENDER_BATCH} images": lambda i: renderer.render(views * (RENDER_BATCH // N_VIEWS)),
        "loss and gradient": lambda i: ops.loss(images[i].color, photo, ops.LossSettings()),
        "loss with valid padding": lambda i: ops.loss(images[i].color, photo, valid),
        "loss with a mask and an exposure": lambda i: ops.loss(images[i].color, target, ops.LossSettings()),
        "blend'": blend_vjp,
        "blend', deterministic": lambda i: ops.blend_vjp(
            projected[i], tiles[i], views[i], ordered, images[i], d_images[i]
        ),
        "blend', with depth": lambda i: ops.blend_vjp(
            projected[i], tiles[i], views[i], deep, deep_images[i], d_deep_images[i]
        ),
        "blend', absolute gradients": lambda i: ops.blend_vjp(
            projected[i], tiles[i], views[i], absolute, images[i], d_images[i]
        ),
        "project'": lambda i: ops.project_vjp(gaussians, views[i], settings, projected[i], d_splats[i], d_gaussians),
        "project', with the pose": lambda i: ops.project_vjp(
            gaussians, views[i], settings, projected[i], d_splats[i], d_gaussians, d_pose
        ),
        "update": lambda i: ops.update(gaussians, d_gaussians, moments.first, moments.second, rates),
        "project' and update in one": lambda i: ops.project_vjp_update(
            gaussians, views[i], settings, projected[i], d_splats[i], moments, rates
        ),
        "density": lambda i: ops.density(projected[i], d_splats[i], views[i], statistics_of),
        "growth (refinement)": lambda i: ops.grow(rows, scores, growth),
        "growth, at a limit": lambda i: ops.grow(rows, scores, replace(growth, max_rows=cloud.n + cloud.n // 50)),
        "Morton order": lambda i: ops.morton_order(gaussians.means),
        "selection of all rows": lambda i: ops.select_rows(rows, order),
        "relocation": lambda i: ops.relocate(relocated, growth.min_opacity, growth.key),
        "cluster, assignment": lambda i: ops.cluster_assign(points, centroids),
        "cluster, means": lambda i: ops.cluster_update(points, labels, weights, centroids),
        "whole step, all rows": steps(UpdateRule.ALL),
        "whole step, all rows in order": steps(UpdateRule.ALL, in_order),
        "whole step, with masks and exposures": steps(UpdateRule.ALL, target=target),
        "whole step, all rows, compact moments": steps(UpdateRule.ALL, compact_rows),
        "whole step, SH deferred": steps(UpdateRule.DEFERRED),
        "whole step": steps(UpdateRule.CONTRIBUTING),
        "whole step, compact moments": steps(UpdateRule.CONTRIBUTING, compact_rows),
        "whole step, no depth limits": steps(UpdateRule.CONTRIBUTING, limits=False),
        "whole step, deterministic": steps(UpdateRule.CONTRIBUTING, rows, ordered),
        "whole step, in order": steps(UpdateRule.CONTRIBUTING, in_order),
    }


def gsplat_kernels(cloud: Cloud) -> dict[str, Callable[[int], object]]:
    """The peer on the same Gaussians and views, with its own Python: forward, and a whole step with this engine's loss and
    torch's fused Adam. Empty where gsplat is not installed."""
    try:
        from gsplat import rasterization
    except ImportError:
        return {}
    gaussians, photo = random_cloud(cloud, "cuda"), photo_for(cloud, "cuda")
    leaves = [array.requires_grad_() for array in gaussians.arrays()]
    adam = torch.optim.Adam([{"params": [leaf], "lr": 0.0} for leaf in leaves], eps=1e-15, fused=True)
    views = [camera(cloud, i) for i in range(N_VIEWS)]
    poses = [torch.eye(4)[None] for _ in views]
    for pose, view in zip(poses, views, strict=True):
        pose[0, :3] = torch.as_tensor(view.cam_from_world)
    on_gpu = [pose.cuda() for pose in poses]
    lens = torch.tensor([[cloud.focal, 0, cloud.width / 2], [0, cloud.focal, cloud.height / 2], [0, 0, 1]])[None].cuda()

    def forward(i: int) -> torch.Tensor:
        color, _, _ = rasterization(
            leaves[0], leaves[2], leaves[1].exp(), leaves[3].sigmoid(), leaves[4], on_gpu[i], lens, cloud.width,
            cloud.height, near_plane=0.2, sh_degree=3, packed=False,
        )  # fmt: skip
        return color[0]

    def forward_only(i: int) -> None:
        with torch.no_grad():
            forward(i)

    def step(i: int) -> None:
        color = forward(i)
        color.backward(ops.loss(color.detach().contiguous(), photo, ops.LossSettings()).d_color)
        adam.step()
        adam.zero_grad(set_to_none=True)

    return {"gsplat: forward": forward_only, "gsplat: whole step": step}


def training_memory(cloud: Cloud, storage: ops.MomentStorage) -> float:
    """GiB that training takes at most, beside the photos: Gaussians, moments, statistics, and all that a step needs."""
    gaussians, photo = random_cloud(cloud, "cuda"), photo_for(cloud, "cuda")
    moments = ops.AdamMoments.zeros(gaussians, storage)
    step = TrainingStep(gaussians, moments, Statistics.empty(cloud.n, "cuda"), UpdateRule.CONTRIBUTING)
    views = [StepView(camera(cloud, i), photo, RasterSettings(), ops.LossSettings()) for i in range(N_VIEWS)]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for i in range(2 * N_VIEWS):
        step.run(views[i % N_VIEWS], ops.AdamSettings(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, step=i + 1))
    step.settle()
    return (torch.cuda.max_memory_allocated() - photo.numel()) / 2**30


def gpu_scene(cloud: Cloud) -> dict[str, float]:
    """What the first view of the cloud holds."""
    gaussians, view, settings = random_cloud(cloud, "cuda"), camera(cloud), RasterSettings()
    projected = ops.project(gaussians, view, settings)
    tiles = ops.tile(projected, view)
    image = ops.blend(projected, tiles, view, settings)
    lists = tiles.offsets.diff()
    d_image = Image(torch.ones_like(image.color), torch.zeros_like(image.transmittance))
    d_splats = ops.blend_vjp(projected, tiles, view, settings, image, d_image)
    return {
        "visible": len(projected.splats),
        "contributing": int((d_splats != 0).any(dim=1).sum()),
        "instances": int(lists.sum()),
        "list_mean": float(lists.float().mean()),
        "list_longest": int(lists.max()),
        "opaque_share": float((image.transmittance < OPAQUE).float().mean()),
    }


def measure_cuda(cloud: Cloud, prefixes: list[str]) -> dict[str, object]:
    """Prints the table, and returns its figures."""
    scene = gpu_scene(cloud)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, commit {machine.commit()}")
    print(
        f"{cloud.n:,} Gaussians at {cloud.width}×{cloud.height}: {scene['visible']:,} visible, "
        f"{scene['contributing']:,} contributing; {scene['instances']:,} instances, {scene['list_mean']:,.0f} a tile, "
        f"{scene['list_longest']:,} at most; {scene['opaque_share']:.0%} of the pixels opaque"
    )
    memory = {storage.value: training_memory(cloud, storage) for storage in ops.MomentStorage}
    print("peak memory of training: " + ", ".join(f"{gib:.2f} GiB ({name} moments)" for name, gib in memory.items()))
    print(f"{'kernel':32}{'median':>10}{'10 %':>10}{'90 %':>10}")
    rows = []
    for name, run in (gpu_kernels(cloud) | gsplat_kernels(cloud)).items():
        if not any(name.startswith(prefix) for prefix in prefixes):
            continue
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(GPU_WARM_UP + GPU_REPEATS + 1)]
        for i, mark in enumerate(marks):  # one behind the other, as in training: nobody waits in between
            mark.record()
            run(i % N_VIEWS)
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in pairwise(marks[GPU_WARM_UP:])]
        fast, median, slow = np.quantile(times, [0.1, 0.5, 0.9])
        print(f"{name:32}{median:7.3f} ms{fast:7.3f} ms{slow:7.3f} ms")
        rows.append({"kernel": name, "milliseconds": median, "milliseconds_10": fast, "milliseconds_90": slow})
    gpu = {"gpu": torch.cuda.get_device_name(), "driver": machine.driver()}
    return {**gpu, "n": cloud.n, "scene": scene, "training_gib": memory, "rows": rows}


def main() -> None:
    parser = machine.arguments(__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cloud", choices=list(CLOUDS), default="250k-half")
    parser.add_argument("--rows", nargs="+", default=[""], help="on a GPU, only the rows that begin with one of these")
    options = parser.parse_args()
    cloud = CLOUDS[options.cloud]
    measured = measure_cuda(cloud, options.rows) if options.device == "cuda" else measure_cpu(cloud)
    machine.write_json(options.json, {"cloud": options.cloud, **measured})


if __name__ == "__main__":
    main()
