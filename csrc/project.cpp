// project: raw parameters to splats on the image plane, eight Gaussians side by side.
#include "kernels.h"
#include "simd.h"
#include "splat_math.h"
#include "tile_spans.h"

namespace spaceport::SPACEPORT_ISA {

namespace {

constexpr int kLanes = 8;
constexpr int64_t kRowsPerPiece = 1024;

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

struct CameraLanes {
  Mat3<Float8> rotation;
  Vec3<Float8> translation, center;
  Lens<Float8> lens;
};

CameraLanes lanes_of(const Camera& camera) {
  CameraLanes lanes;
  const float* m = camera.cam_from_world;
  for (int i = 0; i < 3; ++i) {
    lanes.rotation.row[i] = {Float8(m[4 * i]), Float8(m[4 * i + 1]), Float8(m[4 * i + 2])};
  }
  lanes.translation = {Float8(m[3]), Float8(m[7]), Float8(m[11])};
  lanes.center = {Float8(camera.center[0]), Float8(camera.center[1]), Float8(camera.center[2])};
  lanes.lens = lens_of<Float8>(camera);
  return lanes;
}

// What forward and backward both need of a Gaussian's shape.
struct Shape {
  Quaternion<Float8> quaternion, unit;
  Mat3<Float8> rotation;
  Vec3<Float8> scale;
  Vec3<Float8> point;  // the mean in the camera
  Mat3<Float8> axes_in_cam;
  ProjectedAxes<Float8> axes;
  Float8 determinant;
  Conic<Float8> conic;
  Covariance2d<Float8> covariance;
};

HOST_DEVICE Vec3<Float8> point_in_cam(const CameraLanes& camera, const Vec3<Float8>& mean) {
  return camera.rotation * mean + camera.translation;
}

HOST_DEVICE Shape shape_of(const Gaussians& g, const Rows& rows, const CameraLanes& camera, const Vec3<Float8>& mean,
                           Float8 low_pass) {
  Shape s;
  s.point = point_in_cam(camera, mean);
  s.quaternion = {rows.gather(g.quaternions, 4, 0), rows.gather(g.quaternions, 4, 1), rows.gather(g.quaternions, 4, 2),
                  rows.gather(g.quaternions, 4, 3)};
  s.unit = normalized(s.quaternion);
  s.rotation = rotation(s.unit);
  const Vec3<Float8> log_scale = rows.gather3(g.log_scales, 3, 0);
  s.scale = {exponential(log_scale.x), exponential(log_scale.y), exponential(log_scale.z)};
  s.axes_in_cam = camera.rotation * axes_of(s.rotation, s.scale);
  s.axes = project_axes(camera.lens, s.point, s.axes_in_cam);
  s.covariance = covariance_of(s.axes, low_pass);
  s.determinant = determinant_of(s.axes, low_pass);
  s.conic = conic_of(s.covariance, s.determinant);
  return s;
}

// The SH coefficients of eight Gaussians up to a degree, channels innermost.
struct ShLanes {
  Float8 columns[kMaxShCoefficients * 3];

