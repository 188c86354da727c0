// Python's view of the engine; reader.h has how arguments are read.
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "cuda_status.h"
#include "diagnose.h"
#include "ops.h"
#include "reader.h"
#include "render.h"
#include "step.h"

namespace spaceport {
namespace {

using Unlocked = py::gil_scoped_release;

// What only the CPU can look at before it starts.
void check_instances(const Cpu&, const Projected& p, const Tiles& t) {
  if (p.instance_offsets[p.n] != t.n_instances) {
    refuse("instances", std::to_string(p.instance_offsets[p.n]) + " rows, as projected", std::to_string(t.n_instances));
  }
}
bool names_rows_behind(const Cpu&, const Projected& p, int64_t n_gaussians) {
  return p.n > 0 && p.gaussian_from_splat[p.n - 1] >= n_gaussians;
}
#ifdef SPACEPORT_BUILD_CUDA
void check_instances(const Cuda&, const Projected&, const Tiles&) {}
bool names_rows_behind(const Cuda&, const Projected&, int64_t) {
  return false;
}
#endif

template <class Backend>
void check_rows(const Backend& backend, const Projected& p, int64_t n_gaussians) {
  if (p.n > n_gaussians || names_rows_behind(backend, p, n_gaussians))
    refuse("projected", "splats of " + std::to_string(n_gaussians) + " Gaussians", "those of more");
}

// The verbs of one backend.
template <class Backend>
void bind_verbs(py::module_& m) {
  m.def("project_scratch", [](const Backend& backend, int64_t n) { return project_scratch(backend, n); });
  m.def(
      "project",
      [](const Backend& backend, py::object gaussians, py::object camera, py::object settings, py::object scratch,
         py::object out) {
        const Reader read = reader_of(backend);
        const Gaussians g = read.gaussians(gaussians);
        const Projected projected = read.projected(out, g.n);
        void* memory = read.scratch(scratch, project_scratch(backend, g.n));
        const Camera c = camera_of(camera);
        const RasterSettings s = raster_settings_of(settings, g.n_coefficients);
        ProjectedCounts counts;
        {
          Unlocked unlocked;
          counts = project(backend, g, c, s, memory, projected);
        }
        return py::make_tuple(counts.n_splats, counts.n_instances);
      },
      "Fills `out` (N rows) with the visible Gaussians; returns how many there are, and their number of instances.");

  m.def("project_vjp_scratch",
        [](const Backend& backend, int64_t n_splats) { return project_vjp_scratch(backend, n_splats); });
  m.def("project_vjp",
        [](const Backend& backend, py::object gaussians, py::object camera, py::object settings, py::object projected,
           py::object d_splats, py::object d_gaussians, py::object d_cam_from_world, py::object scratch) {
          const Reader read = reader_of(backend);
          const Gaussians g = read.gaussians(gaussians);
          const Projected p = read.projected(projected);
          const SplatGradient d = read.splat_gradient(d_splats, p.n);
          ProjectGradient out = {read.gaussians_like(d_gaussians, g), nullptr, nullptr};
          if (!d_cam_from_world.is_none()) {
            out.cam_from_world = read.array<double>(d_cam_from_world, "d_cam_from_world", {3, 4}).data;
            out.scratch = read.scratch(scratch, project_vjp_scratch(backend, p.n));
          }
          check_rows(backend, p, g.n);
          const Camera c = camera_of(camera);
          const RasterSettings s = raster_settings_of(settings, g.n_coefficients);
          Unlocked unlocked;
          project_vjp(backend, g, c, s, p, d, out);
        });

  m.def("tile_scratch", [](const Backend& backend, int64_t n_splats, int64_t n_instances, py::object camera) {
    return tile_scratch(backend, n_splats, n_instances, camera_of(camera));
  });
  m.def("tile",
        [](const Backend& backend, py::object projected, py::object camera, py::object scratch, py::object out) {
          const Reader read = reader_of(backend);
          const Projected p = read.projected(projected);
          const Camera c = camera_of(camera);
          const Tiles t = read.tiles(out, c);
          check_instances(backend, p, t);
          void* memory = read.scratch(scratch, tile_scratch(backend, p.n, t.n_instances, c));
          Unlocked unlocked;
          tile(backend, p, c, memory, t);
        });

  m.def("blend", [](const Backend& backend, py::object projected, py::object tiles, py::object camera,
                    py::object settings, py::object out) {
    const Reader read = reader_of(backend);
    const Projected p = read.projected(projected);
    const Camera c = camera_of(camera);
    const Tiles t = read.tiles(tiles, c);
    check_instances(backend, p, t);
    const RasterSettings s = raster_settings_of(settings, kMaxShCoefficients);
    const Image image = read.image(out, c, hits_size(backend, t.n_instances, c));
    Unlocked unlocked;
    blend(backend, p, t, c, s, image);
  });
  m.def(
      "hits_size",
      [](const Backend& backend, int64_t n_instances, py::object camera) {
        return hits_size(backend, n_instances, camera_of(camera));
      },
      "How many numbers an image's `hits` holds, so that blend_vjp can follow.");

  m.def("blend_vjp_scratch",
        [](const Backend& backend, int64_t n_splats, int64_t n_instances, int n_columns, py::object settings) {
          const RasterSettings s = raster_settings_of(settings, kMaxShCoefficients);
          return blend_vjp_scratch(backend, n_splats, n_instances, n_columns, s);
        });
  m.def("blend_vjp", [](const Backend& backend, py::object projected, py::object tiles, py::object camera,
                        py::object settings, py::object image, py::object d_image, py::object scratch,
                        py::object d_splats) {
    const Reader read = reader_of(backend);
    const Projected p = read.projected(projected);
    const Camera c = camera_of(camera);
    const Tiles t = read.tiles(tiles, c);
    check_instances(backend, p, t);
    const RasterSettings s = raster_settings_of(settings, kMaxShCoefficients);
    const int64_t n_hits = hits_size(backend, t.n_instances, c);
    const Image i = read.image(image, c, n_hits), d_i = read.image(d_image, c);
    if (n_hits > 0 && i.hits == nullptr) refuse("image", "what blend returned, with its hits", "none");
    if (d_i.depth != nullptr && i.depth == nullptr) refuse("image", "the depth that blend returned", "none");
    const SplatGradient d_s = read.splat_gradient(d_splats, p.n);
    if (has_depth(d_s.n_columns) != (d_i.depth != nullptr))
      refuse("d_splats", d_i.depth != nullptr ? "10 or 12 columns" : "9 or 11 columns", std::to_string(d_s.n_columns));
    void* memory = read.scratch(scratch, blend_vjp_scratch(backend, p.n, t.n_instances, d_s.n_columns, s));
    Unlocked unlocked;
    blend_vjp(backend, p, t, c, s, i, d_i, memory, d_s);
  });

  m.def("loss_scratch",
        [](const Backend& backend, int width, int height) { return loss_scratch(backend, width, height); });
  m.def(
      "loss",
      [](const Backend& backend, py::object color, py::object target, py::object settings, py::object scratch,
         py::object out) {
        const Reader read = reader_of(backend);
        const Array<float> x = read.array<float>(color, "color", {-1, -1, 3});
        const int64_t height = x.shape[0], width = x.shape[1];
        const LossImages images = {x.data, read.loss_target(target, width, height), int(width), int(height)};
        const LossSettings s = loss_settings_of(settings, width, height);
        void* memory = read.scratch(scratch, loss_scratch(backend, images.width, images.height));
        LossOutput output = {read.field<double>(out, "means", {2}).data,
                             read.field<float>(out, "d_color", x.shape).data, nullptr};
        if (images.target.exposure != nullptr) {
          output.d_exposure = read.field<float>(out, "d_exposure", {3, 4}).data;
        }
        Unlocked unlocked;
        loss(backend, images, s, memory, output);
      },
      "Fills `out`: means of L1 and of SSIM, and the gradients of (1 - w) L1 + w (1 - SSIM).");

  m.def("update", [](const Backend& backend, py::object values, py::object gradient, py::object first,
                     py::object second, py::object settings) {
    const Reader read = reader_of(backend);
    const Gaussians v = read.gaussians(values);
    const Gaussians g = read.gaussians_like(gradient, v);
    const AdamMoments moments = read.moments(first, second, v);
    const AdamSettings a = adam_settings_of(settings);
    Unlocked unlocked;
    update(backend, v, g, moments, a);
  });

  m.def("project_vjp_update_scratch", [](const Backend& backend, py::object values) {
    return project_vjp_update_scratch(backend, reader_of(backend).gaussians(values));
  });
  m.def(
      "project_vjp_update",
      [](const Backend& backend, py::object values, py::object camera, py::object settings, py::object projected,
         py::object d_splats, py::object first, py::object second, py::object adam, py::object scratch) {
        const Reader read = reader_of(backend);
        const Gaussians v = read.gaussians(values);
        const Projected p = read.projected(projected);
        const float* d = read.array<float>(d_splats, "d_splats", {p.n, kSplatGradientStride}).data;
        const AdamMoments moments = read.moments(first, second, v);
        const AdamSettings a = adam_settings_of(adam);
        check_rows(backend, p, v.n);
        void* memory = read.scratch(scratch, project_vjp_update_scratch(backend, v));
        const Camera c = camera_of(camera);
        const RasterSettings s = raster_settings_of(settings, v.n_coefficients);
        Unlocked unlocked;
        project_vjp_update(backend, v, c, s, p, d, moments, a, memory);
      },
      "project_vjp and update in one.");

  m.def("density",
        [](const Backend& backend, py::object projected, py::object d_splats, py::object camera, py::object out) {
          const Reader read = reader_of(backend);
          const Projected p = read.projected(projected);
          const float* d = read.array<float>(d_splats, "d_splats", {p.n, kSplatGradientStride}).data;
          const Camera c = camera_of(camera);
          const Array<float> sums = read.field<float>(out, "gradient_sums", {-1});
          check_rows(backend, p, sums.shape[0]);
          const DensityStatistics statistics = {sums.data, read.field<float>(out, "n_visible", {sums.shape[0]}).data};
          Unlocked unlocked;
          density(backend, p, d, c, statistics);
        });
}

// Only the CPU can look at lists of rows before it starts.
void check_row_numbers(const Cpu&, const int32_t* rows, int64_t n, int64_t n_rows) {
  for (int64_t i = 0; i < n; ++i) {
    if (!(rows[i] >= 0 && rows[i] < n_rows)) refuse("rows", "below " + std::to_string(n_rows), std::to_string(rows[i]));
  }
}
#ifdef SPACEPORT_BUILD_CUDA
void check_row_numbers(const Cuda&, const int32_t*, int64_t, int64_t) {}
#endif

// What adds, removes and moves rows.
template <class Backend>
void bind_growth(py::module_& m) {
  m.def("plan_growth_scratch", [](const Backend& backend, int64_t n) { return plan_growth_scratch(backend, n); });
  m.def(
      "plan_growth",
      [](const Backend& backend, py::object gaussians, py::object scores, py::object settings, py::object scratch,
         py::object sources) {
        const Reader read = reader_of(backend);
        const Gaussians g = read.gaussians(gaussians);
        const float* of_rows = read.array<float>(scores, "scores", {g.n}).data;
        const GrowthSettings s = growth_settings_of(settings);
        void* memory = read.scratch(scratch, plan_growth_scratch(backend, g.n));
        int32_t* lists = read.array<int32_t>(sources, "sources", {kGrowthLists, g.n}).data;
        GrowthCounts counts;
        {
          Unlocked unlocked;
          counts = plan_growth(backend, g, of_rows, s, memory, lists);
        }
        return py::make_tuple(counts.kept, counts.clones, counts.parents);
      },
      "Lists the rows that stay, are cloned and are split; returns how many each.");
  m.def(
      "grow",
      [](const Backend& backend, py::object rows, py::object sources, py::object counts, py::object key,
         py::object out) {
        const Reader read = reader_of(backend);
        const Rows r = read.rows(rows);
        const auto [kept, clones, parents] = counts.cast<std::tuple<int64_t, int64_t, int64_t>>();
        const GrowthPlan plan = {read.array<int32_t>(sources, "sources", {kGrowthLists, r.values.n}).data,
                                 r.values.n,
                                 {kept, clones, parents}};
        for (int64_t count : {kept, clones, parents}) {
          if (!(count >= 0 && count <= r.values.n)) refuse("counts", "those of the plan", std::to_string(count));
        }
        const Rows to = read.rows(out, r, kept + clones + 2 * parents);
        const DrawKey k = draw_key_of(key);
        Unlocked unlocked;
        grow(backend, r, plan, k, to);
      },
      "Writes the rows of a plan.");
  m.def("select_rows", [](const Backend& backend, py::object rows, py::object selected, py::object out) {
    const Reader read = reader_of(backend);
    const Rows r = read.rows(rows);
    const Array<int32_t> numbers = read.array<int32_t>(selected, "rows", {-1});
    check_row_numbers(backend, numbers.data, numbers.shape[0], r.values.n);
    const Rows to = read.rows(out, r, numbers.shape[0]);
    Unlocked unlocked;
    select_rows(backend, r, numbers.data, to);
  });
  m.def("morton_order_scratch", [](const Backend& backend, int64_t n) { return morton_order_scratch(backend, n); });
  m.def("morton_order", [](const Backend& backend, py::object means, py::object scratch, py::object order) {
    const Reader read = reader_of(backend);
    const Array<float> m = read.array<float>(means, "means", {-1, 3});
    void* memory = read.scratch(scratch, morton_order_scratch(backend, m.shape[0]));
    int32_t* numbers = read.array<int32_t>(order, "order", {m.shape[0]}).data;
    Unlocked unlocked;
    morton_order(backend, {m.data, m.shape[0], 3}, memory, numbers);
  });
  m.def("relocate_scratch", [](const Backend& backend, int64_t n) { return relocate_scratch(backend, n); });
  m.def(
      "relocate",
      [](const Backend& backend, py::object rows, float min_opacity, py::object key, py::object scratch) {
        const Reader read = reader_of(backend);
        const Rows r = read.rows(rows);
        void* memory = read.scratch(scratch, relocate_scratch(backend, r.values.n));
        const Relocation settings = {min_opacity, draw_key_of(key)};
        Unlocked unlocked;
        relocate(backend, r, settings, memory);
      },
      "Moves rows fainter than min_opacity (logit) onto others, in place.");
}

#ifdef SPACEPORT_BUILD_CUDA
// What a recorded sequence is for.
StepSize checked_size(int64_t n_gaussians, int64_t n_instances, int width, int height) {
  if (n_gaussians < 1) refuse("gaussians", "at least one", "none");
  if (width < 1 || height < 1) refuse("width, height", "a positive size", shape_text({width, height}));
  if (n_instances < 1 || n_instances > kMostInstances)
    refuse("n_instances", "1 to " + std::to_string(kMostInstances), std::to_string(n_instances));
  return {n_gaussians, n_instances, width, height};
}

void bind_step(py::module_& m) {
  m.attr("STEP_PROGRESS_SIZE") = sizeof(StepProgress);
  m.def(
      "step_scratch",
      [](const Cuda& cuda, int64_t n, int64_t n_instances, int width, int height, py::object settings) {
        return step_scratch(cuda, {n, n_instances, width, height}, raster_settings_of(settings, kMaxShCoefficients));
      },
      "Bytes of scratch that a step needs.");
  m.def(
      "catch_up",
      [](const Cuda& cuda, py::object values, py::object first, py::object second, py::object up_to_date,
         py::object adam) {
        const Reader read = reader_of(cuda);
        const Gaussians v = read.gaussians(values);
        const AdamMoments moments = read.moments(first, second, v);
        int32_t* rows = read.array<int32_t>(up_to_date, "up_to_date", {v.n}).data;
        const AdamSettings a = adam_settings_of(adam);
        Unlocked unlocked;
        catch_up(cuda, v, moments, rows, a);
      },
      "Makes up for the steps that rows have missed, up to and with adam.step.");
  m.def(
      "sh_log_size", [](const Cuda& cuda, int64_t n) { return sh_log_size(cuda, n); },
      "Bytes of the log of a step whose SH coefficients are brought up to date later.");
  m.def(
      "flush_sh",
      [](const Cuda& cuda, py::object values, py::object first, py::object second, py::object sh_log) {
        const Reader read = reader_of(cuda);
        const Gaussians v = read.gaussians(values);
        const AdamMoments moments = read.moments(first, second, v);
        uint8_t* log = read.array<uint8_t>(sh_log, "sh_log", {int64_t(sh_log_size(cuda, v.n))}).data;
        Unlocked unlocked;
        flush_sh(cuda, v, moments, log);
      },
      "Brings the SH coefficients up to date with what is logged.");
  py::class_<StepView>(m, "StepView", "A camera and what its image is compared with, read once.")
      .def(py::init([](const Cuda& cuda, py::object camera, py::object photo, py::object mask, py::object exposure,
                       py::object depth_limits) {
        const Camera c = camera_of(camera);
        const Reader read = reader_of(cuda);
        const int64_t n_tiles = int64_t(c.tiles_x()) * c.tiles_y();
        StepView view = {
            c, {read.array<uint8_t>(photo, "photo", {c.height, c.width, 3}).data, nullptr, nullptr}, {}, nullptr};
        if (!mask.is_none()) view.target.mask = read.array<uint8_t>(mask, "mask", {c.height, c.width}).data;
        if (!exposure.is_none()) {
          view.exposure = {
              read.field<float>(exposure, "values", {3, 4}).data, read.field<float>(exposure, "first", {3, 4}).data,
              read.field<float>(exposure, "second", {3, 4}).data, read.field<float>(exposure, "n_steps", {}).data};
          view.target.exposure = view.exposure.values;
        }
        if (!depth_limits.is_none()) {
          view.depth_limits =
              reinterpret_cast<uint32_t*>(read.array<int32_t>(depth_limits, "depth_limits", {n_tiles}).data);
        }
        return view;
      }));
  py::class_<StepGraph>(m, "StepGraph", "A training step for images of one size, recorded.")
      .def(py::init([](const Cuda& cuda, py::object values, py::object first, py::object second, py::object sums,
                       py::object up_to_date, py::object sh_log, py::object statistics, py::object scratch,
                       int64_t n_instances, int width, int height, bool has_mask, bool has_exposure, bool has_limits,
                       py::object settings, py::object loss, py::object progress, py::object progress_on_host) {
        const Reader read = reader_of(cuda);
        const Gaussians v = read.gaussians(values);
        const StepSize size = checked_size(v.n, n_instances, width, height);
        const RasterSettings raster = raster_settings_of(settings, v.n_coefficients);
        StepBuffers buffers = {v,
                               read.moments(first, second, v),
                               read.array<float>(sums, "sums", {v.n, kSplatGradientStride}).data,
                               nullptr,
                               nullptr,
                               {read.field<float>(statistics, "gradient_sums", {v.n}).data,
                                read.field<float>(statistics, "n_visible", {v.n}).data},
                               read.scratch(scratch, step_scratch(cuda, size, raster))};
        if (!up_to_date.is_none()) buffers.up_to_date = read.array<int32_t>(up_to_date, "up_to_date", {v.n}).data;
        if (!sh_log.is_none()) {
          if (!up_to_date.is_none()) refuse("sh_log", "None where rows miss steps", "a log");
          buffers.sh_log = read.array<uint8_t>(sh_log, "sh_log", {int64_t(sh_log_size(cuda, v.n))}).data;
        }
        const int64_t n_bytes = sizeof(StepProgress);
        const StepBook book = {
            reinterpret_cast<StepProgress*>(read.array<uint8_t>(progress, "progress", {n_bytes}).data),
            reinterpret_cast<StepProgress*>(
                Reader("cpu").array<uint8_t>(progress_on_host, "progress_on_host", {n_bytes}).data)};
        return new StepGraph(buffers, size, {has_mask, has_exposure, has_limits}, raster,
                             loss_settings_of(loss, width, height), book);
      }))
      .def("launch", [](const StepGraph& graph, const Cuda& cuda, const StepView& view, py::object adam,
                        bool gathers_statistics) {
        const AdamSettings a = adam_settings_of(adam);
        Unlocked unlocked;
        graph.launch(cuda, {view, a, gathers_statistics});
      });
}

void bind_render(py::module_& m) {
  m.def(
      "render_scratch",
      [](const Cuda& cuda, int64_t n, int64_t n_instances, int width, int height) {
        return render_scratch(cuda, {n, n_instances, width, height});
      },
      "Bytes of scratch that a renderer needs.");
  py::class_<RenderGraph>(m, "RenderGraph", "Images of one size, recorded.")
      .def(py::init([](const Cuda& cuda, py::object gaussians, py::object scratch, int64_t n_instances, int width,
                       int height, py::object settings, py::object most) {
        const Reader read = reader_of(cuda);
        const Gaussians g = read.gaussians(gaussians);
        const StepSize size = checked_size(g.n, n_instances, width, height);
        return new RenderGraph(g, size, raster_settings_of(settings, g.n_coefficients),
                               read.scratch(scratch, render_scratch(cuda, size)),
                               read.array<int64_t>(most, "most", {1}).data);
      }))
      .def("launch", [](const RenderGraph& graph, const Cuda& cuda, py::object camera, py::object out) {
        const Camera c = camera_of(camera);
        const Image image = reader_of(cuda).image(out, c);
        Unlocked unlocked;
        graph.launch(cuda, c, image);
      });
}
#endif

// A GPU leaves out labels that name no centroid; the CPU would write to memory that is not its own.
void check_labels(const Cpu&, const int32_t* labels, int64_t n, int64_t n_centroids) {
  for (int64_t i = 0; i < n; ++i) {
    if (!(labels[i] >= 0 && labels[i] < n_centroids)) refuse("labels", "rows of centroids", std::to_string(labels[i]));
  }
}
void check_dimensions(const Cpu&, const Points&) {}
#ifdef SPACEPORT_BUILD_CUDA
void check_labels(const Cuda&, const int32_t*, int64_t, int64_t) {}
void check_dimensions(const Cuda&, const Points& points) {
  if (points.n_dimensions > kMaxPointDimensions) {
    refuse("points", "at most " + std::to_string(kMaxPointDimensions) + " dimensions on a GPU",
           std::to_string(points.n_dimensions));
  }
}
#endif

template <class Backend>
void bind_cluster(py::module_& m) {
  m.def("cluster_assign_scratch", [](const Backend& backend, py::object centroids) {
    return cluster_assign_scratch(backend, reader_of(backend).points(centroids, "centroids", -1));
  });
  m.def(
      "cluster_assign",
      [](const Backend& backend, py::object points, py::object centroids, py::object scratch, py::object labels,
         py::object distances) {
        const Reader read = reader_of(backend);
        const Points p = read.points(points, "points", -1), c = read.points(centroids, "centroids", p.n_dimensions);
        if (c.n < 1) refuse("centroids", "at least one", "none");
        check_dimensions(backend, p);
        void* memory = read.scratch(scratch, cluster_assign_scratch(backend, c));
        int32_t* l = read.array<int32_t>(labels, "labels", {p.n}).data;
        float* d = read.array<float>(distances, "distances", {p.n}).data;
        Unlocked unlocked;
        cluster_assign(backend, p, c, memory, l, d);
      },
      "Nearest centroid of every point and the squared distance to it.");
  m.def("cluster_update_scratch", [](const Backend& backend, py::object points, py::object centroids) {
    const Reader read = reader_of(backend);
    return cluster_update_scratch(backend, read.points(points, "points", -1), read.points(centroids, "centroids", -1));
  });
  m.def(
      "cluster_update",
      [](const Backend& backend, py::object points, py::object labels, py::object weights, py::object centroids,
         py::object scratch, py::object centroid_weights) {
        const Reader read = reader_of(backend);
        const Points p = read.points(points, "points", -1), c = read.points(centroids, "centroids", p.n_dimensions);
        const int32_t* l = read.array<int32_t>(labels, "labels", {p.n}).data;
        check_labels(backend, l, p.n, c.n);
        check_dimensions(backend, p);
        const float* w = read.array<float>(weights, "weights", {p.n}).data;
        void* memory = read.scratch(scratch, cluster_update_scratch(backend, p, c));
        const Clusters out = {c, read.array<float>(centroid_weights, "centroid_weights", {c.n}).data};
        Unlocked unlocked;
        cluster_update(backend, p, l, w, memory, out);
      },
      "Moves every centroid to the weighted mean of its points.");
}

template <class Backend>
void bind_multiply_adds(py::module_& m) {
  m.def(
      "multiply_adds",
      [](const Backend& backend, int64_t n_pieces) {
        Unlocked unlocked;
        multiply_adds(backend, n_pieces);
      },
      "Does n_pieces * MULTIPLY_ADD_FLOPS operations on registers; a GPU is not waited for.");
}

void bind_diagnose(py::module_& m) {
  m.attr("MULTIPLY_ADD_FLOPS") = kMultiplyAddFlops;
  m.def(
      "count_pairs",
      [](const Cpu& cpu, py::object projected, py::object tiles, py::object camera, py::object settings) {
        const Reader read = reader_of(cpu);
        const Projected p = read.projected(projected);
        const Camera c = camera_of(camera);
        const Tiles t = read.tiles(tiles, c);
        check_instances(cpu, p, t);
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

py::dict build_info() {
  py::dict info;
  info["version"] = SPACEPORT_VERSION;
  info["compiler"] = SPACEPORT_COMPILER;
  std::vector<std::string> backends = {"cpu"}, architectures, simd = {"portable"};
#ifdef SPACEPORT_BUILD_CUDA
  backends.push_back("cuda");
  std::istringstream listed(SPACEPORT_CUDA_ARCHITECTURES);
  for (std::string architecture; std::getline(listed, architecture, ',');) architectures.push_back(architecture);
#endif
#ifdef SPACEPORT_BUILD_AVX2
  simd.push_back("avx2");
#endif
  info["backends"] = backends;
  info["cuda_architectures"] = architectures;
  info["simd"] = simd;
  info["simd_in_use"] = has_avx2() ? "avx2" : "portable";
  return info;
}

}  // namespace
}  // namespace spaceport

PYBIND11_MODULE(_engine, m) {
  using namespace spaceport;
  m.doc() = "The engine's verbs on raw buffers; spaceport_gs.ops is the interface for users.";
  m.attr("TILE_SIZE") = kTileSize;
  m.attr("MOST_INSTANCES") = kMostInstances;
  m.attr("ALPHA_CUTOFF") = kAlphaCutoff;
  m.attr("SPLAT_STRIDE") = kSplatStride;
  m.attr("GROWTH_LISTS") = kGrowthLists;
  m.attr("TILE_SET_STRIDE") = sizeof(TileSet) / sizeof(int32_t);
  m.attr("SPLAT_GRADIENT_STRIDE") = kSplatGradientStride;
  m.attr("SPLAT_DEPTH_GRADIENT_STRIDE") = kSplatDepthGradientStride;
  m.attr("ABSOLUTE_COLUMNS") = kAbsoluteColumns;
  m.attr("DEPTH_KEY_BITS") = kDepthKeyBits;
  m.attr("VERSION") = SPACEPORT_VERSION;
  m.def("build_info", &build_info,
        "What was built: version, compiler, backends, CUDA architectures, SIMD paths and the one this machine takes.");

  py::class_<Cpu>(m, "Cpu", "The CPU backend: a pool of threads and an instruction set.")
      .def(py::init(&make_cpu), py::arg("n_threads") = 0, py::arg("simd") = "auto")
      .def_property_readonly("n_threads", [](const Cpu& cpu) { return cpu.pool->n_threads(); })
      .def_property_readonly("simd", [](const Cpu& cpu) { return cpu.simd == Simd::kAvx2 ? "avx2" : "portable"; });
  bind_verbs<Cpu>(m);
  bind_growth<Cpu>(m);
  bind_cluster<Cpu>(m);
  bind_multiply_adds<Cpu>(m);
  bind_diagnose(m);

#ifdef SPACEPORT_BUILD_CUDA
  py::class_<Cuda>(m, "Cuda", "The CUDA backend: a stream of the current device.")
      .def(py::init([](uintptr_t stream) { return Cuda{reinterpret_cast<void*>(stream)}; }), py::arg("stream"));
  bind_verbs<Cuda>(m);
  bind_growth<Cuda>(m);
  bind_cluster<Cuda>(m);
  bind_multiply_adds<Cuda>(m);
  bind_step(m);
  bind_render(m);
  m.def("cuda_status", &cuda_status,
        "Empty if a GPU can be used, else why not: no driver, a driver too old for this build, no device.");
#endif
}
