// project' and Adam in one: a gradient never goes through memory. Two ways to the same end: every row at every step, or
// only the rows that contributed to the image. What the others miss, decay of their moments and the way that their
// values drift on meanwhile, is made up for when they contribute again, for all steps missed at once.
#define SPACEPORT_ISA cuda

#include <algorithm>

#include "look_back.cuh"
#include "queued.cuh"
#include "rows.cuh"
#include "sh_moments.cuh"

namespace spaceport {
namespace cuda {

namespace {

// Steps that a row has missed, as factors of its moments and of the way that it makes for them.
struct Lag {
  float first, second;  // beta^missed
  float drift;          // in units of first moment / root of the second, at learning rate 1

  __device__ static Lag none() { return {1.0f, 1.0f, 0.0f}; }
  // The row made step `last`, and none since until `step`. Behind the first 64 steps no way is left to speak of.
  __device__ static Lag between(int64_t last, int64_t step, const AdamRates& r) {
    const int64_t n_missed = step - 1 - last;
    if (n_missed <= 0) return none();
    const float ratio = exp2f(r.log2_beta1 - 0.5f * r.log2_beta2), missed = float(n_missed);
    float drift = 0.0f, power = 1.0f;
    float first_left = exp2f(float(last) * r.log2_beta1), second_left = exp2f(float(last) * r.log2_beta2);
    for (int i = 0; i < n_missed && i < 64; ++i) {
      power *= ratio;
      first_left *= r.beta1;
      second_left *= r.beta2;
      drift += power * sqrtf(1.0f - second_left) / (1.0f - first_left);  // with the corrections of that step
    }
    return {exp2f(missed * r.log2_beta1), exp2f(missed * r.log2_beta2), drift};
  }
};

__device__ void catch_up(float& value, float& first, float& second, float rate, const AdamRates& r, const Lag& lag) {
  value -= rate * lag.drift * first / (sqrtf(second) + r.epsilon);
  first *= lag.first;
  second *= lag.second;
}

__device__ void adam(float& value, float gradient, float& first, float& second, float rate, const AdamRates& r,
                     const Lag& lag) {
  if (lag.drift != 0.0f) catch_up(value, first, second, rate, r, lag);
  adam(value, gradient, first, second, rate, r);
}

__device__ void step(Parameter<float>& p, float gradient, float rate, const AdamRates& rates, const Lag& lag) {
  adam(p.value, gradient, p.first, p.second, rate, rates, lag);
}
__device__ void step(Parameter<float4>& p, const float4& gradient, const float4& rate, const AdamRates& rates,
                     const Lag& lag) {
  adam(p.value.x, gradient.x, p.first.x, p.second.x, rate.x, rates, lag);
  adam(p.value.y, gradient.y, p.first.y, p.second.y, rate.y, rates, lag);
  adam(p.value.z, gradient.z, p.first.z, p.second.z, rate.z, rates, lag);
  adam(p.value.w, gradient.w, p.first.w, p.second.w, rate.w, rates, lag);
}

// The gradient by one row: by its place and shape, and what that by its SH coefficients is made of.
struct RowGradient {
  RawShape<float> raw;
  float opacity;
  Vec3<float> color, direction;
};
// From the gradient by its splat, or the sums that stand for it. load_sh(columns) reads the row's SH coefficients.
template <int kDegree, class LoadSh>
__device__ RowGradient gradient_of_row(const RawShape<float>& raw, float logit, const View<float>& view, float low_pass,
                                       SplatRows kind, float d[kSplatGradientStride], LoadSh&& load_sh) {
  RowGradient gradient;
  const Shape<float> s = shape_of(raw, view, low_pass);
  const float opacity = sigmoid(logit);
  if (kind == SplatRows::kMoments) gradient_of_moments(s.conic, opacity, d);
  gradient.raw = shape_of_vjp(raw, view, s, seen_shape_vjp(view, s, d[0], d[1], Conic<float>{d[2], d[3], d[4]}));
  gradient.opacity = d[5] * opacity * (1.0f - opacity);
  const Vec3<float> offset = raw.mean - view.center;
  gradient.direction = direction(offset);
  float sh[3 * n_coefficients_of(kDegree)], basis[kMaxShCoefficients], d_basis[kMaxShCoefficients];
  load_sh(sh);
  sh_basis(kDegree, gradient.direction, basis);
  const Vec3<float> color = color_of(kDegree, basis, sh);
  gradient.color = {color.x > 0.0f ? d[6] : 0.0f, color.y > 0.0f ? d[7] : 0.0f, color.z > 0.0f ? d[8] : 0.0f};
#pragma unroll
  for (int k = 0; k < n_coefficients_of(kDegree); ++k) {
    d_basis[k] = dot(Vec3<float>{sh[3 * k], sh[3 * k + 1], sh[3 * k + 2]}, gradient.color);
  }
  gradient.raw.mean = gradient.raw.mean + direction_vjp(offset, sh_basis_vjp(kDegree, gradient.direction, d_basis));
  return gradient;
}

// All of a row but its SH coefficients, with its moments. Everything is read before anything is written: the compiler
// would wait for each value in turn, because it cannot know that they lie apart.
struct RowShape {
  RawShape<float> raw;
  float logit;
};
struct FetchedShape {
  WarpRows::Fetched means, log_scales;
  float4 quaternion;
  float logit;
};
__device__ FetchedShape fetch_shape(const Gaussians& g, const WarpRows& rows, int32_t row) {
  FetchedShape f = {rows.fetch(g.means), rows.fetch(g.log_scales), {}, 0.0f};
  if (row >= 0) {
    f.quaternion = reinterpret_cast<const float4*>(g.quaternions)[row];
    f.logit = g.opacities[row];
  }
  return f;
}
__device__ RowShape own_shape(const FetchedShape& f, const WarpRows& rows) {
  const float4& q = f.quaternion;
  return {{rows.own(f.means), rows.own(f.log_scales), {q.x, q.y, q.z, q.w}}, f.logit};
}
__device__ void write_shape(const Gaussians& g, const WarpRows& rows, int32_t row, const RowShape& shape) {
  rows.store(g.means, shape.raw.mean);
  rows.store(g.log_scales, shape.raw.log_scale);
  if (row < 0) return;
  const Quaternion<float>& q = shape.raw.quaternion;
  reinterpret_cast<float4*>(g.quaternions)[row] = make_float4(q.w, q.x, q.y, q.z);
  g.opacities[row] = shape.logit;
}

__device__ void adam(Vec3<float>& value, const Vec3<float>& gradient, Vec3<float>& first, Vec3<float>& second,
                     float rate, const AdamRates& r, const Lag& lag) {
  adam(value.x, gradient.x, first.x, second.x, rate, r, lag);
  adam(value.y, gradient.y, first.y, second.y, rate, r, lag);
  adam(value.z, gradient.z, first.z, second.z, rate, r, lag);
}
__device__ void adam(Quaternion<float>& value, const Quaternion<float>& gradient, Quaternion<float>& first,
                     Quaternion<float>& second, float rate, const AdamRates& r, const Lag& lag) {
  adam(value.w, gradient.w, first.w, second.w, rate, r, lag);
  adam(value.x, gradient.x, first.x, second.x, rate, r, lag);
  adam(value.y, gradient.y, first.y, second.y, rate, r, lag);
  adam(value.z, gradient.z, first.z, second.z, rate, r, lag);
}

// Adam on all of the rows of a warp but their SH coefficients.
__device__ void update_shapes(const Gaussians& g, const AdamMoments& moments, const WarpRows& rows, int32_t row,
                              RowShape& value, const RowGradient& gradient, const UpdateInputs& u, const Lag& lag) {
  const FetchedShape firsts = fetch_shape(moments.first, rows, row), seconds = fetch_shape(moments.second, rows, row);
  RowShape first = own_shape(firsts, rows), second = own_shape(seconds, rows);
  const AdamSettings& rate = u.settings;
  adam(value.raw.mean, gradient.raw.mean, first.raw.mean, second.raw.mean, rate.means, u.rates, lag);
  adam(value.raw.log_scale, gradient.raw.log_scale, first.raw.log_scale, second.raw.log_scale, rate.log_scales, u.rates,
       lag);
  adam(value.raw.quaternion, gradient.raw.quaternion, first.raw.quaternion, second.raw.quaternion, rate.quaternions,
       u.rates, lag);
  adam(value.logit, gradient.opacity, first.logit, second.logit, rate.opacities, u.rates, lag);
  write_shape(g, rows, row, value);
  write_shape(moments.first, rows, row, first);
  write_shape(moments.second, rows, row, second);
}

struct UpdateJob {
  Gaussians values;
  AdamMoments moments;
  Projected projected;
  SplatGradients gradients;
  const uint32_t* is_halted;
  float low_pass;
  float half_width, half_height;  // pixels

