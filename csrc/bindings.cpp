// Python's view of the engine. Arrays are anything that is C-contiguous in host memory: NumPy arrays, other buffers, or
// torch tensors, which are read through data_ptr() so that torch is not needed to build or to import this module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "diagnose.h"
#include "ops.h"

namespace py = pybind11;

namespace spaceport {
namespace {

template <class T>
struct Format;
template <>
struct Format<float> {
  static constexpr const char* name = "float32";
};
template <>
struct Format<int32_t> {
  static constexpr const char* name = "int32";
};
template <>
struct Format<int64_t> {
  static constexpr const char* name = "int64";
};
template <>
struct Format<uint8_t> {
  static constexpr const char* name = "uint8";
};

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// An array argument, checked once: its address and shape.
template <class T>
struct Array {
  T* data;
  std::vector<int64_t> shape;
};

[[noreturn]] void refuse(const char* name, const std::string& expected, const std::string& got) {
  throw py::value_error(std::string(name) + ": expected " + expected + ", got " + got);
}

// `shape` holds the expected sizes; -1 stands for any.
template <class T>
Array<T> array_of(py::handle object, const char* name, const std::vector<int64_t>& shape) {
  Array<T> array{nullptr, {}};
  std::string format;
  bool contiguous = true;
  py::buffer_info info;
  if (py::hasattr(object, "data_ptr")) {
    if (object.attr("device").attr("type").cast<std::string>() != "cpu")
      refuse(name, "a CPU tensor", py::str(object.attr("device")));
    format = py::str(object.attr("dtype")).cast<std::string>().substr(6);  // behind "torch."
    contiguous = object.attr("is_contiguous")().cast<bool>();
    for (py::handle size : object.attr("shape")) array.shape.push_back(size.cast<int64_t>());
    array.data = reinterpret_cast<T*>(object.attr("data_ptr")().cast<uintptr_t>());
  } else if (py::isinstance<py::buffer>(object)) {
    info = py::reinterpret_borrow<py::buffer>(object).request();
    format = info.item_type_is_equivalent_to<T>() ? Format<T>::name : "buffer format " + info.format;
    array.shape.assign(info.shape.begin(), info.shape.end());
    py::ssize_t stride = info.itemsize;
    for (size_t i = info.shape.size(); i-- > 0; stride *= info.shape[i]) {
      if (info.shape[i] > 1 && info.strides[i] != stride) contiguous = false;
    }
    array.data = static_cast<T*>(info.ptr);
  } else {
    refuse(name, "an array", py::str(py::type::of(object)));
  }
  bool fits = array.shape.size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || shape[i] == array.shape[i];
  if (format != Format<T>::name) refuse(name, Format<T>::name, format);
  if (!fits) refuse(name, "shape " + shape_text(shape) + " (-1: any)", shape_text(array.shape));
  if (!contiguous) refuse(name, "a C-contiguous array", "one with gaps");
  return array;
}

template <class T>
Array<T> field_of(py::handle noun, const char* name, const std::vector<int64_t>& shape) {
  return array_of<T>(noun.attr(name), name, shape);
}

Gaussians gaussians_of(py::handle object) {
  const Array<float> means = field_of<float>(object, "means", {-1, 3});
  const int64_t n = means.shape[0];
  const Array<float> sh = field_of<float>(object, "sh", {n, -1, 3});
  const int64_t k = sh.shape[1];
  if (k != 1 && k != 4 && k != 9 && k != 16) refuse("sh", "1, 4, 9 or 16 coefficients", std::to_string(k));
  return {means.data,
          field_of<float>(object, "log_scales", {n, 3}).data,
          field_of<float>(object, "quaternions", {n, 4}).data,
          field_of<float>(object, "opacities", {n}).data,
          sh.data,
          n,
          int(k)};
}

// The same Gaussians in another role: all sizes must agree with `like`.
Gaussians gaussians_like(py::handle object, const Gaussians& like) {
  const Gaussians g = gaussians_of(object);
  if (g.n != like.n || g.n_coefficients != like.n_coefficients) {
    refuse("Gaussians", shape_text({like.n, like.n_coefficients}) + " rows and coefficients",
           shape_text({g.n, g.n_coefficients}));
  }
  return g;
}

Camera camera_of(py::handle object) {
  Camera camera;
  const py::handle pose = object.attr("cam_from_world");
  const py::buffer_info info = py::reinterpret_borrow<py::buffer>(pose).request();
  if (!info.item_type_is_equivalent_to<double>() || info.shape != std::vector<py::ssize_t>{3, 4}) {
    refuse("cam_from_world", "float64 [3, 4]", "format " + info.format);
  }
  double center[3] = {0.0, 0.0, 0.0};
  for (int i = 0; i < 3; ++i) {
    double row[4];
    for (int j = 0; j < 4; ++j) {
      row[j] = *reinterpret_cast<const double*>(static_cast<const char*>(info.ptr) + i * info.strides[0] +
                                                j * info.strides[1]);
      camera.cam_from_world[4 * i + j] = float(row[j]);
    }
    for (int j = 0; j < 3; ++j) center[j] -= row[j] * row[3];
  }
  for (int j = 0; j < 3; ++j) camera.center[j] = float(center[j]);
  camera.fx = object.attr("fx").cast<float>();
  camera.fy = object.attr("fy").cast<float>();
  camera.cx = object.attr("cx").cast<float>();
  camera.cy = object.attr("cy").cast<float>();
  camera.width = object.attr("width").cast<int>();
  camera.height = object.attr("height").cast<int>();
  if (!(camera.width > 0 && camera.height > 0))
    refuse("camera", "a positive size", shape_text({camera.width, camera.height}));
  if (!(camera.fx > 0.0f && camera.fy > 0.0f))
    refuse("camera", "positive focal lengths", std::to_string(camera.fx) + ", " + std::to_string(camera.fy));
  return camera;
}

RasterSettings raster_settings_of(py::handle object, int n_coefficients) {
  RasterSettings s;
  s.sh_degree = object.attr("sh_degree").cast<int>();
  s.near = object.attr("near").cast<float>();
  s.low_pass = object.attr("low_pass").cast<float>();
  s.alpha_max = object.attr("alpha_max").cast<float>();
  const auto background = object.attr("background").cast<std::vector<float>>();
  if (background.size() != 3) refuse("background", "three numbers", std::to_string(background.size()));
  for (int c = 0; c < 3; ++c) s.background[c] = background[size_t(c)];
  // The Gaussians may hold fewer coefficients than the degree asks for.
  if (!(s.sh_degree >= 0 && s.sh_degree <= 3)) refuse("sh_degree", "0 to 3", std::to_string(s.sh_degree));
  while ((s.sh_degree + 1) * (s.sh_degree + 1) > n_coefficients) --s.sh_degree;
  if (!(s.near > 0.0f)) refuse("near", "a positive depth", std::to_string(s.near));
  if (!(s.low_pass >= 0.0f)) refuse("low_pass", "a variance in px^2", std::to_string(s.low_pass));
  if (!(s.alpha_max > 0.0f && s.alpha_max < 1.0f))
    refuse("alpha_max", "a number between 0 and 1", std::to_string(s.alpha_max));
  return s;
}

Projected projected_of(py::handle object) {
  const Array<float> splats = field_of<float>(object, "splats", {-1, kSplatStride});
  const int64_t n = splats.shape[0];
  return {reinterpret_cast<Splat*>(splats.data), field_of<int32_t>(object, "gaussian_from_splat", {n}).data,
          field_of<int64_t>(object, "instance_offsets", {n + 1}).data, n};
}

Tiles tiles_of(py::handle object, const Projected& projected, const Camera& camera) {
  const int64_t n_tiles = int64_t(camera.tiles_x()) * camera.tiles_y();
  const int64_t n_instances = projected.instance_offsets[projected.n];
  return {field_of<int64_t>(object, "offsets", {n_tiles + 1}).data,
          reinterpret_cast<Instance*>(field_of<int32_t>(object, "instances", {n_instances, 2}).data), n_instances};
}

Image image_of(py::handle object, const Camera& camera) {
  return {field_of<float>(object, "color", {camera.height, camera.width, 3}).data,
          field_of<float>(object, "transmittance", {camera.height, camera.width}).data};
}

Points points_of(py::handle object, const char* name, int64_t n_dimensions) {
  const Array<float> values = array_of<float>(object, name, {-1, n_dimensions});
  return {values.data, values.shape[0], values.shape[1]};
}

Cpu make_cpu(int n_threads, const std::string& simd) {
  if (n_threads < 0) refuse("n_threads", "0 (all cores) or more", std::to_string(n_threads));
  Simd chosen = has_avx2() ? Simd::kAvx2 : Simd::kPortable;
  if (simd == "portable") {
    chosen = Simd::kPortable;
  } else if (simd == "avx2") {
    if (!has_avx2()) refuse("simd", "an instruction set of this machine and build", "avx2");
  } else if (simd != "auto") {
    refuse("simd", "auto, portable or avx2", simd);
  }
  return {std::make_shared<ThreadPool>(n_threads), chosen};
}

using Unlocked = py::gil_scoped_release;

}  // namespace
}  // namespace spaceport

