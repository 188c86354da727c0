// loss: L1 + D-SSIM and its gradient in one pass over blocks of the image.
//
// Colours stay interleaved: a horizontal tap is a load three floats further on. Each block streams down its rows. A row
// of both images is filtered across and kept for eleven rows; from these come the local moments of a row, its SSIM and
// the three derivatives that the gradient needs; those are filtered in the same two steps back onto the pixels.
#include <initializer_list>

#include "kernels.h"
#include "simd.h"
#include "ssim_math.h"

namespace spaceport::SPACEPORT_ISA {

namespace {

constexpr int kLanes = 8;

constexpr int padded(int n_floats) {
  return (n_floats + 2 * kLanes - 1) / kLanes * kLanes;
}

// The last eleven rows of `kPlanes` filtered quantities.
template <int kPlanes>
class RowRing {
 public:
  RowRing(float* memory, int stride) : memory_(memory), stride_(stride) {}
  static size_t n_floats(int stride) { return size_t(kPlanes) * kTaps * size_t(stride); }

  // Rows may be negative, but not below -kTaps.
  float* row(int plane, int row) { return memory_ + (plane * kTaps + (row + kTaps) % kTaps) * int64_t(stride_); }
  void clear(int at_row) {
    for (int plane = 0; plane < kPlanes; ++plane) std::memset(row(plane, at_row), 0, size_t(stride_) * sizeof(float));
  }
  // The eleven rows around `center`, of the first plane.
  struct Window {
    const float* rows[kTaps];
  };
  Window around(int center) {
    Window window;
    for (int k = 0; k < kTaps; ++k) window.rows[k] = row(0, center - kRadius + k);
    return window;
  }
  // The window down these rows, at float i.
  HOST_DEVICE void filtered(const Window& window, int i, Float8 out[kPlanes]) const {
    const int64_t plane_size = int64_t(kTaps) * stride_;
    for (int plane = 0; plane < kPlanes; ++plane) out[plane] = Float8(0.0f);
    for (int k = 0; k < kTaps; ++k) {
      const float* at = window.rows[k] + i;
      for (int plane = 0; plane < kPlanes; ++plane, at += plane_size) {
        out[plane] = multiply_add(Float8(kWindow[k]), load(at), out[plane]);
      }
    }
  }

 private:
  float* memory_;
  int stride_;
};

// What all pixels weigh together in the means of L1 and of SSIM.
struct LossWeights {
  double l1, ssim;

  static LossWeights of(const LossImages& image, int margin) {
    const uint8_t* mask = image.target.mask;
    if (mask == nullptr) {
      return {double(image.width) * image.height, double(image.width - 2 * margin) * (image.height - 2 * margin)};
    }
    uint64_t all = 0, inner = 0;
    for (int y = 0; y < image.height; ++y) {
      const uint8_t* row = mask + int64_t(y) * image.width;
      const bool is_inner_row = y >= margin && y < image.height - margin;
      for (int x = 0; x < image.width; ++x) all += row[x];
      for (int x = margin; is_inner_row && x < image.width - margin; ++x) inner += row[x];
    }
    return {double(all) / 255.0, double(inner) / 255.0};
  }
};

// 1 / (weight of all values); 0 where nothing weighs.
double per_value(double weight) {
  return weight > 0.0 ? 1.0 / (kChannels * weight) : 0.0;
}

// What the gradients of L1 and of SSIM are multiplied by at each pixel.
struct LossFactors {
  float l1, ssim;
  int margin;  // pixels at each side of the image that SSIM does not count
};

// One block: its pixels [x0, x1) x [y0, y1), with halos of one and of two window radii around them.
class Block {
 public:
  Block(const LossImages& image, int x0, int y0, const LossFactors& factors, float* d_color)
      : image_(image),
        factors_(factors),
        x0_(x0),
        y0_(y0),
        x1_(x0 + kLossBlockWidth < image.width ? x0 + kLossBlockWidth : image.width),
        y1_(y0 + kLossBlockHeight < image.height ? y0 + kLossBlockHeight : image.height),
        n_outer_(kChannels * (x1_ - x0_ + 4 * kRadius)),
        n_inner_(kChannels * (x1_ - x0_ + 2 * kRadius)),
        n_own_(kChannels * (x1_ - x0_)),
        stride_(padded(n_outer_) + kChannels * kTaps),
        memory_(new float[size_t(stride_) * 5 + RowRing<5>::n_floats(stride_) + RowRing<3>::n_floats(stride_)]()),
        x_row_(memory_),
        y_row_(memory_ + stride_),
        maps_(memory_ + 2 * stride_),
        moments_(memory_ + 5 * stride_, stride_),
        derivatives_(memory_ + 5 * stride_ + RowRing<5>::n_floats(stride_), stride_),
        d_color_(d_color) {}
  ~Block() { delete[] memory_; }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Sums over the block's own pixels.
  LossSums run() {
    for (int row = y0_ - 2 * kRadius; row < y1_ + 2 * kRadius; ++row) {
      filter_images_across(row);
      if (row - kRadius >= y0_ - kRadius) differentiate(row - kRadius);
      if (row - 2 * kRadius >= y0_) write_gradient(row - 2 * kRadius);
    }
    return sums_;
  }

