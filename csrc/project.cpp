// project: raw parameters to splats on the image plane, eight Gaussians side by side.
#include "kernels.h"
#include "simd.h"
#include "splat_math.h"
#include "tile_spans.h"

namespace spaceport::SPACEPORT_ISA {

namespace {

constexpr int kLanes = 8;

// Up to eight rows of the parameter tables; missing lanes repeat the last one.
struct Rows {
  int64_t index[kLanes];
  int n;

  template <class IndexOf>
  static Rows of(int64_t begin, int64_t end, IndexOf&& index_of) {
    Rows rows;
    rows.n = int(end - begin < kLanes ? end - begin : kLanes);
    for (int lane = 0; lane < kLanes; ++lane) rows.index[lane] = index_of(begin + (lane < rows.n ? lane : rows.n - 1));
    return rows;
  }

  HOST_DEVICE Float8 gather(const float* table, int64_t stride, int64_t column) const {
    float lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = table[index[lane] * stride + column];
    return load(lanes);
  }
  HOST_DEVICE Vec3<Float8> gather3(const float* table, int64_t stride, int64_t column) const {
    return {gather(table, stride, column), gather(table, stride, column + 1), gather(table, stride, column + 2)};
  }
  HOST_DEVICE void scatter(float* table, int64_t stride, int64_t column, Float8 value) const {
    float lanes[kLanes];
    store(lanes, value);
    for (int lane = 0; lane < n; ++lane) table[index[lane] * stride + column] = lanes[lane];
  }
  // Columns [0, n_columns) at once; whole groups of eight are read as rows and transposed.
  void gather_columns(const float* table, int64_t stride, int n_columns, Float8* columns) const {
    int column = 0;
    for (; column + kLanes <= n_columns; column += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) columns[column + lane] = load(table + index[lane] * stride + column);
      transpose(columns + column);
    }
    for (; column < n_columns; ++column) columns[column] = gather(table, stride, column);
  }
  void scatter_columns(float* table, int64_t stride, int n_columns, Float8* columns) const {
    int column = 0;
    for (; column + kLanes <= n_columns; column += kLanes) {
      transpose(columns + column);
      for (int lane = 0; lane < n; ++lane) store(table + index[lane] * stride + column, columns[column + lane]);
    }
    for (; column < n_columns; ++column) scatter(table, stride, column, columns[column]);
  }
  HOST_DEVICE void scatter3(float* table, int64_t stride, int64_t column, const Vec3<Float8>& value) const {
    scatter(table, stride, column, value.x);
    scatter(table, stride, column + 1, value.y);
    scatter(table, stride, column + 2, value.z);
  }
};

RawShape<Float8> raw_shape_of(const Gaussians& g, const Rows& rows) {
  return {rows.gather3(g.means, 3, 0),
          rows.gather3(g.log_scales, 3, 0),
          {rows.gather(g.quaternions, 4, 0), rows.gather(g.quaternions, 4, 1), rows.gather(g.quaternions, 4, 2),
           rows.gather(g.quaternions, 4, 3)}};
}

// The splats of one piece, written from its first row on.
class PieceWriter {
 public:
  PieceWriter(const Projected& out, int64_t first_row) : out_(out), first_row_(first_row) {}

  void append(const Splat& splat, int64_t gaussian, int64_t n_tiles) {
    const int64_t at = first_row_ + n_++;
    out_.splats[at] = splat;
    out_.gaussian_from_splat[at] = int32_t(gaussian);
    out_.instance_offsets[at] = n_tiles;
  }
  int64_t n() const { return n_; }

