// The maths of one Gaussian, each function directly followed by its _vjp (vector-Jacobian product).
//
// Everything is a template over the number type: float in a CUDA thread, Float8 (eight Gaussians side by side) on the
// CPU. A number type needs + - * /, comparisons, select(condition, a, b), square_root and exponential. References:
// Zwicker et al., EWA Splatting (2002); Kerbl et al., 3D Gaussian Splatting (2023).
#pragma once

#include "device.h"
#include "types.h"

namespace spaceport::SPACEPORT_ISA {

template <class T>
struct Vec3 {
  T x, y, z;
};

template <class T>
HOST_DEVICE T dot(const Vec3<T>& a, const Vec3<T>& b) {
  return a.x * b.x + a.y * b.y + a.z * b.z;
}
template <class T>
HOST_DEVICE Vec3<T> operator+(const Vec3<T>& a, const Vec3<T>& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z};
}
template <class T>
HOST_DEVICE Vec3<T> operator-(const Vec3<T>& a, const Vec3<T>& b) {
  return {a.x - b.x, a.y - b.y, a.z - b.z};
}
template <class T>
HOST_DEVICE Vec3<T> operator*(const T& s, const Vec3<T>& a) {
  return {s * a.x, s * a.y, s * a.z};
}

// Three rows.
template <class T>
struct Mat3 {
  Vec3<T> row[3];
};

template <class T>
HOST_DEVICE Vec3<T> operator*(const Mat3<T>& m, const Vec3<T>& v) {
  return {dot(m.row[0], v), dot(m.row[1], v), dot(m.row[2], v)};
}
template <class T>
HOST_DEVICE Vec3<T> transposed_times(const Mat3<T>& m, const Vec3<T>& v) {
  return v.x * m.row[0] + v.y * m.row[1] + v.z * m.row[2];
}
template <class T>
HOST_DEVICE Mat3<T> operator*(const Mat3<T>& a, const Mat3<T>& b) {
  return {transposed_times(b, a.row[0]), transposed_times(b, a.row[1]), transposed_times(b, a.row[2])};
}
template <class T>
HOST_DEVICE Mat3<T> transposed(const Mat3<T>& m) {
  return {Vec3<T>{m.row[0].x, m.row[1].x, m.row[2].x}, Vec3<T>{m.row[0].y, m.row[1].y, m.row[2].y},
          Vec3<T>{m.row[0].z, m.row[1].z, m.row[2].z}};
}

template <class T>
struct Quaternion {
  T w, x, y, z;
};

template <class T>
HOST_DEVICE T norm_squared(const Quaternion<T>& q) {
  return q.w * q.w + q.x * q.x + q.y * q.y + q.z * q.z;
}

template <class T>
HOST_DEVICE Quaternion<T> normalized(const Quaternion<T>& q) {
  const T inverse = T(1.0f) / square_root(norm_squared(q));
  return {q.w * inverse, q.x * inverse, q.y * inverse, q.z * inverse};
}
template <class T>
HOST_DEVICE Quaternion<T> normalized_vjp(const Quaternion<T>& q, const Quaternion<T>& d_unit) {
  const T inverse = T(1.0f) / square_root(norm_squared(q));
  const Quaternion<T> u = {q.w * inverse, q.x * inverse, q.y * inverse, q.z * inverse};
  const T along = u.w * d_unit.w + u.x * d_unit.x + u.y * d_unit.y + u.z * d_unit.z;
  return {(d_unit.w - along * u.w) * inverse, (d_unit.x - along * u.x) * inverse, (d_unit.y - along * u.y) * inverse,
          (d_unit.z - along * u.z) * inverse};
}

