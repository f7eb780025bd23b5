// half.h: bfloat16 and float16 <-> float, and masters that follow their 16-bit parameters.
// No include guard: each isa_<name>.cpp includes it for its own CPU.
//
// Narrowing rounds to nearest, ties to even; a NaN stays one, quiet, with the upper bits of its payload, as the
// hardware's conversions do it. No mode flushes a denormal of 16 bits; the same bits on every ISA.
// 2 B and 4 B per element: what they work on lies in the cache.

namespace fastrunner::FR_ISA {

static inline float as_float(std::uint32_t bits) noexcept { return __builtin_bit_cast(float, bits); }
static inline std::uint32_t as_bits(float value) noexcept { return __builtin_bit_cast(std::uint32_t, value); }

struct Bfloat16 {
  static inline float widen(std::uint16_t h) noexcept { return as_float(std::uint32_t(h) << 16); }
  static inline std::uint16_t narrow(float value) noexcept {
    const std::uint32_t bits = as_bits(value);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t quiet = (bits >> 16) | 0x40u;
    return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
  }
};

struct Float16 {
  static inline float widen(std::uint16_t h) noexcept {
    const std::uint32_t sign = std::uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    // The exponent's bias grows by 112; inf and NaN get the largest exponent, a NaN turns quiet.
    std::uint32_t bits = (magnitude << 13) + (112u << 23);
    bits += magnitude >= 0x7c00u ? 112u << 23 : 0u;
    bits |= magnitude > 0x7c00u ? 0x400000u : 0u;
    // A denormal is magnitude * 2^-24, a normal float: the product is exact and in no mode flushed.
    const float denormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f;
    return as_float(sign | (magnitude < 0x400u ? as_bits(denormal) : bits));
  }
  static inline std::uint16_t narrow(float value) noexcept {
    const std::uint32_t bits = as_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    // Normal: the exponent is moved, 13 bits are rounded off; a carry into the exponent is right, up to inf.
    const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14: the significand is shifted to units of 2^-24 and rounded. 31 is far enough for all that vanish.
    const std::uint32_t exponent = magnitude >> 23;
    const std::uint32_t distance = exponent < 126u ? 126u - exponent : 0u;
    const std::uint32_t shift = distance < 31u ? distance : 31u;
    const std::uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
    const std::uint32_t kept = significand >> shift, lost = significand & ((1u << shift) - 1u);
    const std::uint32_t half = shift ? 1u << (shift - 1u) : 1u;
    const std::uint32_t denormal = kept + ((lost > half || (lost == half && (kept & 1u))) ? 1u : 0u);
    std::uint32_t result = magnitude < (113u << 23) ? denormal : normal;
    result = magnitude >= (143u << 23) ? 0x7c00u : result;  // 2^16 and above, inf
    result = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : result;
    return static_cast<std::uint16_t>(sign | result);
  }
};

template <class Half>
static inline void widen_all(float* __restrict out, const std::uint16_t* __restrict in, std::int64_t n) noexcept {
  for (std::int64_t j = 0; j < n; ++j) out[j] = Half::widen(in[j]);
}
template <class Half>
static inline void narrow_all(std::uint16_t* __restrict out, const float* __restrict in, std::int64_t n) noexcept {
  for (std::int64_t j = 0; j < n; ++j) out[j] = Half::narrow(in[j]);
}
// A parameter that was changed from outside no longer is its rounded master. It is the truth: the master follows it.
template <class Half>
static inline void follow_all(float* __restrict master, const std::uint16_t* __restrict p, std::int64_t n) noexcept {
  for (std::int64_t j = 0; j < n; ++j) {
    const float lost = Half::widen(p[j]), kept = master[j];
    master[j] = Half::narrow(kept) == p[j] ? kept : lost;
  }
}

void widen_bfloat16(float* out, const std::uint16_t* in, std::int64_t n) noexcept { widen_all<Bfloat16>(out, in, n); }
void narrow_bfloat16(std::uint16_t* out, const float* in, std::int64_t n) noexcept { narrow_all<Bfloat16>(out, in, n); }
void follow_bfloat16(float* master, const std::uint16_t* p, std::int64_t n) noexcept {
  follow_all<Bfloat16>(master, p, n);
}
void widen_float16(float* out, const std::uint16_t* in, std::int64_t n) noexcept { widen_all<Float16>(out, in, n); }
void narrow_float16(std::uint16_t* out, const float* in, std::int64_t n) noexcept { narrow_all<Float16>(out, in, n); }
void follow_float16(float* master, const std::uint16_t* p, std::int64_t n) noexcept {
  follow_all<Float16>(master, p, n);
}

}  // namespace fastrunner::FR_ISA
