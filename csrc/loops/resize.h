// resize.h: the two passes of an image's resize.  No include guard: each isa_<name>.cpp includes it for its own CPU.
//
// Down the columns whole rows are added up, value by value. Across, each pixel has its own weights: a pixel's channels
// are one register of four floats, of which the last ones may be the next pixel's, and count for nothing.
// Products and sums are rounded one by one and in one order, so every ISA gives the same bits.

namespace fastrunner::FR_ISA {

typedef float Pixel __attribute__((vector_size(16), aligned(4), may_alias));
typedef std::int32_t Levels __attribute__((vector_size(16), aligned(4), may_alias));

// sum = weight * row, or sum += weight * row.
void add_row(float* __restrict sum, const std::uint8_t* __restrict row, std::int64_t n, float weight,
             bool first) noexcept {
  if (first) {
    for (std::int64_t i = 0; i < n; ++i) sum[i] = weight * static_cast<float>(row[i]);
  } else {
    for (std::int64_t i = 0; i < n; ++i) sum[i] += weight * static_cast<float>(row[i]);
  }
}

// kMost: the number of weights, where it is small enough to be compiled in; 0: taps.most.
template <int kMost>
static inline void across(const float* __restrict row, const Taps& taps, int channels,
                          std::int32_t* __restrict levels) noexcept {
  const std::int64_t most = kMost ? kMost : taps.most;
  for (std::int64_t x = 0; x < taps.size; ++x) {
    const float* pixel = row + taps.first[x] * channels;
    const float* weight = taps.weights + x * most;
    Pixel sum = {0.5f, 0.5f, 0.5f, 0.5f};
    for (std::int64_t k = 0; k < most; ++k) sum += weight[k] * *reinterpret_cast<const Pixel*>(pixel + k * channels);
    *reinterpret_cast<Levels*>(levels + 4 * x) = __builtin_convertvector(sum, Levels);
  }
}

// levels: room for (size, 4).
void shrink_row(const float* row, const Taps& taps, int channels, std::int32_t* levels, const RowOut& out) noexcept {
  switch (taps.most) {
    case 2:
      across<2>(row, taps, channels, levels);
      break;
    case 3:
      across<3>(row, taps, channels, levels);
      break;
    case 4:
      across<4>(row, taps, channels, levels);
      break;
    default:
      across<0>(row, taps, channels, levels);
  }
  for (int c = 0; c < channels; ++c) {
    std::uint8_t* __restrict to = out.data + c * out.channel_stride;
    if (out.pixel_stride == 1) {
      for (std::int64_t x = 0; x < taps.size; ++x) to[x] = static_cast<std::uint8_t>(levels[4 * x + c]);
    } else {
      for (std::int64_t x = 0; x < taps.size; ++x)
        to[x * out.pixel_stride] = static_cast<std::uint8_t>(levels[4 * x + c]);
    }
  }
}

}  // namespace fastrunner::FR_ISA
