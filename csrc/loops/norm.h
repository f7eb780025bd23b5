// norm.h: sum of g[j]^2 over one chunk.  Reads 4 B per element: bound by memory on every ISA.
// No include guard: each isa_<name>.cpp includes it for its own CPU.
//
// Element j goes to lane j mod 64, counted from the start of the chunk and not from its address, and the lanes are
// folded by a fixed tree. A lane adds at most 256 squares, so float suffices: the relative error over 25 M elements is
// near 1e-9.

namespace fastrunner::FR_ISA {

double sum_squares(const float* __restrict g, std::int64_t n) noexcept {
  float lane[kLanes] = {};
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] += g[j + l] * g[j + l];
  for (int l = 0; j + l < n; ++l) lane[l] += g[j + l] * g[j + l];
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

}  // namespace fastrunner::FR_ISA
