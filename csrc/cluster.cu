// cluster: k-means. Assignment is a matrix product in disguise, |c|^2 - 2 p.c, whose rows are searched for their least
// entry while they are in registers. Every number is rounded as on a CPU with AVX2, so that both find the same.
#include <cub/device/device_radix_sort.cuh>

#include "launch.cuh"
#include "warp.cuh"

namespace spaceport {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kTile = 128;    // points of a block, and centroids that it looks at together
constexpr int kOfThread = 8;  // of either: 64 sums in registers
constexpr int kLanesAcross = 8, kWarpsAcross = 2;
constexpr int kWarpPoints = kTile / (kThreads / 32 / kWarpsAcross), kWarpCentroids = kTile / kWarpsAcross;
constexpr float kFar = 3e38f;

// Centroids in tiles of 128, each [D][128] with D filled up with zeros to whole chunks of dimensions.
struct AssignScratch {
  float* values;   // [n_tiles, D, 128]
  float* squares;  // [n_tiles, 128]; far where there is no centroid
  int64_t n_tiles;

  static AssignScratch of(Arena& arena, int64_t n_centroids, int n_padded) {
    const int64_t n_tiles = n_blocks_of(n_centroids, kTile);
    return {arena.take<float>(n_tiles * kTile * n_padded), arena.take<float>(n_tiles * kTile), n_tiles};
  }
};

// Dimensions that are in shared memory at once. SH of degrees 1 and 3 have multiples of nine, of degree 2 of eight.
int chunk_for(int64_t n_dimensions) {
  return (n_dimensions + 8) / 9 * 9 <= (n_dimensions + 7) / 8 * 8 ? 9 : 8;
}
int padded_for(int64_t n_dimensions) {
  const int chunk = chunk_for(n_dimensions);
  return int((n_dimensions + chunk - 1) / chunk * chunk);
}

__global__ __launch_bounds__(kThreads) void arrange_kernel(Points centroids, int n_padded, AssignScratch out) {
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= out.n_tiles * kTile) return;
  const bool is_there = c < centroids.n;
  float square = 0.0f;
  for (int d = 0; d < n_padded; ++d) {
    const float value =
        is_there && d < centroids.n_dimensions ? centroids.values[c * centroids.n_dimensions + d] : 0.0f;
    out.values[(c / kTile * n_padded + d) * kTile + c % kTile] = value;
    square = __fadd_rn(square, __fmul_rn(value, value));
  }
  out.squares[c] = is_there ? square : kFar;
}

// Ties go to the lowest label.
struct Nearest {
  float distance;
  int label;

  __device__ void take(const Nearest& other) {
    if (other.distance < distance || (other.distance == distance && other.label < label)) *this = other;
  }
};

__device__ inline void load8(const float* from, int apart, float* values) {
  const float4 a = *reinterpret_cast<const float4*>(from), b = *reinterpret_cast<const float4*>(from + apart);
  values[0] = a.x, values[1] = a.y, values[2] = a.z, values[3] = a.w;
  values[4] = b.x, values[5] = b.y, values[6] = b.z, values[7] = b.w;
}

// A warp has 32 points and 64 centroids of the tiles, a lane two fours of each.
struct Place {
  int points, centroids;  // first of the lane's

  __device__ static Place mine() {
    const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
    return {warp / kWarpsAcross * kWarpPoints + lane / kLanesAcross * 4,
            warp % kWarpsAcross * kWarpCentroids + lane % kLanesAcross * 4};
  }
  __device__ static int point(int i) { return i % 4 + i / 4 * (kWarpPoints / 2); }
  __device__ static int centroid(int i) { return i % 4 + i / 4 * (kWarpCentroids / 2); }
};

