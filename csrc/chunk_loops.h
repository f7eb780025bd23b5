// chunk_loops.h: what every instruction set provides. Each loop runs over one chunk: at most kChunk consecutive values;
// those of a resize over one row of an image.
//
// One source gives all of them: isa_<name>.cpp defines FR_ISA, includes loops/*.h and is compiled for that CPU. All
// give the same bits, because nothing is contracted (-ffp-contract=off), a fused multiply-add is written where one is
// meant, and sums run in one order whatever the width of the registers.
#pragma once
#include <cstdint>

namespace fastrunner {

inline constexpr std::int64_t kChunk = 16384;  // 64 KiB a stream: a chunk's p, g and m fit into L2 together
inline constexpr int kTogether = 8;            // chunks whose sums of squares are taken at once
inline constexpr int kLanes = 64;              // partial sums of a chunk: four AVX-512 registers, eight of AVX2

// What one update does, as bits: a loop is compiled once for every combination, so it has no branch inside.
enum Form : unsigned {
  kWriteBack = 1,  // the clipped gradient is stored
  kAverage = 2,    // an average follows the new parameter
  kOptions = 4,    // the first bit of the algorithm's own
};
enum SgdForm : unsigned {
  kDecay = kOptions,         // weight_decay != 0
  kMomentum = 2 * kOptions,  // momentum != 0
  kFirst = 4 * kOptions,     // the momentum buffer is written without being read
  kNesterov = 8 * kOptions,
  kSgdForms = 16 * kOptions,
};
enum AdamForm : unsigned {
  kL2 = kOptions,             // weight_decay != 0, added to the gradient (Adam)
  kDecoupled = 2 * kOptions,  // weight_decay != 0, taken off the parameter (AdamW)
  kAmsgrad = 4 * kOptions,
  kAdamForms = 8 * kOptions,
};

// The memory of one chunk. Those that the form does not ask for may be null.
struct Streams {
  float* p;
  float* g;
  float* m;  // momentum_buffer or exp_avg
  float* v;  // exp_avg_sq
  float* x;  // max_exp_avg_sq
  float* a;  // the average
};

// Factors of one step, rounded to float once, as torch rounds them.
struct EmaScalars {
  float keep;  // 1 - m
  float take;  // m
};
struct SgdScalars {
  float minus_lr;
  float momentum;
  float one_minus_dampening;
  float weight_decay;
};
struct AdamScalars {
  float weight_decay;     // kL2
  float keep;             // kDecoupled: 1 - lr * weight_decay
  float one_minus_beta1;  // exp_avg moves by this much towards the gradient
  bool near;              // one_minus_beta1 < 0.5: torch's lerp counts from the nearer end
  float beta2;
  float one_minus_beta2;
  float root_correction2;  // sqrt(1 - beta2^step)
  float eps;
  float minus_step_size;  // -lr / (1 - beta1^step)
};
struct Scalars {
  unsigned form;  // bits of the algorithm, as the group's options have them
  float sign;     // -1: maximize
  union {
    SgdScalars sgd;
    AdamScalars adam;
  };
};

// sums[i] of the n values at g[i], for count <= kTogether chunks.
using SumSquares = void(const float* const* g, int count, std::int64_t n, double* sums) noexcept;
using Update = void(const Streams& streams, std::int64_t n, const Scalars& s, EmaScalars ema, float clip,
                    unsigned form) noexcept;
using Average = void(float* a, const float* p, std::int64_t n, EmaScalars ema) noexcept;
using Widen = void(float* out, const std::uint16_t* in, std::int64_t n) noexcept;
using Narrow = void(std::uint16_t* out, const float* in, std::int64_t n) noexcept;
using Follow = void(float* master, const std::uint16_t* p, std::int64_t n) noexcept;

// Of a resize: which values each output position is made of, and how much of each.
struct Taps {
  std::int64_t size;          // output positions
  std::int64_t most;          // weights of each; where fewer count the last are 0
  const std::int32_t* first;  // (size,)
  const float* weights;       // (size, most); they add up to 1
};
struct RowOut {
  std::uint8_t* data;
  std::int64_t pixel_stride, channel_stride;  // in bytes
};
using AddRow = void(float* sum, const std::uint8_t* row, std::int64_t n, float weight, bool first) noexcept;
using ShrinkRow = void(const float* row, const Taps& taps, int channels, std::int32_t* levels,
                       const RowOut& out) noexcept;

struct HalfLoops {
  Widen* widen;
  Narrow* narrow;
  Follow* follow;
};
struct ChunkLoops {
  SumSquares* sum_squares;
  Update* sgd_update;
  Update* adam_update;
  Average* average;
  HalfLoops bfloat16, float16;
  AddRow* add_row;
  ShrinkRow* shrink_row;
};

}  // namespace fastrunner
