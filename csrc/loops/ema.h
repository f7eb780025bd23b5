// ema.h: a <- keep * a + take * p on one chunk: the average of parameters that are not updated in the same pass.
// No include guard: each isa_<name>.cpp includes it for its own CPU.
//
// The bits are those of torch._foreach_mul_(a, 1 - m); torch._foreach_add_(a, p, alpha=m).
// Reads 8 B and writes 4 B per element: bound by memory on every ISA.

namespace fastrunner::FR_ISA {

void average(float* __restrict a, const float* __restrict p, std::int64_t n, EmaScalars ema) noexcept {
  for (std::int64_t j = 0; j < n; ++j) a[j] = fma(ema.take, p[j], ema.keep * a[j]);
}

}  // namespace fastrunner::FR_ISA
