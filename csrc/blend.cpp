// blend: every tile walks its list front to back, sixteen pixels (two Float8) a row.
//
// Forward and backward share `visit_pixels`, so that the backward replays exactly what the forward did. The colour
// behind a splat is the final colour less the prefix up to it; hence no per-pixel lists and no division to recover T.
#include "kernels.h"
#include "prefetch.h"
#include "simd.h"

namespace spaceport::SPACEPORT_ISA {

namespace {

constexpr int kLanes = 8;
constexpr int kVectorsPerRow = kTileSize / kLanes;
constexpr int kVectors = kTileSize * kVectorsPerRow;
constexpr int kSplatsBetweenStopChecks = 8;
constexpr int kPrefetchDistance = 8;

// One value for every pixel of a tile.
struct TilePlane {
  alignas(32) float values[kVectors * kLanes];

  HOST_DEVICE Float8 get(int vector) const { return load(values + vector * kLanes); }
  HOST_DEVICE void set(int vector, Float8 value) { store(values + vector * kLanes, value); }
};

// Where a tile lies in the image; the last tiles of a row or column may hang over its edge.
struct TilePlace {
  int x, y;           // of its first pixel
  int width, height;  // of the part inside the image

  static TilePlace of(int64_t tile, const Camera& camera) {
    const int x = int(tile % camera.tiles_x()) * kTileSize, y = int(tile / camera.tiles_x()) * kTileSize;
    const int right = camera.width - x, bottom = camera.height - y;
    return {x, y, right < kTileSize ? right : kTileSize, bottom < kTileSize ? bottom : kTileSize};
  }

  template <class Visit>
  HOST_DEVICE void for_each_pixel(int image_width, Visit&& visit) const {
    for (int row = 0; row < height; ++row) {
      for (int column = 0; column < width; ++column) {
        visit(row * kTileSize + column, int64_t(y + row) * image_width + x + column);
      }
    }
  }
};

// T of every pixel of a tile; a pixel that has stopped, or lies outside the image, carries a minus sign.
struct Transmittance {
  TilePlane plane;

  explicit Transmittance(const TilePlace& place) {
    for (float& value : plane.values) value = -1.0f;
    place.for_each_pixel(0, [&](int pixel, int64_t) { plane.values[pixel] = 1.0f; });
  }
  bool all_stopped() const {
    for (int v = 0; v < kVectors; ++v) {
      if (any(plane.get(v) > Float8(0.0f))) return false;
    }
    return true;
  }
};

// A splat as one tile sees it: the exponent of alpha in base 2 is (a dx + b dy) dx + c dy^2 + log2(opacity).
struct TileSplat {
  float y;  // centre, relative to the first row's pixel centres
  Float8 a, b_factor;
  float c, log2_opacity;
  Float8 dx[kVectorsPerRow];
  int row_begin, row_end;
  int vector_begin, vector_end;

  HOST_DEVICE TileSplat(const Splat& s, const TilePlace& place) {
    const Float8 lane_centers(Float8::Vector{0.5f, 1.5f, 2.5f, 3.5f, 4.5f, 5.5f, 6.5f, 7.5f});
    const float x = s.x - float(place.x);
    y = s.y - float(place.y) - 0.5f;
    a = Float8(-0.5f * kLog2E * s.a);
    b_factor = Float8(-kLog2E * s.b);
    c = -0.5f * kLog2E * s.c;
    log2_opacity = log2f(s.opacity);
    for (int v = 0; v < kVectorsPerRow; ++v) dx[v] = lane_centers + Float8(float(v * kLanes) - x);
    row_begin = ceiling_of(larger(y - s.extent_y, 0.0f));
    row_end = floor_of(larger(smaller(y + s.extent_y, float(place.height - 1)), -1.0f)) + 1;
    vector_begin = x - s.extent_x > float(kLanes) - 0.5f ? 1 : 0;
    vector_end = x + s.extent_x < float(kLanes) + 0.5f ? 1 : kVectorsPerRow;
  }
};

// What blending one splat into eight pixels does to them.
struct Contribution {
  Float8 alpha;
  Float8 weight;    // alpha * T, zero where the pixel does not take part
  Float8 t_before;  // T in front of the splat
  Mask8 takes_part;
};

// Calls visit(vector, dx, contribution) for the vectors in which some pixel takes part, and start_row(dy), end_row(dy)
// around each row; updates T.
template <class StartRow, class Visit, class EndRow>
HOST_DEVICE void visit_pixels(const TileSplat& s, Float8 alpha_max, Transmittance& transmittance, StartRow&& start_row,
                              Visit&& visit, EndRow&& end_row) {
  const Float8 zero(0.0f), cutoff(kLog2Cutoff), stop_below(kTransmittanceStop);
  for (int row = s.row_begin; row < s.row_end; ++row) {
    const float dy = float(row) - s.y;
    const Float8 b_dy = s.b_factor * Float8(dy);
    const Float8 constant(s.c * dy * dy + s.log2_opacity);
    start_row(dy);
    for (int v = s.vector_begin; v < s.vector_end; ++v) {
      const Float8 dx = s.dx[v];
      const Float8 exponent = multiply_add(multiply_add(s.a, dx, b_dy), dx, constant);
      const int vector = row * kVectorsPerRow + v;
      const Float8 t = transmittance.plane.get(vector);
      const Mask8 reached = (exponent >= cutoff) & (t > zero);
      if (!any(reached)) continue;
      const Float8 alpha = minimum(exponential_base2(exponent), alpha_max);
      const Float8 weight = alpha * t;
      const Float8 t_after = t - weight;
      const Mask8 goes_on = {t_after.v >= stop_below.v};
      const Mask8 takes_part = reached & goes_on;
      // A pixel that the splat reaches but that would fall below the limit stops: its T gets the minus sign.
      const Float8 stopped = select(reached, zero - t, t);
      transmittance.plane.set(vector, select(takes_part, t_after, stopped));
      visit(vector, v, Contribution{alpha, masked(takes_part, weight), t, takes_part});
    }
    end_row(dy);
  }
}

// Expected and median depth of a tile's pixels.
struct TileDepths {
  TilePlane expected, median;

