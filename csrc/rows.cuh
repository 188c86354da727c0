// How kernels read and write the rows of Gaussians.
#pragma once

#include <type_traits>

#include "scalar.h"
#include "splat_math.h"
#include "warp.cuh"

namespace spaceport {
namespace cuda {

__device__ inline Vec3<float> load3(const float* table, int64_t row) {
  return {table[3 * row], table[3 * row + 1], table[3 * row + 2]};
}
__device__ inline void store3(float* table, int64_t row, const Vec3<float>& value) {
  table[3 * row] = value.x;
  table[3 * row + 1] = value.y;
  table[3 * row + 2] = value.z;
}
__device__ inline RawShape<float> raw_shape_of(const Gaussians& g, int64_t row) {
  const float4 q = reinterpret_cast<const float4*>(g.quaternions)[row];
  return {load3(g.means, row), load3(g.log_scales, row), {q.x, q.y, q.z, q.w}};
}

// Rows of SH coefficients in shared memory, four floats at a time: neighbouring lanes read neighbouring places of
// global memory, then each reads its own row. An odd number of fours a row keeps lanes on different banks.
template <int kColumns>
struct StagedRows {
  static constexpr int kFours = (kColumns + 3) / 4, kStride = kFours | 1;

  __device__ explicit StagedRows(float4* fours) : address_(kept(uint32_t(__cvta_generic_to_shared(fours)))) {}

  // Whether rows of `stride` floats can be read so.
  __device__ static bool fit(int stride) { return stride % 4 == 0; }
  // Called by a warp, for 32 rows: row_of(slot) is where one lies, or null where it is not wanted.
  template <class RowOf>
  __device__ void load(int lane, RowOf&& row_of) const {
    constexpr int kBatch = kFours % 4 == 0 ? 4 : kFours % 7 == 0 ? 7 : kFours;  // in flight at once
    static_assert(kFours % kBatch == 0, "whole batches");
#pragma unroll
    for (int begin = 0; begin < kFours; begin += kBatch) {
      float4 four[kBatch];
      bool is_wanted[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const unsigned i = unsigned(lane) + (begin + j) * 32, slot = i / kFours;
        const float* row = row_of(int(slot));
        is_wanted[j] = row != nullptr;
        if (is_wanted[j]) four[j] = reinterpret_cast<const float4*>(row)[i - slot * kFours];
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const unsigned i = unsigned(lane) + (begin + j) * 32, slot = i / kFours;
        if (is_wanted[j]) store_shared(address_ + (i + slot * (kStride - kFours)) * sizeof(float4), four[j]);
      }
    }
  }
  __device__ void get(int slot, float columns[kColumns]) const {
    const uint32_t row = address_ + slot * kStride * sizeof(float4);
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const float4 four = load_shared(row + i * sizeof(float4));
      const float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (4 * i + j < kColumns) columns[4 * i + j] = values[j];
      }
    }
  }

 private:
  uint32_t address_;  // in shared memory: of a pointer the compiler makes it anew for every access
};

// The first `kColumns` floats of a row of `stride`, by one thread; four at a time where all rows begin at such a place.
template <int kColumns>
__device__ void load_row(const float* row, int stride, float* columns) {
  if (kColumns % 4 == 0 && stride % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) {
      const float4 four = reinterpret_cast<const float4*>(row)[i];
      columns[4 * i] = four.x;
      columns[4 * i + 1] = four.y;
      columns[4 * i + 2] = four.z;
      columns[4 * i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) columns[i] = row[i];
  }
}
template <int kColumns>
__device__ void store_row(float* row, int stride, const float* columns) {
  if (kColumns % 4 == 0 && stride % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) {
      reinterpret_cast<float4*>(row)[i] =
          make_float4(columns[4 * i], columns[4 * i + 1], columns[4 * i + 2], columns[4 * i + 3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) row[i] = columns[i];
  }
}

// The rows that the lanes of a warp have, of tables with three floats a row. Lanes read and write neighbouring floats,
// not each its own row in three goes, and exchange them in shared memory. All lanes take part; a row may be -1: none.
class WarpRows {
 public:
  static constexpr int kFloats = 3 * 32;  // of `exchange`, which is the warp's own
  __device__ WarpRows(int32_t row, float* exchange) : exchange_(exchange) {
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const int of = (lane() + 32 * k) / 3;
      const int32_t of_row = __shfl_sync(kAllLanes, row, of);
      at_[k] = of_row < 0 ? -1 : 3 * int64_t(of_row) + (lane() + 32 * k) % 3;
    }
  }
  // As they lie in memory, one every 32 floats; `own` sorts them by lane.
  struct Fetched {
    float values[3];
  };
  __device__ Fetched fetch(const float* table) const {
    Fetched f = {};
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      if (at_[k] >= 0) f.values[k] = table[at_[k]];
    }
    return f;
  }
  __device__ Vec3<float> own(const Fetched& f) const {
    __syncwarp();
#pragma unroll
    for (int k = 0; k < 3; ++k) exchange_[lane() + 32 * k] = f.values[k];
    __syncwarp();
    return {exchange_[3 * lane()], exchange_[3 * lane() + 1], exchange_[3 * lane() + 2]};
  }
  __device__ void store(float* table, const Vec3<float>& own) const {
    __syncwarp();
    exchange_[3 * lane()] = own.x;
    exchange_[3 * lane() + 1] = own.y;
    exchange_[3 * lane() + 2] = own.z;
    __syncwarp();
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      if (at_[k] >= 0) table[at_[k]] = exchange_[lane() + 32 * k];
    }
  }

 private:
  __device__ static int lane() { return int(threadIdx.x % 32); }

  float* exchange_;
  int64_t at_[3];
};

// Fetches n floats to the second-level cache while there is other work.
__device__ inline void prefetch_row(const float* row, int n) {
  constexpr int kLine = 128 / int(sizeof(float));
  for (int i = 0; i < n; i += kLine) asm volatile("prefetch.global.L2 [%0];" ::"l"(row + i));
}

// Calls launch(std::integral_constant of the degree).
template <class Launch>
void for_degree(int degree, Launch&& launch) {
  switch (degree) {
    case 0:
      return launch(std::integral_constant<int, 0>());
    case 1:
      return launch(std::integral_constant<int, 1>());
    case 2:
      return launch(std::integral_constant<int, 2>());
    default:
      return launch(std::integral_constant<int, 3>());
  }
}

}  // namespace cuda
}  // namespace spaceport
