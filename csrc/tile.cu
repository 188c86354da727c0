// tile: for every tile its instances from front to back. A radix sort of the splats by depth, the listing of their
// instances in that order, and a stable radix sort by tile. Compiled without fused multiply-adds, as project.cu is.
#define SPACEPORT_ISA cuda

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include "launch.cuh"
#include "tile_spans.h"

namespace spaceport {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kDepthBits = 31;  // of the bits of a positive float, which sort like the number

// An Instance as the sort carries it.
using PackedInstance = unsigned long long;
static_assert(sizeof(PackedInstance) == sizeof(Instance));

struct TileScratch {
  uint32_t *depths, *sorted_depths;  // [M]
  int32_t *splats, *by_depth;        // [M]
  int64_t* places;                   // [M] where a splat's instances begin in the list, in the order of depth
  uint32_t *tiles, *sorted_tiles;    // [I]
  PackedInstance* listed;            // [I]
  char* library;
  size_t n_library_bytes;

  static TileScratch of(Arena& arena, int64_t n_splats, int64_t n_instances, int n_tile_bits) {
    TileScratch s;
    s.depths = arena.take<uint32_t>(n_splats);
    s.sorted_depths = arena.take<uint32_t>(n_splats);
    s.splats = arena.take<int32_t>(n_splats);
    s.by_depth = arena.take<int32_t>(n_splats);
    s.places = arena.take<int64_t>(n_splats);
    s.tiles = arena.take<uint32_t>(n_instances);
    s.sorted_tiles = arena.take<uint32_t>(n_instances);
    s.listed = arena.take<PackedInstance>(n_instances);
    size_t bytes[3] = {};
    check(cub::DeviceRadixSort::SortPairs(nullptr, bytes[0], s.depths, s.sorted_depths, s.splats, s.by_depth, n_splats,
                                          0, kDepthBits),
          "tile");
    check(cub::DeviceScan::ExclusiveSum(nullptr, bytes[1], s.places, s.places, n_splats), "tile");
    check(cub::DeviceRadixSort::SortPairs(nullptr, bytes[2], s.tiles, s.sorted_tiles, s.listed, s.listed, n_instances,
                                          0, n_tile_bits),
          "tile");
    s.n_library_bytes = bytes[0];
    for (size_t b : bytes) s.n_library_bytes = b > s.n_library_bytes ? b : s.n_library_bytes;
    s.library = arena.take<char>(int64_t(s.n_library_bytes));
    return s;
  }
};

__global__ void depths_kernel(const Splat* splats, int64_t n, uint32_t* depths, int32_t* numbers) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  depths[i] = __float_as_uint(splats[i].depth);
  numbers[i] = int32_t(i);
}

__global__ void counts_kernel(const int64_t* instance_offsets, const int32_t* by_depth, int64_t n, int64_t* counts) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) counts[i] = instance_offsets[by_depth[i] + 1] - instance_offsets[by_depth[i]];
}

// What a warp lists before it writes it out, so that neighbouring lanes write neighbouring places.
constexpr int kStaged = 256;
struct StagedInstances {
  uint32_t tiles[kStaged];
  PackedInstance listed[kStaged];
};

// A warp lists the instances of 32 splats, which follow each other in the order of depth. A splat that touches other
// tiles than were counted, because it was projected with another camera, lists no more than its share, and fills what
// is left of it with a tile behind the last.
__global__ __launch_bounds__(kThreads) void list_kernel(Projected projected, const int32_t* by_depth,
                                                        const int64_t* places, int tiles_x, int tiles_y,
                                                        int64_t n_instances, uint32_t* tiles, PackedInstance* listed) {
  __shared__ StagedInstances staged_by_warp[kThreads / 32];
  StagedInstances& staged = staged_by_warp[threadIdx.x / 32];
  const int lane = int(threadIdx.x % 32);
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool exists = i < projected.n;
  const int32_t splat = exists ? by_depth[i] : 0;
  const int64_t first = exists ? projected.instance_offsets[splat] : 0;
  const int64_t end = exists ? projected.instance_offsets[splat + 1] : 0;
  const int64_t place = exists ? places[i] : 0;
  const int64_t warp_begin = __shfl_sync(0xffffffffu, place, 0);
  int64_t warp_end = exists ? place + end - first : 0;
  for (int step = 16; step > 0; step /= 2) {
    const int64_t other = __shfl_xor_sync(0xffffffffu, warp_end, step);
    warp_end = other > warp_end ? other : warp_end;
  }
  const int64_t n = warp_end - warp_begin;
  const bool is_staged = n <= kStaged;

  int64_t number = first;
  const auto put = [&](uint32_t tile) {
    const int64_t at = place + number - first;
    const PackedInstance packed = PackedInstance(uint32_t(splat)) | PackedInstance(uint32_t(number)) << 32;
    if (is_staged) {
      staged.tiles[at - warp_begin] = tile;
      staged.listed[at - warp_begin] = packed;
    } else if (at < n_instances) {
      tiles[at] = tile;
      listed[at] = packed;
    }
    ++number;
  };
  if (exists) {
    for_each_tile_row(projected.splats[splat], tiles_x, tiles_y, [&](int row, TileSpan columns) {
      for (int column = columns.begin; column < columns.end && number < end; ++column) {
        put(uint32_t(row * tiles_x + column));
      }
    });
    while (number < end) put(uint32_t(tiles_x * tiles_y));
  }
  if (!is_staged) return;
  __syncwarp();
  for (int64_t at = lane; at < n && warp_begin + at < n_instances; at += 32) {
    tiles[warp_begin + at] = staged.tiles[at];
    listed[warp_begin + at] = staged.listed[at];
  }
}

