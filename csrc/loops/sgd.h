// sgd.h: one SGD step on one chunk, with the clipping of the gradient and the average of the parameter folded in.
// No include guard: each isa_<name>.cpp includes it for its own CPU.
//
//   g' = clip * g                                   stored with kWriteBack
//   d  = sign * g' + weight_decay * p
//   m <- momentum * m + (1 - dampening) * d         kFirst: m <- d
//   p <- p - lr * (nesterov ? d + momentum * m : m)
//   a <- keep * a + take * p                        with kAverage
// The order of operations and every rounding are those of torch.optim.SGD on one tensor, so the bits are torch's.
// With momentum it reads 12 B and writes 8 B per element (4 B more to write with kWriteBack; 4 B to read and 4 B to
// write with kAverage): bound by memory on every ISA.

namespace fastrunner::FR_ISA {

template <unsigned kForm>
static void sgd_update_form(const Streams& streams, std::int64_t n, const Scalars& s, EmaScalars ema,
                            float clip) noexcept {
  float* p = streams.p;
  float* g = streams.g;
  float* m = streams.m;
  float* a = streams.a;
  const float minus_lr = s.sgd.minus_lr, momentum = s.sgd.momentum, gain = s.sgd.one_minus_dampening;
  const float decay = s.sgd.weight_decay, sign = s.sign;
#pragma GCC ivdep  // no two streams overlap
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
    const float updated = fma(minus_lr, d, p[j]);
    p[j] = updated;
    if constexpr (kForm & kAverage) a[j] = fma(ema.take, updated, ema.keep * a[j]);
  }
}

// One bit of the form after the other becomes a constant.
template <unsigned kForm = 0, unsigned kBit = 1>
static void sgd_update_pick(const Streams& streams, std::int64_t n, const Scalars& s, EmaScalars ema, float clip,
                            unsigned form) noexcept {
  if constexpr (kBit == kSgdForms)
    sgd_update_form<kForm>(streams, n, s, ema, clip);
  else if (form & kBit)
    sgd_update_pick<kForm | kBit, 2 * kBit>(streams, n, s, ema, clip, form);
  else
    sgd_update_pick<kForm, 2 * kBit>(streams, n, s, ema, clip, form);
}

void sgd_update(const Streams& streams, std::int64_t n, const Scalars& s, EmaScalars ema, float clip,
                unsigned form) noexcept {
  sgd_update_pick(streams, n, s, ema, clip, form);
}

}  // namespace fastrunner::FR_ISA
