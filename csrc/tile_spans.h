// Which tiles a splat touches: exactly those whose rectangle of pixel centres meets the ellipse alpha >= kAlphaCutoff.
// Counting (project) and listing (tile) both walk these spans, so that they agree to the bit.
#pragma once

#include <cmath>

#include "device.h"
#include "types.h"

namespace spaceport::SPACEPORT_ISA {

// The ellipse is a dx^2 + 2 b dx dy + c dy^2 <= this; a little wide, so that rounding never loses a pixel.
HOST_DEVICE float ellipse_level(float opacity) {
  return 2.0f * logf(opacity / kAlphaCutoff) + 1e-4f;
}

// First and last + 1 of the tiles (0 ... n_tiles) whose pixel centres reach into [low, high], in pixels.
struct TileSpan {
  int begin, end;
};
HOST_DEVICE TileSpan tile_span(float low, float high, int n_tiles) {
  const float size = float(kTileSize), limit = float(n_tiles);
  const float first = smaller(larger((low + 0.5f) / size, 0.0f), limit + 1.0f);
  const float last = smaller(larger((high - 0.5f) / size, -1.0f), limit);
  const int begin = ceiling_of(first) - 1;  // the last centre of `begin`, at size - 0.5, is not left of low
  const int end = floor_of(last) + 1;       // the first centre of `end` - 1, at 0.5, is not right of high
  return {begin < 0 ? 0 : begin, end > n_tiles ? n_tiles : end};
}

// The rows of tiles that a splat touches, and of each the columns.
struct TileRows {
  float x, y, extent_x, extent_y, per_extent_y;
  float half_width;    // of the chord through the centre
  float slant;         // middle of the chord at dy is slant * dy
  float rightmost_dy;  // where the ellipse reaches furthest right
  int tiles_x;
  TileSpan rows;

  HOST_DEVICE TileRows(const Splat& s, int tiles_x, int tiles_y)
      : x(s.x),
        y(s.y),
        extent_x(s.extent_x),
        extent_y(s.extent_y),
        per_extent_y(1.0f / s.extent_y),
        half_width(sqrtf(ellipse_level(s.opacity) / s.a)),
        slant(-s.b / s.a),
        rightmost_dy(-s.b / s.c * s.extent_x),
        tiles_x(tiles_x),
        rows(tile_span(s.y - s.extent_y, s.y + s.extent_y, tiles_y)) {}

  HOST_DEVICE TileSpan columns(int row) const {
    const float top = larger(float(row * kTileSize) + 0.5f - y, -extent_y);
    const float bottom = smaller(float((row + 1) * kTileSize) - 0.5f - y, extent_y);
    const float dy_right = smaller(larger(rightmost_dy, top), bottom);
    const float dy_left = smaller(larger(-rightmost_dy, top), bottom);
    const float up_right = dy_right * per_extent_y, up_left = dy_left * per_extent_y;
    const float right = slant * dy_right + half_width * sqrtf(larger(1.0f - up_right * up_right, 0.0f));
    const float left = slant * dy_left - half_width * sqrtf(larger(1.0f - up_left * up_left, 0.0f));
    return tile_span(x + larger(left, -extent_x), x + smaller(right, extent_x), tiles_x);
  }
};

// Calls visit(row of tiles, span of columns) for every row that the splat touches.
template <class Visit>
HOST_DEVICE void for_each_tile_row(const Splat& s, int tiles_x, int tiles_y, Visit&& visit) {
  const TileRows tiles(s, tiles_x, tiles_y);
  for (int row = tiles.rows.begin; row < tiles.rows.end; ++row) {
    const TileSpan columns = tiles.columns(row);
    if (columns.begin < columns.end) visit(row, columns);
  }
}

}  // namespace spaceport::SPACEPORT_ISA