// Where the tiles' lists begin, from the sorted tiles of all instances.
__global__ void offsets_kernel(const uint32_t* tiles, int64_t n_instances, int64_t n_tiles, int64_t* offsets) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i > n_instances) return;
  const int64_t before = i == 0 ? -1 : int64_t(tiles[i - 1]);
  const int64_t here = i == n_instances ? n_tiles : int64_t(tiles[i]);
  for (int64_t tile = before + 1; tile <= here && tile <= n_tiles; ++tile) offsets[tile] = i;
}

constexpr int kMostTileBits = 32;

int bits_for(uint64_t largest) {
  int bits = 1;
  while (largest >> bits) ++bits;
  return bits;
}

}  // namespace
}  // namespace cuda

size_t tile_scratch(const Cuda&, int64_t n_splats, int64_t n_instances) {
  Arena arena(nullptr);
  cuda::TileScratch::of(arena, n_splats, n_instances, cuda::kMostTileBits);
  return arena.used();
}

void tile(const Cuda& backend, const Projected& projected, const Camera& camera, void* memory, const Tiles& out) {
  const cudaStream_t stream = stream_of(backend);
  const int64_t n_tiles = int64_t(camera.tiles_x()) * camera.tiles_y();
  const int64_t n = projected.n, n_instances = out.n_instances;
  if (n_instances == 0) {
    check(cudaMemsetAsync(out.offsets, 0, size_t(n_tiles + 1) * sizeof(int64_t), stream), "tile");
    return;
  }
  const int n_tile_bits = cuda::bits_for(uint64_t(n_tiles));
  Arena arena(memory);
  const cuda::TileScratch s = cuda::TileScratch::of(arena, n, n_instances, cuda::kMostTileBits);
  const unsigned splat_blocks = n_blocks_of(n, cuda::kThreads);
  cuda::depths_kernel<<<splat_blocks, cuda::kThreads, 0, stream>>>(projected.splats, n, s.depths, s.splats);
  size_t n_bytes = s.n_library_bytes;
  check(cub::DeviceRadixSort::SortPairs(s.library, n_bytes, s.depths, s.sorted_depths, s.splats, s.by_depth, n, 0,
                                        cuda::kDepthBits, stream),
        "tile");
  cuda::counts_kernel<<<splat_blocks, cuda::kThreads, 0, stream>>>(projected.instance_offsets, s.by_depth, n, s.places);
  check(cub::DeviceScan::ExclusiveSum(s.library, n_bytes, s.places, s.places, n, stream), "tile");
  cuda::list_kernel<<<splat_blocks, cuda::kThreads, 0, stream>>>(projected, s.by_depth, s.places, camera.tiles_x(),
                                                                 camera.tiles_y(), n_instances, s.tiles, s.listed);
  check(cub::DeviceRadixSort::SortPairs(s.library, n_bytes, s.tiles, s.sorted_tiles, s.listed,
                                        reinterpret_cast<cuda::PackedInstance*>(out.instances), n_instances, 0,
                                        n_tile_bits, stream),
        "tile");
  cuda::offsets_kernel<<<n_blocks_of(n_instances + 1, cuda::kThreads), cuda::kThreads, 0, stream>>>(
      s.sorted_tiles, n_instances, n_tiles, out.offsets);
  check_launch("tile");
}

}  // namespace spaceport