 private:
  bool inside(int row) const { return row >= 0 && row < image_.height; }

  // Both images' row as floats, zero outside the image, `halo` pixels wider than the block on both sides.
  void load_rows(int row, int halo) {
    const int first = x0_ - halo, last = x1_ + halo;
    const int from = first > 0 ? first : 0, to = last < image_.width ? last : image_.width;
    const int skipped = kChannels * (from - first), n = kChannels * (to - from);
    const int64_t at = kChannels * (int64_t(row) * image_.width + from);
    std::memset(x_row_, 0, size_t(stride_) * sizeof(float));
    std::memset(y_row_, 0, size_t(stride_) * sizeof(float));
    std::memcpy(x_row_ + skipped, image_.color + at, size_t(n) * sizeof(float));
    for (int i = 0; i < n; ++i) y_row_[skipped + i] = float(image_.target.photo[at + i]) * (1.0f / 255.0f);
    if (image_.target.exposure != nullptr) expose(image_.color + at, n, x_row_ + skipped);
    if (image_.target.mask != nullptr) {
      weigh(row, first, x_row_);
      weigh(row, first, y_row_);
    }
  }

  // Colours behind the exposure. These are kept out of the loop over the rows, which they would slow down.
  __attribute__((noinline)) void expose(const float* color, int n, float* out) const {
    for (int i = 0; i < n; i += kChannels) {
      for (int c = 0; c < kChannels; ++c) out[i + c] = exposed(image_.target.exposure, color + i, c);
    }
  }

  // Multiplies what is as long as a row and begins at pixel `first` by the mask, where it lies in the image.
  __attribute__((noinline)) void weigh(int row, int first, float* values) const {
    const uint8_t* mask = image_.target.mask + int64_t(row) * image_.width;
    const int last = x0_ + x1_ - first;  // rows reach as far beyond the block on both sides
    for (int x = first > 0 ? first : 0; x < last && x < image_.width; ++x) {
      for (int c = 0; c < kChannels; ++c) values[kChannels * (x - first) + c] *= float(mask[x]) * (1.0f / 255.0f);
    }
  }

  void filter_images_across(int row) {
    if (!inside(row)) {
      moments_.clear(row);
      return;
    }
    load_rows(row, 2 * kRadius);
    for (int i = 0; i < n_inner_; i += kLanes) {
      Float8 x(0.0f), y(0.0f), xx(0.0f), yy(0.0f), xy(0.0f);
      for (int k = 0; k < kTaps; ++k) {
        const Float8 weight(kWindow[k]);
        const Float8 x_k = load(x_row_ + i + kChannels * k), y_k = load(y_row_ + i + kChannels * k);
        const Float8 wx = weight * x_k, wy = weight * y_k;
        x = x + wx;
        y = y + wy;
        xx = multiply_add(wx, x_k, xx);
        yy = multiply_add(wy, y_k, yy);
        xy = multiply_add(wx, y_k, xy);
      }
      store(moments_.row(0, row) + i, x);
      store(moments_.row(1, row) + i, y);
      store(moments_.row(2, row) + i, xx);
      store(moments_.row(3, row) + i, yy);
      store(moments_.row(4, row) + i, xy);
    }
  }

  void differentiate(int row) {
    if (row < factors_.margin || row >= image_.height - factors_.margin) {
      derivatives_.clear(row);
      return;
    }
    float* ssim_row = x_row_;  // free until the next row is loaded
    const auto window = moments_.around(row);
    for (int i = 0; i < n_inner_; i += kLanes) {
      Float8 moments[5];
      moments_.filtered(window, i, moments);
      const SsimDerivatives<Float8> d = ssim_of(moments);
      store(ssim_row + i, d.ssim);
      store(maps_ + i, d.by_mean);
      store(maps_ + stride_ + i, d.by_square);
      store(maps_ + 2 * stride_ + i, d.by_product);
    }
    for (float* map : {ssim_row, maps_, maps_ + stride_, maps_ + 2 * stride_}) {
      clear_what_does_not_count(map);
      if (image_.target.mask != nullptr) weigh(row, x0_ - kRadius, map);
    }
    if (row >= y0_ && row < y1_) sums_.ssim += sum_of(ssim_row + kChannels * kRadius);
    for (int plane = 0; plane < 3; ++plane) {
      const float* map = maps_ + plane * stride_;
      float* out = derivatives_.row(plane, row);
      for (int i = 0; i < n_own_; i += kLanes) {
        Float8 sum(0.0f);
        for (int k = 0; k < kTaps; ++k) sum = multiply_add(Float8(kWindow[k]), load(map + i + kChannels * k), sum);
        store(out + i, sum);
      }
    }
  }