  HOST_DEVICE const Vec3<Float8> coefficient(int k) const {
    return {columns[3 * k], columns[3 * k + 1], columns[3 * k + 2]};
  }
};

HOST_DEVICE Vec3<Float8> color_before_clamp(const ShLanes& sh, int degree, const Float8 basis[kMaxShCoefficients]) {
  Vec3<Float8> color = {Float8(0.5f), Float8(0.5f), Float8(0.5f)};
  for (int k = 0; k < n_coefficients_of(degree); ++k) color = color + basis[k] * sh.coefficient(k);
  return color;
}

// Zero where x is finite, else NaN.
HOST_DEVICE Float8 poison(Float8 x) {
  return x * Float8(0.0f);
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

void project_rows(const Gaussians& g, const Rows& rows, const CameraLanes& camera, const Camera& grid,
                  const RasterSettings& settings, PieceWriter& writer) {
  const Vec3<Float8> mean = rows.gather3(g.means, 3, 0);
  if (!any(point_in_cam(camera, mean).z >= Float8(settings.near))) return;

  const Shape s = shape_of(g, rows, camera, mean, Float8(settings.low_pass));
  const Float8 inverse_z = Float8(1.0f) / s.point.z;
  const Float8 x = camera.lens.fx * s.point.x * inverse_z + camera.lens.cx;
  const Float8 y = camera.lens.fy * s.point.y * inverse_z + camera.lens.cy;
  const Float8 opacity = sigmoid(rows.gather(g.opacities, 1, 0));
  const Vec3<Float8> view = direction(mean - camera.center);
  Float8 basis[kMaxShCoefficients];
  sh_basis(settings.sh_degree, view, basis);
  ShLanes sh;
  rows.gather_columns(g.sh, int64_t(g.n_coefficients) * 3, 3 * n_coefficients_of(settings.sh_degree), sh.columns);
  const Vec3<Float8> color = color_before_clamp(sh, settings.sh_degree, basis);
  const Float8 doubt = poison(x) + poison(y) + poison(s.conic.a) + poison(s.conic.b) + poison(s.conic.c) +
                       poison(s.covariance.xx) + poison(s.covariance.yy) + poison(color.x) + poison(color.y) +
                       poison(color.z) + poison(opacity) + poison(rows.gather(g.opacities, 1, 0));
  // Phrased so that NaN fails.
  const Mask8 visible = (s.point.z >= Float8(settings.near)) & (opacity >= Float8(kAlphaCutoff)) &
                        (norm_squared(s.quaternion) >= Float8(kMinQuaternionNormSquared)) &
                        (s.determinant > Float8(0.0f)) & (doubt == Float8(0.0f));
  if (!any(visible)) return;

  const Float8 zero(0.0f);
  float lanes[10][kLanes];
  int32_t is_visible[kLanes];
  store(lanes[0], x);
  store(lanes[1], y);
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

int64_t project(const Cpu& cpu, const Gaussians& g, const Camera& camera, const RasterSettings& settings,
                const Projected& out) {
  const CameraLanes camera_lanes = lanes_of(camera);
  const int64_t n_pieces = n_pieces_of(g.n, kRowsPerPiece);
  int64_t* n_visible = new int64_t[n_pieces + 1];
  parallel_for(*cpu.pool, n_pieces, [&](int64_t piece) {
    const Range range = range_of(piece, g.n, kRowsPerPiece);
    PieceWriter writer(out, range.begin);
    for (int64_t row = range.begin; row < range.end; row += kLanes) {
      const Rows rows = Rows::of(row, range.end, [](int64_t i) { return i; });
      project_rows(g, rows, camera_lanes, camera, settings, writer);
    }
    n_visible[piece] = writer.n();
  });

  // Close the gaps between the pieces, in order.
  int64_t n = 0;
  for (int64_t piece = 0; piece < n_pieces; ++piece) {
    const int64_t from = range_of(piece, g.n, kRowsPerPiece).begin;
    std::memmove(out.splats + n, out.splats + from, size_t(n_visible[piece]) * sizeof(Splat));
    std::memmove(out.gaussian_from_splat + n, out.gaussian_from_splat + from,
                 size_t(n_visible[piece]) * sizeof(int32_t));
    std::memmove(out.instance_offsets + n, out.instance_offsets + from, size_t(n_visible[piece]) * sizeof(int64_t));
    n += n_visible[piece];
  }
  delete[] n_visible;
  int64_t n_instances = 0;
  for (int64_t splat = 0; splat < n; ++splat) {
    const int64_t n_tiles = out.instance_offsets[splat];
    out.instance_offsets[splat] = n_instances;
    n_instances += n_tiles;
  }
  out.instance_offsets[n] = n_instances;
  return n;
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

// Gradient by the colour's coefficients, written to d_g.sh; returns the gradient by the mean.
HOST_DEVICE Vec3<Float8> color_vjp(const Gaussians& g, const Rows& rows, const CameraLanes& camera,
                                   const Vec3<Float8>& mean, int degree, Vec3<Float8> d_color, const Gaussians& d_g) {
  const Float8 zero(0.0f);
  const int64_t stride = int64_t(g.n_coefficients) * 3;
  const Vec3<Float8> offset = mean - camera.center;
  const Vec3<Float8> view = direction(offset);
  Float8 basis[kMaxShCoefficients], d_basis[kMaxShCoefficients];
  sh_basis(degree, view, basis);
  ShLanes sh;
  rows.gather_columns(g.sh, stride, 3 * n_coefficients_of(degree), sh.columns);
  const Vec3<Float8> color = color_before_clamp(sh, degree, basis);
  d_color = {masked(color.x > zero, d_color.x), masked(color.y > zero, d_color.y), masked(color.z > zero, d_color.z)};
  for (int k = 0; k < n_coefficients_of(degree); ++k) {
    d_basis[k] = dot(sh.coefficient(k), d_color);
    sh.columns[3 * k] = basis[k] * d_color.x;
    sh.columns[3 * k + 1] = basis[k] * d_color.y;
    sh.columns[3 * k + 2] = basis[k] * d_color.z;
  }
  for (int column = 3 * n_coefficients_of(degree); column < stride; ++column) sh.columns[column] = zero;
  rows.scatter_columns(d_g.sh, stride, int(stride), sh.columns);
  return direction_vjp(offset, sh_basis_vjp(degree, view, d_basis));
}

void project_rows_vjp(const Gaussians& g, const Rows& rows, const Rows& splats, const CameraLanes& camera,
                      const RasterSettings& settings, const float* d_splats, const Gaussians& d_g) {
  const int64_t stride = kSplatGradientStride;
  const Vec3<Float8> mean = rows.gather3(g.means, 3, 0);
  const Shape s = shape_of(g, rows, camera, mean, Float8(settings.low_pass));

  const Covariance2d<Float8> d_covariance = conic_of_vjp(
      s.conic,
      {splats.gather(d_splats, stride, 2), splats.gather(d_splats, stride, 3), splats.gather(d_splats, stride, 4)});
  const ProjectedAxes<Float8> d_axes = covariance_of_vjp(s.axes, d_covariance);
  const ProjectedAxesGradient<Float8> d = project_axes_vjp(camera.lens, s.point, s.axes_in_cam, d_axes.u, d_axes.v);

  const Float8 inverse_z = Float8(1.0f) / s.point.z;
  const Float8 d_x = splats.gather(d_splats, stride, 0) * camera.lens.fx * inverse_z;
  const Float8 d_y = splats.gather(d_splats, stride, 1) * camera.lens.fy * inverse_z;
  const Vec3<Float8> d_point =
      d.d_point + Vec3<Float8>{d_x, d_y, Float8(0.0f) - (d_x * s.point.x + d_y * s.point.y) * inverse_z};

  const AxesGradient<Float8> d_world = axes_of_vjp(s.rotation, s.scale, transposed(camera.rotation) * d.d_axes_in_cam);
  const Quaternion<Float8> d_quaternion = normalized_vjp(s.quaternion, rotation_vjp(s.unit, d_world.d_rotation));
  const Float8 opacity = sigmoid(rows.gather(g.opacities, 1, 0));
  const Vec3<Float8> d_mean =
      transposed_times(camera.rotation, d_point) +
      color_vjp(g, rows, camera, mean, settings.sh_degree, splats.gather3(d_splats, stride, 6), d_g);

  rows.scatter3(d_g.means, 3, 0, d_mean);
  rows.scatter3(d_g.log_scales, 3, 0,
                {d_world.d_scale.x * s.scale.x, d_world.d_scale.y * s.scale.y, d_world.d_scale.z * s.scale.z});
  rows.scatter(d_g.quaternions, 4, 0, d_quaternion.w);
  rows.scatter(d_g.quaternions, 4, 1, d_quaternion.x);
  rows.scatter(d_g.quaternions, 4, 2, d_quaternion.y);
  rows.scatter(d_g.quaternions, 4, 3, d_quaternion.z);
  rows.scatter(d_g.opacities, 1, 0, splats.gather(d_splats, stride, 5) * opacity * (Float8(1.0f) - opacity));
}

}  // namespace

void project_vjp(const Cpu& cpu, const Gaussians& g, const Camera& camera, const RasterSettings& settings,
                 const Projected& projected, const float* d_splats, const Gaussians& d_g) {
  const CameraLanes camera_lanes = lanes_of(camera);
  const int32_t* gaussian_from_splat = projected.gaussian_from_splat;
  const int64_t n_pieces = n_pieces_of(projected.n, kRowsPerPiece);
  if (n_pieces == 0) zero_rows(d_g, 0, g.n);
  parallel_for(*cpu.pool, n_pieces, [&](int64_t piece) {
    const Range range = range_of(piece, projected.n, kRowsPerPiece);
    // The piece owns the rows from behind the last splat of the piece before it to its own last splat.
    int64_t next_row = range.begin == 0 ? 0 : int64_t(gaussian_from_splat[range.begin - 1]) + 1;
    for (int64_t splat = range.begin; splat < range.end; ++splat) {
      zero_rows(d_g, next_row, gaussian_from_splat[splat]);
      next_row = int64_t(gaussian_from_splat[splat]) + 1;
    }
    if (range.end == projected.n) zero_rows(d_g, next_row, g.n);
    for (int64_t splat = range.begin; splat < range.end; splat += kLanes) {
      const Rows splats = Rows::of(splat, range.end, [](int64_t i) { return i; });
      const Rows rows = Rows::of(splat, range.end, [&](int64_t i) { return int64_t(gaussian_from_splat[i]); });
      project_rows_vjp(g, rows, splats, camera_lanes, settings, d_splats, d_g);
    }
  });
}

}  // namespace spaceport::SPACEPORT_ISA
