// tile: for every tile its instances from front to back. A radix sort of the splats by depth, the listing of their
// instances in that order, and a stable radix sort by tile on the narrowest key. Compiled without fused multiply-adds,
// as project.cu is.
#define SPACEPORT_ISA cuda

#include "queued.cuh"
#include "tile_spans.h"

namespace spaceport {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kListThreads = 256;
constexpr int kSplatsOfThread = 2, kSplatsOfList = kListThreads * kSplatsOfThread;  // that a block lists

struct Grid {
  int tiles_x, tiles_y;

  __host__ __device__ int64_t n_tiles() const { return int64_t(tiles_x) * tiles_y; }
};

int bits_for(uint64_t largest) {
  int bits = 1;
  while (largest >> bits) ++bits;
  return bits;
}

// A key is the number of a tile, or `n_tiles`: a place in the list that holds nothing.
template <class Key>
struct TileScratch {
  SortPair<uint32_t> by_depth[2];  // [M]
  int64_t* first_instances;        // [lists]
  SortPair<Key> by_tile[2];        // [I]

  static TileScratch of(Arena& arena, int64_t n_splats, int64_t n_instances) {
    TileScratch s;
    for (auto& pair : s.by_depth) pair = {arena.take<uint32_t>(n_splats), arena.take<int32_t>(n_splats)};
    s.first_instances = arena.take<int64_t>(n_blocks_of(n_splats, kSplatsOfList));
    for (auto& pair : s.by_tile) pair = {arena.take<Key>(n_instances), arena.take<int32_t>(n_instances)};
    return s;
  }
};

// What a block lists before it writes it out, so that neighbouring lanes write neighbouring places.
constexpr unsigned kStaged = 4096;

template <class Key>
struct List {
  Key* tiles;
  int32_t* splats;
  int64_t n;  // that fit

  __device__ void put(int64_t at, int tile, int32_t splat) const {
    if (at >= n) return;
    tiles[at] = Key(tile);
    splats[at] = splat;
  }
};

// All lanes list the instances of one splat that reaches far: at most `n` from `first` on. Returns how many there are.
// They find the tiles of 32 rows, a row each, then write them one after the other to neighbouring places.
template <class Key>
__device__ unsigned list_far_splat(const Splat& splat, int32_t number, const Grid& grid, int64_t first, unsigned n,
                                   const List<Key>& list) {
  const TileRows tiles(splat, grid.tiles_x, grid.tiles_y);
  const int lane = int(threadIdx.x % 32);
  unsigned listed = 0;
  for (int begin = tiles.rows.begin; begin < tiles.rows.end; begin += 32) {
    const int row = begin + lane;
    TileSpan columns = {0, 0};
    if (row < tiles.rows.end) columns = tiles.columns(row);
    const unsigned own = columns.begin < columns.end ? unsigned(columns.end - columns.begin) : 0;
    const unsigned sum = warp_sum_so_far(own);  // of the rows up to this one
    const unsigned total = __shfl_sync(kAllLanes, sum, 31);
    const int first_tile = row * grid.tiles_x + columns.begin - int(sum - own);  // less the place of its first
    for (unsigned at = unsigned(lane); at - unsigned(lane) < total; at += 32) {
      int of = 0;  // the row in which the place `at` is: the first whose sum is larger
      for (int step = 16; step > 0; step /= 2) {
        if (__shfl_sync(kAllLanes, sum, of + step - 1) <= at) of += step;
      }
      const int tile = __shfl_sync(kAllLanes, first_tile, of) + int(at);
      if (at < total && listed + at < n) list.put(first + listed + at, tile, number);
    }
    listed += total;
  }
  return listed;
}

// A splat of a block that reaches far, and how many instances before it the block has.
struct FarSplat {
  int32_t number;
  unsigned n, first;
};

// The number of the first instance of every kSplatsOfList splats in the order of depth, a warp each. Most keys say
// themselves how many instances their splats have.
__global__ __launch_bounds__(kThreads) void first_instances_kernel(Projected projected,
                                                                   Late<ProjectedCounts> late_counts,
                                                                   SortPair<uint32_t> by_depth, LookBack look_back,
                                                                   int64_t* first_instances) {
  constexpr int kWarps = kThreads / 32, kOfThread = kSplatsOfList / 32;
  __shared__ uint32_t of_warps[kWarps];
  __shared__ int64_t first_of_block;
  __shared__ unsigned block;
  const int64_t n_splats = late_counts.get().n_splats;
  if (int64_t(blockIdx.x) * kWarps * kSplatsOfList >= n_splats) return;
  if (threadIdx.x == 0) block = atomicAdd(look_back.ticket, 1u);
  __syncthreads();
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const int64_t list = int64_t(block) * kWarps + warp, first = list * kSplatsOfList + lane;
  uint32_t keys[kOfThread];
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) {
    const int64_t at = first + i * 32;
    keys[i] = at < n_splats ? by_depth.keys[at] : 0;
  }
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) {
    const int64_t at = first + i * 32;
    const uint32_t n = keys[i] >> kDepthKeyBits;
    if (at < n_splats) sum += n != 0 ? n : projected.touched[by_depth.values[at]].n;
  }
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  if (lane == 0) of_warps[warp] = sum;
  __syncthreads();
  uint32_t before_warp = 0, of_block = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before_warp += of_warps[w];
    of_block += of_warps[w];
  }
  if (warp == 0) {
    const uint64_t before = sum_before(look_back.counts, block, of_block);
    if (lane == 0) first_of_block = int64_t(before);
  }
  __syncthreads();
  if (lane == 0 && list * kSplatsOfList < n_splats) first_instances[list] = first_of_block + before_warp;
}