 private:
  const Projected& out_;
  int64_t first_row_;
  int64_t n_ = 0;
};

void project_rows(const Gaussians& g, const Rows& rows, const View<Float8>& view, const Camera& grid,
                  const RasterSettings& settings, PieceWriter& writer) {
  const Vec3<Float8> mean = rows.gather3(g.means, 3, 0);
  if (!any(point_in_cam(view, mean).z >= Float8(settings.near))) return;

  const RawShape<Float8> raw = raw_shape_of(g, rows);
  const Shape<Float8> s = shape_of(raw, view, Float8(settings.low_pass));
  const Float8 logit = rows.gather(g.opacities, 1, 0);
  const Float8 opacity = sigmoid(logit);
  Float8 basis[kMaxShCoefficients], sh[kMaxShCoefficients * 3];
  sh_basis(settings.sh_degree, direction(mean - view.center), basis);
  rows.gather_columns(g.sh, int64_t(g.n_coefficients) * 3, 3 * n_coefficients_of(settings.sh_degree), sh);
  const Vec3<Float8> color = color_of(settings.sh_degree, basis, sh);
  // Phrased so that NaN fails.
  const Mask8 visible = (s.point.z >= Float8(settings.near)) & (opacity >= Float8(kAlphaCutoff)) &
                        (norm_squared(raw.quaternion) >= Float8(kMinQuaternionNormSquared)) &
                        (s.determinant > Float8(0.0f)) & (doubt_of(s, color, opacity, logit) == Float8(0.0f));
  if (!any(visible)) return;

  const Float8 zero(0.0f);
  float lanes[10][kLanes];
  int32_t is_visible[kLanes];
  store(lanes[0], s.x);
  store(lanes[1], s.y);
  store(lanes[2], s.conic.a);
  store(lanes[3], s.conic.b);
  store(lanes[4], s.conic.c);
  store(lanes[5], opacity);
  store(lanes[6], select(color.x > zero, color.x, zero));
  store(lanes[7], select(color.y > zero, color.y, zero));
  store(lanes[8], select(color.z > zero, color.z, zero));
  store(lanes[9], s.point.z);
  float variance_x[kLanes], variance_y[kLanes];
  store(variance_x, s.covariance.xx);
  store(variance_y, s.covariance.yy);
  std::memcpy(is_visible, &visible.v, sizeof(is_visible));

  for (int lane = 0; lane < rows.n; ++lane) {
    if (!is_visible[lane]) continue;
    Splat splat = {lanes[0][lane], lanes[1][lane], lanes[2][lane], lanes[3][lane], lanes[4][lane], lanes[5][lane],
                   lanes[6][lane], lanes[7][lane], lanes[8][lane], lanes[9][lane], 0.0f,           0.0f};
    const float level = ellipse_level(splat.opacity);
    splat.extent_x = sqrtf(level * variance_x[lane]);
    splat.extent_y = sqrtf(level * variance_y[lane]);
    int64_t n_tiles = 0;
    for_each_tile_row(splat, grid.tiles_x(), grid.tiles_y(),
                      [&](int, TileSpan columns) { n_tiles += columns.end - columns.begin; });
    if (n_tiles > 0) writer.append(splat, rows.index[lane], n_tiles);
  }
}

}  // namespace

ProjectedCounts project(const Cpu& cpu, const Gaussians& g, const Camera& camera, const RasterSettings& settings,
                        void* scratch, const Projected& out) {
  const View<Float8> view = view_of<Float8>(camera);
  const int64_t n_pieces = n_pieces_of(g.n, kProjectRowsPerPiece);
  int64_t* n_visible = static_cast<int64_t*>(scratch);  // [n_pieces]
  parallel_for(*cpu.pool, n_pieces, [&](int64_t piece) {
    const Range range = range_of(piece, g.n, kProjectRowsPerPiece);
    PieceWriter writer(out, range.begin);
    for (int64_t row = range.begin; row < range.end; row += kLanes) {
      const Rows rows = Rows::of(row, range.end, [](int64_t i) { return i; });
      project_rows(g, rows, view, camera, settings, writer);
    }
    n_visible[piece] = writer.n();
  });

  // Close the gaps between the pieces, in order.
  int64_t n = 0;
  for (int64_t piece = 0; piece < n_pieces; ++piece) {
    const int64_t from = range_of(piece, g.n, kProjectRowsPerPiece).begin;
    std::memmove(out.splats + n, out.splats + from, size_t(n_visible[piece]) * sizeof(Splat));
    std::memmove(out.gaussian_from_splat + n, out.gaussian_from_splat + from,
                 size_t(n_visible[piece]) * sizeof(int32_t));
    std::memmove(out.instance_offsets + n, out.instance_offsets + from, size_t(n_visible[piece]) * sizeof(int64_t));
    n += n_visible[piece];
  }
  int64_t n_instances = 0;
  for (int64_t splat = 0; splat < n; ++splat) {
    const int64_t n_tiles = out.instance_offsets[splat];
    out.instance_offsets[splat] = n_instances;
    n_instances += n_tiles;
  }
  out.instance_offsets[n] = n_instances;
  return {n, n_instances};
}