// Rotation matrix of a unit quaternion.
template <class T>
HOST_DEVICE Mat3<T> rotation(const Quaternion<T>& q) {
  const T one(1.0f), two(2.0f);
  return {Vec3<T>{one - two * (q.y * q.y + q.z * q.z), two * (q.x * q.y - q.w * q.z), two * (q.x * q.z + q.w * q.y)},
          Vec3<T>{two * (q.x * q.y + q.w * q.z), one - two * (q.x * q.x + q.z * q.z), two * (q.y * q.z - q.w * q.x)},
          Vec3<T>{two * (q.x * q.z - q.w * q.y), two * (q.y * q.z + q.w * q.x), one - two * (q.x * q.x + q.y * q.y)}};
}
template <class T>
HOST_DEVICE Quaternion<T> rotation_vjp(const Quaternion<T>& q, const Mat3<T>& d) {
  const T two(2.0f);
  const Vec3<T>&r0 = d.row[0], &r1 = d.row[1], &r2 = d.row[2];
  return {two * (q.x * (r2.y - r1.z) + q.y * (r0.z - r2.x) + q.z * (r1.x - r0.y)),
          two * (q.y * (r0.y + r1.x) + q.z * (r0.z + r2.x) + q.w * (r2.y - r1.z) - two * q.x * (r1.y + r2.z)),
          two * (q.x * (r0.y + r1.x) + q.z * (r1.z + r2.y) + q.w * (r0.z - r2.x) - two * q.y * (r0.x + r2.z)),
          two * (q.x * (r0.z + r2.x) + q.y * (r1.z + r2.y) + q.w * (r1.x - r0.y) - two * q.z * (r0.x + r1.y))};
}

// A Gaussian's axes in the world, as columns: rotation times standard deviations. Its covariance is axes * axes^T.
template <class T>
HOST_DEVICE Mat3<T> axes_of(const Mat3<T>& r, const Vec3<T>& scale) {
  Mat3<T> axes;
  for (int i = 0; i < 3; ++i) axes.row[i] = {r.row[i].x * scale.x, r.row[i].y * scale.y, r.row[i].z * scale.z};
  return axes;
}
template <class T>
struct AxesGradient {
  Mat3<T> d_rotation;
  Vec3<T> d_scale;
};
template <class T>
HOST_DEVICE AxesGradient<T> axes_of_vjp(const Mat3<T>& r, const Vec3<T>& scale, const Mat3<T>& d_axes) {
  const Mat3<T> r_columns = transposed(r), d_columns = transposed(d_axes);
  return {axes_of(d_axes, scale),
          {dot(r_columns.row[0], d_columns.row[0]), dot(r_columns.row[1], d_columns.row[1]),
           dot(r_columns.row[2], d_columns.row[2])}};
}

// Perspective projection of a Gaussian to first order: the 2D covariance is u.u, u.v, v.v with (u, v) = J * axes.
// x/z and y/z inside J are clamped a little outside the image, where the linearisation would explode.
template <class T>
struct Lens {
  T fx, fy, cx, cy;
  T min_x, max_x, min_y, max_y;  // bounds of x/z and y/z inside the Jacobian
};

template <class T>
HOST_DEVICE Lens<T> lens_of(const Camera& camera) {
  const float margin_x = kJacobianMargin * 0.5f * float(camera.width) / camera.fx;
  const float top = -camera.above, bottom = float(camera.height) + camera.below;  // of the whole image
  const float margin_y = kJacobianMargin * 0.5f * (bottom - top) / camera.fy;
  return {T(camera.fx),
          T(camera.fy),
          T(camera.cx),
          T(camera.cy),
          T(-camera.cx / camera.fx - margin_x),
          T((float(camera.width) - camera.cx) / camera.fx + margin_x),
          T((top - camera.cy) / camera.fy - margin_y),
          T((bottom - camera.cy) / camera.fy + margin_y)};
}

template <class T>
HOST_DEVICE T clamp(const T& value, const T& low, const T& high) {
  return select(value < low, low, select(value > high, high, value));
}

template <class T>
struct Covariance2d {
  T xx, xy, yy;  // px^2
};

template <class T>
struct ProjectedAxes {
  Vec3<T> u, v;  // rows of J * axes, pixels
};