template <int kChunk>
__device__ void add_products(const float* points, const float* centroids, const Place& place,
                             float (&products)[kOfThread][kOfThread]) {
#pragma unroll
  for (int d = 0; d < kChunk; ++d) {
    float p[kOfThread], c[kOfThread];
    load8(points + d * kTile + place.points, kWarpPoints / 2, p);
    load8(centroids + d * kTile + place.centroids, kWarpCentroids / 2, c);
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
#pragma unroll
      for (int j = 0; j < kOfThread; ++j) products[i][j] = fmaf(p[i], c[j], products[i][j]);
    }
  }
}

// Most tiles hold nothing nearer for a point, so that which of the eight is the nearest is seldom asked.
__device__ inline void search(float (&products)[kOfThread][kOfThread], const float* squares, int first,
                              Nearest (&nearest)[kOfThread]) {
  float square[kOfThread];
  load8(squares + first, kWarpCentroids / 2, square);
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) {
    float least = kFar;
#pragma unroll
    for (int j = 0; j < kOfThread; ++j) {
      products[i][j] = fmaf(-2.0f, products[i][j], square[j]);
      least = fminf(least, products[i][j]);
    }
    if (least < nearest[i].distance) {
      int found = 0;
#pragma unroll
      for (int j = kOfThread - 1; j >= 0; --j) {
        if (products[i][j] == least) found = Place::centroid(j);
      }
      nearest[i] = {least, first + found};
    }
  }
}

template <int kChunk>
__global__ __launch_bounds__(kThreads, 2) void assign_kernel(Points points, int n_padded, AssignScratch centroids,
                                                             int32_t* labels, float* distances) {
  constexpr int kChunkFours = kChunk * kTile / 4, kRounds = (kChunkFours + kThreads - 1) / kThreads;
  __shared__ __align__(16) float of_points[kMaxPointDimensions * kTile];
  __shared__ __align__(16) float4 of_centroids[2][kChunkFours];
  const int thread = int(threadIdx.x), n_dimensions = int(points.n_dimensions);
  const int64_t first_point = int64_t(blockIdx.x) * kTile;
  for (int i = thread; i < kTile * n_padded; i += kThreads) {
    const int d = i % n_padded;
    const int64_t row = first_point + i / n_padded;
    const bool is_there = row < points.n && d < n_dimensions;
    of_points[d * kTile + i / n_padded] = is_there ? points.values[row * n_dimensions + d] : 0.0f;
  }
  const float4* chunks = reinterpret_cast<const float4*>(centroids.values);
  const int n_chunks = n_padded / kChunk;
  const int64_t n_all_chunks = centroids.n_tiles * n_chunks;
  for (int i = thread; i < kChunkFours; i += kThreads) of_centroids[0][i] = chunks[i];
  __syncthreads();

  const Place place = Place::mine();
  Nearest nearest[kOfThread];
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) nearest[i] = {kFar, 0};
  int64_t done = 0;  // chunks
  for (int64_t tile = 0; tile < centroids.n_tiles; ++tile) {
    float products[kOfThread][kOfThread] = {};
    for (int chunk = 0; chunk < n_chunks; ++chunk) {
      float4 next[kRounds];
      const bool goes_on = ++done < n_all_chunks;
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        const int i = thread + r * kThreads;
        if (goes_on && i < kChunkFours) next[r] = chunks[done * kChunkFours + i];
      }
      const float* these = reinterpret_cast<const float*>(of_centroids[(done - 1) % 2]);
      add_products<kChunk>(of_points + chunk * kChunk * kTile, these, place, products);
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        const int i = thread + r * kThreads;
        if (goes_on && i < kChunkFours) of_centroids[done % 2][i] = next[r];
      }
      __syncthreads();
    }
    search(products, centroids.squares, int(tile) * kTile + place.centroids, nearest);
  }

  Nearest(*found)[kTile] = reinterpret_cast<Nearest(*)[kTile]>(of_centroids);  // which nobody reads any more
  static_assert(sizeof(Nearest) * kWarpsAcross * kTile <= sizeof(of_centroids), "room for the nearest of each warp");
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) {
    for (int step = 1; step < kLanesAcross; step *= 2) {
      nearest[i].take(
          {__shfl_xor_sync(kAllLanes, nearest[i].distance, step), __shfl_xor_sync(kAllLanes, nearest[i].label, step)});
    }
    if (thread % kLanesAcross == 0) found[thread / 32 % kWarpsAcross][place.points + Place::point(i)] = nearest[i];
  }
  __syncthreads();
  if (thread >= kTile || first_point + thread >= points.n) return;
  Nearest best = found[0][thread];
  for (int w = 1; w < kWarpsAcross; ++w) best.take(found[w][thread]);
  float square = 0.0f;
  for (int d = 0; d < n_dimensions; ++d) {
    const float value = of_points[d * kTile + thread];
    square = __fadd_rn(square, __fmul_rn(value, value));
  }
  const float distance = __fadd_rn(square, best.distance);
  labels[first_point + thread] = best.label;
  distances[first_point + thread] = distance > 0.0f ? distance : 0.0f;
}