namespace {

void zero_rows(const Gaussians& g, int64_t begin, int64_t end) {
  const size_t n = size_t(end - begin), sh = size_t(g.n_coefficients) * 3;
  std::memset(g.means + begin * 3, 0, n * 3 * sizeof(float));
  std::memset(g.log_scales + begin * 3, 0, n * 3 * sizeof(float));
  std::memset(g.quaternions + begin * 4, 0, n * 4 * sizeof(float));
  std::memset(g.opacities + begin, 0, n * sizeof(float));
  std::memset(g.sh + begin * int64_t(sh), 0, n * sh * sizeof(float));
}

// Gradient by the pose, summed over rows: in double precision, as there may be millions.
struct PoseSum {
  double values[kPoseSize] = {};

  void add(const Rows& rows, const PoseGradient<Float8>& d) {
    const Mat3<Float8>& r = d.d_rotation;
    const Vec3<Float8>& t = d.d_translation;
    const Float8 columns[kPoseSize] = {r.row[0].x, r.row[0].y, r.row[0].z, t.x,        r.row[1].x, r.row[1].y,
                                       r.row[1].z, t.y,        r.row[2].x, r.row[2].y, r.row[2].z, t.z};
    for (int k = 0; k < kPoseSize; ++k) {
      float lanes[kLanes];
      store(lanes, columns[k]);
      for (int lane = 0; lane < rows.n; ++lane) values[k] += double(lanes[lane]);
    }
  }
};

// Gradient by the colour's coefficients, written to d_g.sh; returns the gradient by the mean.
HOST_DEVICE Vec3<Float8> color_vjp(const Gaussians& g, const Rows& rows, const View<Float8>& view,
                                   const Vec3<Float8>& mean, int degree, Vec3<Float8> d_color, const Gaussians& d_g) {
  const Float8 zero(0.0f);
  const int64_t stride = int64_t(g.n_coefficients) * 3;
  const Vec3<Float8> offset = mean - view.center;
  const Vec3<Float8> to_gaussian = direction(offset);
  Float8 basis[kMaxShCoefficients], d_basis[kMaxShCoefficients], sh[kMaxShCoefficients * 3];
  sh_basis(degree, to_gaussian, basis);
  rows.gather_columns(g.sh, stride, 3 * n_coefficients_of(degree), sh);
  const Vec3<Float8> color = color_of(degree, basis, sh);
  d_color = {masked(color.x > zero, d_color.x), masked(color.y > zero, d_color.y), masked(color.z > zero, d_color.z)};
  color_of_vjp(degree, basis, d_color, sh, d_basis);
  for (int column = 3 * n_coefficients_of(degree); column < stride; ++column) sh[column] = zero;
  rows.scatter_columns(d_g.sh, stride, int(stride), sh);
  return direction_vjp(offset, sh_basis_vjp(degree, to_gaussian, d_basis));
}

// `d_pose` may be null.
void project_rows_vjp(const Gaussians& g, const Rows& rows, const Rows& splats, const View<Float8>& view,
                      const RasterSettings& settings, const SplatGradient& d_splats, const Gaussians& d_g,
                      PoseSum* d_pose) {
  const auto d_splat = [&](int column) { return splats.gather(d_splats.rows, d_splats.n_columns, column); };
  const RawShape<Float8> raw = raw_shape_of(g, rows);
  const Shape<Float8> s = shape_of(raw, view, Float8(settings.low_pass));
  ProjectedAxesGradient<Float8> d_seen =
      seen_shape_vjp(view, s, d_splat(0), d_splat(1), {d_splat(2), d_splat(3), d_splat(4)});
  if (has_depth(d_splats.n_columns)) d_seen.d_point.z = d_seen.d_point.z + d_splat(9);
  const RawShape<Float8> d = shape_of_vjp(raw, view, s, d_seen);
  const Float8 opacity = sigmoid(rows.gather(g.opacities, 1, 0));
  const Vec3<Float8> d_mean_by_color =
      color_vjp(g, rows, view, raw.mean, settings.sh_degree, {d_splat(6), d_splat(7), d_splat(8)}, d_g);

  rows.scatter3(d_g.means, 3, 0, d.mean + d_mean_by_color);
  rows.scatter3(d_g.log_scales, 3, 0, d.log_scale);
  rows.scatter(d_g.quaternions, 4, 0, d.quaternion.w);
  rows.scatter(d_g.quaternions, 4, 1, d.quaternion.x);
  rows.scatter(d_g.quaternions, 4, 2, d.quaternion.y);
  rows.scatter(d_g.quaternions, 4, 3, d.quaternion.z);
  rows.scatter(d_g.opacities, 1, 0, d_splat(5) * opacity * (Float8(1.0f) - opacity));
  if (d_pose != nullptr) d_pose->add(rows, pose_vjp(raw, view, s, d_seen, Float8(-1.0f) * d_mean_by_color));
}

}  // namespace