PYBIND11_MODULE(_engine, m) {
  using namespace spaceport;
  m.doc() = "The engine's verbs on raw buffers; spaceport_gs.ops is the interface for users.";
  m.attr("TILE_SIZE") = kTileSize;
  m.attr("ALPHA_CUTOFF") = kAlphaCutoff;
  m.attr("SPLAT_STRIDE") = kSplatStride;
  m.attr("SPLAT_GRADIENT_STRIDE") = kSplatGradientStride;
  m.attr("VERSION") = SPACEPORT_VERSION;

  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = SPACEPORT_VERSION;
        info["compiler"] = SPACEPORT_COMPILER;
        info["backends"] = std::vector<std::string>{"cpu"};
        info["cuda_architectures"] = std::vector<std::string>{};
        std::vector<std::string> simd = {"portable"};
#ifdef SPACEPORT_BUILD_AVX2
        simd.push_back("avx2");
#endif
        info["simd"] = simd;
        info["simd_in_use"] = has_avx2() ? "avx2" : "portable";
        return info;
      },
      "What was built: version, compiler, backends, CUDA architectures, SIMD paths and the one this machine takes.");

  py::class_<Cpu>(m, "Cpu", "The CPU backend: a pool of threads and an instruction set.")
      .def(py::init(&make_cpu), py::arg("n_threads") = 0, py::arg("simd") = "auto")
      .def_property_readonly("n_threads", [](const Cpu& cpu) { return cpu.pool->n_threads(); })
      .def_property_readonly("simd", [](const Cpu& cpu) { return cpu.simd == Simd::kAvx2 ? "avx2" : "portable"; });

  m.def(
      "project",
      [](const Cpu& cpu, py::object gaussians, py::object camera, py::object settings, py::object out) {
        const Gaussians g = gaussians_of(gaussians);
        const Projected projected = {reinterpret_cast<Splat*>(field_of<float>(out, "splats", {g.n, kSplatStride}).data),
                                     field_of<int32_t>(out, "gaussian_from_splat", {g.n}).data,
                                     field_of<int64_t>(out, "instance_offsets", {g.n + 1}).data, g.n};
        const Camera c = camera_of(camera);
        const RasterSettings s = raster_settings_of(settings, g.n_coefficients);
        Unlocked unlocked;
        return project(cpu, g, c, s, projected);
      },
      "Fills `out` (N rows) with the visible Gaussians; returns how many.");

  m.def("project_vjp", [](const Cpu& cpu, py::object gaussians, py::object camera, py::object settings,
                          py::object projected, py::object d_splats, py::object d_gaussians) {
    const Gaussians g = gaussians_of(gaussians);
    const Projected p = projected_of(projected);
    const float* d = array_of<float>(d_splats, "d_splats", {p.n, kSplatGradientStride}).data;
    const Gaussians d_g = gaussians_like(d_gaussians, g);
    const Camera c = camera_of(camera);
    const RasterSettings s = raster_settings_of(settings, g.n_coefficients);
    Unlocked unlocked;
    project_vjp(cpu, g, c, s, p, d, d_g);
  });

  m.def("tile", [](const Cpu& cpu, py::object projected, py::object camera, py::object scratch, py::object out) {
    const Projected p = projected_of(projected);
    const Camera c = camera_of(camera);
    const Tiles t = tiles_of(out, p, c);
    int32_t* words = array_of<int32_t>(scratch, "scratch", {4 * p.n + 3 * t.n_instances}).data;
    const TileScratch s = {reinterpret_cast<SplatDepth*>(words), reinterpret_cast<SplatDepth*>(words + 2 * p.n),
                           reinterpret_cast<PlacedInstance*>(words + 4 * p.n)};
    Unlocked unlocked;
    tile(cpu, p, c, s, t);
  });

  m.def("blend", [](const Cpu& cpu, py::object projected, py::object tiles, py::object camera, py::object settings,
                    py::object out) {
    const Projected p = projected_of(projected);
    const Camera c = camera_of(camera);
    const Tiles t = tiles_of(tiles, p, c);
    const RasterSettings s = raster_settings_of(settings, kMaxShCoefficients);
    const Image image = image_of(out, c);
    Unlocked unlocked;
    blend(cpu, p, t, c, s, image);
  });

  m.def("blend_vjp", [](const Cpu& cpu, py::object projected, py::object tiles, py::object camera, py::object settings,
                        py::object image, py::object d_image, py::object records, py::object d_splats) {
    const Projected p = projected_of(projected);
    const Camera c = camera_of(camera);
    const Tiles t = tiles_of(tiles, p, c);
    const RasterSettings s = raster_settings_of(settings, kMaxShCoefficients);
    const Image i = image_of(image, c), d = image_of(d_image, c);
    const BlendGradient out = {array_of<float>(records, "records", {t.n_instances, kSplatGradientStride}).data,
                               array_of<float>(d_splats, "d_splats", {p.n, kSplatGradientStride}).data};
    Unlocked unlocked;
    blend_vjp(cpu, p, t, c, s, i, d, out);
  });

  m.def(
      "loss",
      [](const Cpu& cpu, py::object color, py::object photo, float ssim_weight, py::object d_color) {
        const Array<float> x = array_of<float>(color, "color", {-1, -1, 3});
        const uint8_t* y = array_of<uint8_t>(photo, "photo", x.shape).data;
        float* d = array_of<float>(d_color, "d_color", x.shape).data;
        const int width = int(x.shape[1]), height = int(x.shape[0]);
        LossValue value;
        {
          Unlocked unlocked;
          value = loss(cpu, x.data, y, width, height, {ssim_weight}, d);
        }
        return py::make_tuple(value.l1, value.ssim);
      },
      "Mean L1 and mean SSIM; d_color becomes the gradient of (1 - w) L1 + w (1 - SSIM).");

  m.def("update", [](const Cpu& cpu, py::object values, py::object gradient, py::object first, py::object second,
                     py::object settings) {
    const Gaussians v = gaussians_of(values);
    const Gaussians g = gaussians_like(gradient, v), m1 = gaussians_like(first, v), m2 = gaussians_like(second, v);
    const auto number = [&](const char* name) { return settings.attr(name).cast<float>(); };
    const AdamSettings a = {number("means"),       number("log_scales"),
                            number("quaternions"), number("opacities"),
                            number("sh_dc"),       number("sh_rest"),
                            number("beta1"),       number("beta2"),
                            number("epsilon"),     settings.attr("step").cast<int64_t>()};
    if (a.step < 1) refuse("step", "1 or more", std::to_string(a.step));
    Unlocked unlocked;
    update(cpu, v, g, m1, m2, a);
  });

  m.def("density", [](const Cpu& cpu, py::object projected, py::object d_splats, py::object camera, py::object out) {
    const Projected p = projected_of(projected);
    const float* d = array_of<float>(d_splats, "d_splats", {p.n, kSplatGradientStride}).data;
    const Camera c = camera_of(camera);
    const Array<float> sums = field_of<float>(out, "gradient_sums", {-1});
    if (p.n > 0 && p.gaussian_from_splat[p.n - 1] >= sums.shape[0])
      refuse("gradient_sums", "a row per Gaussian", shape_text(sums.shape));
    const DensityStatistics statistics = {sums.data, field_of<float>(out, "n_visible", {sums.shape[0]}).data};
    Unlocked unlocked;
    density(cpu, p, d, c, statistics);
  });

  m.def(
      "cluster_assign",
      [](const Cpu& cpu, py::object points, py::object centroids, py::object labels, py::object distances) {
        const Points p = points_of(points, "points", -1), c = points_of(centroids, "centroids", p.n_dimensions);
        if (c.n < 1) refuse("centroids", "at least one", "none");
        int32_t* l = array_of<int32_t>(labels, "labels", {p.n}).data;
        float* d = array_of<float>(distances, "distances", {p.n}).data;
        Unlocked unlocked;
        cluster_assign(cpu, p, c, l, d);
      },
      "Nearest centroid of every point and the squared distance to it.");
  m.def(
      "cluster_update",
      [](const Cpu& cpu, py::object points, py::object labels, py::object weights, py::object centroids,
         py::object centroid_weights) {
        const Points p = points_of(points, "points", -1), c = points_of(centroids, "centroids", p.n_dimensions);
        const int32_t* l = array_of<int32_t>(labels, "labels", {p.n}).data;
        for (int64_t i = 0; i < p.n; ++i) {
          if (!(l[i] >= 0 && l[i] < c.n)) refuse("labels", "rows of centroids", std::to_string(l[i]));
        }
        const float* w = array_of<float>(weights, "weights", {p.n}).data;
        float* cw = array_of<float>(centroid_weights, "centroid_weights", {c.n}).data;
        Unlocked unlocked;
        cluster_update(cpu, p, l, w, c, cw);
      },
      "Moves every centroid to the weighted mean of its points.");

  // For benchmarks.
  m.attr("MULTIPLY_ADD_FLOPS") = kMultiplyAddFlops;
  m.def(
      "multiply_adds",
      [](const Cpu& cpu, int64_t n_pieces) {
        Unlocked unlocked;
        multiply_adds(cpu, n_pieces);
      },
      "Does n_pieces * MULTIPLY_ADD_FLOPS operations on registers.");
  m.def(
      "count_pairs",
      [](const Cpu& cpu, py::object projected, py::object tiles, py::object camera, py::object settings) {
        const Projected p = projected_of(projected);
        const Camera c = camera_of(camera);
        const Tiles t = tiles_of(tiles, p, c);
        const RasterSettings s = raster_settings_of(settings, kMaxShCoefficients);
        PairCounts counts;
        {
          Unlocked unlocked;
          counts = count_pairs(cpu, p, t, c, s);
        }
        return py::make_tuple(counts.evaluated, counts.blended);
      },
      "(splat, pixel) pairs of the tiles' lists before each pixel's stop, and those of them that are blended.");
}
