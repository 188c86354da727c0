// One training step from a file of raw inputs to a file of raw results, for machines that cannot run Python here.
// Usage: run_step INPUT OUTPUT; the layout of both is that of tests/test_aarch64.py.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "ops.h"

using namespace spaceport;

namespace {

template <class T>
std::vector<T> read(FILE* file, int64_t n) {
  std::vector<T> values(static_cast<size_t>(n));
  if (fread(values.data(), sizeof(T), values.size(), file) != values.size()) {
    fprintf(stderr, "input ends early\n");
    exit(1);
  }
  return values;
}

template <class T>
void write(FILE* file, const std::vector<T>& values) {
  fwrite(values.data(), sizeof(T), values.size(), file);
}

// Gaussians with their own memory.
struct Table {
  std::vector<float> means, log_scales, quaternions, opacities, sh;

  Table(int64_t n, int64_t k)
      : means(size_t(3 * n)),
        log_scales(size_t(3 * n)),
        quaternions(size_t(4 * n)),
        opacities(size_t(n)),
        sh(size_t(3 * k * n)) {}

  std::vector<float>* arrays[5] = {&means, &log_scales, &quaternions, &opacities, &sh};
  Gaussians view() {
    const int64_t n = int64_t(opacities.size());
    return {means.data(),
            log_scales.data(),
            quaternions.data(),
            opacities.data(),
            sh.data(),
            n,
            int(int64_t(sh.size()) / (3 * n))};
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  FILE* input = fopen(argv[1], "rb");
  if (!input) return 1;
  const std::vector<int64_t> sizes = read<int64_t>(input, 4);  // N, K, width, height
  const int64_t n = sizes[0], k = sizes[1];
  const int width = int(sizes[2]), height = int(sizes[3]);
  const std::vector<float> c = read<float>(input, 19);  // pose, centre, intrinsics
  Camera camera;
  for (int i = 0; i < 12; ++i) camera.cam_from_world[i] = c[size_t(i)];
  for (int i = 0; i < 3; ++i) camera.center[i] = c[size_t(12 + i)];
  camera.fx = c[15], camera.fy = c[16], camera.cx = c[17], camera.cy = c[18];
  camera.width = width, camera.height = height;
  Table values(n, k);
  for (std::vector<float>* array : values.arrays) *array = read<float>(input, int64_t(array->size()));
  const std::vector<uint8_t> photo = read<uint8_t>(input, int64_t(width) * height * 3);
  fclose(input);

  const Cpu cpu = {std::make_shared<ThreadPool>(2), Simd::kPortable};
  const RasterSettings settings = {3, 0.2f, 0.3f, 0.99f, {0.1f, 0.2f, 0.3f}};

  std::vector<Splat> splats(static_cast<size_t>(n));
  std::vector<int32_t> gaussian_from_splat(static_cast<size_t>(n));
  std::vector<int64_t> instance_offsets(static_cast<size_t>(n + 1));
  Projected projected = {splats.data(), gaussian_from_splat.data(), instance_offsets.data(), n, nullptr, nullptr};
  std::vector<char> scratch(project_scratch(cpu, n));
  const ProjectedCounts counts = project(cpu, values.view(), camera, settings, scratch.data(), projected);
  projected.n = counts.n_splats;
  const int64_t n_instances = counts.n_instances;

  std::vector<int64_t> tile_offsets(static_cast<size_t>(camera.tiles_x() * camera.tiles_y() + 1));
  std::vector<int32_t> splats_of(static_cast<size_t>(n_instances)), numbers(static_cast<size_t>(n_instances));
  const Tiles tiles = {tile_offsets.data(), splats_of.data(), numbers.data(), n_instances};
  scratch.resize(tile_scratch(cpu, projected.n, n_instances, camera));
  tile(cpu, projected, camera, scratch.data(), tiles);

  const size_t n_pixels = size_t(width) * size_t(height);
  std::vector<float> color(3 * n_pixels), transmittance(n_pixels), d_color(3 * n_pixels), d_transmittance(n_pixels);
  const Image image = {color.data(), transmittance.data(), nullptr};
  blend(cpu, projected, tiles, camera, settings, image);
  scratch.resize(loss_scratch(cpu, width, height));
  std::vector<double> means(2);
  loss(cpu, {color.data(), {photo.data(), nullptr, nullptr}, width, height}, {0.2f, SsimPadding::kZero}, scratch.data(),
       {means.data(), d_color.data(), nullptr});

  scratch.resize(blend_vjp_scratch(cpu, projected.n, n_instances, kSplatGradientStride, settings));
  std::vector<float> d_splat_rows(static_cast<size_t>(projected.n) * kSplatGradientStride);
  const SplatGradient d_splats = {d_splat_rows.data(), kSplatGradientStride};
  const Image d_image = {d_color.data(), d_transmittance.data(), nullptr};
  blend_vjp(cpu, projected, tiles, camera, settings, image, d_image, scratch.data(), d_splats);
  Table gradient(n, k), first(n, k), second(n, k);
  project_vjp(cpu, values.view(), camera, settings, projected, d_splats, {gradient.view(), nullptr, nullptr});
  const AdamSettings adam = {1e-3f, 2e-3f, 3e-3f, 4e-3f, 5e-3f, 6e-3f, 0.9f, 0.999f, 1e-15f, 1, 0.0f};
  update(cpu, values.view(), gradient.view(), {first.view(), second.view(), MomentStorage::kFull}, adam);

  FILE* output = fopen(argv[2], "wb");
  if (!output) return 1;
  write(output, std::vector<int64_t>{projected.n, n_instances});
  write(output, means);
  write(output, color);
  write(output, transmittance);
  for (const std::vector<float>* array : gradient.arrays) write(output, *array);
  for (const std::vector<float>* array : values.arrays) write(output, *array);
  return fclose(output) == 0 ? 0 : 1;
}
