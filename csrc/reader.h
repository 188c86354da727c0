// Reads Python's arguments into the engine's nouns; part of bindings.cpp. Arrays are anything that is C-contiguous in
// the backend's memory: NumPy arrays and other buffers, or torch tensors, which are read through data_ptr() so that
// torch is not needed to build or to import the module.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_status.h"
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
struct Format<double> {
  static constexpr const char* name = "float64";
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

// Reads arrays and nouns whose arrays lie in the memory of one device.
class Reader {
 public:
  // `index` of the device, where there may be several; else -1.
  explicit Reader(const char* device, int index = -1) : device_(device), index_(index) {}

  // `shape` holds the expected sizes; -1 stands for any.
  template <class T>
  Array<T> array(py::handle object, const char* name, const std::vector<int64_t>& shape) const {
    Array<T> array{nullptr, {}};
    std::string format;
    bool contiguous = true;
    if (py::hasattr(object, "data_ptr")) {
      const std::string device = object.attr("device").attr("type").cast<std::string>();
      if (device != device_) refuse(name, std::string("a tensor on ") + device_, device);
      const py::object index = object.attr("device").attr("index");
      if (index_ >= 0 && index.cast<int>() != index_)
        refuse(name, "a tensor on the current device, " + std::to_string(index_), py::str(index));
      format = py::str(object.attr("dtype")).cast<std::string>().substr(6);  // behind "torch."
      contiguous = object.attr("is_contiguous")().cast<bool>();
      for (py::handle size : object.attr("shape")) array.shape.push_back(size.cast<int64_t>());
      array.data = reinterpret_cast<T*>(object.attr("data_ptr")().cast<uintptr_t>());
    } else if (std::string(device_) == "cpu" && py::isinstance<py::buffer>(object)) {
      const py::buffer_info info = py::reinterpret_borrow<py::buffer>(object).request();
      format = info.item_type_is_equivalent_to<T>() ? Format<T>::name : "buffer format " + info.format;
      array.shape.assign(info.shape.begin(), info.shape.end());
      py::ssize_t stride = info.itemsize;
      for (size_t i = info.shape.size(); i-- > 0; stride *= info.shape[i]) {
        if (info.shape[i] > 1 && info.strides[i] != stride) contiguous = false;
      }
      array.data = static_cast<T*>(info.ptr);
    } else {
      refuse(name, std::string("an array on ") + device_, py::str(py::type::of(object)));
    }
    bool fits = array.shape.size() == shape.size();
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || shape[i] == array.shape[i];
    if (format != Format<T>::name) refuse(name, Format<T>::name, format);
    if (!fits) refuse(name, "shape " + shape_text(shape) + " (-1: any)", shape_text(array.shape));
    if (!contiguous) refuse(name, "a C-contiguous array", "one with gaps");
    return array;
  }

  template <class T>
  Array<T> field(py::handle noun, const char* name, const std::vector<int64_t>& shape) const {
    return array<T>(noun.attr(name), name, shape);
  }

  void* scratch(py::handle object, size_t n_bytes) const {
    const Array<uint8_t> bytes = array<uint8_t>(object, "scratch", {-1});
    if (bytes.shape[0] < int64_t(n_bytes))
      refuse("scratch", std::to_string(n_bytes) + " bytes", std::to_string(bytes.shape[0]));
    return bytes.data;
  }

  Gaussians gaussians(py::handle object) const { return gaussians(object, field<float>(object, "sh", {-1, -1, 3})); }

  // The same Gaussians in another role: all sizes must agree with `like`.
  Gaussians gaussians_like(py::handle object, const Gaussians& like) const {
    const Gaussians g = gaussians(object);
    if (g.n != like.n || g.n_coefficients != like.n_coefficients) {
      refuse("Gaussians", shape_text({like.n, like.n_coefficients}) + " rows and coefficients",
             shape_text({g.n, g.n_coefficients}));
    }
    return g;
  }

  // Adam's moments of these values, in either storage.
  AdamMoments moments(py::handle first, py::handle second, const Gaussians& values) const {
    const AdamMoments moments = {companion(first, values.n), companion(second, values.n),
                                 is_compact(first) ? MomentStorage::kCompact : MomentStorage::kFull};
    if (moments.storage == MomentStorage::kCompact && !is_gpu()) refuse("sh", "float32", "int32: compact moments");
    check_coefficients(moments.first, values.n_coefficients);
    check_coefficients(moments.second, moments.storage == MomentStorage::kCompact ? 1 : values.n_coefficients);
    return moments;
  }

  Rows rows(py::handle object) const {
    const py::sequence companions = object.attr("companions");
    if (companions.size() > kMaxCompanions)
      refuse("companions", "at most " + std::to_string(kMaxCompanions), std::to_string(companions.size()));
    Rows rows = {gaussians(object.attr("values")), {}, int(companions.size())};
    for (int c = 0; c < rows.n_companions; ++c) {
      rows.companions[c] = companion(companions[size_t(c)], rows.values.n);
    }
    return rows;
  }