  __device__ bool changes_nothing() const { return is_halted != nullptr && *is_halted != 0; }
  __device__ void add_statistics(const DensityStatistics& statistics, int64_t row, const float* d) const {
    statistics.gradient_sums[row] += hypotf(d[0] * half_width, d[1] * half_height);
  }
};

// What the update of a row's SH coefficients needs: their gradient is the product of a basis value and of a colour's.
struct alignas(16) ShRecord {
  Vec3<float> direction, color;
  Lag lag;
  int32_t row;
};

// A row that a thread updates, and where its splat's gradient or sums are; -1 for none. Visible rows without one are
// hidden.
struct Item {
  int64_t row, gradient;
  bool is_visible;
};

// Every row, visible or not.
struct AllRows {
  static constexpr bool kSeesAll = true;

  __device__ int64_t n(const UpdateJob& job) const { return job.values.n; }
  __device__ Item item(const UpdateJob& job, int64_t i) const {
    if (job.projected.gaussian_from_splat == nullptr) {
      const uint32_t depth_key = job.projected.depth_keys[i];
      return {i, is_listed(depth_key) ? i : -1, depth_key != kNoDepth};
    }
    const int64_t splat = splat_of(job.projected, i);
    return {i, splat, splat >= 0};
  }
  __device__ Lag lag(const Item&, const UpdateInputs&) const { return Lag::none(); }