// Points in the order of their labels, and where those of each centroid begin.
struct UpdateScratch {
  uint32_t *keys, *sorted_keys;  // [n]
  int32_t *numbers, *order;      // [n]
  int64_t* begins;               // [n_centroids + 1]
  char* library;
  size_t n_library_bytes;

  static UpdateScratch of(Arena& arena, int64_t n_points, int64_t n_centroids) {
    UpdateScratch s;
    s.keys = arena.take<uint32_t>(n_points);
    s.sorted_keys = arena.take<uint32_t>(n_points);
    s.numbers = arena.take<int32_t>(n_points);
    s.order = arena.take<int32_t>(n_points);
    s.begins = arena.take<int64_t>(n_centroids + 1);
    s.n_library_bytes = 0;
    s.sort(nullptr, s.n_library_bytes, n_points, n_centroids, nullptr);
    s.library = arena.take<char>(int64_t(s.n_library_bytes));
    return s;
  }
  void sort(void* memory, size_t& n_bytes, int64_t n, int64_t n_centroids, cudaStream_t stream) const {
    int n_bits = 1;
    while (n_centroids >> n_bits) ++n_bits;
    check(cub::DeviceRadixSort::SortPairs(memory, n_bytes, keys, sorted_keys, numbers, order, n, 0, n_bits, stream),
          "cluster_update");
  }
};

// A label that is no row of the centroids goes behind all others.
__global__ __launch_bounds__(kThreads) void keys_kernel(const int32_t* labels, int64_t n, int64_t n_centroids,
                                                        UpdateScratch out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  out.keys[i] = labels[i] >= 0 && labels[i] < n_centroids ? uint32_t(labels[i]) : uint32_t(n_centroids);
  out.numbers[i] = int32_t(i);
}

__global__ __launch_bounds__(kThreads) void begins_kernel(const uint32_t* sorted_keys, int64_t n, int64_t n_centroids,
                                                          int64_t* begins) {
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c > n_centroids) return;
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sorted_keys[middle] < c) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  begins[c] = low;
}