  // Room for `n` rows with what those of `like` have.
  Rows rows(py::handle object, const Rows& like, int64_t n) const {
    const Rows r = rows(object);
    if (r.values.n != n || r.values.n_coefficients != like.values.n_coefficients || r.n_companions != like.n_companions)
      refuse("out", shape_text({n, like.values.n_coefficients, like.n_companions}) + " rows, coefficients, companions",
             shape_text({r.values.n, r.values.n_coefficients, r.n_companions}));
    for (int c = 0; c < r.n_companions; ++c) check_coefficients(r.companions[c], like.companions[c].n_coefficients);
    return r;
  }

  // `n` rows, of which the first that project fills are used; -1 takes all rows as filled.
  Projected projected(py::handle object, int64_t n = -1) const {
    const Array<float> splats = field<float>(object, "splats", {n, kSplatStride});
    n = splats.shape[0];
    Projected p = {reinterpret_cast<Splat*>(aligned(splats, "splats").data),
                   field<int32_t>(object, "gaussian_from_splat", {n}).data,
                   field<int64_t>(object, "instance_offsets", {n + 1}).data,
                   n,
                   nullptr,
                   nullptr};
    if (is_gpu()) {
      const Array<int32_t> touched = field<int32_t>(object, "touched", {n, sizeof(TileSet) / sizeof(int32_t)});
      p.touched = reinterpret_cast<TileSet*>(aligned(touched, "touched").data);
      p.depth_keys = reinterpret_cast<uint32_t*>(field<int32_t>(object, "depth_keys", {n}).data);
    }
    return p;
  }

  Tiles tiles(py::handle object, const Camera& camera) const {
    const int64_t n_tiles = int64_t(camera.tiles_x()) * camera.tiles_y();
    const Array<int32_t> splats = field<int32_t>(object, "splat_from_instance", {-1});
    Tiles t = {field<int64_t>(object, "offsets", {n_tiles + 1}).data, splats.data, nullptr, splats.shape[0]};
    if (!is_gpu()) t.number_from_instance = field<int32_t>(object, "number_from_instance", {t.n_instances}).data;
    return t;
  }

  // Nine columns, or ten, or two more than these.
  SplatGradient splat_gradient(py::handle object, int64_t n) const {
    const Array<float> rows = array<float>(object, "d_splats", {n, -1});
    const int64_t n_columns = rows.shape[1];
    if (n_columns < kSplatGradientStride || n_columns > kSplatDepthGradientStride + kAbsoluteColumns)
      refuse("d_splats", "9 columns, or 10 with the depth, or 2 more", std::to_string(n_columns));
    return {rows.data, int(n_columns)};
  }

  // Depths may be None.
  Image image(py::handle object, const Camera& camera) const {
    const auto plane_or_null = [&](const char* name) {
      return object.attr(name).is_none() ? nullptr : field<float>(object, name, {camera.height, camera.width}).data;
    };
    return {field<float>(object, "color", {camera.height, camera.width, 3}).data,
            field<float>(object, "transmittance", {camera.height, camera.width}).data, nullptr, plane_or_null("depth"),
            plane_or_null("median_depth")};
  }
  // With room for what blend keeps for its backward pass, unless it is None.
  Image image(py::handle object, const Camera& camera, int64_t hits_size) const {
    Image i = image(object, camera);
    if (!object.attr("hits").is_none()) i.hits = field<int32_t>(object, "hits", {hits_size}).data;
    return i;
  }

  // What an image of this size is compared with: its attributes photo, mask and exposure, the last two maybe None.
  LossTarget loss_target(py::handle object, int64_t width, int64_t height) const {
    LossTarget target = {field<uint8_t>(object, "photo", {height, width, 3}).data, nullptr, nullptr};
    if (!object.attr("mask").is_none()) target.mask = field<uint8_t>(object, "mask", {height, width}).data;
    if (!object.attr("exposure").is_none())
      target.exposure = array<float>(object.attr("exposure"), "exposure", {3, 4}).data;
    return target;
  }

  Points points(py::handle object, const char* name, int64_t n_dimensions) const {
    const Array<float> values = array<float>(object, name, {-1, n_dimensions});
    return {values.data, values.shape[0], values.shape[1]};
  }

 private:
  // With these SH coefficients, or what has their place.
  Gaussians gaussians(py::handle object, const Array<float>& sh) const {
    const Array<float> means = field<float>(object, "means", {-1, 3});
    const int64_t n = means.shape[0], k = sh.shape[1];
    if (sh.shape[0] != n) refuse("sh", shape_text({n, -1, 3}) + " (-1: any)", shape_text(sh.shape));
    if (k != 1 && k != 4 && k != 9 && k != 16) refuse("sh", "1, 4, 9 or 16 coefficients", std::to_string(k));
    return {means.data,
            field<float>(object, "log_scales", {n, 3}).data,
            aligned(field<float>(object, "quaternions", {n, 4}), "quaternions").data,
            field<float>(object, "opacities", {n}).data,
            aligned(sh, "sh").data,
            n,
            int(k)};
  }

