#include "image_resize.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>
#include <vector>

namespace fastrunner {

namespace {

// Weights of all output positions along one side, as Pillow's precompute_coeffs (src/libImaging/Resample.c) has them.
class SideTaps {
 public:
  SideTaps(std::int64_t in, std::int64_t out, bool mirror) {
    const double scale = double(in) / double(out), support = std::max(scale, 1.0);
    const auto low = [&](std::int64_t i) {
      return std::max<std::int64_t>(static_cast<std::int64_t>((double(i) + 0.5) * scale - support + 0.5), 0);
    };
    const auto high = [&](std::int64_t i) {
      return std::min<std::int64_t>(static_cast<std::int64_t>((double(i) + 0.5) * scale + support + 0.5), in);
    };
    most_ = 1;
    for (std::int64_t i = 0; i < out; ++i) most_ = std::max(most_, high(i) - low(i));
    first_.resize(out), weights_.resize(out * most_);
    for (std::int64_t i = 0; i < out; ++i) {
      const auto weight = [&](std::int64_t k) {
        return std::max(0.0, 1.0 - std::abs((double(k) - (double(i) + 0.5) * scale + 0.5) / support));
      };
      double total = 0.0;
      for (std::int64_t k = low(i); k < high(i); ++k) total += weight(k);
      const std::int64_t at = mirror ? out - 1 - i : i;
      first_[at] = static_cast<std::int32_t>(low(i));
      for (std::int64_t k = low(i); k < high(i); ++k)
        weights_[at * most_ + k - low(i)] = static_cast<float>(weight(k) / total);
    }
  }

  Taps view() const { return {static_cast<std::int64_t>(first_.size()), most_, first_.data(), weights_.data()}; }

 private:
  std::int64_t most_;
  std::vector<std::int32_t> first_;
  std::vector<float> weights_;
};

// DALI's calls: pointers as numbers; of each output and input its data, its shape (int64), its number of dimensions.
using Setup = void(std::uint64_t out_shapes, std::uint64_t out_ndims, std::int32_t num_outs, std::uint64_t in_shapes,
                   std::uint64_t in_ndims, std::int32_t num_ins, std::int32_t num_samples);
using Run = void(std::uint64_t outs, std::uint64_t out_shapes, std::uint64_t out_ndims, std::int32_t num_outs,
                 std::uint64_t ins, std::uint64_t in_shapes, std::uint64_t in_ndims, std::int32_t num_ins);

const ChunkLoops* dali_loops = nullptr;

// Shapes come as one array of pointers, all samples of an output or input behind each other.
void setup(std::uint64_t out_shapes, std::uint64_t out_ndims, std::int32_t, std::uint64_t in_shapes, std::uint64_t,
           std::int32_t, std::int32_t num_samples) noexcept {
  const auto* out = reinterpret_cast<std::int64_t* const*>(out_shapes);
  const auto* in = reinterpret_cast<const std::int64_t* const*>(in_shapes);
  const std::int32_t ndim = *reinterpret_cast<const std::int32_t*>(out_ndims);
  for (std::int32_t sample = 0; sample < num_samples; ++sample) std::copy_n(in[sample], ndim, out[sample]);
}

template <bool kPlanar>
void run(std::uint64_t outs, std::uint64_t out_shapes, std::uint64_t, std::int32_t, std::uint64_t ins,
         std::uint64_t in_shapes, std::uint64_t, std::int32_t) noexcept {
  auto* out = *reinterpret_cast<std::uint8_t* const*>(outs);
  const std::int64_t* shape = *reinterpret_cast<const std::int64_t* const*>(out_shapes);
  const auto* in = reinterpret_cast<const void* const*>(ins);
  const std::int64_t* image = reinterpret_cast<const std::int64_t* const*>(in_shapes)[1];
  const bool mirror = *static_cast<const std::int32_t*>(in[2]) != 0;
  resize_image({static_cast<const std::uint8_t*>(in[1]), image[0], image[1]}, {out, shape[kPlanar], shape[kPlanar + 1]},
               static_cast<int>(image[2]), mirror, kPlanar, *dali_loops);
}

}  // namespace

void resize_image(Image image, ImageOut out, int channels, bool mirror, bool planar, const ChunkLoops& loops) {
  if (std::min({image.height, image.width, out.height, out.width}) < 1 || channels < 1 || channels > 4)
    throw std::invalid_argument("images must have sizes of at least 1, and 1 to 4 channels");
  const SideTaps down(image.height, out.height, false), across(image.width, out.width, mirror);
  const Taps rows = down.view(), columns = across.view();
  const std::int64_t length = image.width * channels;
  std::vector<float> sum(length + columns.most * channels + 4);  // what is read beyond the row has weight 0
  std::vector<std::int32_t> levels(4 * out.width);
  const std::int64_t pixel_stride = planar ? 1 : channels, channel_stride = planar ? out.height * out.width : 1;
  for (std::int64_t y = 0; y < out.height; ++y) {
    const std::uint8_t* row = image.data + rows.first[y] * length;
    const float* weights = rows.weights + y * rows.most;
    for (std::int64_t k = 0; k < rows.most && (k == 0 || weights[k] != 0.0f); ++k)
      loops.add_row(sum.data(), row + k * length, length, weights[k], k == 0);
    loops.shrink_row(sum.data(), columns, channels, levels.data(),
                     {out.data + y * out.width * pixel_stride, pixel_stride, channel_stride});
  }
}

std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t> dali_resize(const ChunkLoops& loops) {
  dali_loops = &loops;
  Setup* const shapes = setup;
  Run *const planar = run<true>, *const interleaved = run<false>;
  return {reinterpret_cast<std::uintptr_t>(shapes), reinterpret_cast<std::uintptr_t>(planar),
          reinterpret_cast<std::uintptr_t>(interleaved)};
}

}  // namespace fastrunner