template <class T>
HOST_DEVICE ProjectedAxes<T> project_axes(const Lens<T>& lens, const Vec3<T>& p, const Mat3<T>& axes_in_cam) {
  const T inverse_z = T(1.0f) / p.z;
  const T slope_x = clamp(p.x * inverse_z, lens.min_x, lens.max_x);
  const T slope_y = clamp(p.y * inverse_z, lens.min_y, lens.max_y);
  return {lens.fx * inverse_z * (axes_in_cam.row[0] - slope_x * axes_in_cam.row[2]),
          lens.fy * inverse_z * (axes_in_cam.row[1] - slope_y * axes_in_cam.row[2])};
}
template <class T>
struct ProjectedAxesGradient {
  Vec3<T> d_point;
  Mat3<T> d_axes_in_cam;
};
template <class T>
HOST_DEVICE ProjectedAxesGradient<T> project_axes_vjp(const Lens<T>& lens, const Vec3<T>& p, const Mat3<T>& axes_in_cam,
                                                      const Vec3<T>& d_u, const Vec3<T>& d_v) {
  const T zero(0.0f), inverse_z = T(1.0f) / p.z;
  const T raw_x = p.x * inverse_z, raw_y = p.y * inverse_z;
  const T slope_x = clamp(raw_x, lens.min_x, lens.max_x), slope_y = clamp(raw_y, lens.min_y, lens.max_y);
  const T gain_x = lens.fx * inverse_z, gain_y = lens.fy * inverse_z;
  const Vec3<T> d_row0 = gain_x * d_u, d_row1 = gain_y * d_v;
  const T d_slope_x = select(raw_x == slope_x, zero - dot(d_row0, axes_in_cam.row[2]), zero);
  const T d_slope_y = select(raw_y == slope_y, zero - dot(d_row1, axes_in_cam.row[2]), zero);
  const T along = dot(d_row0, axes_in_cam.row[0] - slope_x * axes_in_cam.row[2]) +
                  dot(d_row1, axes_in_cam.row[1] - slope_y * axes_in_cam.row[2]);
  return {{d_slope_x * inverse_z, d_slope_y * inverse_z,
           zero - inverse_z * (along + d_slope_x * raw_x + d_slope_y * raw_y)},
          {d_row0, d_row1, (zero - slope_x) * d_row0 - slope_y * d_row1}};
}

template <class T>
HOST_DEVICE Covariance2d<T> covariance_of(const ProjectedAxes<T>& axes, const T& low_pass) {
  return {dot(axes.u, axes.u) + low_pass, dot(axes.u, axes.v), dot(axes.v, axes.v) + low_pass};
}
template <class T>
HOST_DEVICE ProjectedAxes<T> covariance_of_vjp(const ProjectedAxes<T>& axes, const Covariance2d<T>& d) {
  const T two(2.0f);
  return {two * d.xx * axes.u + d.xy * axes.v, d.xy * axes.u + two * d.yy * axes.v};
}

// The conic is the inverse covariance. The determinant is formed as |u x v|^2 + ..., which needles do not cancel away.
template <class T>
struct Conic {
  T a, b, c;
};
template <class T>
HOST_DEVICE T determinant_of(const ProjectedAxes<T>& axes, const T& low_pass) {
  const Vec3<T>&u = axes.u, &v = axes.v;
  const Vec3<T> cross = {u.y * v.z - u.z * v.y, u.z * v.x - u.x * v.z, u.x * v.y - u.y * v.x};
  return dot(cross, cross) + low_pass * (dot(u, u) + dot(v, v) + low_pass);
}
template <class T>
HOST_DEVICE Conic<T> conic_of(const Covariance2d<T>& s, const T& determinant) {
  const T inverse = T(1.0f) / determinant;
  return {s.yy * inverse, T(0.0f) - s.xy * inverse, s.xx * inverse};
}
// -K G K with the symmetric matrices K (the conic) and G (the gradient by it, its off-diagonal shared by two places).
template <class T>
HOST_DEVICE Covariance2d<T> conic_of_vjp(const Conic<T>& k, const Conic<T>& d) {
  const T half(0.5f), two(2.0f), zero(0.0f);
  const T g = half * d.b;
  const T p = d.a * k.a + g * k.b, q = d.a * k.b + g * k.c;  // rows of G K
  const T r = g * k.a + d.c * k.b, s = g * k.b + d.c * k.c;
  return {zero - (k.a * p + k.b * r), zero - two * (k.a * q + k.b * s), zero - (k.b * q + k.c * s)};
}