  TileDepths() { std::memset(static_cast<void*>(this), 0, sizeof(*this)); }
  HOST_DEVICE void add(int vector, const Contribution& c, Float8 z) {
    const Float8 half(kMedianTransmittance), t_after = c.t_before - c.weight;
    const Mask8 is_median = c.takes_part & (c.t_before >= half) & (t_after < half);
    expected.set(vector, multiply_add(c.weight, z, expected.get(vector)));
    median.set(vector, select(is_median, z, median.get(vector)));
  }
  void write(const TilePlace& place, int image_width, const Image& out) const {
    place.for_each_pixel(image_width, [&](int pixel, int64_t at) {
      if (out.depth != nullptr) out.depth[at] = expected.values[pixel];
      if (out.median_depth != nullptr) out.median_depth[at] = median.values[pixel];
    });
  }
};
// Of an image that nobody asks for its depth.
struct NoDepths {
  HOST_DEVICE void add(int, const Contribution&, Float8) {}
  void write(const TilePlace&, int, const Image&) const {}
};

template <class Depths>
void blend_tile(const Splat* splats, const int32_t* instances, int64_t n, const TilePlace& place, int image_width,
                const RasterSettings& settings, const Image& out) {
  Transmittance transmittance(place);
  TilePlane color[3];
  for (TilePlane& plane : color) std::memset(plane.values, 0, sizeof(plane.values));
  Depths depths;
  const Float8 alpha_max(settings.alpha_max);

  for (int64_t i = 0; i < n; ++i) {
    if (i % kSplatsBetweenStopChecks == 0 && transmittance.all_stopped()) break;
    const Splat& splat = splats[instances[i]];
    if (i + kPrefetchDistance < n) prefetch(splats[instances[i + kPrefetchDistance]]);
    const Float8 red(splat.red), green(splat.green), blue(splat.blue), z(splat.depth);
    visit_pixels(
        TileSplat(splat, place), alpha_max, transmittance, [](float) {},
        [&](int vector, int, const Contribution& c) {
          color[0].set(vector, multiply_add(c.weight, red, color[0].get(vector)));
          color[1].set(vector, multiply_add(c.weight, green, color[1].get(vector)));
          color[2].set(vector, multiply_add(c.weight, blue, color[2].get(vector)));
          depths.add(vector, c, z);
        },
        [](float) {});
  }

  place.for_each_pixel(image_width, [&](int pixel, int64_t at) {
    const float t = fabsf(transmittance.plane.values[pixel]);
    out.transmittance[at] = t;
    for (int c = 0; c < 3; ++c) out.color[3 * at + c] = color[c].values[pixel] + t * settings.background[c];
  });
  depths.write(place, image_width, out);
}

}  // namespace

void blend(const Cpu& cpu, const Projected& projected, const Tiles& tiles, const Camera& camera,
           const RasterSettings& settings, const Image& out) {
  const auto blend_any =
      out.depth == nullptr && out.median_depth == nullptr ? blend_tile<NoDepths> : blend_tile<TileDepths>;
  parallel_for(*cpu.pool, int64_t(camera.tiles_x()) * camera.tiles_y(), [&](int64_t tile) {
    const int64_t begin = tiles.offsets[tile];
    blend_any(projected.splats, tiles.splat_from_instance + begin, tiles.offsets[tile + 1] - begin,
              TilePlace::of(tile, camera), camera.width, settings, out);
  });
}

namespace {

// Sums over the pixels of a tile that give a splat's gradient; d is the gradient by the exponent of e. The last three
// are there only where they are asked for.
struct Moments {
  Float8 d, d_dx, d_dy, d_dxdx, d_dxdy, d_dydy, red, green, blue, depth, absolute_x, absolute_y;
};

// Gradient of the loss by a tile's pixels, and by what they would show behind everything.
struct TileGradient {
  TilePlane red, green, blue;
  TilePlane depth;   // zero where the loss does not see it
  TilePlane total;   // gradient . what is seen: colour and depth, and T by its own gradient
  TilePlane prefix;  // gradient . colour and depth blended so far