  // What has a row for each of n others: moments in either storage (see MomentStorage).
  Gaussians companion(py::handle object, int64_t n) const {
    Gaussians g = {};
    if (is_compact(object)) {
      const Array<int32_t> words = field<int32_t>(object, "sh", {-1, -1, 3});
      g = gaussians(object, Array<float>{reinterpret_cast<float*>(words.data), words.shape});
    } else {
      g = gaussians(object);
    }
    if (g.n != n) refuse("companions", std::to_string(n) + " rows", std::to_string(g.n));
    return g;
  }
  static bool is_compact(py::handle companion) {
    const std::string format = py::str(companion.attr("sh").attr("dtype"));
    return format == "torch.int32" || format == "int32";
  }
  static void check_coefficients(const Gaussians& g, int expected) {
    if (g.n_coefficients != expected)
      refuse("sh", std::to_string(expected) + " coefficients", std::to_string(g.n_coefficients));
  }

  bool is_gpu() const { return index_ >= 0; }

  // Kernels read and write these rows sixteen bytes at a time.
  template <class T>
  const Array<T>& aligned(const Array<T>& rows, const char* name) const {
    const bool is_wide = rows.shape.size() > 1 && rows.shape[1] * (rows.shape.size() > 2 ? rows.shape[2] : 1) % 4 == 0;
    if (is_gpu() && is_wide && reinterpret_cast<uintptr_t>(rows.data) % 16 != 0)
      refuse(name, "memory that begins at a multiple of 16 bytes", "a view into other memory: clone it");
    return rows;
  }

  const char* device_;
  int index_;
};

Reader reader_of(const Cpu&) {
  return Reader("cpu");
}
#ifdef SPACEPORT_BUILD_CUDA
Reader reader_of(const Cuda&) {
  return Reader("cuda", current_cuda_device());
}
#endif

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
  camera.above = object.attr("above").cast<float>();
  camera.below = object.attr("below").cast<float>();
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
  s.deterministic = object.attr("deterministic").cast<bool>();
  // The Gaussians may hold fewer coefficients than the degree asks for.
  if (!(s.sh_degree >= 0 && s.sh_degree <= 3)) refuse("sh_degree", "0 to 3", std::to_string(s.sh_degree));
  while ((s.sh_degree + 1) * (s.sh_degree + 1) > n_coefficients) --s.sh_degree;
  if (!(s.near > 0.0f)) refuse("near", "a positive depth", std::to_string(s.near));
  if (!(s.low_pass >= 0.0f)) refuse("low_pass", "a variance in px^2", std::to_string(s.low_pass));
  if (!(s.alpha_max > 0.0f && s.alpha_max < 1.0f))
    refuse("alpha_max", "a number between 0 and 1", std::to_string(s.alpha_max));
  return s;
}

// For images of this size.
LossSettings loss_settings_of(py::handle object, int64_t width, int64_t height) {
  LossSettings s = {object.attr("ssim_weight").cast<float>(), SsimPadding::kZero};
  const std::string padding = object.attr("padding").attr("value").cast<std::string>();
  if (padding == "valid") {
    s.padding = SsimPadding::kValid;
    if (width < kSsimWindow || height < kSsimWindow) {
      refuse("color", "at least 11x11 pixels, a whole window of SSIM, for the padding `valid`",
             shape_text({height, width}));
    }
  } else if (padding != "zero") {
    refuse("padding", "zero or valid", padding);
  }
  return s;
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

AdamSettings adam_settings_of(py::handle object) {
  const auto number = [&](const char* name) { return object.attr(name).cast<float>(); };
  const AdamSettings a = {number("means"),       number("log_scales"),
                          number("quaternions"), number("opacities"),
                          number("sh_dc"),       number("sh_rest"),
                          number("beta1"),       number("beta2"),
                          number("epsilon"),     object.attr("step").cast<int64_t>(),
                          number("exposure")};
  if (a.step < 1) refuse("step", "1 or more", std::to_string(a.step));
  return a;
}

DrawKey draw_key_of(py::handle object) {
  return {object.attr("seed").cast<uint64_t>(), object.attr("step").cast<uint32_t>()};
}

GrowthSettings growth_settings_of(py::handle object) {
  const auto number = [&](const char* name) { return object.attr(name).cast<float>(); };
  const GrowthSettings s = {number("threshold"),
                            number("split_log_scale"),
                            number("min_opacity"),
                            number("max_log_scale"),
                            object.attr("max_rows").cast<int64_t>(),
                            draw_key_of(object.attr("key"))};
  if (!(s.threshold >= 0.0f)) refuse("threshold", "0 or more", std::to_string(s.threshold));
  if (s.max_rows < 0) refuse("max_rows", "0 (no limit) or more", std::to_string(s.max_rows));
  return s;
}

}  // namespace
}  // namespace spaceport