void project_vjp(const Cpu& cpu, const Gaussians& g, const Camera& camera, const RasterSettings& settings,
                 const Projected& projected, const SplatGradient& d_splats, const ProjectGradient& out) {
  const Gaussians& d_g = out.gaussians;
  PoseSum* pose_sums = static_cast<PoseSum*>(out.scratch);  // [n_pieces]
  const View<Float8> view = view_of<Float8>(camera);
  const int32_t* gaussian_from_splat = projected.gaussian_from_splat;
  const int64_t n_pieces = n_pieces_of(projected.n, kProjectRowsPerPiece);
  if (n_pieces == 0) zero_rows(d_g, 0, g.n);
  parallel_for(*cpu.pool, n_pieces, [&](int64_t piece) {
    const Range range = range_of(piece, projected.n, kProjectRowsPerPiece);
    // The piece owns the rows from behind the last splat of the piece before it to its own last splat.
    int64_t next_row = range.begin == 0 ? 0 : int64_t(gaussian_from_splat[range.begin - 1]) + 1;
    for (int64_t splat = range.begin; splat < range.end; ++splat) {
      zero_rows(d_g, next_row, gaussian_from_splat[splat]);
      next_row = int64_t(gaussian_from_splat[splat]) + 1;
    }
    if (range.end == projected.n) zero_rows(d_g, next_row, g.n);
    PoseSum d_pose;
    for (int64_t splat = range.begin; splat < range.end; splat += kLanes) {
      const Rows splats = Rows::of(splat, range.end, [](int64_t i) { return i; });
      const Rows rows = Rows::of(splat, range.end, [&](int64_t i) { return int64_t(gaussian_from_splat[i]); });
      project_rows_vjp(g, rows, splats, view, settings, d_splats, d_g,
                       out.cam_from_world != nullptr ? &d_pose : nullptr);
    }
    if (out.cam_from_world != nullptr) pose_sums[piece] = d_pose;
  });
  if (out.cam_from_world == nullptr) return;
  for (int k = 0; k < kPoseSize; ++k) {
    double sum = 0.0;
    for (int64_t piece = 0; piece < n_pieces; ++piece) sum += pose_sums[piece].values[k];
    out.cam_from_world[k] = sum;
  }
}

}  // namespace spaceport::SPACEPORT_ISA