// Real spherical harmonics up to degree 3 with the signs of the field's files.
constexpr float kSh0 = 0.28209479177387814f;
constexpr float kSh1 = 0.4886025119029199f;
CONSTANT_TABLE float kSh2[5] = {1.0925484305920792f, -1.0925484305920792f, 0.31539156525252005f, -1.0925484305920792f,
                                0.5462742152960396f};
CONSTANT_TABLE float kSh3[7] = {-0.5900435899266435f, 2.890611442640554f, -0.4570457994644658f, 0.3731763325901154f,
                                -0.4570457994644658f, 1.445305721320277f, -0.5900435899266435f};

HOST_DEVICE constexpr int n_coefficients_of(int sh_degree) {
  return (sh_degree + 1) * (sh_degree + 1);
}

template <class T>
HOST_DEVICE void sh_basis(int degree, const Vec3<T>& d, T basis[kMaxShCoefficients]) {
  basis[0] = T(kSh0);
  if (degree < 1) return;
  const T x = d.x, y = d.y, z = d.z, zero(0.0f);
  basis[1] = zero - T(kSh1) * y;
  basis[2] = T(kSh1) * z;
  basis[3] = zero - T(kSh1) * x;
  if (degree < 2) return;
  const T xx = x * x, yy = y * y, zz = z * z;
  basis[4] = T(kSh2[0]) * x * y;
  basis[5] = T(kSh2[1]) * y * z;
  basis[6] = T(kSh2[2]) * (zz + zz - xx - yy);
  basis[7] = T(kSh2[3]) * x * z;
  basis[8] = T(kSh2[4]) * (xx - yy);
  if (degree < 3) return;
  const T three(3.0f), four(4.0f);
  basis[9] = T(kSh3[0]) * y * (three * xx - yy);
  basis[10] = T(kSh3[1]) * x * y * z;
  basis[11] = T(kSh3[2]) * y * (four * zz - xx - yy);
  basis[12] = T(kSh3[3]) * z * (zz + zz - three * xx - three * yy);
  basis[13] = T(kSh3[4]) * x * (four * zz - xx - yy);
  basis[14] = T(kSh3[5]) * z * (xx - yy);
  basis[15] = T(kSh3[6]) * x * (xx - three * yy);
}
// Gradient by the direction, given the gradient by each basis value.
template <class T>
HOST_DEVICE Vec3<T> sh_basis_vjp(int degree, const Vec3<T>& d, const T g[kMaxShCoefficients]) {
  Vec3<T> out = {T(0.0f), T(0.0f), T(0.0f)};
  if (degree < 1) return out;
  const T x = d.x, y = d.y, z = d.z, two(2.0f);
  out = {out.x - T(kSh1) * g[3], out.y - T(kSh1) * g[1], out.z + T(kSh1) * g[2]};
  if (degree < 2) return out;
  const T g4 = T(kSh2[0]) * g[4], g5 = T(kSh2[1]) * g[5], g6 = T(kSh2[2]) * g[6];
  const T g7 = T(kSh2[3]) * g[7], g8 = T(kSh2[4]) * g[8];
  out.x = out.x + g4 * y - two * x * g6 + g7 * z + two * x * g8;
  out.y = out.y + g4 * x + g5 * z - two * y * g6 - two * y * g8;
  out.z = out.z + g5 * y + two * two * z * g6 + g7 * x;
  if (degree < 3) return out;
  const T three(3.0f), four(4.0f), six(6.0f), eight(8.0f);
  const T xx = x * x, yy = y * y, zz = z * z;
  const T g9 = T(kSh3[0]) * g[9], g10 = T(kSh3[1]) * g[10], g11 = T(kSh3[2]) * g[11], g12 = T(kSh3[3]) * g[12];
  const T g13 = T(kSh3[4]) * g[13], g14 = T(kSh3[5]) * g[14], g15 = T(kSh3[6]) * g[15];
  out.x = out.x + six * x * y * g9 + y * z * g10 - two * x * y * g11 - six * x * z * g12 +
          (four * zz - three * xx - yy) * g13 + two * x * z * g14 + three * (xx - yy) * g15;
  out.y = out.y + three * (xx - yy) * g9 + x * z * g10 + (four * zz - xx - three * yy) * g11 - six * y * z * g12 -
          two * x * y * g13 - two * y * z * g14 - six * x * y * g15;
  out.z = out.z + x * y * g10 + eight * y * z * g11 + three * (two * zz - xx - yy) * g12 + eight * x * z * g13 +
          (xx - yy) * g14;
  return out;
}