// A block lists the instances of its splats, which follow each other in the order of depth. What is projected with
// another camera than `grid` stands for lists no more than its share, and fills what is left of it with no tile.
template <class Key>
__global__ __launch_bounds__(kListThreads) void list_kernel(Projected projected, Late<ProjectedCounts> late_counts,
                                                            const int32_t* by_depth, const int64_t* first_instances,
                                                            Grid grid, List<Key> list) {
  constexpr int kSplats = kSplatsOfThread;
  __shared__ Key staged_tiles[kStaged];
  __shared__ int32_t staged_splats[kStaged];
  __shared__ int n_far;
  const int64_t n_splats = late_counts.get().n_splats, first_of_list = int64_t(blockIdx.x) * kSplatsOfList;
  if (first_of_list >= n_splats) return;
  if (threadIdx.x == 0) n_far = 0;
  const int64_t first_of_thread = first_of_list + threadIdx.x * kSplats;
  const int64_t first_of_block = first_instances[blockIdx.x];
  int32_t splats[kSplats];
  TileSet touched[kSplats];
  unsigned n_of_thread = 0;
#pragma unroll
  for (int i = 0; i < kSplats; ++i) splats[i] = first_of_thread + i < n_splats ? by_depth[first_of_thread + i] : -1;
#pragma unroll
  for (int i = 0; i < kSplats; ++i) {
    touched[i] = splats[i] >= 0 ? projected.touched[splats[i]] : TileSet{};
    n_of_thread += touched[i].n;
  }
  const BlockSums sums = block_sums<kListThreads>({0, n_of_thread});
  const bool is_staged = sums.total.instances <= kStaged;
  const auto is_far = [](const TileSet& set) { return set.n > 0 && set.bits == 0; };
  const auto put = [&](unsigned at, int tile, int32_t splat) {
    if (is_staged) {
      staged_tiles[at] = Key(tile);
      staged_splats[at] = splat;
    } else {
      list.put(first_of_block + at, tile, splat);
    }
  };
  unsigned first = sums.before.instances;
#pragma unroll
  for (int i = 0; i < kSplats; ++i) {
    const TileSet& set = touched[i];
    const unsigned end = first + set.n;
    unsigned at = first;
    for (uint64_t left_over = set.bits; left_over != 0 && at < end; left_over &= left_over - 1, ++at) {
      const int bit = __ffsll(int64_t(left_over)) - 1;
      const int row = int(set.corner >> 16) + bit / kTileBoxSide;
      const int column = int(set.corner & 0xffffu) + bit % kTileBoxSide;
      const bool is_inside = row < grid.tiles_y && column < grid.tiles_x;
      put(at, is_inside ? row * grid.tiles_x + column : int(grid.n_tiles()), splats[i]);
    }
    first = end;
  }
  __syncthreads();
  if (is_staged) {
    for (unsigned at = threadIdx.x; at < sums.total.instances; at += kListThreads) {
      list.put(first_of_block + at, staged_tiles[at], staged_splats[at]);
    }
    __syncthreads();  // far splats' places above hold nothing yet
  }
  // Splats that reach far come together, where the background begins: the warps of a block share them.
  static_assert(sizeof(FarSplat) * kListThreads * kSplats <= sizeof(staged_splats), "written out by now");
  FarSplat* far_splats = reinterpret_cast<FarSplat*>(staged_splats);
  first = sums.before.instances;
#pragma unroll
  for (int i = 0; i < kSplats; ++i) {
    if (is_far(touched[i])) far_splats[atomicAdd(&n_far, 1)] = FarSplat{splats[i], touched[i].n, first};
    first += touched[i].n;
  }
  __syncthreads();
  for (int i = int(threadIdx.x) / 32; i < n_far; i += kListThreads / 32) {
    const FarSplat far = far_splats[i];
    const int64_t first = first_of_block + far.first;
    unsigned listed = list_far_splat(projected.splats[far.number], far.number, grid, first, far.n, list);
    for (listed += threadIdx.x % 32; listed < far.n; listed += 32) {
      list.put(first + listed, int(grid.n_tiles()), far.number);
    }
  }
}

