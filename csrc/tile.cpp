// tile: for every tile its instances from front to back. A radix sort by depth, then a stable counting sort by tile.
#define SPACEPORT_ISA portable

#include <cstring>
#include <vector>

#include "ops.h"
#include "tile_spans.h"

namespace spaceport {

namespace {

constexpr int kRadixBits = 11;
constexpr int kRadixPasses = 3;
constexpr int kDigits = 1 << kRadixBits;
constexpr int64_t kSplatsPerPiece = 8192;

// Depths are positive, so that their bits sort like numbers.
uint32_t depth_key(float depth) {
  uint32_t bits;
  std::memcpy(&bits, &depth, sizeof(bits));
  return bits;
}

struct KeyedSplat {
  uint32_t key;
  int32_t splat;
};

struct PlacedInstance {
  int32_t tile;
  Instance instance;
};

// Splats from near to far; equal depths keep their order.
std::vector<KeyedSplat> sorted_by_depth(const Projected& projected) {
  std::vector<KeyedSplat> items(projected.n), other(projected.n);
  std::vector<int64_t> counts(size_t(kRadixPasses) * kDigits);
  for (int64_t i = 0; i < projected.n; ++i) {
    const uint32_t key = depth_key(projected.splats[i].depth);
    items[i] = {key, int32_t(i)};
    for (int pass = 0; pass < kRadixPasses; ++pass) {
      ++counts[size_t(pass) * kDigits + ((key >> (pass * kRadixBits)) & (kDigits - 1))];
    }
  }
  for (int pass = 0; pass < kRadixPasses; ++pass) {
    int64_t* starts = counts.data() + size_t(pass) * kDigits;
    int64_t sum = 0;
    for (int digit = 0; digit < kDigits; ++digit) {
      const int64_t count = starts[digit];
      starts[digit] = sum;
      sum += count;
    }
    for (const KeyedSplat& item : items) other[starts[(item.key >> (pass * kRadixBits)) & (kDigits - 1)]++] = item;
    items.swap(other);
  }
  return items;
}

}  // namespace

void tile(const Cpu& cpu, const Projected& projected, const Camera& camera, const Tiles& out) {
  const int tiles_x = camera.tiles_x(), tiles_y = camera.tiles_y();
  const int64_t n_tiles = int64_t(tiles_x) * tiles_y;
  const std::vector<KeyedSplat> order = sorted_by_depth(projected);
  const int64_t n_pieces = n_pieces_of(projected.n, kSplatsPerPiece);

  // places[piece][tile]: first the number of instances, then where the piece's next one goes.
  std::vector<int64_t> places(size_t(n_pieces) * n_tiles);
  std::vector<std::vector<PlacedInstance>> listed(static_cast<size_t>(n_pieces));
  parallel_for(*cpu.pool, n_pieces, [&](int64_t piece) {
    const Range range = range_of(piece, projected.n, kSplatsPerPiece);
    int64_t* count = places.data() + piece * n_tiles;
    std::vector<PlacedInstance>& list = listed[size_t(piece)];
    list.reserve(size_t(4 * (range.end - range.begin)));
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int32_t splat = order[size_t(i)].splat;
      int64_t number = projected.instance_offsets[splat];
      portable::for_each_tile_row(projected.splats[splat], tiles_x, tiles_y, [&](int row, portable::TileSpan columns) {
        for (int column = columns.begin; column < columns.end; ++column) {
          const int tile = row * tiles_x + column;
          ++count[tile];
          list.push_back({tile, {splat, int32_t(number++)}});
        }
      });
    }
  });
  int64_t sum = 0;
  for (int64_t t = 0; t < n_tiles; ++t) {
    out.offsets[t] = sum;
    for (int64_t piece = 0; piece < n_pieces; ++piece) {
      const int64_t count = places[size_t(piece * n_tiles + t)];
      places[size_t(piece * n_tiles + t)] = sum;
      sum += count;
    }
  }
  out.offsets[n_tiles] = sum;
  parallel_for(*cpu.pool, n_pieces, [&](int64_t piece) {
    int64_t* place = places.data() + piece * n_tiles;
    for (const PlacedInstance& item : listed[size_t(piece)]) out.instances[place[item.tile]++] = item.instance;
  });
}

}  // namespace spaceport
