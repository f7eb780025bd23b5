// sgd.h: one SGD step on one chunk, with the clipping of the gradient folded in.
// No include guard: each isa_<name>.cpp includes it for its own CPU.
//
//   g' = clip * g                                   stored with kWriteBack
//   d  = sign * g' + weight_decay * p
//   m <- momentum * m + (1 - dampening) * d         kFirst: m <- d
//   p <- p - lr * (nesterov ? d + momentum * m : m)
// The order of operations and every rounding are those of torch.optim.SGD on one tensor, so the bits are torch's.
// With momentum it reads 12 B and writes 8 B per element (12 B with kWriteBack): bound by memory on every ISA.

namespace fastrunner::FR_ISA {

template <unsigned kForm>
static void sgd_update_form(float* __restrict p, float* __restrict g, float* __restrict m, std::int64_t n,
                            const SgdScalars& s, float clip) noexcept {
  const float minus_lr = s.minus_lr, momentum = s.momentum, gain = s.one_minus_dampening, decay = s.weight_decay;
  const float sign = s.sign;
  for (std::int64_t j = 0; j < n; ++j) {
    const float clipped = g[j] * clip;
    if constexpr (kForm & kWriteBack) g[j] = clipped;
    float d = sign * clipped;
    if constexpr (kForm & kDecay) d = fma(decay, p[j], d);
    if constexpr (kForm & kMomentum) {
      const float buffer = (kForm & kFirst) ? d : fma(gain, d, momentum * m[j]);
      m[j] = buffer;
      d = (kForm & kNesterov) ? fma(momentum, buffer, d) : buffer;
    }
    p[j] = fma(minus_lr, d, p[j]);
  }
}

// One bit of the form after the other becomes a constant.
template <unsigned kForm = 0, unsigned kBit = 1>
static void sgd_update_pick(float* p, float* g, float* m, std::int64_t n, const SgdScalars& s, float clip,
                            unsigned form) noexcept {
  if constexpr (kBit == kSgdForms)
    sgd_update_form<kForm>(p, g, m, n, s, clip);
  else if (form & kBit)
    sgd_update_pick<kForm | kBit, 2 * kBit>(p, g, m, n, s, clip, form);
  else
    sgd_update_pick<kForm, 2 * kBit>(p, g, m, n, s, clip, form);
}

void sgd_update(float* p, float* g, float* m, std::int64_t n, const SgdScalars& s, float clip, unsigned form) noexcept {
  sgd_update_pick(p, g, m, n, s, clip, form);
}

}  // namespace fastrunner::FR_ISA