// Where the tiles' lists begin, from the sorted tiles of all instances: a thread looks at several that follow each
// other.
template <class Key>
__global__ __launch_bounds__(kThreads) void offsets_kernel(const Key* tiles, SortSize size, int64_t n_tiles,
                                                           int64_t* offsets) {
  constexpr int kKeys = 16 / int(sizeof(Key));
  const int64_t n_instances = size.get();
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kKeys;
  if (first > n_instances) return;
  Key keys[kKeys];
  if (first + kKeys <= n_instances) {
    *reinterpret_cast<uint4*>(keys) = *reinterpret_cast<const uint4*>(tiles + first);
  } else {
    for (int i = 0; i < kKeys; ++i) keys[i] = first + i < n_instances ? tiles[first + i] : Key(n_tiles);
  }
  int64_t before = first == 0 ? -1 : int64_t(tiles[first - 1]);
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    if (first + i > n_instances) return;
    const int64_t here = first + i == n_instances ? n_tiles : int64_t(keys[i]);
    for (int64_t tile = before + 1; tile <= here && tile <= n_tiles; ++tile) offsets[tile] = first + i;
    before = here;
  }
}

// Calls with_key(a number of the type that holds every tile's number, and one more).
template <class WithKey>
auto with_narrowest_key(const Camera& camera, WithKey&& with_key) {
  const Grid grid = {camera.tiles_x(), camera.tiles_y()};
  const int n_bits = bits_for(uint64_t(grid.n_tiles()));
  return n_bits <= 16 ? with_key(uint16_t(), grid, n_bits) : with_key(uint32_t(), grid, n_bits);
}

}  // namespace

TileState TileState::of(Arena& arena, int64_t n_splats, int64_t n_instances, const Camera& camera) {
  const int n_tile_bits = with_narrowest_key(camera, [](auto, const Grid&, int n_bits) { return n_bits; });
  return {LookBack::of(arena, n_splats), SortState::of(arena, n_splats, kDepthKeyBits),
          SortState::of(arena, n_instances, n_tile_bits)};
}

size_t queued_tile_scratch(int64_t n_splats, int64_t n_instances, const Camera& camera) {
  return with_narrowest_key(camera, [&](auto key, const Grid&, int) {
    Arena arena(nullptr);
    TileScratch<decltype(key)>::of(arena, n_splats, n_instances);
    return arena.used();
  });
}