  TileGradient(const TilePlace& place, const Camera& camera, const Image& image, const Image& d_image) {
    std::memset(static_cast<void*>(this), 0, sizeof(*this));
    place.for_each_pixel(camera.width, [&](int pixel, int64_t at) {
      const float *color = image.color + 3 * at, *d = d_image.color + 3 * at;
      red.values[pixel] = d[0];
      green.values[pixel] = d[1];
      blue.values[pixel] = d[2];
      // `color` holds the background already, and what is behind it scales with T as the background does.
      total.values[pixel] =
          d[0] * color[0] + d[1] * color[1] + d[2] * color[2] + d_image.transmittance[at] * image.transmittance[at];
      if (d_image.depth == nullptr) return;
      depth.values[pixel] = d_image.depth[at];
      total.values[pixel] += d_image.depth[at] * image.depth[at];
    });
  }
};

// What one tile's list holds, and where the moments of each of its instances go.
struct TileList {
  const int32_t *splats, *numbers;
  int64_t n;
};

template <int kColumns>
void blend_tile_vjp(const Splat* splats, const TileList& list, const TilePlace& place, const RasterSettings& settings,
                    TileGradient& gradient, float* records) {
  const int32_t* instances = list.splats;
  const int64_t n = list.n;
  Transmittance transmittance(place);
  const Float8 zero(0.0f), one(1.0f), alpha_max(settings.alpha_max);

  int64_t i = 0;
  for (; i < n; ++i) {
    if (i % kSplatsBetweenStopChecks == 0 && transmittance.all_stopped()) break;
    const Splat& splat = splats[instances[i]];
    if (i + kPrefetchDistance < n) prefetch(splats[instances[i + kPrefetchDistance]]);
    const Float8 red(splat.red), green(splat.green), blue(splat.blue), z(splat.depth);
    const TileSplat tile_splat(splat, place);
    Moments sum = {zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero};
    Float8 row_d, row_dx, row_dxdx, slope_x, slope_y;  // the slopes are of the exponent, by the mean, at dx = 0
    visit_pixels(
        tile_splat, alpha_max, transmittance,
        [&](float dy) {
          row_d = row_dx = row_dxdx = zero;
          slope_x = Float8(splat.b * dy);
          slope_y = Float8(splat.c * dy);
        },
        [&](int vector, int v, const Contribution& c) {
          const Float8 d_red = gradient.red.get(vector), d_green = gradient.green.get(vector),
                       d_blue = gradient.blue.get(vector);
          Float8 shade = multiply_add(d_red, red, multiply_add(d_green, green, d_blue * blue));
          if constexpr (has_depth(kColumns)) {
            const Float8 d_depth = gradient.depth.get(vector);
            shade = multiply_add(d_depth, z, shade);
            sum.depth = multiply_add(c.weight, d_depth, sum.depth);
          }
          const Float8 prefix = multiply_add(c.weight, shade, gradient.prefix.get(vector));
          gradient.prefix.set(vector, prefix);
          const Float8 behind = (gradient.total.get(vector) - prefix) / (one - c.alpha);
          const Float8 d_alpha = c.t_before * shade - behind;
          const Float8 d = masked(c.takes_part & (c.alpha < alpha_max), d_alpha * c.alpha);
          const Float8 dx = tile_splat.dx[v];
          const Float8 d_dx = d * dx;
          row_d = row_d + d;
          row_dx = row_dx + d_dx;
          row_dxdx = multiply_add(d_dx, dx, row_dxdx);
          if constexpr (has_absolute(kColumns)) {
            sum.absolute_x = sum.absolute_x + absolute(multiply_add(d_dx, Float8(splat.a), d * slope_x));
            sum.absolute_y = sum.absolute_y + absolute(multiply_add(d_dx, Float8(splat.b), d * slope_y));
          }
          sum.red = multiply_add(c.weight, d_red, sum.red);
          sum.green = multiply_add(c.weight, d_green, sum.green);
          sum.blue = multiply_add(c.weight, d_blue, sum.blue);
        },
        [&](float dy) {
          const Float8 d_dy = row_d * Float8(dy);
          sum.d = sum.d + row_d;
          sum.d_dx = sum.d_dx + row_dx;
          sum.d_dy = sum.d_dy + d_dy;
          sum.d_dxdx = sum.d_dxdx + row_dxdx;
          sum.d_dxdy = multiply_add(row_dx, Float8(dy), sum.d_dxdy);
          sum.d_dydy = multiply_add(d_dy, Float8(dy), sum.d_dydy);
        });
    float* record = records + int64_t(list.numbers[i]) * kColumns;
    const Float8 sums[] = {sum.d,   sum.d_dx,  sum.d_dy, sum.d_dxdx, sum.d_dxdy,     sum.d_dydy,
                           sum.red, sum.green, sum.blue, sum.depth,  sum.absolute_x, sum.absolute_y};
    constexpr int kSkipped = has_depth(kColumns) ? 0 : 1;
    for (int k = 0; k < kColumns; ++k) {
      record[k] = spaceport::SPACEPORT_ISA::sum(sums[k < kSplatGradientStride ? k : k + kSkipped]);
    }
  }
  for (; i < n; ++i) std::memset(records + int64_t(list.numbers[i]) * kColumns, 0, kColumns * sizeof(float));
}

// A splat's gradient from the moments of all its instances, added in the order of emission.
template <int kColumns>
void splat_gradient(const Splat& s, const float* records, int64_t n_records, float* d_splat) {
  float m[kColumns] = {};
  for (int64_t i = 0; i < n_records; ++i) {
    for (int k = 0; k < kColumns; ++k) m[k] += records[i * kColumns + k];
  }
  d_splat[0] = s.a * m[1] + s.b * m[2];
  d_splat[1] = s.b * m[1] + s.c * m[2];
  d_splat[2] = -0.5f * m[3];
  d_splat[3] = -m[4];
  d_splat[4] = -0.5f * m[5];
  d_splat[5] = m[0] / s.opacity;
  for (int k = 6; k < kColumns; ++k) d_splat[k] = m[k];
}

}  // namespace

void blend_vjp(const Cpu& cpu, const Projected& projected, const Tiles& tiles, const Camera& camera,
               const RasterSettings& settings, const Image& image, const Image& d_image, void* scratch,
               const SplatGradient& d_splats) {
  const int64_t n_columns = d_splats.n_columns;
  auto blend_any_tile_vjp = blend_tile_vjp<kSplatGradientStride>;
  auto any_splat_gradient = splat_gradient<kSplatGradientStride>;
  for_columns(d_splats.n_columns, [&](auto columns) {
    blend_any_tile_vjp = blend_tile_vjp<columns>;
    any_splat_gradient = splat_gradient<columns>;
  });
  float* records = static_cast<float*>(scratch);  // [I, n_columns]
  parallel_for(*cpu.pool, int64_t(camera.tiles_x()) * camera.tiles_y(), [&](int64_t tile) {
    const TilePlace place = TilePlace::of(tile, camera);
    TileGradient gradient(place, camera, image, d_image);
    const int64_t begin = tiles.offsets[tile];
    const TileList list = {tiles.splat_from_instance + begin, tiles.number_from_instance + begin,
                           tiles.offsets[tile + 1] - begin};
    blend_any_tile_vjp(projected.splats, list, place, settings, gradient, records);
  });
  constexpr int64_t kSplatsPerPiece = 4096;
  parallel_for(*cpu.pool, n_pieces_of(projected.n, kSplatsPerPiece), [&](int64_t piece) {
    const Range range = range_of(piece, projected.n, kSplatsPerPiece);
    for (int64_t splat = range.begin; splat < range.end; ++splat) {
      const int64_t begin = projected.instance_offsets[splat];
      any_splat_gradient(projected.splats[splat], records + begin * n_columns,
                         projected.instance_offsets[splat + 1] - begin, d_splats.rows + splat * n_columns);
    }
  });
}

}  // namespace spaceport::SPACEPORT_ISA
