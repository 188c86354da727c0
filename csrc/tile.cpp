// tile: for every tile its instances from front to back. A radix sort of the splats by depth, then the listing of their
// instances in that order, then a stable counting sort by tile.
#define SPACEPORT_ISA portable

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "ops.h"
#include "prefetch.h"
#include "tile_spans.h"

namespace spaceport {

namespace {

constexpr int kRadixBits = 11;
constexpr int kRadixPasses = 3;
constexpr int64_t kItemsPerPiece = 1 << 15;

// Calls place(i, where) for every i in [0, n), such that `where` runs through the keys in order and equal keys keep
// theirs. Returns the first place of every key, and n behind the last.
template <class KeyOf, class Place>
std::vector<int64_t> counting_sort(ThreadPool& pool, int64_t n, int64_t n_keys, KeyOf&& key_of, Place&& place) {
  const int64_t n_pieces = n_pieces_of(n, kItemsPerPiece);
  std::vector<int64_t> next(static_cast<size_t>(n_pieces * n_keys));  // [piece][key], first counts, then places
  parallel_for(pool, n_pieces, [&](int64_t piece) {
    const Range range = range_of(piece, n, kItemsPerPiece);
    int64_t* counts = next.data() + piece * n_keys;
    for (int64_t i = range.begin; i < range.end; ++i) ++counts[key_of(i)];
  });
  std::vector<int64_t> first(static_cast<size_t>(n_keys + 1));
  int64_t sum = 0;
  for (int64_t key = 0; key < n_keys; ++key) {
    first[size_t(key)] = sum;
    for (int64_t piece = 0; piece < n_pieces; ++piece) {
      int64_t& slot = next[size_t(piece * n_keys + key)];
      const int64_t count = slot;
      slot = sum;
      sum += count;
    }
  }
  first[size_t(n_keys)] = sum;
  parallel_for(pool, n_pieces, [&](int64_t piece) {
    const Range range = range_of(piece, n, kItemsPerPiece);
    int64_t* places = next.data() + piece * n_keys;
    for (int64_t i = range.begin; i < range.end; ++i) place(i, places[key_of(i)]++);
  });
  return first;
}

struct SplatDepth {
  int32_t splat;
  uint32_t depth_bits;
};
struct PlacedInstance {
  int32_t tile, splat, number;
};
struct TileScratch {
  SplatDepth *order, *reordered;  // [M] each
  PlacedInstance* listed;         // [I]
};

// Splats from near to far; equal depths keep their order. Depths are positive, so that their bits sort like numbers.
void sort_by_depth(ThreadPool& pool, const Projected& projected, TileScratch& scratch) {
  const int64_t n_pieces = n_pieces_of(projected.n, kItemsPerPiece);
  parallel_for(pool, n_pieces, [&](int64_t piece) {
    const Range range = range_of(piece, projected.n, kItemsPerPiece);
    for (int64_t i = range.begin; i < range.end; ++i) {
      scratch.order[i].splat = int32_t(i);
      std::memcpy(&scratch.order[i].depth_bits, &projected.splats[i].depth, sizeof(float));
    }
  });
  for (int pass = 0; pass < kRadixPasses; ++pass) {
    const int shift = pass * kRadixBits;
    const SplatDepth* from = scratch.order;
    SplatDepth* to = scratch.reordered;
    counting_sort(
        pool, projected.n, int64_t(1) << kRadixBits,
        [&](int64_t i) { return (from[i].depth_bits >> shift) & ((1u << kRadixBits) - 1u); },
        [&](int64_t i, int64_t place) { to[place] = from[i]; });
    std::swap(scratch.order, scratch.reordered);
  }
}

// The instances of all splats, in the order of scratch.order; false if their number is not what projecting counted.
bool list_instances(ThreadPool& pool, const Projected& projected, const Camera& camera, const TileScratch& scratch) {
  constexpr int64_t kSplatsPerPiece = 1 << 13;
  constexpr int64_t kPrefetchDistance = 16;
  const int64_t n_pieces = n_pieces_of(projected.n, kSplatsPerPiece);
  std::vector<int64_t> starts(static_cast<size_t>(n_pieces + 1));
  parallel_for(pool, n_pieces, [&](int64_t piece) {
    const Range range = range_of(piece, projected.n, kSplatsPerPiece);
    int64_t n = 0;
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int32_t splat = scratch.order[i].splat;
      n += projected.instance_offsets[splat + 1] - projected.instance_offsets[splat];
    }
    starts[size_t(piece + 1)] = n;
  });
  for (int64_t piece = 0; piece < n_pieces; ++piece) starts[size_t(piece + 1)] += starts[size_t(piece)];

  const int tiles_x = camera.tiles_x(), tiles_y = camera.tiles_y();
  std::atomic<bool> as_counted{true};
  parallel_for(pool, n_pieces, [&](int64_t piece) {
    const Range range = range_of(piece, projected.n, kSplatsPerPiece);
    PlacedInstance* next = scratch.listed + starts[size_t(piece)];
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int32_t splat = scratch.order[i].splat;
      if (i + kPrefetchDistance < range.end) {
        const int32_t later = scratch.order[i + kPrefetchDistance].splat;
        prefetch(projected.splats[later]);
        __builtin_prefetch(&projected.instance_offsets[later]);
      }
      int64_t number = projected.instance_offsets[splat];
      const int64_t end = projected.instance_offsets[splat + 1];
      int64_t n_tiles = 0;
      portable::for_each_tile_row(projected.splats[splat], tiles_x, tiles_y, [&](int row, portable::TileSpan columns) {
        n_tiles += columns.end - columns.begin;
        for (int column = columns.begin; column < columns.end && number < end; ++column) {
          *next++ = {row * tiles_x + column, splat, int32_t(number++)};
        }
      });
      if (n_tiles != end - projected.instance_offsets[splat]) as_counted = false;
    }
  });
  return as_counted;
}

}  // namespace

size_t tile_scratch(const Cpu&, int64_t n_splats, int64_t n_instances, const Camera&) {
  return 2 * size_t(n_splats) * sizeof(SplatDepth) + size_t(n_instances) * sizeof(PlacedInstance);
}

void tile(const Cpu& cpu, const Projected& projected, const Camera& camera, void* memory, const Tiles& out) {
  SplatDepth* order = static_cast<SplatDepth*>(memory);
  TileScratch scratch = {order, order + projected.n, reinterpret_cast<PlacedInstance*>(order + 2 * projected.n)};
  sort_by_depth(*cpu.pool, projected, scratch);
  if (!list_instances(*cpu.pool, projected, camera, scratch)) {
    throw std::invalid_argument("projected: was not projected with this camera");
  }
  const int64_t n_tiles = int64_t(camera.tiles_x()) * camera.tiles_y();
  const std::vector<int64_t> first = counting_sort(
      *cpu.pool, out.n_instances, n_tiles, [&](int64_t i) { return scratch.listed[i].tile; },
      [&](int64_t i, int64_t place) {
        out.splat_from_instance[place] = scratch.listed[i].splat;
        out.number_from_instance[place] = scratch.listed[i].number;
      });
  std::memcpy(out.offsets, first.data(), first.size() * sizeof(int64_t));
}

}  // namespace spaceport
