// fma.h: a * b + c, rounded once.  No include guard: each isa_<name>.cpp includes it for its own CPU.
//
// torch's CPU kernels add with a fused multiply-add, so we do, and give its bits. A CPU without the instruction gets
// the same bits from doubles: a * b is exact there, and its sum with c, rounded to odd, still rounds correctly to float
// (Boldo, Melquiond 2008, https://doi.org/10.1109/TC.2007.70819).
#include <cstdint>

namespace fastrunner::FR_ISA {

static inline float fma(float a, float b, float c) noexcept {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  const double product = double(a) * double(b);
  const double sum = product + c;
  const double c_part = sum - product;
  const double error = (product - (sum - c_part)) + (c - c_part);  // exact (Knuth's TwoSum); NaN if sum is not finite
  std::int64_t bits = __builtin_bit_cast(std::int64_t, sum);
  const bool inexact = error < 0.0 || error > 0.0;
  if (inexact && (bits & 1) == 0) bits += (error > 0.0) == (sum > 0.0) ? 1 : -1;
  return static_cast<float>(__builtin_bit_cast(double, bits));
#endif
}

}  // namespace fastrunner::FR_ISA
