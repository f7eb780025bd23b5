// adam.h: one Adam or AdamW step on one chunk, with clipping and average folded in.
// No include guard: each isa_<name>.cpp includes it for its own CPU.
//
//   g' = clip * g                                   stored with kWriteBack
//   d  = sign * g' + weight_decay * p               the decay with kL2; with kDecoupled: p <- (1 - lr * decay) * p
//   m <- m + (1 - beta1) * (d - m)                  v <- beta2 * v + (1 - beta2) * d^2
//   x <- max(x, v)                                  with kAmsgrad; x stands for v from here on
//   p <- p - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//   a <- keep * a + take * p                        with kAverage
// Source: Kingma, Ba 2014 (https://arxiv.org/abs/1412.6980); Loshchilov, Hutter 2017
// (https://arxiv.org/abs/1711.05101). The order of operations and every rounding are those of torch.optim.Adam on one
// tensor (foreach=False), but for the square root: here it is the nearest float, and torch's (MKL's) often is not.
// Reads 16 B and writes 12 B per element; 4 B more to write with kWriteBack, 4 B to read and 4 B to write with kAverage
// or kAmsgrad.

namespace fastrunner::FR_ISA {

template <unsigned kForm>
static void adam_update_form(const Streams& streams, std::int64_t n, const Scalars& s, EmaScalars ema,
                             float clip) noexcept {
  float* p = streams.p;
  float* g = streams.g;
  float* m = streams.m;
  float* v = streams.v;
  float* x = streams.x;
  float* a = streams.a;
  const AdamScalars k = s.adam;
  const float sign = s.sign;
  // torch's lerp: m + w * (d - m) for w < 0.5, else d - (d - m) * (1 - w); both as base + weight * (d - m).
  const bool near = k.near;
  const float weight = near ? k.one_minus_beta1 : k.one_minus_beta1 - 1.0f;
#pragma GCC ivdep  // no two streams overlap
  for (std::int64_t j = 0; j < n; ++j) {
    const float clipped = g[j] * clip;
    if constexpr (kForm & kWriteBack) g[j] = clipped;
    float d = sign * clipped;
    float param = p[j];
    if constexpr (kForm & kL2) d = fma(k.weight_decay, param, d);
    if constexpr (kForm & kDecoupled) param *= k.keep;
    const float before = m[j];
    const float mean = fma(weight, d - before, near ? before : d);
    m[j] = mean;
    const float square = fma(k.one_minus_beta2 * d, d, k.beta2 * v[j]);
    v[j] = square;
    float scale = square;
    if constexpr (kForm & kAmsgrad) {
      const float most = x[j];
      scale = (most > square || most != most) ? most : square;
      x[j] = scale;
    }
    const float denominator = __builtin_sqrtf(scale) / k.root_correction2 + k.eps;
    const float updated = param + k.minus_step_size * mean / denominator;
    p[j] = updated;
    if constexpr (kForm & kAverage) a[j] = fma(ema.take, updated, ema.keep * a[j]);
  }
}

// One bit of the form after the other becomes a constant.
template <unsigned kForm = 0, unsigned kBit = 1>
static void adam_update_pick(const Streams& streams, std::int64_t n, const Scalars& s, EmaScalars ema, float clip,
                             unsigned form) noexcept {
  if constexpr (kBit == kAdamForms)
    adam_update_form<kForm>(streams, n, s, ema, clip);
  else if (form & kBit)
    adam_update_pick<kForm | kBit, 2 * kBit>(streams, n, s, ema, clip, form);
  else
    adam_update_pick<kForm, 2 * kBit>(streams, n, s, ema, clip, form);
}

void adam_update(const Streams& streams, std::int64_t n, const Scalars& s, EmaScalars ema, float clip,
                 unsigned form) noexcept {
  adam_update_pick(streams, n, s, ema, clip, form);
}

}  // namespace fastrunner::FR_ISA
