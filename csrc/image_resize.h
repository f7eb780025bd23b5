// image_resize.h: an image of bytes in another size, mirrored or not; alone, and as DALI calls it.
#pragma once
#include <cstdint>
#include <tuple>

#include "chunk_loops.h"

namespace fastrunner {

struct Image {
  const std::uint8_t* data;  // (height, width, channels)
  std::int64_t height, width;
};
struct ImageOut {
  std::uint8_t* data;  // (height, width, channels), or planar (channels, height, width)
  std::int64_t height, width;
};

// Bilinear with a triangular filter that widens where the image shrinks: Pillow's BILINEAR, torchvision's antialias.
// Sums are float, rounded once, to nearest; Pillow rounds between its two passes, so they differ by at most 1.
// Throws std::invalid_argument for sizes below 1 or channels that are not 1 to 4. From any thread.
void resize_image(Image image, ImageOut out, int channels, bool mirror, bool planar, const ChunkLoops& loops);

// Addresses of functions for DALI's operator NumbaFuncImpl, which calls addresses: (setup, run planar, run
// interleaved). Inputs of a sample: anything of the output's shape, which is not read; the image, uint8 (H, W, C); and
// int32 (1,), whether it is mirrored.
std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t> dali_resize(const ChunkLoops& loops);

}  // namespace fastrunner