 private:
  // Gaussians of splats ascend.
  __device__ static int64_t splat_of(const Projected& projected, int64_t row) {
    int64_t low = 0, high = projected.n;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (projected.gaussian_from_splat[middle] < row) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low < projected.n && projected.gaussian_from_splat[low] == row ? low : -1;
  }
};

// The rows of a list, with their sums in its order. They may have missed steps.
struct ListedRows {
  const int32_t* rows;
  const int* n_rows;
  int32_t* up_to_date;
  static constexpr bool kSeesAll = false;  // visible rows were counted, and their sums cleared, for the list

  __device__ int64_t n(const UpdateJob&) const { return *n_rows; }
  __device__ Item item(const UpdateJob&, int64_t i) const { return {rows[i], i, true}; }
  __device__ Lag lag(const Item& item, const UpdateInputs& u) const {
    const Lag lag = Lag::between(up_to_date[item.row], u.settings.step, u.rates);
    up_to_date[item.row] = int32_t(u.settings.step);
    return lag;
  }
};

// Where a row's part in the update of SH coefficients goes: to the kernel behind, or to the log. Called by whole warps.
struct ToRecords {
  ShRecord* records;

  __device__ void write(const WarpRows&, int64_t i, const Item& item, const RowGradient& gradient,
                        const Lag& lag) const {
    if (item.row >= 0) records[i] = {gradient.direction, gradient.color, lag, int32_t(item.row)};
  }
};
struct ToLog {
  ShLog log;

