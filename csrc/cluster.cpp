// cluster: k-means. Assignment is a matrix product in disguise: the nearest centroid minimises |c|^2 - 2 p.c.
#include "kernels.h"
#include "simd.h"

namespace spaceport::SPACEPORT_ISA {

namespace {

constexpr int kLanes = 8;
constexpr int kPointsAtOnce = 4, kVectorsAtOnce = 3;  // twelve sums in registers
constexpr int kGroup = kVectorsAtOnce * kLanes;       // centroids at once
constexpr int64_t kPointsPerPiece = 64;
constexpr float kFar = 3e38f;

// Centroids in groups of 24, each [D][24], so that a group's values of one dimension are neighbours.
class Groups {
 public:
  Groups(const float* centroids, int64_t n, int64_t n_dimensions)
      : n_(n_pieces_of(n, kGroup)),
        n_dimensions_(n_dimensions),
        values_(new float[size_t(n_ * kGroup * n_dimensions)]()),
        squares_(new float[size_t(n_ * kGroup)]) {
    for (int64_t c = 0; c < n_ * kGroup; ++c) {
      float square = 0.0f;
      for (int64_t d = 0; d < n_dimensions && c < n; ++d) {
        const float value = centroids[c * n_dimensions + d];
        values_[(c / kGroup * n_dimensions + d) * kGroup + c % kGroup] = value;
        square += value * value;
      }
      squares_[c] = c < n ? square : kFar;
    }
  }
  ~Groups() {
    delete[] values_;
    delete[] squares_;
  }
  Groups(const Groups&) = delete;
  Groups& operator=(const Groups&) = delete;

  int64_t n() const { return n_; }
  const float* values(int64_t group) const { return values_ + group * n_dimensions_ * kGroup; }
  const float* squares(int64_t group) const { return squares_ + group * kGroup; }

 private:
  int64_t n_, n_dimensions_;
  float* values_;
  float* squares_;
};

// The nearest centroids of four points, lane by lane; the lanes are reduced at the end.
struct Nearest {
  Float8 distance[kPointsAtOnce], label[kPointsAtOnce];  // labels as floats: exact below 2^24
};

void visit_group(const Groups& groups, int64_t group, const float* const* points, int64_t n_dimensions,
                 Nearest& nearest) {
  Float8 products[kPointsAtOnce][kVectorsAtOnce];
  for (auto& row : products) {
    for (Float8& product : row) product = Float8(0.0f);
  }
  const float* values = groups.values(group);
  for (int64_t d = 0; d < n_dimensions; ++d, values += kGroup) {
    const Float8 c[kVectorsAtOnce] = {load(values), load(values + kLanes), load(values + 2 * kLanes)};
    for (int p = 0; p < kPointsAtOnce; ++p) {
      const Float8 value(points[p][d]);
      for (int v = 0; v < kVectorsAtOnce; ++v) products[p][v] = multiply_add(value, c[v], products[p][v]);
    }
  }
  const Float8 lanes(Float8::Vector{0, 1, 2, 3, 4, 5, 6, 7}), minus_two(-2.0f);
  for (int v = 0; v < kVectorsAtOnce; ++v) {
    const Float8 square = load(groups.squares(group) + v * kLanes);
    const Float8 label = lanes + Float8(float(group * kGroup + v * kLanes));
    for (int p = 0; p < kPointsAtOnce; ++p) {
      const Float8 distance = multiply_add(minus_two, products[p][v], square);
      const Mask8 nearer = distance < nearest.distance[p];
      nearest.distance[p] = select(nearer, distance, nearest.distance[p]);
      nearest.label[p] = select(nearer, label, nearest.label[p]);
    }
  }
}

}  // namespace

void cluster_assign(const Cpu& cpu, const Points& points, const Points& centroids, int32_t* labels, float* distances) {
  const Groups groups(centroids.values, centroids.n, centroids.n_dimensions);
  const int64_t n_dimensions = points.n_dimensions;
  parallel_for(*cpu.pool, n_pieces_of(points.n, kPointsPerPiece), [&](int64_t piece) {
    const Range range = range_of(piece, points.n, kPointsPerPiece);
    for (int64_t first = range.begin; first < range.end; first += kPointsAtOnce) {
      const float* rows[kPointsAtOnce];
      for (int p = 0; p < kPointsAtOnce; ++p) {
        const int64_t row = first + p < range.end ? first + p : range.end - 1;
        rows[p] = points.values + row * n_dimensions;
      }
      Nearest nearest;
      for (int p = 0; p < kPointsAtOnce; ++p) {
        nearest.distance[p] = Float8(kFar);
        nearest.label[p] = Float8(0.0f);
      }
      for (int64_t group = 0; group < groups.n(); ++group) visit_group(groups, group, rows, n_dimensions, nearest);
      for (int p = 0; p < kPointsAtOnce && first + p < range.end; ++p) {
        float distance[kLanes], label[kLanes], square = 0.0f;
        store(distance, nearest.distance[p]);
        store(label, nearest.label[p]);
        int best = 0;
        for (int lane = 1; lane < kLanes; ++lane) {
          const bool nearer = distance[lane] < distance[best];
          const bool equal = distance[lane] == distance[best] && label[lane] < label[best];
          if (nearer || equal) best = lane;
        }
        for (int64_t d = 0; d < n_dimensions; ++d) square += rows[p][d] * rows[p][d];
        labels[first + p] = int32_t(label[best]);
        distances[first + p] = square + distance[best] > 0.0f ? square + distance[best] : 0.0f;
      }
    }
  });
}

void cluster_update(const Cpu& cpu, const Points& points, const int32_t* labels, const float* weights,
                    const Clusters& out) {
  const Points& centroids = out.centroids;
  float* centroid_weights = out.weights;
  // Cut by dimension: every sum is added up by one thread, in the order of the points.
  std::memset(centroid_weights, 0, size_t(centroids.n) * sizeof(float));
  for (int64_t i = 0; i < points.n; ++i) centroid_weights[labels[i]] += weights[i];
  constexpr int64_t kDimensionsPerPiece = 16;
  const int64_t n_dimensions = points.n_dimensions;
  parallel_for(*cpu.pool, n_pieces_of(n_dimensions, kDimensionsPerPiece), [&](int64_t piece) {
    const Range range = range_of(piece, n_dimensions, kDimensionsPerPiece);
    for (int64_t c = 0; c < centroids.n; ++c) {
      if (!(centroid_weights[c] > 0.0f)) continue;  // an empty cluster keeps its centroid
      for (int64_t d = range.begin; d < range.end; ++d) centroids.values[c * n_dimensions + d] = 0.0f;
    }
    for (int64_t i = 0; i < points.n; ++i) {
      const float* point = points.values + i * n_dimensions;
      float* centroid = centroids.values + labels[i] * n_dimensions;
      if (!(centroid_weights[labels[i]] > 0.0f)) continue;
      for (int64_t d = range.begin; d < range.end; ++d) centroid[d] += weights[i] * point[d];
    }
    for (int64_t c = 0; c < centroids.n; ++c) {
      if (!(centroid_weights[c] > 0.0f)) continue;
      for (int64_t d = range.begin; d < range.end; ++d) centroids.values[c * n_dimensions + d] /= centroid_weights[c];
    }
  });
}

}  // namespace spaceport::SPACEPORT_ISA
