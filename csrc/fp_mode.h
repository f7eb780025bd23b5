// fp_mode.h: one floating-point mode in all threads of a region.
//
// torch.set_flush_denormal(True) changes the calling thread and no other. Left so, the number of threads would decide
// which denormals survive. Each worker therefore runs in the caller's mode, and gets its own back.
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fastrunner {

#if defined(__x86_64__)
using FpMode = unsigned;
inline FpMode fp_mode() noexcept { return _mm_getcsr(); }
inline void set_fp_mode(FpMode mode) noexcept { _mm_setcsr(mode); }
#elif defined(__aarch64__)
using FpMode = std::uint64_t;
inline FpMode fp_mode() noexcept {
  FpMode mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void set_fp_mode(FpMode mode) noexcept { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
#error "fp_mode.h knows x86-64 and aarch64; add how this CPU's rounding and flush-to-zero mode is read and written"
#endif

class ScopedFpMode {
 public:
  explicit ScopedFpMode(FpMode mode) noexcept : before_(fp_mode()) { set_fp_mode(mode); }
  ~ScopedFpMode() { set_fp_mode(before_); }
  ScopedFpMode(const ScopedFpMode&) = delete;
  ScopedFpMode& operator=(const ScopedFpMode&) = delete;

 private:
  FpMode before_;
};

}  // namespace fastrunner