template <class T>
HOST_DEVICE Vec3<T> direction(const Vec3<T>& offset) {
  return (T(1.0f) / square_root(dot(offset, offset))) * offset;
}
template <class T>
HOST_DEVICE Vec3<T> direction_vjp(const Vec3<T>& offset, const Vec3<T>& d_unit) {
  const T inverse = T(1.0f) / square_root(dot(offset, offset));
  const Vec3<T> unit = inverse * offset;
  return inverse * (d_unit - dot(unit, d_unit) * unit);
}

template <class T>
HOST_DEVICE T sigmoid(const T& x) {
  return T(1.0f) / (T(1.0f) + exponential(T(0.0f) - x));
}

// A camera in numbers of type T.
template <class T>
struct View {
  Mat3<T> rotation;  // cam_from_world
  Vec3<T> translation, center;
  Lens<T> lens;
};
template <class T>
HOST_DEVICE View<T> view_of(const Camera& camera) {
  View<T> view;
  const float* m = camera.cam_from_world;
  for (int i = 0; i < 3; ++i) view.rotation.row[i] = {T(m[4 * i]), T(m[4 * i + 1]), T(m[4 * i + 2])};
  view.translation = {T(m[3]), T(m[7]), T(m[11])};
  view.center = {T(camera.center[0]), T(camera.center[1]), T(camera.center[2])};
  view.lens = lens_of<T>(camera);
  return view;
}
template <class T>
HOST_DEVICE Vec3<T> point_in_cam(const View<T>& view, const Vec3<T>& mean) {
  return view.rotation * mean + view.translation;
}

// The raw parameters of a Gaussian's place and shape, or the gradient by them.
template <class T>
struct RawShape {
  Vec3<T> mean, log_scale;
  Quaternion<T> quaternion;
};

// What a camera sees of a shape, with what its gradient needs.
template <class T>
struct Shape {
  Vec3<T> point;  // the mean in the camera
  T x, y;         // pixels
  Conic<T> conic;
  Covariance2d<T> covariance;
  T determinant;  // of the covariance
  Quaternion<T> unit;
  Mat3<T> rotation, axes_in_cam;
  Vec3<T> scale;
  ProjectedAxes<T> axes;
};
template <class T>
HOST_DEVICE Shape<T> shape_of(const RawShape<T>& raw, const View<T>& view, const T& low_pass) {
  Shape<T> s;
  s.point = point_in_cam(view, raw.mean);
  const T inverse_z = T(1.0f) / s.point.z;
  s.x = view.lens.fx * s.point.x * inverse_z + view.lens.cx;
  s.y = view.lens.fy * s.point.y * inverse_z + view.lens.cy;
  s.unit = normalized(raw.quaternion);
  s.rotation = rotation(s.unit);
  s.scale = {exponential(raw.log_scale.x), exponential(raw.log_scale.y), exponential(raw.log_scale.z)};
  s.axes_in_cam = view.rotation * axes_of(s.rotation, s.scale);
  s.axes = project_axes(view.lens, s.point, s.axes_in_cam);
  s.covariance = covariance_of(s.axes, low_pass);
  s.determinant = determinant_of(s.axes, low_pass);
  s.conic = conic_of(s.covariance, s.determinant);
  return s;
}
// In two parts: by the point and the axes in the camera, and from there by the raw parameters.
template <class T>
HOST_DEVICE ProjectedAxesGradient<T> seen_shape_vjp(const View<T>& view, const Shape<T>& s, const T& d_x, const T& d_y,
                                                    const Conic<T>& d_conic) {
  const ProjectedAxes<T> d_axes = covariance_of_vjp(s.axes, conic_of_vjp(s.conic, d_conic));
  ProjectedAxesGradient<T> d = project_axes_vjp(view.lens, s.point, s.axes_in_cam, d_axes.u, d_axes.v);
  const T inverse_z = T(1.0f) / s.point.z;
  const T slope_x = d_x * view.lens.fx * inverse_z, slope_y = d_y * view.lens.fy * inverse_z;
  d.d_point = d.d_point + Vec3<T>{slope_x, slope_y, T(0.0f) - (slope_x * s.point.x + slope_y * s.point.y) * inverse_z};
  return d;
}
template <class T>
HOST_DEVICE RawShape<T> shape_of_vjp(const RawShape<T>& raw, const View<T>& view, const Shape<T>& s,
                                     const ProjectedAxesGradient<T>& d) {
  const AxesGradient<T> d_world = axes_of_vjp(s.rotation, s.scale, transposed(view.rotation) * d.d_axes_in_cam);
  return {transposed_times(view.rotation, d.d_point),
          {d_world.d_scale.x * s.scale.x, d_world.d_scale.y * s.scale.y, d_world.d_scale.z * s.scale.z},
          normalized_vjp(raw.quaternion, rotation_vjp(s.unit, d_world.d_rotation))};
}