  __device__ void write(const WarpRows& rows, int64_t, const Item&, const RowGradient& gradient, const Lag&) const {
    rows.store(log.colors + (*log.n - 1) * 3 * log.n_rows, gradient.color);
  }
};

constexpr int kRows = 128;  // of a block

// The gradients of rows, and Adam on all but their SH coefficients: one thread a row.
template <int kDegree, class Rows, class To>
__global__ __launch_bounds__(kRows, 4) void update_shape_kernel(UpdateJob job, Rows rows,
                                                                Late<UpdateInputs> late_inputs, To sh) {
  constexpr int kColumns = 3 * n_coefficients_of(kDegree);
  __shared__ float4 staged_fours[kRows * StagedRows<kColumns>::kStride];
  __shared__ float exchange[kRows / 32][WarpRows::kFloats];
  __shared__ int64_t splat_rows[kRows];
  __shared__ UpdateInputs u;
  const int64_t i = int64_t(blockIdx.x) * kRows + threadIdx.x, n = rows.n(job);
  if (i - threadIdx.x >= n) return;
  late_inputs.copy_to(u);
  const Item item = i < n ? rows.item(job, i) : Item{-1, -1, false};
  splat_rows[threadIdx.x] = item.gradient >= 0 ? item.row : -1;
  const int stride = 3 * job.values.n_coefficients, first_of_warp = int(threadIdx.x) / 32 * 32;
  const StagedRows<kColumns> staged(staged_fours + first_of_warp * StagedRows<kColumns>::kStride);
  __syncthreads();
  if (StagedRows<kColumns>::fit(stride)) {
    staged.load(int(threadIdx.x % 32), [&](int slot) {
      const int64_t row = splat_rows[first_of_warp + slot];
      return row >= 0 ? job.values.sh + row * stride : nullptr;
    });
  }
  __syncwarp();
  const bool changes_nothing = job.changes_nothing();
  const WarpRows warp_rows(int32_t(item.row), exchange[threadIdx.x / 32]);
  RowShape value = own_shape(fetch_shape(job.values, warp_rows, int32_t(item.row)), warp_rows);
  RowGradient gradient = {};
  if (item.gradient >= 0) {
    float d[kSplatGradientStride];
    float* from = job.gradients.rows + item.gradient * kSplatGradientStride;
#pragma unroll
    for (int k = 0; k < kSplatGradientStride; ++k) d[k] = from[k];
    if (Rows::kSeesAll && job.gradients.kind == SplatRows::kMoments) {
#pragma unroll
      for (int k = 0; k < kSplatGradientStride; ++k) from[k] = 0.0f;
    }
    gradient = gradient_of_row<kDegree>(value.raw, value.logit, u.view, job.low_pass, job.gradients.kind, d,
                                        [&](float* columns) {
                                          if (StagedRows<kColumns>::fit(stride)) {
                                            staged.get(int(threadIdx.x % 32), columns);
                                          } else {
                                            load_row<kColumns>(job.values.sh + item.row * stride, stride, columns);
                                          }
                                        });
    if (u.statistics.gradient_sums != nullptr && !changes_nothing) job.add_statistics(u.statistics, item.row, d);
  }
  if (changes_nothing) return;
  if (Rows::kSeesAll && item.is_visible && u.statistics.n_visible != nullptr) u.statistics.n_visible[item.row] += 1.0f;
  const Lag lag = item.row >= 0 ? rows.lag(item, u) : Lag::none();
  update_shapes(job.values, job.moments, warp_rows, int32_t(item.row), value, gradient, u, lag);
  sh.write(warp_rows, i, item, gradient, lag);
}

constexpr int kShRows = 64, kShThreads = 256;  // of a block
constexpr unsigned kMostShBlocks = 2640;       // several times what a large GPU holds: they take turns

// Adam on the SH coefficients of the rows that have a record: neighbouring threads take neighbouring coefficients, four
// at a time where the rows' length allows it.
template <int kDegree, class Rows, class Sh>
__global__ __launch_bounds__(kShThreads, 3) void update_sh_kernel(UpdateJob job, Rows rows,
                                                                  Late<UpdateInputs> late_inputs,
                                                                  const ShRecord* records, Sh sh) {
  constexpr int kCoefficients = n_coefficients_of(kDegree);
  __shared__ float bases[kCoefficients][kShRows + 1];
  __shared__ float colors[3][kShRows + 1];
  __shared__ int32_t row_of[kShRows];
  __shared__ Lag lag_of[kShRows];
  __shared__ AdamRates rates;
  __shared__ float dc, rest;
  __shared__ Rounding rounding;
  if (job.changes_nothing()) return;
  const int64_t n_rows = rows.n(job);
  const int thread = int(threadIdx.x), stride = 3 * job.values.n_coefficients;
  if (thread == 0) {
    const UpdateInputs& u = *late_inputs.place_or_value();
    rates = u.rates;
    dc = u.settings.sh_dc;
    rest = u.settings.sh_rest;
    rounding = {uint32_t(u.settings.step)};
  }
  const auto gradient_of = [&](int slot, int column) {
    const int k = column / 3;
    return k < kCoefficients ? bases[k][slot] * colors[column - 3 * k][slot] : 0.0f;
  };
  for (int64_t first = int64_t(blockIdx.x) * kShRows; first < n_rows; first += int64_t(gridDim.x) * kShRows) {
    const int n = int(n_rows - first < kShRows ? n_rows - first : kShRows);
    __syncthreads();
    if (thread < n) {
      const ShRecord record = records[first + thread];
      float basis[kMaxShCoefficients];
      sh_basis(kDegree, record.direction, basis);
#pragma unroll
      for (int k = 0; k < kCoefficients; ++k) bases[k][thread] = basis[k];
      colors[0][thread] = record.color.x;
      colors[1][thread] = record.color.y;
      colors[2][thread] = record.color.z;
      row_of[thread] = record.row;
      lag_of[thread] = record.lag;
    }
    __syncthreads();
    if (stride % 4 == 0) {
      constexpr int kAtOnce = 3;  // read before any is written: the compiler cannot know that they lie apart
      const int n_fours = stride / 4;
      for (int begin = thread; begin < n * n_fours; begin += kAtOnce * kShThreads) {
        typename Sh::Fetched fetched[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int i = begin + j * kShThreads, slot = i / n_fours;
          if (i < n * n_fours) {
            fetched[j] = sh.fetch(row_of[slot], n_fours, i - slot * n_fours);
          }
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int i = begin + j * kShThreads, slot = i / n_fours, four = i - slot * n_fours, column = 4 * four;
          if (i >= n * n_fours) continue;
          const float4 gradient = make_float4(gradient_of(slot, column), gradient_of(slot, column + 1),
                                              gradient_of(slot, column + 2), gradient_of(slot, column + 3));
          Parameter<float4> p = Sh::unpack(fetched[j], four);
          step(p, gradient, column == 0 ? make_float4(dc, dc, dc, rest) : make_float4(rest, rest, rest, rest), rates,
               lag_of[slot]);
          sh.store(p, row_of[slot], n_fours, four, rounding);
        }
      }
    } else {
      for (int i = thread; i < n * stride; i += kShThreads) {
        const int slot = i / stride, column = i - slot * stride;
        Parameter<float> p = sh.load_one(row_of[slot], stride, column);
        step(p, gradient_of(slot, column), column < 3 ? dc : rest, rates, lag_of[slot]);
        sh.store_one(p, row_of[slot], stride, column, rounding);
      }
    }
  }
}

constexpr int kThreads = kLookBackRows;

// Rows whose sums are not all zero, and those sums. Within a block of 256 rows they keep their order.
struct Contributing {
  int32_t* rows;  // [N]
  float* sums;    // [N, 9]
  int* n;
};

// Lists them, clears the sums, and counts all visible rows. Splats lie at their rows.
__global__ __launch_bounds__(kThreads) void list_contributing_kernel(UpdateJob job, Late<UpdateInputs> late_inputs,
                                                                     Contributing listed) {
  __shared__ float sums[kThreads * kSplatGradientStride];
  __shared__ int16_t place_of[kThreads];
  __shared__ int first_of_block;
  const int64_t first = int64_t(blockIdx.x) * kThreads, row = first + threadIdx.x, n = job.values.n;
  const int n_rows = int(n - first < kThreads ? n - first : kThreads);
  const bool is_visible = row < n && job.projected.depth_keys[row] != kNoDepth;
  if (__syncthreads_or(is_visible) == 0) return;
  float* from = job.gradients.rows + first * kSplatGradientStride;
#pragma unroll
  for (int j = 0; j < kSplatGradientStride; ++j) {
    const int i = int(threadIdx.x) + j * kThreads;
    sums[i] = i < n_rows * kSplatGradientStride ? from[i] : 0.0f;
  }
  __syncthreads();
  bool contributes = false;
#pragma unroll
  for (int i = 0; i < kSplatGradientStride; ++i) contributes |= sums[threadIdx.x * kSplatGradientStride + i] != 0.0f;
  const BlockSums counted = block_sums<kThreads>({contributes, 0});
  if (threadIdx.x == 0 && counted.total.splats > 0) first_of_block = atomicAdd(listed.n, int(counted.total.splats));
  place_of[threadIdx.x] = int16_t(contributes ? int(counted.before.splats) : -1);
  float* n_visible = late_inputs.place_or_value()->statistics.n_visible;
  if (is_visible && n_visible != nullptr && !job.changes_nothing()) n_visible[row] += 1.0f;
  if (counted.total.splats == 0) return;
  __syncthreads();
  if (contributes) listed.rows[first_of_block + counted.before.splats] = int32_t(row);
#pragma unroll
  for (int j = 0; j < kSplatGradientStride; ++j) {
    const int i = int(threadIdx.x) + j * kThreads, of = i / kSplatGradientStride;
    if (place_of[of] < 0) continue;
    listed.sums[int64_t(first_of_block + place_of[of]) * kSplatGradientStride + i - of * kSplatGradientStride] =
        sums[i];
    from[i] = 0.0f;
  }
}

// One table of parameters with its moments, each [N, n_columns].
struct Table {
  float *values, *first, *second;
  int n_columns;
  float rate;
};
struct Tables {
  Table tables[4];
};

// All rows that have missed steps make up for them.
template <class Sh>
__global__ __launch_bounds__(kRows) void catch_up_kernel(Tables all, Sh sh, int n_sh_columns, int64_t n, AdamSettings a,
                                                         AdamRates rates, int32_t* up_to_date) {
  __shared__ Lag lags[kRows];
  const int64_t first_row = int64_t(blockIdx.x) * kRows;
  const int n_rows = int(n - first_row < kRows ? n - first_row : kRows);
  if (int(threadIdx.x) < n_rows) {
    const int64_t row = first_row + threadIdx.x;
    lags[threadIdx.x] = Lag::between(up_to_date[row], a.step + 1, rates);
    up_to_date[row] = int32_t(a.step);
  }
  __syncthreads();
  for (const Table& table : all.tables) {
    for (int i = int(threadIdx.x); i < n_rows * table.n_columns; i += kRows) {
      const int row = i / table.n_columns;
      if (lags[row].drift == 0.0f) continue;
      const int64_t at = first_row * table.n_columns + i;
      catch_up(table.values[at], table.first[at], table.second[at], table.rate, rates, lags[row]);
    }
  }
  for (int i = int(threadIdx.x); i < n_rows * n_sh_columns; i += kRows) {
    const int row = i / n_sh_columns, column = i - row * n_sh_columns;
    if (lags[row].drift == 0.0f) continue;
    Parameter<float> p = sh.load_one(first_row + row, n_sh_columns, column);
    catch_up(p.value, p.first, p.second, column < 3 ? a.sh_dc : a.sh_rest, rates, lags[row]);
    sh.store_one(p, first_row + row, n_sh_columns, column, {uint32_t(a.step)});
  }
}

struct UpdateScratch {
  ShRecord* records;  // [N]
  Contributing contributing;

