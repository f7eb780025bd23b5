// norm.h: sums of g[j]^2 over chunks.  Reads 4 B per element: bound by memory on every ISA.
// No include guard: each isa_<name>.cpp includes it for its own CPU.
//
// Element j goes to lane j mod 64, counted from the start of its chunk and not from its address, and the lanes are
// folded by a fixed tree. A lane adds at most 256 squares, so float suffices: the relative error over 25 M elements is
// near 1e-9. Several chunks are read in turns, which is faster; each gets the sum that it has alone.

namespace fastrunner::FR_ISA {

static inline void add_squares(float* __restrict lane, const float* __restrict g, std::int64_t n) noexcept {
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] += g[j + l] * g[j + l];
  for (int l = 0; j + l < n; ++l) lane[l] += g[j + l] * g[j + l];
}

void sum_squares(const float* const* g, int count, std::int64_t n, double* sums) noexcept {
  constexpr std::int64_t kTurn = 2 * kLanes;
  float lane[kTogether][kLanes];
  for (int i = 0; i < count; ++i)
    for (int l = 0; l < kLanes; ++l) lane[i][l] = 0.0f;
  const std::int64_t turn = count == 1 ? n : kTurn;
  for (std::int64_t j = 0; j < n; j += turn)
    for (int i = 0; i < count; ++i) add_squares(lane[i], g[i] + j, n - j < turn ? n - j : turn);
  for (int i = 0; i < count; ++i) {
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) lane[i][l] += lane[i][l + half];
    sums[i] = lane[i][0];
  }
}

}  // namespace fastrunner::FR_ISA