// A warp adds up a centroid, each lane two of its dimensions, in the order of the points. What waits for memory is
// asked for many points at once: one centroid may have most of them.
__global__ __launch_bounds__(kThreads) void means_kernel(Points points, const float* weights, UpdateScratch sorted,
                                                         Clusters out) {
  constexpr int kAtOnce = 16, kOfLane = (kMaxPointDimensions + 31) / 32;
  const int64_t c = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32, n_dimensions = points.n_dimensions;
  if (c >= out.centroids.n) return;
  const int lane = int(threadIdx.x % 32);
  const int64_t end = sorted.begins[c + 1];
  struct Point {
    int64_t row;
    float weight;
  };
  const auto point_at = [&](int64_t place) {
    if (place >= end) return Point{0, 0.0f};
    const int64_t row = sorted.order[place];
    return Point{row, weights[row]};
  };
  float sums[kOfLane] = {}, total = 0.0f;
  Point next = point_at(sorted.begins[c] + lane);
  for (int64_t first = sorted.begins[c]; first < end; first += 32) {
    const Point point = next;
    next = point_at(first + 32 + lane);
    const int n = end - first < 32 ? int(end - first) : 32;
    for (int begin = 0; begin < n; begin += kAtOnce) {
      float values[kAtOnce][kOfLane];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float* row = points.values + __shfl_sync(kAllLanes, point.row, begin + i) * n_dimensions;
#pragma unroll
        for (int k = 0; k < kOfLane; ++k) values[i][k] = lane + 32 * k < n_dimensions ? row[lane + 32 * k] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float weight = __shfl_sync(kAllLanes, point.weight, begin + i);
        if (begin + i >= n) continue;
        total = __fadd_rn(total, weight);
#pragma unroll
        for (int k = 0; k < kOfLane; ++k) sums[k] = __fadd_rn(sums[k], __fmul_rn(weight, values[i][k]));
      }
    }
  }
  if (lane == 0) out.weights[c] = total;
  if (!(total > 0.0f)) return;
#pragma unroll
  for (int k = 0; k < kOfLane; ++k) {
    if (lane + 32 * k < n_dimensions) out.centroids.values[c * n_dimensions + lane + 32 * k] = sums[k] / total;
  }
}

}  // namespace
}  // namespace cuda

size_t cluster_assign_scratch(const Cuda&, const Points& centroids) {
  Arena arena(nullptr);
  cuda::AssignScratch::of(arena, centroids.n, cuda::padded_for(centroids.n_dimensions));
  return arena.used();
}

void cluster_assign(const Cuda& backend, const Points& points, const Points& centroids, void* scratch, int32_t* labels,
                    float* distances) {
  if (points.n == 0) return;
  const cudaStream_t stream = stream_of(backend);
  const int n_padded = cuda::padded_for(points.n_dimensions);
  Arena arena(scratch);
  const cuda::AssignScratch arranged = cuda::AssignScratch::of(arena, centroids.n, n_padded);
  cuda::arrange_kernel<<<n_blocks_of(arranged.n_tiles * cuda::kTile, cuda::kThreads), cuda::kThreads, 0, stream>>>(
      centroids, n_padded, arranged);
  const auto kernel = cuda::chunk_for(points.n_dimensions) == 9 ? cuda::assign_kernel<9> : cuda::assign_kernel<8>;
  kernel<<<n_blocks_of(points.n, cuda::kTile), cuda::kThreads, 0, stream>>>(points, n_padded, arranged, labels,
                                                                            distances);
  check_launch("cluster_assign");
}

size_t cluster_update_scratch(const Cuda&, const Points& points, const Points& centroids) {
  Arena arena(nullptr);
  cuda::UpdateScratch::of(arena, points.n, centroids.n);
  return arena.used();
}

void cluster_update(const Cuda& backend, const Points& points, const int32_t* labels, const float* weights,
                    void* scratch, const Clusters& out) {
  const cudaStream_t stream = stream_of(backend);
  const int64_t n = points.n, n_centroids = out.centroids.n;
  Arena arena(scratch);
  cuda::UpdateScratch sorted = cuda::UpdateScratch::of(arena, n, n_centroids);
  if (n > 0) {
    cuda::keys_kernel<<<n_blocks_of(n, cuda::kThreads), cuda::kThreads, 0, stream>>>(labels, n, n_centroids, sorted);
    sorted.sort(sorted.library, sorted.n_library_bytes, n, n_centroids, stream);
  }
  cuda::begins_kernel<<<n_blocks_of(n_centroids + 1, cuda::kThreads), cuda::kThreads, 0, stream>>>(
      sorted.sorted_keys, n, n_centroids, sorted.begins);
  cuda::means_kernel<<<n_blocks_of(n_centroids * 32, cuda::kThreads), cuda::kThreads, 0, stream>>>(points, weights,
                                                                                                   sorted, out);
  check_launch("cluster_update");
}

}  // namespace spaceport