  static UpdateScratch of(Arena& arena, int64_t n_gaussians, int* n_contributing) {
    return {arena.take<ShRecord>(n_gaussians),
            {arena.take<int32_t>(n_gaussians), arena.take<float>(n_gaussians * kSplatGradientStride), n_contributing}};
  }
};

template <class Rows>
void launch_update(cudaStream_t stream, const UpdateJob& job, int sh_degree, const Rows& rows,
                   const Late<UpdateInputs>& inputs, ShRecord* records) {
  const int64_t n = job.values.n;
  const unsigned n_sh_blocks = std::min(n_blocks_of(n, kShRows), kMostShBlocks);
  for_degree(sh_degree, [&](auto degree) {
    update_shape_kernel<degree><<<n_blocks_of(n, kRows), kRows, 0, stream>>>(job, rows, inputs, ToRecords{records});
    for_storage(job.values, job.moments, [&](const auto& sh) {
      update_sh_kernel<degree><<<n_sh_blocks, kShThreads, 0, stream>>>(job, rows, inputs, records, sh);
    });
  });
}

void launch_logged_update(cudaStream_t stream, const UpdateJob& job, int sh_degree, const Late<UpdateInputs>& inputs,
                          const ShLog& log) {
  const int n_coefficients = (sh_degree + 1) * (sh_degree + 1);
  queue_open_slot(stream, log, inputs, n_coefficients, job.is_halted);
  for_degree(sh_degree, [&](auto degree) {
    update_shape_kernel<degree>
        <<<n_blocks_of(job.values.n, kRows), kRows, 0, stream>>>(job, AllRows{}, inputs, ToLog{log});
  });
  queue_constant_update(stream, job.values, job.moments, log, inputs, job.is_halted);
  queue_flush(stream, job.values, job.moments, log, kShSlots);
}

}  // namespace

size_t queued_update_scratch(int64_t n_gaussians) {
  Arena arena(nullptr);
  UpdateScratch::of(arena, n_gaussians, nullptr);
  return arena.used();
}

void queue_project_vjp_update(cudaStream_t stream, const Gaussians& values, const Late<UpdateInputs>& inputs,
                              const Camera& camera, const RasterSettings& settings, const Projected& projected,
                              const SplatGradients& gradients, const AdamMoments& moments, const UpdateRule& rule,
                              void* memory) {
  Arena arena(memory);
  const UpdateScratch s = UpdateScratch::of(arena, values.n, rule.n_contributing);
  UpdateJob job = {values,
                   moments,
                   projected,
                   gradients,
                   rule.is_halted,
                   settings.low_pass,
                   0.5f * float(camera.width),
                   0.5f * float(camera.height)};
  if (rule.log.colors != nullptr) {
    launch_logged_update(stream, job, settings.sh_degree, inputs, rule.log);
  } else if (rule.up_to_date == nullptr) {
    launch_update(stream, job, settings.sh_degree, AllRows{}, inputs, s.records);
  } else {
    list_contributing_kernel<<<n_blocks_of(values.n, kThreads), kThreads, 0, stream>>>(job, inputs, s.contributing);
    job.gradients.rows = s.contributing.sums;
    const ListedRows rows = {s.contributing.rows, s.contributing.n, rule.up_to_date};
    launch_update(stream, job, settings.sh_degree, rows, inputs, s.records);
  }
  check_launch("project' and update");
}

}  // namespace cuda

size_t project_vjp_update_scratch(const Cuda&, const Gaussians& values) {
  return cuda::queued_update_scratch(values.n);
}

void project_vjp_update(const Cuda& backend, const Gaussians& values, const Camera& camera,
                        const RasterSettings& settings, const Projected& projected, const float* d_splats,
                        const AdamMoments& moments, const AdamSettings& adam, void* scratch) {
  if (values.n == 0) return;
  const cuda::UpdateInputs inputs = {cuda::view_of<float>(camera), adam, cuda::AdamRates::of(adam), {}};
  cuda::queue_project_vjp_update(stream_of(backend), values, cuda::Late<cuda::UpdateInputs>(inputs), camera, settings,
                                 projected, {cuda::SplatRows::kGradients, const_cast<float*>(d_splats)}, moments, {},
                                 scratch);
}

void catch_up(const Cuda& backend, const Gaussians& values, const AdamMoments& moments, int32_t* up_to_date,
              const AdamSettings& a) {
  if (values.n == 0) return;
  const Gaussians &m = moments.first, &v = moments.second;
  const cuda::Tables tables = {{{values.means, m.means, v.means, 3, a.means},
                                {values.log_scales, m.log_scales, v.log_scales, 3, a.log_scales},
                                {values.quaternions, m.quaternions, v.quaternions, 4, a.quaternions},
                                {values.opacities, m.opacities, v.opacities, 1, a.opacities}}};
  const unsigned n_blocks = n_blocks_of(values.n, cuda::kRows);
  cuda::for_storage(values, moments, [&](const auto& sh) {
    cuda::catch_up_kernel<<<n_blocks, cuda::kRows, 0, stream_of(backend)>>>(
        tables, sh, 3 * values.n_coefficients, values.n, a, cuda::AdamRates::of(a), up_to_date);
  });
  check_launch("catch up");
}

}  // namespace spaceport