void queue_tile(cudaStream_t stream, const Projected& projected, const Late<ProjectedCounts>& counts,
                const Camera& camera, const TileState& state, void* memory, const Tiles& out) {
  with_narrowest_key(camera, [&](auto key, const Grid& grid, int) {
    using Key = decltype(key);
    const int64_t n = projected.n;
    Arena arena(memory);
    const auto s = TileScratch<Key>::of(arena, n, out.n_instances);
    const ProjectedCounts* place = counts.place;
    const SortSize n_splats = {n, place != nullptr ? &place->n_splats : nullptr};
    const SortSize n_instances = {out.n_instances, place != nullptr ? &place->n_instances : nullptr};
    static_assert(Digits::of(kDepthKeyBits).n_passes % 2 == 1, "the last pass writes where the first one did");
    const SortJob<uint32_t> by_depth = {
        {projected.depth_keys, nullptr}, s.by_depth[0], s.by_depth[1], s.by_depth[0], {kDepthMask, kHidden - 1}};
    queue_sort(stream, state.by_depth, by_depth, {n}, n_splats);
    first_instances_kernel<<<n_blocks_of(n, kThreads / 32 * kSplatsOfList), kThreads, 0, stream>>>(
        projected, counts, by_depth.out, state.look_back, s.first_instances);
    list_kernel<Key><<<n_blocks_of(n, kSplatsOfList), kListThreads, 0, stream>>>(
        projected, counts, by_depth.out.values, s.first_instances, grid,
        List<Key>{s.by_tile[0].keys, s.by_tile[0].values, out.n_instances});
    SortJob<Key> by_tile = {{s.by_tile[0].keys, s.by_tile[0].values}, s.by_tile[1], s.by_tile[0], {}};
    by_tile.out = {s.by_tile[state.by_tile.digits.n_passes % 2].keys, out.splat_from_instance};
    queue_sort(stream, state.by_tile, by_tile, n_instances, n_instances);
    offsets_kernel<<<n_blocks_of(out.n_instances + 1, kThreads * 16 / int64_t(sizeof(Key))), kThreads, 0, stream>>>(
        by_tile.out.keys, n_instances, grid.n_tiles(), out.offsets);
    check_launch("tile");
  });
}

namespace {

struct VerbScratch {
  TileState state;
  size_t n_zeros;
  void* rest;

  static VerbScratch of(Arena& arena, int64_t n_splats, int64_t n_instances, const Camera& camera) {
    VerbScratch s;
    s.state = TileState::of(arena, n_splats, n_instances, camera);
    s.n_zeros = arena.used();
    s.rest = arena.take<char>(int64_t(queued_tile_scratch(n_splats, n_instances, camera)));
    return s;
  }
};

}  // namespace
}  // namespace cuda

size_t tile_scratch(const Cuda&, int64_t n_splats, int64_t n_instances, const Camera& camera) {
  Arena arena(nullptr);
  cuda::VerbScratch::of(arena, n_splats, n_instances, camera);
  return arena.used();
}

void tile(const Cuda& backend, const Projected& projected, const Camera& camera, void* memory, const Tiles& out) {
  const cudaStream_t stream = stream_of(backend);
  const int64_t n_tiles = int64_t(camera.tiles_x()) * camera.tiles_y(), n = projected.n;
  if (out.n_instances == 0) {
    check(cudaMemsetAsync(out.offsets, 0, size_t(n_tiles + 1) * sizeof(int64_t), stream), "tile");
    return;
  }
  Arena arena(memory);
  const cuda::VerbScratch s = cuda::VerbScratch::of(arena, n, out.n_instances, camera);
  check(cudaMemsetAsync(memory, 0, s.n_zeros, stream), "tile");
  const ProjectedCounts counts = {n, out.n_instances};
  cuda::queue_tile(stream, projected, cuda::Late<ProjectedCounts>(counts), camera, s.state, s.rest, out);
}

}  // namespace spaceport