  // Columns of a map to the left and to the right of the image and of its margin.
  void clear_what_does_not_count(float* map) const {
    const int left = kRadius + factors_.margin - x0_, right = x1_ + kRadius + factors_.margin - image_.width;
    if (left > 0) std::memset(map, 0, size_t(kChannels * left) * sizeof(float));
    const int kept = n_inner_ - kChannels * (right > 0 ? right : 0);
    std::memset(map + kept, 0, size_t(stride_ - kept) * sizeof(float));
  }

  void write_gradient(int row) {
    load_rows(row, 0);
    const int64_t at = kChannels * (int64_t(row) * image_.width + x0_);
    const Float8 zero(0.0f), plus(factors_.l1), minus(-factors_.l1), ssim_factor(factors_.ssim), two(2.0f);
    float* gradient = maps_;  // free until the next row is differentiated
    float* difference = maps_ + stride_;
    const auto window = derivatives_.around(row);
    for (int i = 0; i < n_own_; i += kLanes) {
      Float8 d[3];
      derivatives_.filtered(window, i, d);
      const Float8 x = load(x_row_ + i), y = load(y_row_ + i);
      const Float8 d_ssim = d[0] + two * x * d[1] + y * d[2];
      const Float8 sign = select(x > y, plus, select(x < y, minus, zero));
      store(gradient + i, multiply_add(ssim_factor, d_ssim, sign));
      store(difference + i, select(x > y, x - y, y - x));
    }
    if (image_.target.mask != nullptr) weigh(row, x0_, gradient);
    if (image_.target.exposure != nullptr) expose_vjp(image_.color + at, gradient);
    std::memcpy(d_color_ + at, gradient, size_t(n_own_) * sizeof(float));
    sums_.l1 += sum_of(difference);
  }

  // The gradient of a row, by the colours before the exposure instead of behind it; adds that by the exposure.
  __attribute__((noinline)) void expose_vjp(const float* color, float* gradient) {
    for (int i = 0; i < n_own_; i += kChannels) {
      const float d[kChannels] = {gradient[i], gradient[i + 1], gradient[i + 2]};
      for (int c = 0; c < kChannels; ++c) {
        double* row = sums_.d_exposure + c * (kChannels + 1);
        for (int k = 0; k < kChannels; ++k) row[k] += double(d[c]) * double(color[i + k]);
        row[kChannels] += double(d[c]);
        gradient[i + c] = exposed_vjp(image_.target.exposure, d, c);
      }
    }
  }

  double sum_of(float* row) const {
    const int whole = n_own_ / kLanes * kLanes;
    Float8 sums(0.0f);
    for (int i = 0; i < whole; i += kLanes) sums = sums + load(row + i);
    double total = double(sum(sums));
    for (int i = whole; i < n_own_; ++i) total += double(row[i]);
    return total;
  }

  const LossImages& image_;
  const LossFactors& factors_;
  int x0_, y0_, x1_, y1_;
  int n_outer_, n_inner_, n_own_;  // floats of a row with two, one and no radius of halo on each side
  int stride_;
  float* memory_;
  float *x_row_, *y_row_;
  float* maps_;
  RowRing<5> moments_;
  RowRing<3> derivatives_;
  float* d_color_;
  LossSums sums_ = {};
};

}  // namespace

void loss(const Cpu& cpu, const LossImages& image, const LossSettings& settings, void* scratch, const LossOutput& out) {
  const int64_t columns = n_pieces_of(image.width, kLossBlockWidth), rows = n_pieces_of(image.height, kLossBlockHeight);
  LossSums* sums = static_cast<LossSums*>(scratch);  // [columns * rows]
  const int margin = margin_of(settings.padding);
  const LossWeights weights = LossWeights::of(image, margin);
  const double l1_share = per_value(weights.l1), ssim_share = per_value(weights.ssim);
  const LossFactors factors = {float((1.0 - double(settings.ssim_weight)) * l1_share),
                               float(-double(settings.ssim_weight) * ssim_share), margin};
  parallel_for(*cpu.pool, columns * rows, [&](int64_t block) {
    const int x0 = int(block % columns) * kLossBlockWidth, y0 = int(block / columns) * kLossBlockHeight;
    sums[block] = Block(image, x0, y0, factors, out.d_color).run();
  });
  LossSums total = {};
  for (int64_t block = 0; block < columns * rows; ++block) {
    total.l1 += sums[block].l1;
    total.ssim += sums[block].ssim;
    for (int i = 0; i < kExposureSize; ++i) total.d_exposure[i] += sums[block].d_exposure[i];
  }
  out.means[0] = total.l1 * l1_share;
  out.means[1] = weights.ssim > 0.0 ? total.ssim * ssim_share : 1.0;
  for (int i = 0; out.d_exposure != nullptr && i < kExposureSize; ++i) out.d_exposure[i] = float(total.d_exposure[i]);
}

}  // namespace spaceport::SPACEPORT_ISA
