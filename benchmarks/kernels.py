"""Speed of every kernel on the random cloud that the field's engines are compared on, at half its usual size.

Each row gives the median time on one core and on all, what was worked through per second, the share of one core's peak that
this is (peak: a loop of fused multiply-adds on registers, measured in the same run), and what bounds it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import machine
import numpy as np
import torch

from spaceport_gs import _engine, ops
from spaceport_gs.density import Statistics
from spaceport_gs.gaussians import Gaussians
from spaceport_gs.types import Camera, Image, RasterSettings

N_GAUSSIANS, SCALE = 250_000, 0.012
WIDTH, HEIGHT, FOCAL = 800, 533, 600.0
N_POINTS, N_CENTROIDS = 20_000, 4_096  # of the palette for SH coefficients
REPEATS = 9


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


def random_cloud(n: int, scale: float) -> Gaussians:
    """Means in a box of 4 × 2.8 × 2 at depth 4; scales log-normal around `scale`."""
    draw = torch.Generator().manual_seed(0)
    box = torch.tensor([4.0, 2.8, 2.0])
    return Gaussians(
        means=(torch.rand(n, 3, generator=draw) - 0.5) * box + torch.tensor([0.0, 0.0, 4.0]),
        log_scales=float(np.log(scale)) + 0.5 * torch.randn(n, 3, generator=draw),
        quaternions=torch.randn(n, 4, generator=draw),
        opacities=2 * torch.randn(n, generator=draw),
        sh=0.2 * torch.randn(n, 16, 3, generator=draw),
    )


def camera() -> Camera:
    return Camera(np.eye(3, 4), FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2, WIDTH, HEIGHT)


def kernels() -> tuple[list[Kernel], dict[str, float]]:
    """The rows to measure, and the figures of the scene they run on."""
    gaussians, view, settings = random_cloud(N_GAUSSIANS, SCALE), camera(), RasterSettings()
    projected = ops.project(gaussians, view, settings)
    tiles = ops.tile(projected, view)
    image = ops.blend(projected, tiles, view, settings)
    cpu = _engine.Cpu()
    n_evaluated, n_blended = _engine.count_pairs(cpu, projected, tiles, view, settings)
    draw = torch.Generator().manual_seed(1)
    photo = torch.randint(0, 256, (HEIGHT, WIDTH, 3), generator=draw, dtype=torch.uint8)
    d_color = ops.loss(image.color, photo, ops.LossSettings()).d_color
    d_image = Image(d_color, torch.zeros(HEIGHT, WIDTH))
    d_splats = ops.blend_vjp(projected, tiles, view, settings, image, d_image)
    d_gaussians = ops.empty_like(gaussians)
    moments = ops.zeros_like(gaussians), ops.zeros_like(gaussians)
    rates = ops.AdamSettings(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, step=1)
    statistics_of = Statistics.empty(N_GAUSSIANS)

    def forward() -> Image:
        splats = ops.project(gaussians, view, settings)
        return ops.blend(splats, ops.tile(splats, view), view, settings)

    def backward() -> Gaussians:
        d = ops.blend_vjp(projected, tiles, view, settings, image, d_image)
        return ops.project_vjp(gaussians, view, settings, projected, d, d_gaussians)

    points, weights = gaussians.sh[:N_POINTS, 1:].reshape(N_POINTS, -1).contiguous(), torch.ones(N_POINTS)
    centroids, totals = points[:N_CENTROIDS].clone(), torch.empty(N_CENTROIDS)
    labels, distances = torch.empty(N_POINTS, dtype=torch.int32), torch.empty(N_POINTS)

    n, n_pixels, n_values = N_GAUSSIANS, WIDTH * HEIGHT, N_GAUSSIANS * 59
    n_instances = len(tiles.instances)
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
            "cache misses of scattered writes",
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
            "project'",
            lambda: ops.project_vjp(gaussians, view, settings, projected, d_splats, d_gaussians),
            n,
            "Gaussians",
            1300,
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
            "cluster, assignment",
            lambda: _engine.cluster_assign(ops.cpu(), points, centroids, labels, distances),
            N_POINTS * N_CENTROIDS,
            "distances",
            2 * n_dimensions,
            "loads of the centroids' values",
        ),
        Kernel(
            "cluster, means",
            lambda: _engine.cluster_update(ops.cpu(), points, labels, weights, centroids, totals),
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


def main() -> None:
    options = machine.arguments(__doc__).parse_args()

    torch.set_num_threads(1)
    n_cores = _engine.Cpu().n_threads
    rows, scene = kernels()
    peak_one, peak_all = peak_flops(1), peak_flops(n_cores)
    gain = peak_all / peak_one
    print(f"{machine.name()}, {n_cores} cores, {_engine.Cpu().simd}, commit {machine.commit()}")
    print(
        f"{scene['gaussians']:,} Gaussians, {scene['instances']:,} instances at {WIDTH}×{HEIGHT}; "
        f"per pixel {scene['pairs_evaluated_per_pixel']:.0f} pairs evaluated, "
        f"{scene['pairs_blended_per_pixel']:.0f} blended"
    )
    print(f"peak of a core {peak_one / 1e9:.1f} GFLOP/s; {n_cores} cores gain {gain:.2f}×\n")
    print(
        f"{'kernel':32}{'1 core':>10}{f'{n_cores} cores':>10}{'gain':>7}{'of FMA':>8}{'per core-second':>24}{'of peak':>9}  bound by"
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
    figures = {
        "simd": _engine.Cpu().simd,
        "peak_flops_one_core": peak_one,
        "fma_gain": gain,
        "scene": scene,
        "rows": results,
    }
    machine.write_json(options.json, figures)


if __name__ == "__main__":
    main()
