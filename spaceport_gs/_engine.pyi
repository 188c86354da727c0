"""The C++ extension: the verbs on raw buffers (NumPy arrays or torch tensors). spaceport_gs.ops is the interface for users.

`Cuda` and `cuda_status` are there in builds with the CUDA backend only.
"""

from typing import Any, Literal, TypedDict

from spaceport_gs.gaussians import Gaussians, Rows
from spaceport_gs.types import (
    Array,
    Camera,
    DrawKey,
    GrowthSettings,
    Image,
    Projected,
    RasterSettings,
    Statistics,
    Tiles,
)

TILE_SIZE: int
MOST_INSTANCES: int
ALPHA_CUTOFF: float
SPLAT_STRIDE: int
GROWTH_LISTS: int
TILE_SET_STRIDE: int
STEP_PROGRESS_SIZE: int
SPLAT_GRADIENT_STRIDE: int
SPLAT_DEPTH_GRADIENT_STRIDE: int
ABSOLUTE_COLUMNS: int
DEPTH_KEY_BITS: int
MULTIPLY_ADD_FLOPS: int
VERSION: str

class BuildInfo(TypedDict):
    version: str
    compiler: str
    backends: list[str]
    cuda_architectures: list[str]
    simd: list[str]
    simd_in_use: str

class Cpu:
    def __init__(self, n_threads: int = 0, simd: Literal["auto", "portable", "avx2"] | str = "auto") -> None: ...
    @property
    def n_threads(self) -> int: ...
    @property
    def simd(self) -> str: ...

class Cuda:
    def __init__(self, stream: int) -> None: ...

class StepView:
    def __init__(
        self,
        backend: Cuda,
        camera: Camera,
        photo: Array,
        mask: Array | None,
        exposure: Any | None,
        depth_limits: Array | None,
    ) -> None: ...

class StepGraph:
    def __init__(
        self,
        backend: Cuda,
        values: Gaussians,
        first: Gaussians,
        second: Gaussians,
        sums: Array,
        up_to_date: Array | None,
        sh_log: Array | None,
        statistics: Statistics,
        scratch: Array,
        n_instances: int,
        width: int,
        height: int,
        has_mask: bool,
        has_exposure: bool,
        has_limits: bool,
        settings: RasterSettings,
        loss: Any,
        progress: Array,
        progress_on_host: Array,
    ) -> None: ...
    def launch(self, backend: Cuda, view: StepView, adam: Any, gathers_statistics: bool) -> None: ...

class RenderGraph:
    def __init__(
        self,
        backend: Cuda,
        gaussians: Gaussians,
        scratch: Array,
        n_instances: int,
        width: int,
        height: int,
        settings: RasterSettings,
        most: Array,
    ) -> None: ...
    def launch(self, backend: Cuda, camera: Camera, out: Image) -> None: ...

Backend = Cpu | Cuda

def build_info() -> BuildInfo: ...
def cuda_status() -> str: ...
def project_scratch(backend: Backend, n: int) -> int: ...
def project(
    backend: Backend,
    gaussians: Gaussians,
    camera: Camera,
    settings: RasterSettings,
    scratch: Array,
    out: Projected,
) -> tuple[int, int]: ...
def project_vjp_scratch(backend: Backend, n_splats: int) -> int: ...
def project_vjp(
    backend: Backend,
    gaussians: Gaussians,
    camera: Camera,
    settings: RasterSettings,
    projected: Projected,
    d_splats: Array,
    d_gaussians: Gaussians,
    d_cam_from_world: Array | None,
    scratch: Array | None,
) -> None: ...
def step_scratch(backend: Cuda, n: int, n_instances: int, width: int, height: int, settings: RasterSettings) -> int: ...
def render_scratch(backend: Cuda, n: int, n_instances: int, width: int, height: int) -> int: ...
def catch_up(
    backend: Cuda, values: Gaussians, first: Gaussians, second: Gaussians, up_to_date: Array, adam: Any
) -> None: ...
def sh_log_size(backend: Cuda, n: int) -> int: ...
def flush_sh(backend: Cuda, values: Gaussians, first: Gaussians, second: Gaussians, sh_log: Array) -> None: ...
def tile_scratch(backend: Backend, n_splats: int, n_instances: int, camera: Camera) -> int: ...
def tile(backend: Backend, projected: Projected, camera: Camera, scratch: Array, out: Tiles) -> None: ...
def blend(
    backend: Backend,
    projected: Projected,
    tiles: Tiles,
    camera: Camera,
    settings: RasterSettings,
    out: Image,
) -> None: ...
def hits_size(backend: Backend, n_instances: int, camera: Camera) -> int: ...
def blend_vjp_scratch(
    backend: Backend, n_splats: int, n_instances: int, n_columns: int, settings: RasterSettings
) -> int: ...
def blend_vjp(
    backend: Backend,
    projected: Projected,
    tiles: Tiles,
    camera: Camera,
    settings: RasterSettings,
    image: Image,
    d_image: Image,
    scratch: Array,
    d_splats: Array,
) -> None: ...
def loss_scratch(backend: Backend, width: int, height: int) -> int: ...
def loss(backend: Backend, color: Array, target: Any, settings: Any, scratch: Array, out: Any) -> None: ...
def update(
    backend: Backend,
    values: Gaussians,
    gradient: Gaussians,
    first: Gaussians,
    second: Gaussians,
    settings: Any,
) -> None: ...
def project_vjp_update_scratch(backend: Backend, values: Gaussians) -> int: ...
def project_vjp_update(
    backend: Backend,
    values: Gaussians,
    camera: Camera,
    settings: RasterSettings,
    projected: Projected,
    d_splats: Array,
    first: Gaussians,
    second: Gaussians,
    adam: Any,
    scratch: Array,
) -> None: ...
def density(backend: Backend, projected: Projected, d_splats: Array, camera: Camera, out: Any) -> None: ...
def plan_growth_scratch(backend: Backend, n: int) -> int: ...
def plan_growth(
    backend: Backend, gaussians: Gaussians, scores: Array, settings: GrowthSettings, scratch: Array, sources: Array
) -> tuple[int, int, int]: ...
def grow(
    backend: Backend, rows: Rows, sources: Array, counts: tuple[int, int, int], key: DrawKey, out: Rows
) -> None: ...
def select_rows(backend: Backend, rows: Rows, selected: Array, out: Rows) -> None: ...
def morton_order_scratch(backend: Backend, n: int) -> int: ...
def morton_order(backend: Backend, means: Array, scratch: Array, order: Array) -> None: ...
def relocate_scratch(backend: Backend, n: int) -> int: ...
def relocate(backend: Backend, rows: Rows, min_opacity: float, key: DrawKey, scratch: Array) -> None: ...
def cluster_assign_scratch(backend: Backend, centroids: Array) -> int: ...
def cluster_assign(
    backend: Backend, points: Array, centroids: Array, scratch: Array, labels: Array, distances: Array
) -> None: ...
def cluster_update_scratch(backend: Backend, points: Array, centroids: Array) -> int: ...
def cluster_update(
    backend: Backend,
    points: Array,
    labels: Array,
    weights: Array,
    centroids: Array,
    scratch: Array,
    centroid_weights: Array,
) -> None: ...
def multiply_adds(backend: Backend, n_pieces: int) -> None: ...
def count_pairs(
    cpu: Cpu, projected: Projected, tiles: Tiles, camera: Camera, settings: RasterSettings
) -> tuple[int, int]: ...