// Gradient by cam_from_world, all twelve numbers of which count as free.
template <class T>
struct PoseGradient {
  Mat3<T> d_rotation;
  Vec3<T> d_translation;
};
// Of what one shape takes from the pose [R | t]: its point R mean + t, its axes R axes, and the camera's centre -R^T t
// that its colour is seen from.
template <class T>
HOST_DEVICE PoseGradient<T> pose_vjp(const RawShape<T>& raw, const View<T>& view, const Shape<T>& s,
                                     const ProjectedAxesGradient<T>& d, const Vec3<T>& d_center) {
  const Mat3<T> axes = axes_of(s.rotation, s.scale);
  return {{d.d_point.x * raw.mean + axes * d.d_axes_in_cam.row[0] - view.translation.x * d_center,
           d.d_point.y * raw.mean + axes * d.d_axes_in_cam.row[1] - view.translation.y * d_center,
           d.d_point.z * raw.mean + axes * d.d_axes_in_cam.row[2] - view.translation.z * d_center},
          d.d_point - view.rotation * d_center};
}

// Colour of SH coefficients [K, 3] before it is clamped to zero from below.
template <class T>
HOST_DEVICE Vec3<T> color_of(int degree, const T basis[kMaxShCoefficients], const T* sh) {
  Vec3<T> color = {T(0.5f), T(0.5f), T(0.5f)};
  for (int k = 0; k < n_coefficients_of(degree); ++k) {
    color = color + basis[k] * Vec3<T>{sh[3 * k], sh[3 * k + 1], sh[3 * k + 2]};
  }
  return color;
}
// Gradient by the basis; the coefficients are replaced by the gradient by them.
template <class T>
HOST_DEVICE void color_of_vjp(int degree, const T basis[kMaxShCoefficients], const Vec3<T>& d_color, T* sh,
                              T d_basis[kMaxShCoefficients]) {
  for (int k = 0; k < n_coefficients_of(degree); ++k) {
    d_basis[k] = dot(Vec3<T>{sh[3 * k], sh[3 * k + 1], sh[3 * k + 2]}, d_color);
    sh[3 * k] = basis[k] * d_color.x;
    sh[3 * k + 1] = basis[k] * d_color.y;
    sh[3 * k + 2] = basis[k] * d_color.z;
  }
}

// Zero where x is finite, else NaN.
template <class T>
HOST_DEVICE T poison(const T& x) {
  return x * T(0.0f);
}
// Zero where all that a splat is made of is finite, else NaN.
template <class T>
HOST_DEVICE T doubt_of(const Shape<T>& s, const Vec3<T>& color, const T& opacity, const T& logit) {
  return poison(s.x) + poison(s.y) + poison(s.conic.a) + poison(s.conic.b) + poison(s.conic.c) +
         poison(s.covariance.xx) + poison(s.covariance.yy) + poison(color.x) + poison(color.y) + poison(color.z) +
         poison(opacity) + poison(logit);
}

}  // namespace spaceport::SPACEPORT_ISA
